"""Golden inputs and outputs: what ``foldexport verify MANIFEST`` re-runs on the machine where an artifact will work.

Inputs are drawn again from a seed by integer arithmetic (see :mod:`foldexport.probes`), so they have the same bits
everywhere and only a digest of them is stored. Expected outputs are those of the training graph in float64; long
outputs are thinned to every k-th element, k odd, and the largest one, which is the unit of their error.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foldexport.errors import CheckpointError
from foldexport.normalise import Raw
from foldexport.probes import normal
from foldexport.verify import Comparison, Runtime, Tolerance, compare

VERSION = 1
Noises = Callable[[int], Iterable[Sequence[float]]]
STORED_ELEMENTS = 4096  # of all outputs together, 44 kB in base64


def golden_inputs(shapes: Sequence[Sequence[int]], seed: int, raw: Raw | None = None) -> tuple[Tensor, ...]:
    """Normal inputs of the given shapes, float32 (every value is exact there), the same on every machine.

    raw: of a network that takes raw pixels; they are then what it normalises to the normal values.
    """
    drawn = [
        normal(np.random.Philox(key=[seed, place]).random_raw, math.prod(shape)) for place, shape in enumerate(shapes)
    ]
    values = [torch.from_numpy(value).reshape(*shape) for value, shape in zip(drawn, shapes, strict=True)]
    return tuple((value if raw is None else raw.pixels(value)).float() for value in values)


def golden(
    reference: Callable[..., Sequence[Tensor]],
    shapes: Sequence[Sequence[int]],
    *,
    n32: float | Sequence[float],
    batches: Sequence[int] = (1, 3),
    seed: int = 0,
    output_names: Sequence[str] | None = None,
    raw: Raw | None = None,
) -> dict[str, Any]:
    """The golden set of a network as a JSON-able dictionary.

    reference: the training graph in float64, called with float64 inputs, gives the list of its outputs.
    shapes:    of the inputs, which are floating; their first axis is replaced by each of ``batches``.
    batches:   the fixed one alone where the batch is fixed.
    n32:       of the training graph, the unit of :func:`check_golden`.      raw: as for :func:`golden_inputs`.
    """
    runs = [
        _run(reference, [[batch, *shape[1:]] for shape in shapes], seed + place, raw) for place, batch in enumerate(batches)
    ]
    count = sum(output.numel() for _, _, outputs in runs for output in outputs)
    step = 1 if count <= STORED_ELEMENTS else math.ceil(count / STORED_ELEMENTS) | 1
    return {
        "version": VERSION,
        "generator": "philox 4x64, sum of twelve 16-bit uniforms",
        "n32": n32 if isinstance(n32, (int, float)) else list(n32),
        "output_names": list(output_names or ()),
        "step": step,
        **({"raw": raw.to_dict()} if raw is not None else {}),
        "runs": [
            {
                "seed": seed + place,
                "inputs": [list(value.shape) for value in inputs],
                "inputs_sha256": digest,
                "outputs": [_packed(output, step) for output in outputs],
            }
            for place, (inputs, digest, outputs) in enumerate(runs)
        ],
    }


def check_golden(
    record: dict[str, Any], runtime: Runtime, *, format: str, label: str, tolerance: Tolerance | None = None,
    unit: str = "float32", dtype: torch.dtype = torch.float32, noise_there: Noises | None = None,
) -> Comparison:
    """Compare a loaded artifact with the golden set of its manifest, by the rules of :func:`foldexport.verify.compare`.

    unit, dtype: the number type whose noise the record's n32 is, and what the artifact is fed. noise_there: as for ``compare``.

    Raises :class:`CheckpointError` when the record is not one of ours, or the inputs drawn here are not those that it
    was made with.
    """
    runs, step = _field(record, "runs"), _field(record, "step")
    probes = [_inputs(run, record.get("raw")) for run in runs]
    references = [packed_outputs(run, step) for run in runs]
    calls = iter(runs)

    def thinned(*arrays: np.ndarray) -> list[np.ndarray]:
        run, outputs = next(calls), [np.asarray(output) for output in runtime(*arrays)]
        found, wanted = [list(output.shape) for output in outputs], [each["shape"] for each in run["outputs"]]
        if step == 1 or len(found) != len(wanted):
            return outputs
        if found != wanted:
            raise ValueError(f"outputs of shape {found} where the manifest has {wanted}")
        return [thin(output, step, each["peak_at"]) for output, each in zip(outputs, run["outputs"], strict=True)]

    names = record.get("output_names") or None
    return compare(
        references, thinned, probes, _field(record, "n32"), format=format, label=label, output_names=names,
        tolerance=tolerance, unit=unit, dtype=dtype, noise_there=noise_there, discrete=record.get("discrete"),
    )  # fmt: skip


def packed_outputs(run: dict[str, Any], step: int) -> list[Tensor]:
    """The outputs that one run of a record has. Raises CheckpointError, or ValueError, where it is none of ours."""
    return [_unpacked(each, step) for each in _field(run, "outputs")]


def _inputs(run: dict[str, Any], raw: dict[str, Any] | None = None) -> tuple[Tensor, ...]:
    inputs = golden_inputs(_field(run, "inputs"), _field(run, "seed"), _raw(raw))
    if _digest(inputs) != _field(run, "inputs_sha256"):
        raise CheckpointError(
            "the manifest's golden inputs cannot be drawn again here: numpy's Philox gives other values."
        )
    return inputs


def _raw(stored: dict[str, Any] | None) -> Raw | None:
    if stored is None:
        return None
    return Raw(tuple(_field(stored, "mean")), tuple(_field(stored, "std")), float(_field(stored, "top")))


def _run(
    reference: Callable[..., Sequence[Tensor]], shapes: list[list[int]], seed: int, raw: Raw | None
) -> tuple[tuple[Tensor, ...], str, list[Tensor]]:
    inputs = golden_inputs(shapes, seed, raw)
    with torch.no_grad():
        outputs = list(reference(*(value.double() for value in inputs)))
    return inputs, _digest(inputs), outputs


def _digest(inputs: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for value in inputs:
        digest.update(value.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _packed(output: Tensor, step: int) -> dict[str, Any]:
    values = output.numpy(force=True).astype(np.float64)
    peak_at = peak_of(values)
    stored = base64.b64encode(thin(values, step, peak_at).astype("<f8").tobytes()).decode()
    return {"shape": list(values.shape), "peak_at": peak_at, "values": stored}


def _unpacked(stored: dict[str, Any], step: int) -> Tensor:
    values = torch.from_numpy(np.frombuffer(base64.b64decode(_field(stored, "values")), "<f8").astype(np.float64))
    return values.reshape(_field(stored, "shape")) if step == 1 else values


def peak_of(values: np.ndarray) -> int:
    """Where the largest value is, in the flat output."""
    return int(np.argmax(np.abs(values))) if values.size else 0


def thin(values: np.ndarray, step: int, peak_at: int) -> np.ndarray:
    """``[ceil(n / step) + 1]`` of the n elements; the values as they are where nothing is thinned."""
    if step == 1 or values.size == 0:
        return values
    flat = values.reshape(-1)
    return np.append(flat[::step], flat[peak_at])


def _field(record: dict[str, Any], name: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise CheckpointError(
            f"the manifest's golden set has no {name!r}: it was not written by foldexport, or was cut."
        )
    return record[name]
