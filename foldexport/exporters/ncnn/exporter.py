"""ncnn: PNNX turns a trace into ncnn's two files, which take one sample at a time.

PNNX is a program of its own that writes eight files beside the trace; two of them are the network. Its trace holds local paths, the
two files do not.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from foldexport import threads as shared
from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters import asked, places, sizes
from foldexport.exporters.inner import Inner
from foldexport.exporters.ncnn import clamps as ncnn_clamps
from foldexport.exporters.ncnn import file as ncnn_file
from foldexport.exporters.ncnn import inner as ncnn_inner
from foldexport.exporters.ncnn.file import ARRAY_KEY, UNREAD, Blob, Layer, Unreadable
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.silence import silenced
from foldexport.exporters.widened import halves, widened

BINARY = ".ncnn.bin"
SECONDS = 3600  # that PNNX may take
FOREIGN = re.compile(r"\w*[.:]|[a-z]")  # an operator that PNNX left as PyTorch's: F.rrelu, Tensor.slice, aten::foo, pnnx.Expression


class NcnnExporter:
    """Plain eval-mode modules to ncnn's ``.param`` and ``.bin``."""

    name = "ncnn"
    suffix = ".ncnn.param"

    def export(
        self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None
    ) -> dict[str, Any]:
        """Write ``module`` to ``path``, ``NAME.ncnn.param``, and ``NAME.ncnn.bin``; equal modules give equal bytes.

        Inputs and outputs are called as PNNX calls them, ``in0`` and ``out0``. In fp16 kernels are stored as halves and biases
        as float32, as ncnn reads them.

        Returns notes for the manifest. Raises :class:`UsageError` for a batch that is not free, for operators that ncnn does
        not have, and for a size that cannot be left free; :class:`PrecisionError` for another precision than fp32 and fp16.
        """
        options = options or ExportOptions()
        asked.require(self.name, example, options, axes=("batch", "height", "width"))
        if "batch" not in options.dynamic and asked.batch_of(example) != 1:
            raise UsageError(
                f"ncnn: a network takes one sample at a time, and a batch of {asked.batch_of(example)} is fixed here: pass "
                "--input-shape with a batch of 1."
            )
        sizes.require_free_axes(module, example, options)
        path, one = Path(path), asked.at_batch(example, 1)
        wide = ncnn_clamps.separated(widened(module))
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".ncnn-") as folder, torch.no_grad():
            param, binary = _converted(wide, tuple(value.float() for value in one), Path(folder), options)
            path.write_bytes(param.read_bytes())
            found = _read(path, binary)
            content = ncnn_file.written(_halved(found, module)) if options.precision == "fp16" else binary.read_bytes()
            _binary(path).write_bytes(content)
        layers = ncnn_file_layers(path)
        inputs, outputs = _ends(layers)
        return {
            "inputs": inputs, "outputs": outputs, "batch": 1, "layers": len(layers), "pnnx": importlib.metadata.version("pnnx"),
            "run": "without Winograd's algorithm (use_winograd_convolution), which ncnn takes by default and which rounds more",
        }  # fmt: skip

    def load(self, path: str | Path, *, winograd: bool = False, threads: int = 0) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the files in ncnn on the CPU, sample by sample, ``*arrays -> [arrays]``.

        winograd: convolutions by Winograd's algorithm up to F(4, 3); ncnn's own default goes up to F(6, 3), which rounds several
        times as much as float32 does. threads: 0 for ncnn's default. A file in float32 is computed in float32; ncnn's default
        would round activations to halves where the processor can. Raises :class:`EquivalenceError` when ncnn refuses the files.
        """
        net, (inputs, outputs) = self._net(Path(path), winograd, threads), _ends(ncnn_file_layers(Path(path)))
        return lambda *arrays: _samples(net, inputs, outputs, arrays)

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Every weight of the ``.bin``, by layer and role, in PyTorch's order of elements."""
        path = Path(path)
        found = _read(path, _binary(path))
        slopes = {f"{each.name}.0.slope": np.array(_slope(each), "<f4") for each in ncnn_file_layers(path) if _slope(each)}
        return slopes | {f"{each.layer.name}.{place}.{each.role}": _in_order(each) for place, each in enumerate(found)}

    def inner(self, path: str | Path) -> Inner:
        """The layers inside the files, and their values."""
        path = Path(path)
        net, found = self._net(path), ncnn_file_layers(path)
        inputs, outputs = _ends(found)
        return ncnn_inner.inner(
            found, self.weights(path), inputs, outputs, lambda names, arrays: _samples(net, inputs, names, arrays)
        )

    def float32_bytes(self, path: str | Path) -> int:
        """Of weights that ncnn stores as float32 always: all but the kernels of convolutions and linear layers."""
        return sum(each.values.nbytes for each in _read(Path(path), _binary(path)) if not each.tagged)

    def runtime(self) -> str:
        """The runtime and its version, "ncnn 1.0.20261020"."""
        return f"ncnn {importlib.metadata.version('ncnn')}"

    def _net(self, path: Path, winograd: bool = False, threads: int = 0) -> Any:
        """Raises :class:`EquivalenceError` when ncnn refuses the files."""
        import ncnn

        half = any(each.values.dtype == np.float16 for each in _read(path, _binary(path)))
        net = ncnn.Net()
        net.opt.use_vulkan_compute = False
        net.opt.use_bf16_storage = False
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = half
        net.opt.use_winograd_convolution, net.opt.use_winograd63_convolution = winograd, False
        if threads or shared.share():
            net.opt.num_threads = threads or shared.share()
        with silenced() as said:
            failed = net.load_param(str(path)) or net.load_model(str(_binary(path)))
        if failed:
            raise EquivalenceError(f"ncnn: {self.runtime()} refuses the files: {said.reason()}")
        return net


def _binary(path: str | Path) -> Path:
    path = Path(path)
    return path.with_name(path.name.removesuffix(NcnnExporter.suffix) + BINARY)


def ncnn_file_layers(path: Path) -> list[Layer]:
    try:
        return ncnn_file.layers(path)
    except (OSError, Unreadable, UnicodeDecodeError) as error:
        raise EquivalenceError(f"ncnn: {error}") from error


def _read(path: Path, binary: Path) -> list[Blob]:
    try:
        return ncnn_file.blobs(path, binary)
    except (OSError, Unreadable, UnicodeDecodeError, KeyError) as error:
        raise EquivalenceError(f"ncnn: {error}") from error


def _converted(module: nn.Module, example: tuple, folder: Path, options: ExportOptions) -> tuple[Path, Path]:
    """What PNNX makes of a trace: paths of the graph and of the weights, in ``folder``."""
    import pnnx

    shapes = "inputshape=" + _shapes(example)
    with silenced() as said:
        try:
            torch.jit.save(torch.jit.trace(module, example, check_trace=False, strict=False), str(folder / "net.pt"))
        except Exception as error:  # the tracer passes on whatever the module's forward or its own C++ raised
            raise UsageError(f"ncnn: torch.jit cannot trace this network: {said.reason(error)}") from error
    command = [pnnx.EXEC_PATH, "net.pt", shapes, "device=cpu", "fp16=0", "optlevel=2"]
    if {"height", "width"} & set(options.dynamic):
        command.append("inputshape2=" + _shapes(tuple(_larger(value, options) for value in example)))
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    param, binary = folder / "net.ncnn.param", folder / "net.ncnn.bin"
    if ran.returncode or not param.is_file() or not binary.is_file():
        lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else f"it ended with {ran.returncode}"
        raise UsageError(f"ncnn: pnnx cannot convert this network: {reason}; export to onnx.")
    left = sorted({layer.kind for layer in ncnn_file_layers(param) if FOREIGN.match(layer.kind)})
    if left:
        raise UsageError(f"ncnn: has no {places.named(module, left)}: export to onnx, or take the operator out of the network.")
    unread = sorted({layer.kind for layer in ncnn_file_layers(param) if layer.kind in UNREAD})
    if unread:
        its = places.named(module, unread)
        raise UsageError(f"ncnn: keeps the weights of its {its} in an order that cannot be compared: export to onnx.")
    return param, binary


def _shapes(example: tuple) -> str:
    return ",".join(f"[{','.join(map(str, value.shape))}]f32" for value in example)


def _larger(value: torch.Tensor, options: ExportOptions) -> torch.Tensor:
    for name in ("height", "width"):
        value = sizes._resized(value, name, options)
    return value


def _halved(found: list[Blob], module: nn.Module) -> list[Blob]:
    """The weights with those kernels as halves that the module holds as halves."""
    known = {value.float().numpy(force=True).size for value in halves(module).values()}
    values = {np.sort(value.float().numpy(force=True), axis=None).tobytes() for value in halves(module).values()}
    return [
        Blob(each.layer, each.role, each.values.astype("<f2"), True)
        if each.tagged and each.values.size in known and np.sort(each.values, axis=None).tobytes() in values
        else each
        for each in found
    ]


def _slope(layer: Layer) -> list[float]:
    """That of a leaky ReLU, by itself or a part of its layer: PNNX writes a PReLU with one slope so, into the ``.param``."""
    if layer.kind == "ReLU":
        return [float(layer.keys[0])] if 0 in layer.keys else []
    leaky = ncnn_inner.ACTIVATIONS.get(layer.keys.get(ncnn_inner.ACTIVATION, 0)) == "leaky_relu"
    if layer.kind not in ncnn_inner.FUSING or not leaky:
        return []
    return [float(each) for each in str(layer.keys.get(ARRAY_KEY - 10, "")).split(",")[1:2]]


def _ends(layers: list[Layer]) -> list[list[str]]:
    """Names of the inputs and outputs, in the order of the module's: PNNX calls them ``in0``, ``in1``, …, ``out0``, …"""
    names = {name for layer in layers for name in layer.outputs}
    return [sorted((name for name in names if re.fullmatch(rf"{kind}\d+", name)), key=_number) for kind in ("in", "out")]


def _number(name: str) -> int:
    return int(name.lstrip("inout"))


def _require_batches(arrays: Sequence[np.ndarray], count: int) -> None:
    if len(arrays) != count or len({len(array) for array in arrays}) != 1:
        raise ValueError(f"it takes {count} inputs of one batch, not shapes {', '.join(str(list(a.shape)) for a in arrays)}")


def _samples(net: Any, inputs: Sequence[str], names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Blobs of these names, for all samples of the batch."""
    _require_batches(arrays, len(inputs))
    samples = [_sample(net, inputs, names, [array[at] for array in arrays]) for at in range(len(arrays[0]))]
    return [np.stack(values) for values in zip(*samples, strict=True)]


def _sample(net: Any, inputs: Sequence[str], outputs: Sequence[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Blobs ``outputs`` for one sample. ``ncnn.Mat`` borrows an array's memory, so each is held until it has been copied."""
    import ncnn

    with net.create_extractor() as extractor:
        for name, array in zip(inputs, arrays, strict=True):
            held = np.ascontiguousarray(array, dtype=np.float32)
            if extractor.input(name, ncnn.Mat(held).clone()):
                raise ValueError(f"ncnn refuses input {name!r} of shape {list(array.shape)}")
        found = []
        for name in outputs:
            failed, value = extractor.extract(name)
            if failed:
                raise ValueError(f"ncnn cannot compute {name!r}")
            found.append(np.array(value, dtype=np.float32))
        return found


def _in_order(blob: Blob) -> np.ndarray:
    """A deconvolution's kernel ``[g, out/g, in/g, k]`` as PyTorch has it, ``[g, in/g, out/g, k]``; others as they are."""
    if blob.role != "weight" or not blob.layer.kind.startswith("Deconvolution"):
        return blob.values
    keys = blob.layer.keys
    groups, outputs, kernel = keys.get(7, 1), keys[0], keys[1] * (1 if blob.layer.kind.endswith("1D") else keys.get(11, keys[1]))
    kernel *= keys.get(21, keys[1]) if blob.layer.kind.endswith("3D") else 1
    shaped = blob.values.reshape(groups, outputs // groups, -1, kernel)
    return np.ascontiguousarray(shaped.swapaxes(1, 2)).reshape(-1)
