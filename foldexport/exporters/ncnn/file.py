"""ncnn's two files: the graph as text (``.param``) and the weights in the order of its layers (``.bin``).

A line of the ``.param`` is ``Type name inputs outputs [input names] [output names] key=value …``. A weight in the ``.bin`` is
either bare float32, or follows a tag of four bytes that says how it is stored, padded to four bytes: 0 is float32, 0x01306B47
float16. Which of the two, and how many values, each layer says by its keys (ncnn's documents "param and model file structure"
and "operators").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAGIC = "7767517"
FLOAT32, FLOAT16 = 0, 0x01306B47
KINDS = {FLOAT32: np.dtype("<f4"), FLOAT16: np.dtype("<f2")}
ARRAY_KEY = -23300  # key -23300 − k holds an array, its length first
CONVOLUTIONS = frozenset(
    f"{kind}{wise}{rank}" for kind in ("Convolution", "Deconvolution") for wise in ("", "DepthWise") for rank in ("", "1D", "3D")
)
#: Weights of the other layers, all bare: how many values, by the layer's keys.
BARE = {
    "PReLU": lambda keys: [keys.get(0, 0)],
    "BatchNorm": lambda keys: [keys.get(0, 0)] * 4,
    "Scale": lambda keys: [keys.get(0, 0)] * (1 + keys.get(1, 0)) if keys.get(0, 0) > 0 else [],
    "InstanceNorm": lambda keys: [keys.get(0, 0)] * 2 if keys.get(2, 1) else [],
    "GroupNorm": lambda keys: [keys.get(1, 0)] * 2 if keys.get(3, 1) else [],
    "LayerNorm": lambda keys: [keys.get(0, 0)] * 2 if keys.get(2, 1) else [],
    "RMSNorm": lambda keys: [keys.get(0, 0)] if keys.get(2, 1) else [],
    "Normalize": lambda keys: [keys.get(3, 0)],
    "Bias": lambda keys: [keys.get(0, 0)],
    "Padding": lambda keys: [keys.get(6, 0)] if keys.get(6, 0) else [],
}  # fmt: skip
#: Layers with weights that are not read here: those in orders of their own, and int8 ones.
UNREAD = frozenset({
    "LSTM", "GRU", "RNN", "MultiHeadAttention", "DeformableConv2D", "Quantize", "Dequantize", "Requantize",
})  # fmt: skip


class Unreadable(ValueError):
    """The files are not ncnn's, or hold weights of layers that are not known here."""


@dataclass(frozen=True)
class Layer:
    """One line of the ``.param``; keys hold whole numbers as such, other numbers and arrays as text."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keys: dict[int, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Blob:
    """One run of values in the ``.bin``: [start, end) with its tag and padding. layer: whose. tagged: it has a tag."""

    layer: Layer
    role: str
    values: np.ndarray
    tagged: bool


def layers(param: Path) -> list[Layer]:
    """The layers of a ``.param`` file. Raises :class:`Unreadable`."""
    lines = param.read_text(encoding="utf-8").split("\n")
    if lines[0].strip() != MAGIC:
        raise Unreadable(f"{param.name} does not begin with {MAGIC}")
    try:
        return [_layer(line.split()) for line in lines[2:] if line.strip()]
    except (ValueError, IndexError) as error:
        raise Unreadable(f"{param.name}: a line of it cannot be read ({error})") from error


def _layer(words: list[str]) -> Layer:
    count, made = int(words[2]), int(words[3])
    names, rest = words[4 : 4 + count + made], words[4 + count + made :]
    keys = {int(key): int(value) if value.lstrip("-").isdigit() else value for key, _, value in (w.partition("=") for w in rest)}
    return Layer(words[0], words[1], tuple(names[:count]), tuple(names[count:]), keys)


def blobs(param: Path, binary: Path) -> list[Blob]:
    """Every weight of the network, in order. Raises :class:`Unreadable` unless they fill the file exactly."""
    content, at, found = binary.read_bytes(), 0, []
    for layer in layers(param):
        for role, count, tagged in _held(layer):
            values, at = _read(content, at, count, tagged, binary.name)
            found.append(Blob(layer, role, values, tagged))
    if at != len(content):
        raise Unreadable(f"{binary.name}: {len(content) - at} bytes of it belong to layers that are not known here")
    return found


def _held(layer: Layer) -> Iterator[tuple[str, int, bool]]:
    """(role, number of values, tagged) of a layer's weights, in the order of the file."""
    keys = layer.keys
    dynamic = 28 if layer.kind.startswith("Deconvolution") else 19  # the key of a weight that is an input
    if layer.kind in UNREAD:
        raise Unreadable(f"the weights of a {layer.kind}, {layer.name}, cannot be read")
    if layer.kind in CONVOLUTIONS and not keys.get(dynamic, 0):
        yield "weight", keys[6], True
        if keys.get(5, 0):
            yield "bias", keys[0], False
    elif layer.kind == "InnerProduct":
        yield "weight", keys[2], True
        if keys.get(1, 0):
            yield "bias", keys[0], False
    elif layer.kind == "Embed":
        yield "weight", keys[3], True
        if keys.get(2, 0):
            yield "bias", keys[0], False
    elif layer.kind == "Gemm":
        yield from _matrices(keys)
    elif layer.kind == "MemoryData":
        count = int(np.prod([size for size in (keys.get(each, 0) for each in (0, 1, 11, 2)) if size]))
        yield "data", count, keys.get(21, 1) == 0
    for count in BARE.get(layer.kind, lambda keys: [])(keys):
        yield "values", count, False


def _matrices(keys: dict[int, int | str]) -> Iterator[tuple[str, int, bool]]:
    """Those of A [M, K], B [K, N] and C in ``α·AB + β·C`` that are constants; key 10 says along which axes C is broadcast."""
    rows, columns, inner = (keys.get(each, 0) for each in (7, 8, 9))
    if keys.get(4, 0):
        yield "a", rows * inner, True
    if keys.get(5, 0):
        yield "b", inner * columns, True
    along = keys.get(10, 0)
    if keys.get(6, 0) and along != -1:
        yield "c", {0: 1, 1: rows, 2: rows, 3: rows * columns, 4: columns}[along], True


def _read(content: bytes, at: int, count: int, tagged: bool, name: str) -> tuple[np.ndarray, int]:
    kind = KINDS[FLOAT32]
    if tagged:
        tag = int.from_bytes(content[at : at + 4], "little")
        if tag not in KINDS:
            raise Unreadable(f"{name}: a weight is stored as {tag:#x}, neither float32 nor float16")
        kind, at = KINDS[tag], at + 4
    size = count * kind.itemsize
    if at + size > len(content):
        raise Unreadable(f"{name} ends in the middle of a weight")
    values = np.frombuffer(content, kind, count, at)
    return values, at + size + -size % 4


def written(found: list[Blob]) -> bytes:
    """The ``.bin`` of these weights; what has a tag is stored in its values' own type."""
    parts = []
    for each in found:
        half = each.values.dtype == np.float16
        if each.tagged:
            parts.append((FLOAT16 if half else FLOAT32).to_bytes(4, "little"))
        raw = each.values.tobytes()
        parts.append(raw + b"\0" * (-len(raw) % 4))
    return b"".join(parts)
