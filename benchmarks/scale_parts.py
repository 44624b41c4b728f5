"""Parts of `scale.py`, each run in a process of its own: ``scale_parts.py PART JSON``; one line of JSON on stdout."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from scale_networks import unet, wide

import foldexport
from foldexport.exporters.onnx import exporter as onnx
from tests.statistics import randomise
from tests.torchvision_schemas import declare_missing

PAGE_BYTES = 4096
EVERY_SECONDS = 0.005


class Watch:
    """Peak resident bytes and seconds of each stage, of which the current one is named by calling the watch."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._stage, self._began, self._done = "start", time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._began
        self._stage, self._began = stage, now

    def stop(self) -> dict[str, Any]:
        self("")
        self._done.set()
        self._thread.join()
        return {"peaks": self.peaks, "seconds": {name: round(value, 1) for name, value in self.seconds.items()}}

    def _sample(self) -> None:
        while not self._done.wait(EVERY_SECONDS):
            self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), resident())


def resident() -> int:
    """Resident bytes of this process (proc(5), ``/proc/self/statm``)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


def weights(width: int, depth: int, formats: list[str], external: bool) -> dict[str, Any]:
    """A network of wide linear layers folded, proved and exported; ``external``: its weights in a file of their own."""
    if external:
        onnx.EXTERNAL_DATA_ABOVE_BYTES = 0
    network = randomise(wide(width, depth), 0)
    size = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    watch, base = Watch(), resident() - size
    folded = foldexport.fold(network, torch.randn(1, 3, 8, 8), progress=watch)
    files = _exported(folded, formats, watch)
    return {"weight_bytes": size, "base_bytes": base, "proof": folded.certificate.summary(), "files": files, **watch.stop()}


def image(network: str, size: int, formats: list[str]) -> dict[str, Any]:
    """A network at ``1x3xSIZExSIZE`` folded, proved and exported."""
    module, watch = _network(network), Watch()
    folded = foldexport.fold(module, torch.randn(1, 3, size, size), progress=watch)
    files = _exported(folded, formats, watch)
    return {"proof": folded.certificate.summary(), "probes": folded.certificate.probes, "files": files, **watch.stop()}


def checkpoint(network: str, path: str) -> dict[str, Any]:
    """The checkpoint that the command is given."""
    torch.save(_network(network).state_dict(), path)
    return {}


def _network(name: str) -> torch.nn.Module:
    if name == "unet":
        return randomise(unet(), 0)
    declare_missing()
    import torchvision

    return randomise(getattr(torchvision.models, name)(), 0, example=torch.randn(2, 3, 64, 64))


def _exported(folded: foldexport.Folded, formats: list[str], watch: Watch) -> list[dict[str, Any]]:
    found = []
    for name in formats:
        watch(f"export {name}")
        with tempfile.TemporaryDirectory() as folder:
            artifact = foldexport.export(folded, name, Path(folder) / f"net.{name}")
        found.append({"format": name, "files": artifact.size_bytes, "comparison": str(artifact.comparison)})
    return found


if __name__ == "__main__":
    parts = {"weights": weights, "image": image, "checkpoint": checkpoint}
    print(json.dumps(parts[sys.argv[1]](**json.loads(sys.argv[2]))))
