"""The ONNX file as TensorRT parses it, and the proof that the parsed network holds the folded weights.

This is what can be proved of an engine where there is no GPU to run it: the builder starts from exactly this network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from foldexport.errors import EquivalenceError, UsageError
from foldexport.exporters.tensorrt import messages
from foldexport.exporters.tensorrt.modules import NodeModules, onnx_nodes


@dataclass(frozen=True)
class Unsupported:
    """A node that the library does not take."""

    node: str
    operator: str
    reason: str


@dataclass(eq=False)
class Parsed:
    """A parsed network and everything that it refers to: TensorRT's objects do not keep each other alive."""

    trt: ModuleType
    log: Any
    builder: Any
    network: Any
    parser: Any
    modules: NodeModules
    kept: tuple = ()

    def layers(self) -> Iterator[Any]:
        for place in range(self.network.num_layers):
            yield self.network.get_layer(place)

    def inputs(self) -> list[Any]:
        return [self.network.get_input(place) for place in range(self.network.num_inputs)]


@dataclass(frozen=True)
class Weight:
    """One weight of a parsed layer: its name in the ONNX file ("" where it has none there) and its values.

    values: None where the Python API cannot hand them over (bfloat16).
    """

    layer: str
    role: str
    name: str
    values: np.ndarray | None


@dataclass(frozen=True)
class Proof:
    """What was compared: weights equal bit for bit, those that cannot be read back, and SCALE layers."""

    identical: int
    unreadable: tuple[str, ...]
    scale: tuple[str, ...]
    layers: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": self.layers, "weights_identical": self.identical, "weights_not_readable": list(self.unreadable),
            "scale_layers": list(self.scale),
        }  # fmt: skip


def parse(trt: ModuleType, file: Path) -> Parsed | list[Unsupported]:
    """The network of an ONNX file, or the nodes that it is refused for. Raises UsageError for any other refusal, and
    MissingDependencyError where the library does not start here.
    """
    log = messages.logger(trt)
    proto = onnx.load(str(file), load_external_data=False)
    data = file.read_bytes()
    builder = messages.made(trt.Builder, log)
    refused = _refused(trt, builder, log, data, file)
    if refused:
        return refused
    network = builder.create_network(_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(data, str(file)):
        failed = _failures(parser)
        if any(each.operator for each in failed):
            return failed
        said = "; ".join(each.reason for each in failed) or "; ".join(messages.errors(log.lines)) or "no reason given"
        raise UsageError(f"tensorrt: the parser refuses the network: {said[:300]}")
    return Parsed(trt, log, builder, network, parser, NodeModules(proto), kept=(data,))


def _flags(trt: ModuleType) -> int:
    """Types as the ONNX graph says them: TensorRT 11 knows nothing else, 10 has to be told."""
    known = trt.NetworkDefinitionCreationFlag.__members__
    return 1 << int(known["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in known else 0


def _refused(trt: ModuleType, builder: Any, log: Any, data: bytes, file: Path) -> list[Unsupported]:
    """Every node that the parser's own check refuses: parsing would stop at the first."""
    network = builder.create_network(_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not hasattr(parser, "supports_model_v2"):  # TensorRT 10.0: parsing names the first
        return []
    before = len(log.lines)
    supported = parser.supports_model_v2(data, str(file))
    found = [] if supported else _failures(parser)
    del log.lines[before:]  # the same lines come again from parsing
    return found


def _failures(parser: Any) -> list[Unsupported]:
    errors = [parser.get_error(place) for place in range(parser.num_errors)]
    return [Unsupported(each.node_name(), each.node_operator(), each.desc().strip()) for each in errors]


def weights(parsed: Parsed) -> list[Weight]:
    """Kernels and biases of convolutions, γ and β of batch norms that only scale, and every constant: linear layers and clamps
    read theirs from constants."""
    trt, kinds = parsed.trt, parsed.trt.LayerType
    found = []
    for layer in parsed.layers():
        if layer.type in (kinds.CONVOLUTION, kinds.DECONVOLUTION):
            layer.__class__ = trt.IConvolutionLayer if layer.type == kinds.CONVOLUTION else trt.IDeconvolutionLayer
            found += _of(parsed, layer, ("kernel", "bias"))
        elif layer.type == kinds.SCALE:
            layer.__class__ = trt.IScaleLayer
            found += _of(parsed, layer, ("scale", "shift"))
        elif layer.type == kinds.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            found.append(Weight(layer.name, "constant", layer.name, _array(layer.weights)))
    return found


def _of(parsed: Parsed, layer: Any, roles: Sequence[str]) -> list[Weight]:
    """Its weights, the node's inputs from the second on; one that comes from another layer (quantised) is among the constants."""
    node = (onnx_nodes(layer.metadata) or [layer.name])[0]
    inputs = parsed.modules.inputs.get(node, [])
    found = []
    for place, role in enumerate(roles, 1):
        values = _array(getattr(layer, role))
        if values is None or values.size:
            found.append(Weight(layer.name, role, inputs[place] if place < len(inputs) else "", values))
    return found


def _array(values: Any) -> np.ndarray | None:
    """An array of its own, in the bits that the library holds."""
    if isinstance(values, np.ndarray):
        return values.copy()
    return np.empty(0, np.float32) if values is None or values.size == 0 else None


def prove(parsed: Parsed, initializers: Mapping[str, np.ndarray], *, kept: int | None = 0) -> Proof:
    """Compare every weight of the parsed network with the ONNX file's, bit for bit; no batch norm may be left but the ``kept``.

    initializers: of the ONNX file, which was compared with the folded module before. kept: batch norms that the fold left where
    they stood, for the reasons in its ledger; None for a network that was not folded, whose batch norms multiply their
    statistics out.

    Raises EquivalenceError naming the user's module.
    """
    identical, unreadable = 0, []
    scale = tuple(layer.name for layer in parsed.layers() if layer.type == parsed.trt.LayerType.SCALE)
    if kept is not None and len(scale) > kept:
        raise EquivalenceError(
            f"tensorrt: {len(scale)} SCALE layer{'s' if len(scale) > 1 else ''} in the parsed network, the first "
            f"{_where(scale[0], parsed)}: a batch norm was left that should have been folded; no file was written."
        )
    for weight in weights(parsed):
        if kept is None and weight.role in ("scale", "shift"):
            continue
        wanted = _wanted(weight, initializers)
        if weight.values is None:
            unreadable.append(weight.name or weight.layer)
            continue
        if wanted is None or wanted.dtype != weight.values.dtype:  # made by the parser itself, or converted: not a weight
            continue
        _require_equal(weight, wanted, parsed)
        identical += 1
    return Proof(identical, tuple(unreadable), scale, parsed.network.num_layers)


def _wanted(weight: Weight, initializers: Mapping[str, np.ndarray]) -> np.ndarray | None:
    if weight.name in initializers:
        return initializers[weight.name]
    base, _, number = weight.name.rpartition("_")  # a second layer over one initializer is numbered
    return initializers.get(base) if number.isdigit() else None


def _require_equal(weight: Weight, wanted: np.ndarray, parsed: Parsed) -> None:
    wanted, found = np.ascontiguousarray(wanted).reshape(-1), np.ascontiguousarray(weight.values).reshape(-1)
    if wanted.size == found.size and np.array_equal(_bits(wanted), _bits(found)):
        return
    which = f"{weight.role} of {_where(weight.layer, parsed)}" if weight.role != "constant" else f"`{weight.name}`"
    if wanted.size != found.size:
        raise EquivalenceError(f"tensorrt: {which} has {found.size} values in the parsed network, {wanted.size} in the folded one.")
    size = wanted.dtype.itemsize
    differ = int((_bits(wanted).reshape(-1, size) != _bits(found).reshape(-1, size)).any(axis=1).sum())
    raise EquivalenceError(
        f"tensorrt: {which} differs in {differ} of {wanted.size} values between the parsed network and the folded one; "
        "no file was written."
    )


def _where(layer: str, parsed: Parsed) -> str:
    module = parsed.modules.of(layer)
    return f"`{module}`" if module else f"{layer!r}"


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint8)
