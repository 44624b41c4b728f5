"""Eight-bit integers: post-training quantisation of a folded network to an ONNX file of quantise-dequantise pairs.

    q = clip(round(x / s), −127, 127),        x ≈ s·q,

with one step s for a tensor of activations, from calibration on the user's own samples, and one per output channel for weights,
both symmetric; biases stay in float32 (TensorRT takes no other). Written by onnxruntime.quantization. Float32 noise is no measure
of it, so it is judged by what the network is for: accuracy where samples have labels, else agreement of the largest class, beside
the signal-to-quantisation-noise ratio ``SQNR = 10·log10(Σ r² / Σ (y − r)²)`` in dB against the training graph.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn

from foldexport.errors import EquivalenceError, PrecisionError, UsageError
from foldexport.exporters import onnx_model
from foldexport.exporters.onnx import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.fold.rebuild import in_dtype
from foldexport.precision.equalise import equalised
from foldexport.precision.quality import Quality
from foldexport.precision.readback import Delivered, delivered

CALIBRATION_SAMPLES = 256
JUDGED_SAMPLES = 2048
FEWEST = 64  # samples below which all serve for both
MAX_DROP = 1.0  # points of accuracy
LEAST_AGREEMENT = 0.98  # of samples, without labels
LEAST_SQNR_DB = 20.0  # where outputs are no class scores
BATCH = 16


@dataclass(frozen=True)
class Samples:
    """What a network is calibrated and judged on: arrays per input, class numbers where there are any."""

    calibration: list[np.ndarray]
    judged: list[np.ndarray]
    labels: np.ndarray | None


def split(arrays: Sequence[np.ndarray], labels: np.ndarray | None) -> Samples:
    """Every other sample calibrates, up to `CALIBRATION_SAMPLES`; the others judge. Few samples do both."""
    count = len(arrays[0])
    if count < FEWEST:
        return Samples(list(arrays), list(arrays), labels)
    calibrate = np.arange(0, count, 2)
    calibrate = calibrate[np.linspace(0, len(calibrate) - 1, min(CALIBRATION_SAMPLES, len(calibrate))).astype(int)]
    judge = np.setdiff1d(np.arange(count), calibrate)[:JUDGED_SAMPLES]
    return Samples([a[calibrate] for a in arrays], [a[judge] for a in arrays], None if labels is None else labels[judge])


def quantise(
    program: fx.GraphModule,
    example: tuple,
    path: str | Path,
    calibration: Sequence[np.ndarray],
    options: ExportOptions,
    *,
    equalise: bool = True,
) -> tuple[dict[str, Any], nn.Module, tuple[int, int]]:
    """Write a float64 program to ``path`` as int8 ONNX.

    Returns the exporter's notes, the float32 module that was quantised, and (groups equalised, values proved equal). Raises
    UsageError where samples do not fit the network.
    """
    groups = proved = 0
    if equalise:
        inputs = [tuple(torch.as_tensor(a).double() for a in part) for part in _batches(calibration)]
        program, groups, proved = equalised(program, inputs)
    module = in_dtype(copy.deepcopy(program), torch.float32)
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        plain = Path(folder) / "float.onnx"
        notes = OnnxExporter().export(module, example, plain, replace(options, precision="fp32"))
        _write(plain, Path(path), calibration, notes["inputs"])
    notes |= {"nodes": len(onnx.load(str(path), load_external_data=False).graph.node)}
    return notes, module, (groups, proved)


def _write(plain: Path, path: Path, calibration: Sequence[np.ndarray], names: Sequence[str]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(_batches(calibration))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self._batches, None)
            return None if part is None else dict(zip(names, part))

    raw = plain.with_name("int8.onnx")
    with _silent():
        quantize_static(
            str(plain), str(raw), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )  # fmt: skip
    onnx_model.write(onnx.load(str(raw)), path)


class _silent:
    """Keeps the quantiser's advice off the user's screen."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(self._before)


def _batches(arrays: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]] | list[list[np.ndarray]]:
    count = len(arrays[0])
    return [[np.ascontiguousarray(a[at : at + BATCH]) for a in arrays] for at in range(0, count, BATCH)]


def judge(
    run: Callable[..., list[np.ndarray]],
    reference: Callable[[tuple], list[Any]],
    samples: Samples,
    equalisation: tuple[int, int],
) -> Quality:
    """Run the file and the training graph on the judged samples. reference: ``inputs → outputs``, the first of which is judged."""
    signal = noise = 0.0
    agree = right_before = right_after = seen = 0
    scores = False
    for part in _batches(samples.judged):
        wanted = np.asarray(torch.as_tensor(reference(tuple(torch.as_tensor(a) for a in part))[0]).double())
        found = run(*part)[0].astype(np.float64)
        signal += float(np.square(wanted).sum())
        noise += float(np.square(found - wanted).sum()) if np.isfinite(found).all() else np.inf
        scores = wanted.ndim == 2 and wanted.shape[1] > 1
        if scores:
            before, after = wanted.argmax(1), found.argmax(1)
            agree += int((before == after).sum())
            if samples.labels is not None:
                truth = samples.labels[seen : seen + len(before)]
                right_before += int((before == truth).sum())
                right_after += int((after == truth).sum())
        seen += len(wanted)
    labels = samples.labels is not None and scores
    sqnr = 10 * float(np.log10(signal / noise)) if 0 < noise < np.inf and signal else (-np.inf if noise else np.inf)
    return Quality(
        sqnr, agree / seen if scores else None, right_before / seen if labels else None, right_after / seen if labels else None,
        seen, len(samples.calibration[0]), *equalisation,
    )  # fmt: skip


def require_quality(found: Quality, max_drop: float | None) -> None:
    """Raises EquivalenceError (exit 4) where quantisation costs more than is allowed."""
    if found.drop_points is not None:
        allowed = MAX_DROP if max_drop is None else max_drop
        if not found.drop_points <= allowed:
            raise EquivalenceError(
                f"int8: accuracy falls by {found.drop_points:.2f} points ({found}), {allowed:g} allowed: give more samples like "
                "those it will see, raise --max-drop, or ask for fp16."
            )
    elif max_drop is not None:
        raise UsageError("--max-drop: is about accuracy, and --data has no labels: name the folders of images after their classes.")
    elif found.agreement is not None and not found.agreement >= LEAST_AGREEMENT:
        raise EquivalenceError(
            f"int8: the largest class differs on {1 - found.agreement:.1%} of {found.samples} samples ({found}), "
            f"{1 - LEAST_AGREEMENT:.0%} allowed: give labelled samples to be judged by accuracy, or ask for fp16."
        )
    elif found.agreement is None and not found.sqnr_db >= LEAST_SQNR_DB:
        raise EquivalenceError(f"int8: {found}, {LEAST_SQNR_DB:g} dB wanted: ask for fp16.")


def require_int8(exporter: Any, path: str | Path) -> Delivered:
    """What the file is in. Raises PrecisionError (exit 6) unless every convolution and product reads 8-bit values and weights."""
    found = delivered(exporter, path)
    other = sum(count for name, count in found.layers.items() if name != "int8")
    if other or not found.layers.get("int8"):
        raise PrecisionError(
            f"{exporter.name}: asked for int8, but {other} of {sum(found.layers.values())} layers compute in another type "
            f"({found}); no file was written."
        )
    return found
