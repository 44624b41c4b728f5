"""The training graph and the folded module on the device that the user asked for, against the float64 reference.

Fast convolutions round more than plain ones do: Winograd's F(4×4, 3×3) costs about a digit (Lavin & Gray 2016, section 5.3;
Barabasz et al. 2020, "Error analysis and improving the accuracy of Winograd convolution for deep neural networks"). So the unit
on a device is the training graph's own noise there,

    n_d = max( n32,  RMS of (float32 on the device − float64)/peak ),

and the training graph itself is held against n32, the noise that the certificate has found on the CPU: it may be
`OWN_ALLOWED` times as large. TF32, which keeps 2^-11 of a value where float32 keeps 2^-24, is thousands of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foldexport import device as devices
from foldexport import interpret, probes
from foldexport.certify.rounding import Errors, rounding
from foldexport.precision.types import HALF
from foldexport.trace import Graph
from foldexport.verify import NOISE_FLOOR, WARN_ABOVE, Comparison, Tolerance, compare, require
from foldexport.verify.reference import Reference

OWN_ALLOWED = 64.0  # times n32: between what fast convolutions cost and what TF32 does
SINGLE = "float32"
ANY = Tolerance(relative=float("inf"))
TRAINING, FOLDED, UNFOLDED = "training graph", "folded module", "unfolded module"


def prove(
    graph: Graph,
    module: nn.Module,
    expected: Reference,
    *,
    levels: Sequence[float] | None = None,
    folded: bool = True,
    tolerance: Tolerance | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Run both on ``expected.device`` and compare them on its inputs; artifacts are measured in n_d from then on.

    module: in the precision of the artifacts, in float32 where that is int8. levels: of the certificate, the training graph's
    float32 noise on the CPU; measured here where there is none.

    Raises EquivalenceError, naming the one that computes something else.
    """
    if levels is None:
        levels = rounding(graph, {}, probes.noise_probes(graph, seed=seed)).levels
    own, there = training_graph(graph, expected, expected.of_tensors(graph, levels))
    expected.levels_there = there
    half = expected.unit in HALF
    found = _compared(
        FOLDED if folded else UNFOLDED, on(module, expected.device), expected, expected.levels if half else there, tolerance,
        expected.unit if half else SINGLE, expected.dtype,
    )  # fmt: skip
    return [require(own), require(found)]


def training_graph(graph: Graph, expected: Reference, levels: Sequence[float]) -> tuple[Comparison, list[float]]:
    """The training graph in float32 on the device, in units of ``levels``; and n_d, per output."""
    outputs: list[list[np.ndarray]] = []

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        inputs = [torch.from_numpy(array) for array in arrays]
        outputs.append(_arrays(interpret.outputs(graph, inputs, torch.float32, device=expected.device)))
        return outputs[-1]

    found = _compared(TRAINING, run, expected, levels, ANY, SINGLE, torch.float32)
    if found.probes < len(expected.outputs):  # it does not run on all of them, and says so
        return found, list(levels)
    there = noise(outputs, expected.outputs, levels)
    again = iter(outputs)
    judged = _compared(TRAINING, lambda *_: next(again), expected, there, None, SINGLE, torch.float32)
    judged.noise_multiple, judged.worst = found.noise_multiple, found.worst
    _judge(judged, there, levels, expected.device)
    return judged, there


def measured(graph: Graph, expected: Reference, device: str) -> list[float]:
    """n_d of each output; n32 where it is more than `OWN_ALLOWED` times that, which no unit may hide."""
    outputs = [_arrays(interpret.outputs(graph, inputs, torch.float32, device=device)) for inputs in expected.inputs]
    there = noise(outputs, expected.outputs, expected.levels)
    return there if times(there, expected.levels) <= OWN_ALLOWED else expected.levels


def on(module: nn.Module, device: str) -> Callable[..., list[np.ndarray]]:
    """``*arrays -> [arrays]``: the module, run on ``device`` with copies of its tensors; it stays where it is.

    TF32 is off while it runs.
    """
    module = devices.with_device(module, device)
    state = {name: each.detach().to(device) for name, each in (*module.named_parameters(), *module.named_buffers())}

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        given = tuple(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
        with torch.no_grad(), devices.full_float32():
            return _arrays(pytree.tree_leaves(torch.func.functional_call(module, state, given)))

    return run


def _compared(
    name: str, run: Callable[..., list[np.ndarray]], expected: Reference, levels: Sequence[float], tolerance: Tolerance | None,
    unit: str, dtype: torch.dtype,
) -> Comparison:  # fmt: skip
    label = f"torch {torch.__version__} on {devices.described(expected.device)}"
    found = compare(
        expected.outputs, run, expected.inputs, list(levels), format=name, label=label, output_names=expected.output_names,
        tolerance=tolerance, unit=unit, dtype=dtype, discrete=expected.discrete or None,
    )  # fmt: skip
    found.device = expected.device
    return found


def noise(outputs: Sequence[Sequence[np.ndarray]], references: Sequence[Sequence[Tensor]], levels: Sequence[float]) -> list[float]:
    """n_d of each output, over all runs. levels: n32."""
    errors = [Errors() for _ in levels]
    for found, wanted in zip(outputs, references, strict=True):
        for place, (one, other) in enumerate(zip(found, wanted)):  # too few or too many is found by `compare`
            if other.is_floating_point() and bool(np.isfinite(one).all()):  # what is not finite fails on its own
                errors[place].add(other, torch.from_numpy(np.asarray(one)))
    return [max(level, each.rms) for level, each in zip(levels, errors, strict=True)]


def times(there: Sequence[float], levels: Sequence[float]) -> float:
    """The largest n_d over n32."""
    return max((a / max(NOISE_FLOOR, b) for a, b in zip(there, levels, strict=True)), default=1.0)


def _judge(found: Comparison, there: Sequence[float], levels: Sequence[float], device: str) -> None:
    """Hold the noise on the device against that on the CPU."""
    ratio = times(there, levels)
    if not ratio <= OWN_ALLOWED:
        found.ok = False
        found.message = (
            f"in float32 it is {ratio:.0f} times as far from float64 on {device} as on the cpu ({OWN_ALLOWED:g} allowed), at "
            f"{found.worst}: its products there are not float32's"
        )
    elif found.ok and ratio > WARN_ABOVE:
        found.message = f"it rounds {ratio:.0f} times as much on {device} as on the cpu: that is the unit of what follows"


def _arrays(leaves: Sequence[Any]) -> list[np.ndarray]:
    return [leaf.numpy(force=True) for leaf in leaves if isinstance(leaf, Tensor)]
