"""``NAME.manifest.json``: what an export was made from, what was proved, and golden inputs to prove it again elsewhere.

Keys have one order and nothing in it depends on the day, the folder or the user; ``seconds`` alone differ between runs.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldexport import __version__, preprocessing
from foldexport.artifact import Artifact
from foldexport.errors import UsageError
from foldexport.exporters.options import ExportOptions
from foldexport.fold.ledger import SKIP_CONNECTION, Ledger
from foldexport.precision.prepare import Prepared
from foldexport.precision.quantised import Quantised
from foldexport.study import Question, Study
from foldexport.trace import Graph
from foldexport.verify import Comparison, Tolerance
from foldexport.verify.reference import Reference

SCHEMA = 1
PACKAGES = ("numpy", "onnx", "onnxscript", "onnxruntime", "onnxsim", "safetensors", "openvino")
NEEDED = ("foldexport", "checkpoint", "artifacts", "golden")


def build(
    question: Question,
    study: Study,
    artifacts: Sequence[Artifact],
    reference: Reference,
    options: ExportOptions,
    *,
    tolerance: Tolerance | None = None,
    command: Sequence[str] = (),
    reduced: Prepared | Quantised | None = None,
    on_device: Sequence[Comparison] = (),
) -> dict[str, Any]:
    """The manifest as plain values; artifacts are named relative to it."""
    inputs, outputs = interface(study.graph, study.example, options)
    precision = {"precision": options.precision, "half_io": options.half_io} | (reduced.to_dict() if reduced else {})
    return plain({
        "foldexport": {"version": __version__, "schema": SCHEMA},
        "command": [without_folders(word) for word in command],
        **describe(question, study),
        "inputs": inputs,
        "outputs": outputs,
        "precision": precision,
        **({"device": on_another_device(reference, on_device)} if on_device else {}),
        "artifacts": [artifact_record(each) for each in artifacts],
        "tolerance": asdict(tolerance) if tolerance else None,
        "probes_left_out": reference.dropped,
        "golden": reference.golden,
        "versions": versions(),
        "seconds": {name: round(value, 3) for name, value in study.seconds.items()},
    })  # fmt: skip


def describe(question: Question, study: Study) -> dict[str, Any]:
    """What was found in the checkpoint and what the fold did: the part that ``inspect`` shows too."""
    network, arch = study.network, without_folders(question.arch or "")
    reason = network.reason.replace(question.arch, arch) if question.arch else network.reason
    certificate = study.certificate.to_dict() if study.certificate else None
    (certificate or {}).pop("seconds", None)
    return plain({
        "checkpoint": network.source,
        "architecture": {
            "name": network.name, "description": network.description, "recognised_by": reason,
            "arch": arch or None, "arch_args": question.arch_args,
            "num_classes": network.num_classes, "notes": network.notes,
        },
        "preprocessing": preprocessing.described(network.preprocessing),
        "costs": {"before": study.before.to_dict(), "after": study.after.to_dict() if study.after else None},
        "evaluated": study.evaluated,
        **({"chain": chained(study.ledger)} if question.chain else {}),
        "ledger": study.ledger.to_list() if study.ledger is not None else None,
        "certificate": certificate,
        "extremes": study.extremes.to_dict() if study.extremes else None,
    })  # fmt: skip


def chained(ledger: Ledger) -> dict[str, Any]:
    """What --chain did: the modules whose skip connections are gone, and those where one stays."""
    entries = [entry for entry in ledger if entry.rule == SKIP_CONNECTION]
    return {
        "turned": [entry.module for entry in entries if entry.status == "folded"],
        "kept": [{"module": entry.module, "reason": entry.reason} for entry in entries if entry.status == "kept"],
    }


def on_another_device(reference: Reference, found: Sequence[Comparison]) -> dict[str, Any]:
    """What ran on the device that was asked for beside the artifacts, and the training graph's float32 noise there, per output."""
    return {"name": reference.device, "float32_noise": reference.levels_there, "comparisons": [each.to_dict() for each in found]}


def artifact_record(artifact: Artifact) -> dict[str, Any]:
    """One artifact: its files with digests and sizes, what the exporter noted, and the proof."""
    names = sorted(artifact.sha256, key=lambda name: (name != artifact.path.name, name))
    return {
        "format": artifact.format,
        "file": artifact.path.name,
        "files": [
            {"name": name, "sha256": artifact.sha256[name], "size_bytes": artifact.size_bytes[name]} for name in names
        ],
        "notes": artifact.notes,
        "comparison": artifact.comparison.to_dict() if artifact.comparison else None,
    }


def interface(graph: Graph, example: tuple, options: ExportOptions) -> tuple[list[dict], list[dict]]:
    """Names, shapes and types of inputs and outputs; a free axis has its name for its length."""
    tensors = [value for value in example if isinstance(value, Tensor)]
    inputs = []
    for name, value in zip(options.names("input", len(tensors)), tensors, strict=True):
        axes = options.dynamic_axes(value.shape)
        shape = [axes.get(axis, size) for axis, size in enumerate(value.shape)]
        inputs.append({"name": name, "shape": shape, "type": _type(value, options)})
    leaves = [getattr(leaf, "meta", {}).get("val") for leaf in graph.fx.output_node().args[0]]
    leaves = [value for value in leaves if isinstance(value, Tensor)]
    batch = tensors[0].shape[0] if tensors and tensors[0].dim() else 1
    outputs = [
        {"name": name, "shape": [_size(size, options, batch) for size in value.shape], "type": _type(value, options)}
        for name, value in zip(options.names("output", len(leaves)), leaves, strict=True)
    ]
    return inputs, outputs


def _size(size: Any, options: ExportOptions, batch: int) -> int | str:
    """A number, or an expression in the batch; in height and width outputs are described at the example's."""
    if isinstance(size, int):
        return size
    if "batch" in options.dynamic:
        return re.sub(r"\bs\d+\b", "batch", str(size))
    return batch if re.fullmatch(r"s\d+", str(size)) else str(size)


def _type(value: Tensor, options: ExportOptions) -> str:
    """Floats are float32 in every artifact, unless its ends were asked for in half."""
    return ("float16" if options.half_io else "float32") if value.is_floating_point() else str(value.dtype).removeprefix("torch.")


def versions() -> dict[str, str]:
    """Of Python, the machine's kind and the packages that took part."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found["torch"] = str(torch.__version__)  # with its build, "+cpu" or "+cu130", which the package's own record may lack
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def without_folders(word: str) -> str:
    """The word with every path in it cut to its last part: ``--arch=/home/me/net.py:Net`` → ``--arch=net.py:Net``."""
    return re.sub(r"[^=:,]+", lambda part: Path(part[0]).name if os.sep in part[0] else part[0], word)


def plain(value: Any) -> Any:
    """The value in JSON's types: tuples as lists, what is not finite as text, anything else as its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def dumps(document: Mapping[str, Any]) -> str:
    """JSON text, indented, ending with a newline."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> dict[str, Any]:
    """The manifest at ``path``. Raises UsageError for a file that is none, or is of a later foldexport."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; wanted NAME.manifest.json, which an export leaves.") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); wanted NAME.manifest.json.") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise UsageError(f"{path}: is not a manifest ({str(error)[:80]}); wanted NAME.manifest.json.") from error
    missing = [key for key in NEEDED if key not in document] if isinstance(document, dict) else list(NEEDED)
    if missing:
        lacks = ", ".join(missing)
        raise UsageError(f"{path}: is not a manifest of foldexport (it has no {lacks}); wanted NAME.manifest.json.")
    if document["foldexport"].get("schema", 0) > SCHEMA:
        written = document["foldexport"].get("version")
        raise UsageError(
            f"{path}: was written by foldexport {written}, which is newer than {__version__} here: upgrade."
        )
    return document
