"""The folder ``NAME.mlpackage``: a list of what is in it, the program as one protobuf, and its large constants in a blob file.

    NAME.mlpackage/Manifest.json                          items with a UUID each
    NAME.mlpackage/Data/com.apple.CoreML/model.mlmodel    Model.proto, whose mlProgram has functions, blocks, operations
    NAME.mlpackage/Data/com.apple.CoreML/weights/weight.bin

A blob is 64 bytes of metadata (sentinel, type, size and place of its data, little-endian) and its data (coremltools,
``mlmodel/format/MIL.proto`` and ``MILBlob/Blob/StorageFormat.hpp``).
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foldexport.errors import EquivalenceError

DATA = Path("Data") / "com.apple.CoreML"
MODEL, WEIGHTS = DATA / "model.mlmodel", DATA / "weights" / "weight.bin"
DROPPED = "executorch_debug_handle_mapping.json"  # coremltools writes it for another tool
DATE = "com.github.apple.coremltools.conversion_date"
SENTINEL = 0xDEADBEEF
METADATA = struct.Struct("<IIQQ")
#: Types by their number in MIL.proto.
TYPES = {
    number: np.dtype(kind)
    for number, kind in {1: "?", 10: "<f2", 11: "<f4", 12: "<f8", 21: "i1", 22: "<i2", 23: "<i4", 24: "<i8", 31: "u1", 32: "<u2",
                         33: "<u4", 34: "<u8"}.items()
}  # fmt: skip


def stabilise(package: Path) -> None:
    """Rewrite what differs from one writing to the next: identifiers, the date, the order of maps."""
    spec = read(package)
    spec.description.metadata.userDefined.pop(DATE, None)
    (package / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    (package / DROPPED).unlink(missing_ok=True)
    manifest = json.loads((package / "Manifest.json").read_text(encoding="utf-8"))
    items, names = {}, {}
    for old, item in sorted(manifest["itemInfoEntries"].items(), key=lambda pair: pair[1]["path"]):
        names[old] = str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])).upper()
        items[names[old]] = dict(sorted(item.items()))
    manifest |= {"itemInfoEntries": items, "rootModelIdentifier": names[manifest["rootModelIdentifier"]]}
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    (package / "Manifest.json").write_text(text, encoding="utf-8", newline="\n")


def read(package: str | Path) -> Any:
    """The protobuf of a package. Raises :class:`EquivalenceError` for a folder that is none."""
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    spec = Model_pb2.Model()
    try:
        spec.ParseFromString((Path(package) / MODEL).read_bytes())
        json.loads((Path(package) / "Manifest.json").read_text(encoding="utf-8"))
    except (OSError, DecodeError, ValueError) as error:
        raise EquivalenceError(f"coreml: the package cannot be read: {str(error).splitlines()[0][:200]}") from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise EquivalenceError(f"coreml: the package holds a {spec.WhichOneof('Type')}, not an ML program.")
    return spec


def block(spec: Any) -> Any:
    """The operations of the program's one function."""
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


def constants(package: str | Path, spec: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, value) of every constant operation, in the package's own bits. Raises :class:`EquivalenceError`."""
    path = Path(package) / WEIGHTS
    content = path.read_bytes() if path.is_file() else b""
    for operation in block(spec).operations:
        if operation.type == "const":
            yield operation.outputs[0].name, value(operation.attributes["val"], content)


def value(held: Any, content: bytes) -> Any:
    """A value of MIL as an array, or as text; ``content``: of the blob file."""
    kind = held.type.tensorType
    shape = [dimension.constant.size for dimension in kind.dimensions]
    if held.WhichOneof("value") == "blobFileValue":
        return _blob(content, held.blobFileValue.offset, TYPES[kind.dataType]).reshape(shape)
    tensor = held.immediateValue.tensor
    field = tensor.WhichOneof("value")
    if field == "strings":
        return tensor.strings.values[0]
    if field == "bytes":
        return np.frombuffer(tensor.bytes.values, TYPES[kind.dataType]).reshape(shape)
    return np.array(getattr(tensor, field).values if field else [], TYPES[kind.dataType]).reshape(shape)


def _blob(content: bytes, at: int, kind: np.dtype) -> np.ndarray:
    if at + METADATA.size > len(content):
        raise EquivalenceError("coreml: the weight file ends before a weight that the program reads.")
    sentinel, _, size, start = METADATA.unpack_from(content, at)
    if sentinel != SENTINEL or start + size > len(content):
        raise EquivalenceError(f"coreml: the weight file has no weight at byte {at}, where the program reads one.")
    return np.frombuffer(content, kind, size // kind.itemsize, start)
