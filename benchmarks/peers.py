"""What others fold: one function for each peer, from the same network in eval mode to what can be counted or run.

reparameterized: timm's ``reparameterize_model``, or the network's own method.    fx_fused: ``torch.fx``'s fusion.
onnx_file, simplified: ``torch.onnx`` with its own optimiser, and onnxsim behind it.    openvino_model: OpenVINO's converter.
Each raises what the peer raises. What only one of them needs is imported where it is needed.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from foldexport.exporters.onnx.exporter import quiet

METHODS = ("reparameterize", "fuse", "switch_to_deploy")
OPSET = 21  # the first with group norm as one operator, so that none of its own steps is taken for one of the network's


def has_method(network: nn.Module) -> list[str]:
    """Names of the classes in ``network`` that bring a method of their own for what folding does."""
    return sorted({type(module).__name__ for module in network.modules() if any(hasattr(module, name) for name in METHODS)})


def reparameterized(network: nn.Module) -> nn.Module:
    """By timm's walk over the modules; where the network has a method for the whole of it, by that."""
    from timm.utils import reparameterize_model

    for name in METHODS:
        if callable(getattr(network, name, None)):
            found = copy.deepcopy(network)
            return (getattr(found, name)() or found).eval()
    return reparameterize_model(network).eval()


def fx_fused(network: nn.Module) -> torch.fx.GraphModule:
    """``torch.fx.experimental.optimization.fuse``: batch norm behind a convolution or a linear layer."""
    from torch.fx.experimental.optimization import fuse

    return fuse(copy.deepcopy(network))


def onnx_program(network: nn.Module, example: Tensor, *, optimise: bool, opset: int = OPSET) -> torch.onnx.ONNXProgram:
    """``torch.onnx.export``; optimise: with what it folds by default, else the graph as it is in the network."""
    with quiet(), torch.no_grad():
        return torch.onnx.export(network, (example,), dynamo=True, optimize=optimise, opset_version=opset, verbose=False)


def simplified(proto):
    """What onnxsim makes of an ONNX graph, with its default settings."""
    import onnxsim

    found, _ = onnxsim.simplify(proto)
    return found


def openvino_model(path: Path):
    """OpenVINO's model of an ONNX file after its converter and the transformations that fold (its offline "MOC" set)."""
    os.environ.setdefault("CI", "true")  # the converter otherwise reports its use
    import openvino
    from openvino._offline_transformations import apply_moc_transformations

    model = openvino.convert_model(str(path))
    apply_moc_transformations(model, cf=True)
    return model
