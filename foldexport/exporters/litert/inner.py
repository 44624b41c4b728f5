"""Inner values of a ``.tflite`` file: LiteRT's interpreter, keeping every tensor, in its own kernels and without XNNPACK.

A tensor is called by its number. Convolutions have their channels last, with transpositions around them, and a padding of their
own in front where TensorFlow's two kinds do not say it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from foldexport.exporters.inner import Inner, Row, operators_of
from foldexport.exporters.litert import file as litert_file

PADS = ("PAD", "PADV2")
LAYOUT = "layout"
ACTIVATIONS = {1: "relu", 2: "clip", 3: "relu6", 4: "tanh"}


def inner(
    model: Any, weights: dict[str, np.ndarray], tensors: Callable[[Sequence[int], Sequence[np.ndarray]], list[np.ndarray]]
) -> Inner:
    """The file's operators. weights: by tensor and name. tensors: (numbers, arrays) → their values."""
    graph = model.subgraphs[0]
    inputs, outputs = ([str(place) for place in places] for places in (graph.inputs, graph.outputs))
    operators, known = operators_of(inputs, _rows(model, graph, weights), passing=(LAYOUT,), sizes=())

    def run(names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return tensors([int(name) for name in names], arrays)

    ends = [known.get(name, name) for name in outputs]
    return Inner(operators, inputs, ends, run, constants=weights, channels_last=True)


def _rows(model: Any, graph: Any, weights: dict[str, np.ndarray]) -> Iterator[Row]:
    kinds, names = litert_file.kind_names(model), {name.partition(".")[0]: name for name in weights}
    for operator in graph.operators:
        kind = kinds[operator.opcodeIndex]
        reads, makes = ([str(place) for place in places] for places in (operator.inputs, operator.outputs))
        held = [names[place] for place in reads if place in names]
        moved = kind == "TRANSPOSE" and held and _moves_channels(weights[held[0]])
        number = getattr(operator.builtinOptions, "fusedActivationFunction", 0)
        fused = ACTIVATIONS.get(number, "unknown") if number else ""
        yield Row(LAYOUT if moved else kind, reads, makes, held, fused, kind in PADS)


def _moves_channels(order: np.ndarray) -> bool:
    """Whether a transposition puts the channels last, or back behind the batch, and changes nothing else."""
    places = [int(place) for place in order]
    others = list(range(2, len(places)))
    return len(places) > 2 and places in ([0, *others, 1], [0, len(places) - 1, *range(1, len(places) - 1)])
