"""Letting a ``.tflite`` file take other batches than the one that its converter knew.

A RESHAPE and a SLICE have sizes as constants, where -1 means what is left. A SLICE resizes its result only where that has a
signature with a size that is not known (LiteRT's ``tflite/kernels/slice.cc``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from foldexport.exporters.litert import file as litert_file

RESHAPE, SLICE = 22, 65
SIZES = {RESHAPE: 1, SLICE: 2}  # the input that holds them
ALIGNMENT = 16  # of constants, as the format's schema asks
UNKNOWN = -1


def free(path: Path, content: bytes) -> bool:
    """Let every RESHAPE take its first size from its input, and every SLICE of a whole first axis all of it; whether there was one.

    content: the file's. What it computes at its own sizes stays the same. A file whose constants lie behind its graph, which is
    one near 2 GB, is left as it is.
    """
    model = litert_file.read(path)
    if any(buffer.offset > 1 for buffer in model.buffers):
        return False
    changed = [_freed(model, graph, each) for graph in model.subgraphs for each in _alone(model, graph)]
    if any(changed):
        path.write_bytes(_packed(model))
    return any(changed)


def _alone(model: Any, graph: Any) -> list[Any]:
    """RESHAPE and SLICE whose sizes are read by no other kind of operator, and as nothing else."""
    kinds, roles = litert_file.kinds_of(model), dict[int, set[tuple[int, int]]]()
    for each in graph.operators:
        for at, place in enumerate(each.inputs):
            roles.setdefault(graph.tensors[place].buffer if place >= 0 else -1, set()).add((kinds[each.opcodeIndex], at))
    wanted = [each for each in graph.operators if SIZES.get(kinds[each.opcodeIndex], 9) < len(each.inputs)]
    return [each for each in wanted if len(roles[graph.tensors[each.inputs[SIZES[kinds[each.opcodeIndex]]]].buffer]) == 1]


def _freed(model: Any, graph: Any, operator: Any) -> bool:
    slices = litert_file.kinds_of(model)[operator.opcodeIndex] == SLICE
    buffer = model.buffers[graph.tensors[operator.inputs[SIZES[SLICE if slices else RESHAPE]]].buffer]
    sizes = _whole(buffer)
    if len(sizes) < 2 or not (sizes[1:] > 0).all():
        return False
    if slices:
        begin, given, made = _whole(model.buffers[graph.tensors[operator.inputs[1]].buffer]), *_ends(graph, operator)
        if not len(begin) or begin[0] != 0 or given.shape[0] != made.shape[0]:
            return False
        made.shapeSignature = np.array([UNKNOWN, *made.shape[1:]], np.int32)
    elif sizes[0] <= 0:
        return False
    sizes[0] = UNKNOWN
    buffer.data = sizes.view(np.uint8)
    return True


def _ends(graph: Any, operator: Any) -> tuple[Any, Any]:
    return graph.tensors[operator.inputs[0]], graph.tensors[operator.outputs[0]]


def _whole(buffer: Any) -> np.ndarray:
    """A copy of a constant of whole numbers; empty where it is none."""
    empty = buffer.data is None or not len(buffer.data)
    return np.empty(0, "<i4") if empty else np.array(buffer.data, np.uint8).view("<i4")


def _packed(model: Any) -> bytes:
    import flatbuffers

    class Aligned(flatbuffers.Builder):
        """The generated code asks for no alignment of constants."""

        def StartVector(self, elemSize, numElems, alignment):
            return super().StartVector(elemSize, numElems, max(alignment, ALIGNMENT))

    builder = Aligned(1024)
    builder.Finish(model.Pack(builder), file_identifier=litert_file.IDENTIFIER)
    return bytes(builder.Output())
