"""Inner values of an ncnn network: its extractor hands out any blob, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from foldexport.exporters.inner import Inner, Row, operators_of
from foldexport.exporters.ncnn.file import CONVOLUTIONS, Layer

PASSING = frozenset({"Split", "Noop", "Dropout"})
FUSING = CONVOLUTIONS | {"InnerProduct"}
ACTIVATION = 9  # the key of these layers that says which activation is a part of them
ACTIVATIONS = {1: "relu", 2: "leaky_relu", 3: "clip", 4: "sigmoid", 5: "mish", 6: "hardswish"}


def inner(
    layers: Sequence[Layer], weights: dict[str, np.ndarray], inputs: list[str], outputs: list[str],
    blobs: Callable[[Sequence[str], Sequence[np.ndarray]], list[np.ndarray]],
) -> Inner:  # fmt: skip
    """The network's layers. weights: by layer, place and role. blobs: (names, arrays) → their values on all samples."""
    operators, known = operators_of(inputs, _rows(layers, list(weights)), passing=PASSING, sizes=())
    return Inner(operators, inputs, [known.get(name, name) for name in outputs], blobs, constants=weights)


def _rows(layers: Sequence[Layer], names: Sequence[str]) -> Iterator[Row]:
    for layer in layers:
        if layer.kind == "Input":
            continue
        held = [name for name in names if name.rsplit(".", 2)[0] == layer.name]
        number = layer.keys.get(ACTIVATION, 0) if layer.kind in FUSING else 0
        fused = ACTIVATIONS.get(number, "unknown") if number else ""
        yield Row(layer.kind, layer.inputs, layer.outputs, held, fused)
