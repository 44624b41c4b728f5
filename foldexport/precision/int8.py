"""Eight-bit integers: post-training quantisation of a folded network to an ONNX file of quantise-dequantise pairs.

    q = clip(round(x / s), −127, 127),        x ≈ s·q,

with one step s for a tensor of activations, from calibration on the user's own samples, and one per output channel for weights,
both symmetric; biases stay in float32 (TensorRT takes no other). Written by onnxruntime.quantization. Float32 noise is no measure
of it, so it is judged by what the network is for: foldexport.precision.judging.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn

from foldexport.errors import PrecisionError
from foldexport.exporters.onnx import model as onnx_model
from foldexport.exporters.onnx.exporter import OnnxExporter
from foldexport.exporters.options import ExportOptions
from foldexport.fold.rebuild import in_dtype
from foldexport.precision.equalise import equalised
from foldexport.precision.judging import BATCH, Samples, batches, judge, require_quality
from foldexport.precision.quality import MAX_DROP, Quality
from foldexport.precision.readback import Delivered, delivered
from foldexport.samples import spread

CALIBRATION_SAMPLES = 256
JUDGED_SAMPLES = 2048
FEWEST = 64  # samples below which all serve for both

__all__ = [
    "BATCH", "CALIBRATION_SAMPLES", "JUDGED_SAMPLES", "MAX_DROP", "Quality", "Samples", "judge", "quantise", "require_int8",
    "require_quality", "split",
]  # fmt: skip


def split(arrays: Sequence[np.ndarray], labels: np.ndarray | None, *, certain: bool = False) -> Samples:
    """Every other sample calibrates, up to `CALIBRATION_SAMPLES`; the others judge. Few samples do both.

    Both are taken evenly from all samples. certain: the labels are numbered as the network's classes are.
    """
    count = len(arrays[0])
    if count < FEWEST:
        return Samples(list(arrays), list(arrays), labels, certain=certain, shared=True)
    calibrate = np.arange(0, count, 2)
    calibrate = calibrate[np.linspace(0, len(calibrate) - 1, min(CALIBRATION_SAMPLES, len(calibrate))).astype(int)]
    judge = spread(np.setdiff1d(np.arange(count), calibrate), JUDGED_SAMPLES)
    return Samples(
        [a[calibrate] for a in arrays], [a[judge] for a in arrays], None if labels is None else labels[judge], certain=certain
    )


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
        inputs = [tuple(torch.as_tensor(a).double() for a in part) for part in batches(calibration)]
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
            self._batches = iter(batches(calibration))

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
