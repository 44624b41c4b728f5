"""A written file at work in a process of its own, which has torch and safetensors and cannot import foldexport."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch

from foldexport.device import product_precision
from foldexport.errors import EquivalenceError

RUNNER = Path(__file__).with_name("runner.py")
PATIENCE_S = 10  # for a process to end by itself


class Process:
    """``*arrays -> [arrays]``; the process ends with this object.

    Raises :class:`EquivalenceError` where the file does not load, RuntimeError where it does not run on an input.
    """

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        settings = [str(torch.get_num_threads()), product_precision(), device]
        self._child = subprocess.Popen(
            [sys.executable, str(RUNNER), str(Path(path).resolve()), *settings],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, cwd=tempfile.gettempdir(),
        )  # fmt: skip
        self._end = weakref.finalize(self, _end, self._child, self._said)
        try:
            self._receive()
        except RuntimeError as error:
            self._end()
            raise EquivalenceError(f"pytorch: the written file does not load: {' '.join(str(error).split())[:300]}") from error

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        buffer = io.BytesIO()
        np.savez(buffer, **{str(place): np.ascontiguousarray(array) for place, array in enumerate(arrays)})
        try:
            self._child.stdin.write(len(buffer.getvalue()).to_bytes(8, "little") + buffer.getvalue())
            self._child.stdin.flush()
        except OSError as error:
            raise RuntimeError(self._last_words()) from error
        return self._receive()

    def _receive(self) -> list[np.ndarray]:
        head = self._child.stdout.read(8)
        content = self._child.stdout.read(int.from_bytes(head, "little"))
        if not head or len(content) < int.from_bytes(head, "little"):
            raise RuntimeError(self._last_words())
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            if "error" in found.files:
                raise RuntimeError(str(found["error"]))
            return [found[str(place)] for place in range(len(found.files))]

    def _last_words(self) -> str:
        code = self._child.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with code {code}{': ' + lines[-1][:300] if lines else ''}"


def _end(child: subprocess.Popen, said: io.IOBase) -> None:
    """Closing its input ends the process."""
    with contextlib.suppress(OSError):  # it has ended already, with something unsent
        child.stdin.close()
    try:
        child.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()
    said.close()
