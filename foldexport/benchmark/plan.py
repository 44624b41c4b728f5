"""What is to be timed: a fold, exported once for every runtime that reads a format, or files that exist."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foldexport import exporters, interpret, probes
from foldexport.api import weights_dtype
from foldexport.artifact import sha256
from foldexport.benchmark import transport
from foldexport.benchmark.contest import Case, Variant
from foldexport.benchmark.runtimes import Runtime
from foldexport.certify.rounding import rounding
from foldexport.errors import UsageError
from foldexport.exporters.options import ExportOptions
from foldexport.fold.rebuild import in_dtype
from foldexport.trace import Graph
from foldexport.verify.golden import golden_inputs

NAMES = ("unfolded", "folded")
SIZED = ("tensorrt", "executorch", "litert")  # formats whose files take one size, or some sizes


class Networks:
    """A training graph and its fold, in float32, and the files that they become, each written when it is first needed."""

    def __init__(
        self, source: nn.Module, folded: nn.Module, graph: Graph, example: Sequence[Tensor], folder: Path,
        levels: Sequence[float] | None = None, seed: int = 0, device: str = "cpu",
    ) -> None:  # fmt: skip
        """device: where the training graph's outputs in float64 are computed."""
        source = graph.module if graph.module is not None else source
        wide = weights_dtype(graph) != torch.float32
        self._modules = (copy.deepcopy(source).float() if wide else source, in_dtype(folded, torch.float32))
        self._graph, self._folder, self._seed, self._device = graph, folder, seed, device
        self._example = tuple(value.float() if value.is_floating_point() else value for value in example)
        self._levels = list(levels) if levels is not None else None
        self._written: dict[tuple[str, ...], list[Variant]] = {}
        self._expected: dict[int, tuple[list[np.ndarray], list[Tensor]]] = {}

    def case(self, row: Runtime, batch: int) -> Case:
        """Unfolded, the baseline, against folded, in one runtime at one batch. Raises UsageError for a batch it cannot have."""
        arrays, expected = self._inputs(batch)
        variants = [dataclasses.replace(each, runtime=row.name) for each in self._variants(row, arrays)]
        return Case(variants, arrays, 0, expected, self._noise())

    def batch(self) -> int:
        """That of the example."""
        return next((value.shape[0] for value in self._example if value.dim()), 1)

    def _inputs(self, batch: int) -> tuple[list[np.ndarray], list[Tensor]]:
        """Inputs of a batch and the training graph's outputs on them in float64."""
        if batch not in self._expected:
            free = self._graph.dynamic.get("batch")
            if not free and batch != self._graph.example[0].shape[0]:
                raise UsageError(f"--batch {batch}: the network works at a batch of {self._graph.example[0].shape[0]} only.")
            drawn = golden_inputs([[batch, *value.shape[1:]] for value in self._example], self._seed)
            inputs = [
                new if old.is_floating_point() else old[torch.arange(batch) % len(old)]
                for new, old in zip(drawn, self._example, strict=True)
            ]
            with torch.no_grad():
                leaves = interpret.outputs(self._graph, inputs, torch.float64, device=self._device)
            outputs = [leaf.cpu() for leaf in leaves if isinstance(leaf, Tensor)]
            self._expected[batch] = [each.numpy() for each in inputs], outputs
        return self._expected[batch]

    def _noise(self) -> list[float]:
        """The training graph's float32 noise, per output that is a tensor."""
        if self._levels is None:
            self._levels = rounding(self._graph, {}, probes.noise_probes(self._graph, seed=self._seed)).levels
        leaves = self._graph.fx.output_node().args[0]
        return [self._levels[place] for place, leaf in enumerate(leaves) if _is_tensor(leaf)]

    def _variants(self, row: Runtime, arrays: Sequence[np.ndarray]) -> list[Variant]:
        # Some are built for their sizes; everything else keeps its batch free where the network allows.
        key = (row.reads, *(str(array.shape) for array in arrays if row.reads in SIZED))
        if key not in self._written:
            fixed = tuple(torch.from_numpy(array) for array in arrays) if row.reads in SIZED else None
            self._written[key] = [
                self._write(name, module, row.reads, fixed) for name, module in zip(NAMES, self._modules, strict=True)
            ]
        return self._written[key]

    def _write(self, name: str, module: nn.Module, reads: str, fixed: tuple[Tensor, ...] | None) -> Variant:
        folder = self._folder / reads / ("x".join(map(str, fixed[0].shape)) if fixed else "") / name
        folder.mkdir(parents=True)
        free = bool(self._graph.dynamic.get("batch"))
        if reads == "module":
            example = [value.float() if value.is_floating_point() else value for value in self._graph.example]
            file, why = transport.save(module, example, folder / "network.torch", free_batch=free)
            note = f"{name} is timed as its exported graph in PyTorch: {why}" if why else ""
            return Variant(name, "", file, _size(folder), None, note)
        exporters.require_writable(exporters.get(reads))
        exporter = exporters.exporter(exporters.get(reads))
        file = folder / f"network{exporter.suffix}"
        options = ExportOptions(dynamic=("batch",) if free and fixed is None else ())
        notes = exporter.export(exporters.suited(exporter, module), fixed or self._example, file, options)
        if reads in ("tensorrt", "aotinductor"):  # executable code is opened only beside a manifest that names its hash
            (folder / "network.manifest.json").write_text(json.dumps(_manifest(file, notes)), encoding="utf-8")
        return Variant(name, "", file, _size(folder), (notes or {}).get("nodes"))


def of_files(
    rows: Sequence[tuple[Path, Runtime]], arrays: Sequence[np.ndarray], baseline: int = 0, names: Sequence[str] | None = None
) -> Case:
    """Files that exist against one another, each in its runtime; the names are told apart where they are alike."""
    given = names or distinct([path for path, _ in rows])
    variants = [
        Variant(name, row.name, path, sum(each.stat().st_size for each in beside(path)), _operators(path))
        for name, (path, row) in zip(given, rows, strict=True)
    ]
    return Case(variants, list(arrays), baseline)


def distinct(paths: Sequence[Path]) -> list[str]:
    """Names of files; with the folders that tell them apart where they are alike, and numbered where they are the same file."""
    names = [_tail(path, {*paths} - {path}) for path in paths]
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if count == 1 else f"{name} ({count})" for name, count in zip(names, counts, strict=True)]


def _tail(path: Path, others: Collection[Path]) -> str:
    """The shortest end of a path, in whole words, that no other ends with."""
    tails = ("/".join(path.parts[-count:]) for count in range(1, len(path.parts) + 1))
    return next((tail for tail in tails if not any(f"/{other.as_posix()}".endswith(f"/{tail}") for other in others)), str(path))


def beside(path: Path) -> list[Path]:
    """The file and the data that lies beside it: ``net.onnx.data``, ``net.py.safetensors``, ``net.bin`` of ``net.xml``."""
    row = exporters.named(path)
    more = [path.with_name(f"{path.name}{suffix}") for suffix in (".data", ".safetensors")]
    more += row.beside(path) if row is not None else ()
    return [path, *(each for each in more if each.is_file())]


def drawn(inputs: Sequence[tuple[tuple[int, ...], Any]], seed: int) -> list[np.ndarray]:
    """Normal numbers for floating inputs, zeros and ones for others: ``(shape, dtype)`` each."""
    values = golden_inputs([shape for shape, _ in inputs], seed)
    return [
        value.numpy().astype(kind) if np.dtype(kind).kind == "f" else (value.numpy() > 0).astype(kind)
        for value, (_, kind) in zip(values, inputs, strict=True)
    ]


def _manifest(file: Path, notes: dict[str, Any]) -> dict[str, Any]:
    known = {key: notes.get(key) for key in ("flavour", "targets")}
    return {"artifacts": [{"file": file.name, "files": [{"name": file.name, "sha256": sha256(file)}], "notes": known}]}


def _size(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.iterdir() if each.is_file())


def _operators(path: Path) -> int | None:
    if path.suffix != ".onnx":
        return None
    import onnx

    return len(onnx.load(str(path), load_external_data=False).graph.node)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf.meta.get("val") if hasattr(leaf, "meta") else leaf, Tensor)
