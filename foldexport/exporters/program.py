"""``torch.export`` of a plain module: what ``.pt2`` files hold and what AOTInductor compiles."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from foldexport.errors import UsageError
from foldexport.exporters import sizes
from foldexport.exporters.options import ExportOptions
from foldexport.trace.exporting import quiet

#: Node notes that hold the exporting machine's paths.
LOCAL = ("stack_trace",)


def exported(name: str, module: nn.Module, example: Sequence, options: ExportOptions) -> ExportedProgram:
    """The program of ``module`` with the asked axes free, and without the paths of the files that it was made from.

    name: of the format, for messages. Raises :class:`UsageError` for inputs that are no tensors, for an axis that the network
    fixes, and for what torch.export cannot take.
    """
    for place, value in enumerate(example):
        if not isinstance(value, Tensor):
            raise UsageError(f"{name}: input {place} is a {type(value).__name__}; a program is written for tensors only.")
    sizes.require_free_axes(module, tuple(example), options)
    example = sizes.traceable(tuple(example), options)
    axes = _axes(example, options)
    try:
        with quiet():
            program = torch.export.export(module, example, dynamic_shapes=axes if any(axes) else None, strict=False)
    except Exception as error:  # torch.export raises whatever dynamo, sympy or the network raised
        raise UsageError(_refusal(name, error, options)) from error
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if hasattr(graph, "graph") else ():
            for note in LOCAL:
                node.meta.pop(note, None)
    return program


def outputs_of(program: ExportedProgram) -> int:
    """The number of outputs that are tensors."""
    return sum(isinstance(each, str) for each in program.graph_signature.user_outputs)


def leaves(result: object) -> list:
    """Tensors of what a program returned, as arrays."""
    return [value.numpy(force=True) for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]


def silent() -> warnings.catch_warnings:
    """For torch's warnings about its own parts, which users can do nothing about."""
    return warnings.catch_warnings(action="ignore")


def _axes(example: Sequence[Tensor], options: ExportOptions) -> tuple[dict[int, object], ...]:
    """Per input its free axes. The batch is one symbol from 1 on; heights and widths get the range that the network has."""
    batch = Dim("batch", min=1)
    return tuple(
        {axis: batch if name == "batch" else Dim.DYNAMIC for axis, name in options.dynamic_axes(value.shape).items()}
        for value in example
    )


def _refusal(name: str, error: Exception, options: ExportOptions) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if any(words in str(error) for words in ("Constraints violated", "specialized", "inconsistencies were found")):
        return f"{name}: the network fixes its {' or '.join(options.dynamic)} at the example's size: leave it out of --dynamic."
    return f"{name}: torch.export cannot take this network: {lines[0][:300]}"
