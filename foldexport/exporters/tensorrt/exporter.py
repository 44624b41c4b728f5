"""TensorRT engines. The module is written as ONNX, that file is proved, and the engine is built from it.

The engine file has nothing in front of it or behind it, so that ``trtexec`` and Triton take it; what else is known goes
into the manifest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor, nn

from foldexport.artifact import sha256
from foldexport.errors import CheckpointError, EquivalenceError, MissingDependencyError, PrecisionError, UsageError
from foldexport.exporters import scales
from foldexport.exporters.onnx import exporter as onnx_format
from foldexport.exporters.options import ExportOptions
from foldexport.exporters.tensorrt import batches, driver, known, layers, messages
from foldexport.exporters.tensorrt import flavour as flavours
from foldexport.exporters.tensorrt.build import build
from foldexport.exporters.tensorrt.engine import Engine, misfit, why_not
from foldexport.exporters.tensorrt.modules import NodeModules, origin
from foldexport.exporters.tensorrt.network import Parsed, Proof, Unsupported, parse, prove, weights
from foldexport.exporters.tensorrt.options import TensorRTOptions
from foldexport.exporters.tensorrt.profile import text

DIFFERENT = "an engine's bytes differ from build to build, also of the same network: keep this file, or its SHA-256"
HALF = {"fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
SHOWN = 3  # unsupported nodes in a message
LOG_LINES = 400  # of the build log in the manifest


class TensorRTExporter:
    """Plain eval-mode modules to TensorRT engines.

    An instance remembers what it built: the layers, the parsed weights, and the hash without which it opens no file.
    """

    name = "tensorrt"
    suffix = ".engine"
    devices = ("cuda",)

    def __init__(self) -> None:
        #: Compares the ONNX file (exporter, path) with the training graph before anything is built; set by
        #: `foldexport.verify.reference.Reference.introduce`, with whether the module is folded: no batch norm is left then.
        self.prove_source: Callable[[Any, Path], Any] | None = None
        self.folded = False
        self._flavour: flavours.Flavour | None = None
        self._known: dict[Path, str] = {}  # SHA-256 of the engines built here
        self._weights: dict[str, np.ndarray] = {}
        self._layers: list[dict[str, Any]] = []
        self._products: dict[str, int] = {}
        self._targets: Any = None
        self._range: list[tuple] = []  # of each input: lowest and highest shape
        self._instead: list[str] = []
        self.source: Any = None

    def export(self, module: nn.Module, example: tuple, path: str | Path, options: ExportOptions | None = None) -> dict[str, Any]:
        """Build an engine of ``module`` at ``path``.

        Raises UsageError (a free input without a profile, operators that the library does not take, anything the
        builder refuses), MissingDependencyError (library or GPU), EquivalenceError (the ONNX file or the parsed network
        does not hold the folded weights), PrecisionError (the engine has no layer in the asked type).
        """
        options = options or ExportOptions(dynamic=())
        wanted = options.tensorrt or TensorRTOptions()
        self._flavour = flavours.require(wanted)
        shapes = _require_profile(example, options)
        path, trt = Path(path), self._flavour.load()
        log = messages.logger(trt)
        log.lines.clear()
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tensorrt-") as folder:
            file = Path(folder) / "network.onnx"
            notes = onnx_format.OnnxExporter().export(module, example, file, options)
            self.source = self._proved(file, shapes, options)
            parsed = self._parsed(file, module, example, options)
            initializers = onnx_format.OnnxExporter().weights(file)
            proof = prove(parsed, initializers, kept=scales.count(module) if self.folded else None)
            self._instead = _instead(self.source, proof)
            self._range = list(zip(*(options.profile.points()[::2] if options.profile else (shapes, shapes)), strict=True))
            self._weights = _by_name(parsed, initializers)
            built = build(parsed, self._flavour, wanted, options.profile, path)
            self._known[path.resolve()] = sha256(path)
            self._targets = built["targets"]
            self._layers = self._report(path, parsed)
            self._products = layers.products(self._layers, parsed.modules)
            record = self._notes(notes, built, options, shapes) | {"network": proof.to_dict()}
            record["onnx"] |= {"sha256": sha256(file)}
            record["log"] = [line.replace(folder, "") for line in messages.kept(log.lines)][-LOG_LINES:]
        self._require_precision(options.precision)
        return record

    def suited(self, module: nn.Module) -> nn.Module:
        """The module with no statistics among the weights of batch norms that only scale, which TensorRT multiplies out."""
        return scales.without_statistics(module)

    def load(self, path: str | Path, *, optimise: bool = True, threads: int = 0) -> Callable[..., list[np.ndarray]]:
        """A callable that runs the engine on the GPU, ``*arrays -> [arrays]``.

        Raises CheckpointError for a file whose SHA-256 no manifest beside it names (an engine is executable code),
        MissingDependencyError where there is no GPU to run it, EquivalenceError when the library refuses the file.
        """
        if threads or not optimise:
            raise UsageError("tensorrt: an engine is optimised when it is built, and has no threads.")
        path = Path(path)
        self._require_known(path)
        reason = self.cannot_run(path)
        if reason:
            raise MissingDependencyError(f"{path.name} cannot be run here: {reason}.")
        return self._open(path).runner()

    def cannot_run(self, path: str | Path) -> str:
        """Why the engine cannot be run on this machine, empty where it can; no more than its header is looked at."""
        reason = why_not()
        told = {"targets": self._targets, "flavour": self._flavour.name if self._flavour else None}
        told = told if self._targets is not None else known.entry(Path(path)) or told
        targets = told["targets"]
        if reason or told["flavour"] != flavours.RTX.name:
            return reason
        gpu = driver.gpu()
        if isinstance(targets, list) and gpu.compute_capability not in targets:
            return f"it was built for {', '.join(targets)}, and the GPU here ({gpu.name}) is {gpu.compute_capability}"
        why = misfit(flavours.RTX.load(), Path(path))
        return f"{flavours.RTX.title} does not take it on this {gpu.name}, {gpu.compute_capability} ({why})" if why else ""

    def weights(self, path: str | Path) -> dict[str, np.ndarray]:
        """Kernels, biases and constants of the network that the engine was built from, as TensorRT parsed them."""
        if Path(path).resolve() not in self._known:
            raise UsageError(f"{Path(path).name}: weights cannot be read out of an engine, only when it is built.")
        return self._weights

    def precision_of(self, path: str | Path) -> dict[str, int]:
        """Convolutions and matrix products in each number type, ``{"float16": 20}``, read back from the built engine.

        All layers with weights, where the engine was not built here and its graph is not known.
        """
        if Path(path).resolve() in self._known:
            return self._products
        self.load(path)
        found = layers.from_inspector(self._open(Path(path)).inspect(), NodeModules(onnx.ModelProto()))
        return layers.types(each for each in found if each["weights"] > 1)

    def takes(self, inputs: tuple) -> bool:
        """Whether the engine's profile covers the inputs' sizes; batches outside of it go through in parts."""
        sizes = [tuple(value.shape) for value in inputs if isinstance(value, Tensor)]
        return len(sizes) == len(self._range) and all(
            len(size) == len(low) and all(a <= b <= c for a, b, c in zip(low[1:], size[1:], high[1:], strict=True))
            for size, (low, high) in zip(sizes, self._range, strict=True)
        )

    def proved_instead(self) -> list[str]:
        """What was proved of an engine that cannot be run here."""
        return self._instead

    def runtime(self) -> str:
        """The library, its version and what it built for: "TensorRT-RTX 1.7.1.116 for 8.6, 8.9, 12.0"."""
        flavour = self._flavour or flavours.choose(TensorRTOptions())
        targets = f" for {', '.join(self._targets)}" if isinstance(self._targets, list) else ""
        return f"{flavour.title} {flavour.version()}{targets}"

    def _proved(self, file: Path, shapes: list[tuple[int, ...]], options: ExportOptions) -> Any:
        """The comparison of the ONNX file with the training graph. Raises EquivalenceError where it fails."""
        if self.prove_source is None:
            return None
        exporter: Any = onnx_format.OnnxExporter()
        if "batch" not in options.dynamic and shapes and shapes[0]:
            exporter = batches.Fitted(exporter, shapes[0][0])
        found = self.prove_source(exporter, file)
        if not found.ok:
            said = f"the ONNX file to build from, run by {found.runtime}: {found.message}"
            raise EquivalenceError(f"tensorrt: {said}; nothing was built.")
        return found

    def _parsed(self, file: Path, module: nn.Module, example: tuple, options: ExportOptions) -> Parsed:
        assert self._flavour is not None
        found = parse(self._flavour.load(), file)
        if isinstance(found, Parsed):
            return found
        scopes = partial(onnx_format.scopes, module, example, options)
        raise UsageError(self._refusal(found, file, module, scopes))

    def _refusal(self, found: list[Unsupported], file: Path, module: nn.Module, scopes: Callable) -> str:
        assert self._flavour is not None
        modules = NodeModules(onnx.load(str(file), load_external_data=False))
        said = []
        for each in found[:SHOWN]:
            where = origin(each.node, module, scopes, modules)
            reason = f": {each.reason}" if " " in each.reason else ""
            said.append(f"{each.operator} ({', '.join(filter(None, (f'node {each.node!r}', where)))}){reason[:150]}")
        more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return (
            f"tensorrt: {self._flavour.title} {self._flavour.version()} does not take {'; '.join(said)}{more}. "
            "Nothing was built: export to onnx, or take the operator out of the network."
        )

    def _report(self, path: Path, parsed: Parsed) -> list[dict[str, Any]]:
        """Layers of the built engine: from the log, else from the engine itself where it can be opened."""
        found = layers.from_log(parsed.log.lines, parsed.modules)
        if found or self.cannot_run(path):
            return found
        return layers.from_inspector(self._open(path).inspect(), parsed.modules)

    def _notes(self, source: dict[str, Any], built: dict[str, Any], options: ExportOptions, shapes: list) -> dict[str, Any]:
        assert self._flavour is not None
        trt = self._flavour.load()
        points = options.profile.points() if options.profile else (shapes, shapes, shapes)
        profile = {
            name: {"min": list(low), "opt": list(middle), "max": list(high)}
            for name, low, middle, high in zip(source["inputs"], *points, strict=True)
        }
        reason = driver.why_none()
        gpu = None if reason else vars(driver.gpu())
        return {
            "inputs": source["inputs"], "outputs": source["outputs"],
            "flavour": self._flavour.name, "library": f"{self._flavour.title} {trt.__version__}",
            "gpu": gpu or f"none ({reason})", **built,
            "profiles": [profile], "layer_types": layers.types(self._layers), "layers": self._layers,
            "onnx": {key: source[key] for key in ("opset", "ir_version", "nodes", "onnxsim")}
            | {"comparison": self.source.to_dict() if self.source is not None else None},
            "warning": DIFFERENT,
        }  # fmt: skip

    def _require_precision(self, asked: str) -> None:
        """Raise PrecisionError where the engine's own layers do not show the asked type."""
        name = HALF.get(asked, "float32")
        if self._products and name not in self._products:
            there = ", ".join(f"{count} in {kind}" for kind, count in self._products.items())
            raise PrecisionError(f"tensorrt: asked for {asked}, but no convolution of the engine computes in it ({there}).")

    def _require_known(self, path: Path) -> None:
        """Raise CheckpointError unless the file is what was built here, or what a manifest beside it names."""
        digest = sha256(path)
        if self._known.get(path.resolve()) == digest:
            return
        entry = known.entry(path)
        if entry is None or digest not in entry["sha256"]:
            what = "differs from the one in its manifest" if entry else f"is in no manifest beside it ({known.MANIFESTS})"
            raise CheckpointError(f"{path.name}: its SHA-256 {what}; an engine is executable code, so it is not opened.")
        self._flavour = flavours.FLAVOURS.get(entry["flavour"], self._flavour)
        self._targets = entry["targets"]
        if self._flavour is not None and not self._flavour.module():
            raise MissingDependencyError(f"{path.name} is a {self._flavour.title} engine: {self._flavour.install}")

    def _open(self, path: Path) -> Engine:
        flavour = self._flavour or flavours.choose(TensorRTOptions())
        return Engine(flavour.load(), path)


def _instead(source: Any, proof: Proof) -> list[str]:
    """The ONNX file's own proof and the parsed network's, in words for the proof line."""
    said = []
    if source is not None:
        said.append(f"its ONNX in {source.runtime}: {source.error}")
    left = "no SCALE layer" if not proof.scale else f"SCALE layers: {len(proof.scale)}"
    said.append(f"parsed network: {proof.identical} weights bit for bit, {left}")
    if proof.unreadable:
        said.append(f"{len(proof.unreadable)} bf16 weights compared in the ONNX file only")
    return said


def _by_name(parsed: Parsed, initializers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of the parsed network; bfloat16, which TensorRT's Python API does not hand over, as the ONNX file has it."""
    found = {each.name or f"{each.layer} {each.role}": each for each in weights(parsed)}
    values = {name: each.values if each.values is not None else initializers.get(name) for name, each in found.items()}
    return {name: value for name, value in values.items() if value is not None}


def _require_profile(example: tuple, options: ExportOptions) -> list[tuple[int, ...]]:
    """Shapes of the inputs. Raises UsageError for free axes without a profile, and for one that does not fit."""
    shapes = [tuple(value.shape) for value in example if isinstance(value, Tensor)]
    names = options.names("input", len(shapes))
    if options.profile is not None:
        options.profile.check(names, shapes, options.dynamic)
    elif any(options.dynamic_axes(shape) for shape in shapes):
        place = next(place for place, shape in enumerate(shapes) if options.dynamic_axes(shape))
        free = " and ".join(options.dynamic_axes(shapes[place]).values())
        raise UsageError(
            f"tensorrt: the {free} of input {names[place]!r} ({text(shapes[place])}) is to be free, and an engine needs to know "
            "its range: pass --min-shape, --opt-shape and --max-shape, or --dynamic none."
        )
    return shapes
