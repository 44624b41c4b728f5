"""Golden inputs and outputs as arrays that numpy alone reads: what verify.py, or a program in another language, compares with.

``golden.npz`` holds ``runs`` (how many), ``n32`` ``[outputs]`` (the unit of errors), ``step``, ``discrete`` ``[outputs]``
(the share of integers that may differ, where outputs are), and of run r and place i

    run{r}_input{i}     what the artifact is fed            run{r}_output{i}    of the training graph in float64
    run{r}_shape{i}     the output's shape                  run{r}_peak_at{i}   where its largest value is

With step 1 outputs are whole; of large ones every step-th value of the flat output is kept, and behind them the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foldexport.bundle import standalone
from foldexport.errors import CheckpointError
from foldexport.verify import Comparison, Runtime, compare
from foldexport.verify.golden import STORED_ELEMENTS, peak_of, thin

if TYPE_CHECKING:
    from foldexport.verify.reference import Reference

OTHERS = 2  # runs that are kept of a network whose inputs cannot be drawn from a seed


@dataclass(eq=False)
class Golden:
    """runs: (inputs, outputs) of the training graph. levels: its noise, per output. dtype: what floating inputs are fed as.

    discrete: per output the share of integers that may differ; empty where there are none.
    """

    runs: list[tuple[Sequence[Any], Sequence[Tensor]]]
    levels: list[float]
    step: int
    dtype: torch.dtype = torch.float32
    discrete: Sequence[float] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """The contents of the file."""
        found = {"runs": np.int64(len(self.runs)), "step": np.int64(self.step), "n32": np.asarray(self.levels, np.float64)}
        found |= {"discrete": np.asarray(self.discrete, np.float64)} if self.discrete else {}
        for number, (inputs, outputs) in enumerate(self.runs):
            tensors = [value for value in inputs if isinstance(value, Tensor)]
            for place, value in enumerate(tensors):
                fed = value.to(self.dtype) if value.is_floating_point() else value
                found[f"run{number}_input{place}"] = np.ascontiguousarray(fed.numpy(force=True))
            for place, output in enumerate(outputs):
                values = output.numpy(force=True)
                peak_at = peak_of(values)
                found[f"run{number}_output{place}"] = np.ascontiguousarray(thin(values, self.step, peak_at))
                found[f"run{number}_shape{place}"] = np.asarray(values.shape, np.int64)
                found[f"run{number}_peak_at{place}"] = np.int64(peak_at)
        return found

    def write(self, path: Path) -> None:
        """The arrays, stored without dates: the same bytes again."""
        np.savez(path, allow_pickle=False, **self.arrays())


def check(path: Path, runtime: Runtime, **how: Any) -> Comparison:
    """Compare a loaded artifact with the arrays at ``path``; ``how``: format, label, tolerance, unit and dtype of ``compare``.

    Raises CheckpointError for a file that is none of ours.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        runs, step, levels = range(int(arrays["runs"])), int(arrays["step"]), [float(each) for each in arrays["n32"]]
        shares = [float(each) for each in arrays.get("discrete", ())]
        inputs = [[torch.from_numpy(each) for each in standalone.numbered(arrays, f"run{run}_input")] for run in runs]
        wanted = [[torch.from_numpy(each) for each in standalone.numbered(arrays, f"run{run}_output")] for run in runs]
        peaks = iter([standalone.numbered(arrays, f"run{run}_peak_at") for run in runs])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: holds no golden inputs and outputs of foldexport ({error}).") from error

    def thinned(*fed: np.ndarray) -> list[np.ndarray]:
        outputs = [np.asarray(output) for output in runtime(*fed)]
        return [thin(output, step, int(peak)) for output, peak in zip(outputs, next(peaks), strict=True)]

    return compare(wanted, thinned, inputs, levels, discrete=shares or None, **how)


def of(reference: Reference) -> Golden:
    """The runs that the manifest has, or where it can have none the first ones of the proof."""
    stored: Mapping[str, Any] | None = reference.golden
    count = len(stored["runs"]) if stored else OTHERS
    runs = list(zip(reference.inputs[:count], reference.outputs[:count]))
    if stored:
        levels = stored["n32"] if isinstance(stored["n32"], Sequence) else [stored["n32"]] * len(reference.output_names)
        return Golden(runs, list(levels), stored["step"], reference.dtype, reference.discrete)
    elements = sum(output.numel() for _, outputs in runs for output in outputs)
    step = 1 if elements <= STORED_ELEMENTS else -(-elements // STORED_ELEMENTS) | 1
    return Golden(runs, list(reference.levels), step, reference.dtype, reference.discrete)
