"""TorchScript archives rewritten to depend on their content alone.

An archive is a zip of records below one folder: ``data.pkl`` (the object, pickled), ``code/**.py`` (one file per
namespace of classes), ``data/*`` and ``constants/*`` (raw tensors), ``version``, ``byteorder``; see PyTorch's
``torch/csrc/jit/docs/serialization.md``. Class names are ``__torch__.<Python path>[.___torch_mangle_<n>].<Name>``,
where ``n`` counts the classes of the process.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

FOLDER = "archive"
TENSOR_ALIGNMENT_BYTES = 64  # as torch writes them, so that a mapped file can be used in place
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip
DROPPED = re.compile(r"\.debug_pkl$|^traced_inputs(/|\.pkl$)|^\.data/serialization_id$")
CLASS_NAME = re.compile(r"__torch__(?:\.\w+)*")
DEFINITION = re.compile(r"^(?:class|def) (\w+)", re.MULTILINE)


def rewrite(source: Path, target: Path) -> None:
    """Copy an archive without debug records, with classes numbered in the order in which the object refers to them.

    Records are stored uncompressed under a fixed folder, in a fixed order and with a fixed date.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        records = {name.partition("/")[2]: name for name in old.namelist()}
        kept = {short: full for short, full in records.items() if not DROPPED.search(short)}
        code = {short: old.read(full).decode() for short, full in kept.items() if _is_code(short)}
        pickled = old.read(kept["data.pkl"])
        definitions = {name: block for short, text in code.items() for name, block in _definitions(short, text)}
        names = _canonical_names(pickled.decode("latin-1"), definitions)
        texts = {_file_of(names[name]): _renamed(block, names) for name, block in definitions.items() if name in names}
        texts["data.pkl"] = _renamed(pickled.decode("latin-1"), names)
        for short in sorted({*texts} | ({*kept} - {*code})):
            if short in texts:
                _store(new, short, texts[short].encode("latin-1" if short == "data.pkl" else "utf-8"))
            else:
                _copy(new, short, old, kept[short])


def _is_code(short: str) -> bool:
    return short.startswith("code/") and short.endswith(".py")


def _namespace(short: str) -> str:
    """``code/__torch__/torch/nn/modules/conv.py`` to ``__torch__.torch.nn.modules.conv``."""
    return short[len("code/") : -len(".py")].replace("/", ".")


def _file_of(name: str) -> str:
    return "code/" + name.rpartition(".")[0].replace(".", "/") + ".py"


def _definitions(short: str, text: str) -> list[tuple[str, str]]:
    """The classes of a code file, each with its full name and its source."""
    starts = [match.start() for match in DEFINITION.finditer(text)] + [len(text)]
    blocks = [text[start:end] for start, end in zip(starts, starts[1:], strict=False)]
    return [(f"{_namespace(short)}.{DEFINITION.match(block).group(1)}", block) for block in blocks]


def _canonical_names(pickled: str, definitions: dict[str, str]) -> dict[str, str]:
    """Every class that the object reaches, to its name by order of first reference: in the pickle, then in the code.

    ``data.pkl`` names classes by GLOBAL opcodes, ``c<namespace>\\n<name>\\n``: text without a length.
    """
    names: dict[str, str] = {}
    waiting = [namespace + "." + name for namespace, name in re.findall(r"c(__torch__[\w.]*)\n(\w+)\n", pickled)]
    while waiting:
        name = waiting.pop(0)
        if name in names or name not in definitions:
            continue
        names[name] = _numbered(name, len(names))
        waiting += CLASS_NAME.findall(definitions[name])
    return names


def _numbered(name: str, number: int) -> str:
    """Every class in a namespace of its own, so that a name depends on neither the process nor the other classes."""
    namespace, _, last = re.sub(r"\.___torch_mangle_\d+", "", name).rpartition(".")
    return f"{namespace}.___torch_mangle_{number}.{last}"


def _renamed(text: str, names: dict[str, str]) -> str:
    def pickled(match: re.Match) -> str:
        namespace, _, last = names.get(f"{match[1]}.{match[2]}", f"{match[1]}.{match[2]}").rpartition(".")
        return f"c{namespace}\n{last}\n"

    text = re.sub(r"c(__torch__[\w.]*)\n(\w+)\n", pickled, text)
    return CLASS_NAME.sub(lambda match: names.get(match[0], match[0]), text)


def _store(new: zipfile.ZipFile, short: str, content: bytes) -> None:
    new.writestr(_entry(new, short), content)


def _copy(new: zipfile.ZipFile, short: str, old: zipfile.ZipFile, full: str) -> None:
    """Copy a record without holding it in memory."""
    size = old.getinfo(full).file_size
    with old.open(full) as reader, new.open(_entry(new, short), "w", force_zip64=size >= zipfile.ZIP64_LIMIT) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def _entry(new: zipfile.ZipFile, short: str) -> zipfile.ZipInfo:
    """A header padded so that the record's content starts at a multiple of the alignment."""
    entry = zipfile.ZipInfo(f"{FOLDER}/{short}", EPOCH)
    header_bytes = 30 + len(entry.filename.encode()) + 4
    padding = -(new.fp.tell() + header_bytes) % TENSOR_ALIGNMENT_BYTES
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    entry.create_system = 3
    return entry
