"""Runtimes of phones and boards, on this processor: ExecuTorch, LiteRT and ncnn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foldexport import exporters
from foldexport.benchmark.runtimes import Ready


def executorch(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The program, whose threads are those of the process. Raises ValueError for a batch that it does not take."""
    import torch

    from foldexport.exporters.executorch import file as executorch_file
    from foldexport.exporters.executorch.exporter import ExecuTorchExporter

    execute = ExecuTorchExporter().method(path, threads)
    lowest, highest = executorch_file.batches(path)
    if not lowest <= len(arrays[0]) <= highest:
        raise ValueError(f"it takes {lowest} to {highest} samples at once, not {len(arrays[0])}")
    given = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return Ready(lambda: execute(given), lambda result: [each.numpy(force=True) for each in result])


def litert(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The interpreter, resized once to the inputs, which are copied in."""
    from foldexport.exporters.litert.exporter import LiteRTExporter

    interpreter, inputs, outputs = LiteRTExporter().interpreter(path, [array.shape for array in arrays], threads)
    for index, array in zip(inputs, arrays, strict=True):
        interpreter.set_tensor(index, np.ascontiguousarray(array))
    return Ready(interpreter.invoke, lambda _: [interpreter.get_tensor(index) for index in outputs])


def ncnn(path: Path, arrays: Sequence[np.ndarray], threads: int, device: str) -> Ready:
    """The network, sample by sample, with ncnn's fast algorithms but F(6, 3), which would not pass for the same network."""
    run = exporters.exporter(exporters.get("ncnn")).load(path, threads=threads, winograd=True)
    given = [np.ascontiguousarray(array) for array in arrays]
    return Ready(lambda: run(*given), lambda result: list(result))
