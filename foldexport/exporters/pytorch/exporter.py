"""The format: a readable ``NAME.py`` with ``NAME.py.safetensors`` beside it, run in a process of its own."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters import sizes
from foldexport.exporters.inner import Inner
from foldexport.exporters.options import FLOATS, ExportOptions
from foldexport.exporters.pytorch import inner as source_inner
from foldexport.exporters.pytorch.checked import check
from foldexport.exporters.pytorch.process import Process
from foldexport.exporters.pytorch.source import written
from foldexport.exporters.weights import as_array
from foldexport.verify.golden import golden_inputs

WEIGHTS = ".safetensors"  # after the whole name of the source: NAME.safetensors may be the user's checkpoint
BATCHES = (1, 3)


class PyTorchExporter:
    """Plain eval-mode modules to source that needs torch and safetensors only."""

    name = "pytorch"
    suffix = ".py"
    devices = ("cpu", "cuda")

    def export(
        self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None
    ) -> dict[str, Any]:
        """Write ``module`` to ``path`` and its tensors beside it; equal modules give equal bytes.

        The written file is run at once in another process, and its outputs must be those of ``module`` bit for bit.

        Returns notes for the manifest. Raises :class:`UsageError` for a network that plain PyTorch calls do not say,
        :class:`PrecisionError` for another precision than fp32, fp16 and bf16, and :class:`EquivalenceError` where a bit differs.
        """
        options = options or ExportOptions()
        options.require_precision(self.name, FLOATS)
        for place, value in enumerate(example):
            if not isinstance(value, Tensor):
                raise UsageError(f"pytorch: input {place} is a {type(value).__name__}; the written network takes tensors only.")
        sizes.require_free_axes(module, example, options)
        path = Path(path)
        text, tensors = written(module, example, [options.dynamic_axes(value.shape) for value in example])
        path.write_text(text, encoding="utf-8", newline="\n")
        save_file(tensors, _weights(path), metadata={"format": "pt"})
        shutil.copymode(path, _weights(path))  # which safetensors opens to its owner alone
        outputs = _require_identical(self, module, example, path, options)
        return {"inputs": options.names("input", len(example)), "outputs": options.names("output", outputs)}

    def load(self, path: str | Path, *, device: str = "cpu") -> Process:
        """A callable that runs the file with torch and safetensors in another process, ``*arrays -> [arrays]``.

        device: where it computes; TF32 is off there.

        The source is read before it is run. Raises :class:`EquivalenceError` for one that holds more than a network, and for
        one that does not load.
        """
        require_network(path)
        return Process(path, device)

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every parameter and buffer, by the name that the written modules give it."""
        return {name: as_array(value) for name, value in _loaded(path).items()}

    def inner(self, path: str | Path) -> Inner:
        """The calls inside the source, and their values."""
        require_network(path)
        return source_inner.inner(Path(path), self.weights(path))

    def precision_of(self, path: str | Path) -> dict[str, int]:
        """Convolutions and linear layers by the type of their weight, which is what torch computes them in."""
        weights = [value for name, value in _loaded(path).items() if name.endswith(".weight") and value.dim() >= 2]
        return dict(Counter(str(value.dtype).removeprefix("torch.") for value in weights))

    def runtime(self) -> str:
        """The runtime and its version, "PyTorch 2.13.0"."""
        return f"PyTorch {torch.__version__}"


def _weights(path: str | Path) -> Path:
    path = Path(path)
    return path.with_name(path.name + WEIGHTS)


def require_network(path: str | Path) -> None:
    """Read the source, which may be anybody's, before it is run. Raises :class:`EquivalenceError` for more than a network."""
    try:
        check(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EquivalenceError(f"pytorch: the written file cannot be read: {error}") from error


def _loaded(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(_weights(path))
    except (OSError, SafetensorError) as error:
        raise EquivalenceError(f"pytorch: {_weights(path).name} cannot be read: {str(error).splitlines()[0]}") from error


def _require_identical(
    exporter: PyTorchExporter, module: nn.Module, example: tuple, path: Path, options: ExportOptions
) -> int:
    """Compare every bit of the outputs on the example and on normal inputs of one and three samples; returns their number."""
    run, count = exporter.load(path), 0
    state = {name: _laid_out(value) for name, value in (*module.named_parameters(), *module.named_buffers())}
    for inputs in (example, *_normal(example, options)):
        inputs = tuple(map(_laid_out, inputs))
        with torch.no_grad():
            leaves = pytree.tree_leaves(torch.func.functional_call(module, state, inputs))
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        count = len(wanted)
        try:
            found = run(*(value.numpy(force=True) for value in inputs))
        except RuntimeError as error:
            raise EquivalenceError(f"pytorch: the written file does not run: {str(error).splitlines()[0][:300]}") from error
        if len(found) != len(wanted):
            raise EquivalenceError(f"pytorch: the written file has {len(found)} outputs, the folded network {len(wanted)}.")
        for place, (one, other) in enumerate(zip(found, wanted)):
            expected = other.numpy(force=True)
            if one.shape != expected.shape or one.dtype != expected.dtype or one.tobytes() != expected.tobytes():
                raise EquivalenceError(
                    f"pytorch: output {place} of the written file is not the network's bit for bit; no file was written."
                )
    return count


def _laid_out(value: Tensor) -> Tensor:
    """A copy in memory as the other process gets it: by other strides PyTorch may choose a kernel that rounds otherwise.

    ``contiguous()`` leaves those of a 1x1 convolution's weight, which mean nothing, as a network in channels_last had them.
    """
    return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)


def _normal(example: tuple, options: ExportOptions) -> list[tuple[Tensor, ...]]:
    """The golden inputs of floating networks, in the example's types."""
    if not all(value.is_floating_point() and value.dim() for value in example):
        return []
    batches = BATCHES if "batch" in options.dynamic else (None,)
    shapes = [[[each or value.shape[0], *value.shape[1:]] for value in example] for each in batches]
    return [
        tuple(made.to(value.dtype) for made, value in zip(golden_inputs(shape, seed), example))
        for seed, shape in enumerate(shapes)
    ]
