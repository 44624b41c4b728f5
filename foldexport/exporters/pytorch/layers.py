"""One ``torch.nn`` layer as the text of its constructor, or as the functional call that computes the same."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
from torch import Tensor, nn

from foldexport.errors import UsageError

SKIPPED = ("device", "dtype", "inplace", "init", "args", "kwargs")  # of constructors: none of them is in what is written
INFINITE = {"inf": 'float("inf")', "-inf": '-float("inf")', "nan": 'float("nan")'}


def literal(value: Any) -> str:
    """A number, text, type or nest of them as Python source. Raises UsageError for anything else."""
    if isinstance(value, list | tuple):
        inner = ", ".join(map(literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, float):
        return INFINITE.get(repr(value), repr(value))
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool | int | complex | torch.dtype | torch.memory_format | torch.layout):
        return repr(value)
    if value is Ellipsis:
        return "..."
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    raise UsageError(f"pytorch: a {type(value).__name__} among arguments has no plain source; use onnx or torchscript.")


def constructor(layer: nn.Module, where: str) -> str:
    """``nn.Conv2d(3, 8, 3, padding=1)``: arguments at their defaults left out, equal lengths written once.

    Raises UsageError, naming the layer, for one that is not of torch.nn.
    """
    name = type(layer).__name__
    if getattr(nn, name, None) is not type(layer) or any(True for _ in layer.children()):
        raise UsageError(
            f"pytorch: `{where}` is a {type(layer).__module__}.{name}, not a layer of torch.nn, so its source would not be plain "
            "PyTorch; use onnx or torchscript."
        )
    positional, named = [], []
    for parameter in inspect.signature(type(layer).__init__).parameters.values():
        if parameter.name in ("self", *SKIPPED) or not hasattr(layer, parameter.name):
            continue
        if parameter.name == "bias" and not getattr(layer, "elementwise_affine", True):
            continue  # a layer norm without weights has no bias to leave out
        value = _argument(layer, parameter.name)
        if parameter.default is inspect.Parameter.empty:
            positional.append(literal(value))
        elif not _is_default(layer, parameter, value):
            named.append(f"{parameter.name}={literal(value)}")
    dtype = next((each.dtype for each in layer.parameters() if each.is_floating_point()), torch.float32)
    if dtype != torch.float32:
        named.append(f"dtype={dtype}")
    return f"nn.{name}({', '.join(positional + named)})"


def _argument(layer: nn.Module, name: str) -> Any:
    value = getattr(layer, name)
    if name == "bias":
        return value is not None and value is not False
    if isinstance(value, torch.Size):
        value = tuple(value)
    rank = next((int(each) for each in type(layer).__name__ if each.isdigit()), 0)
    tuples = isinstance(value, tuple) and len(value) in (rank, 1 if name == "normalized_shape" else rank)
    pads = name == "padding" and "Pad" in type(layer).__name__ and isinstance(value, tuple)
    return value[0] if (tuples or pads) and len(set(value)) == 1 else value


def _is_default(layer: nn.Module, parameter: inspect.Parameter, value: Any) -> bool:
    if parameter.name == "stride" and parameter.default is None:  # a pool's stride is its window
        return value is None or value == _argument(layer, "kernel_size")
    return value == parameter.default and type(value) in (type(parameter.default), int, float, bool)


def functional(layer: nn.Module, operand: str) -> str | None:
    """The call that a layer without weights makes, ``F.relu(x)``; None where only the layer itself says it."""
    if getattr(layer, "inplace", False):
        return None
    kind = type(layer).__name__
    if type(layer) is nn.Identity:
        return operand
    if type(layer) in CALLS:
        name, *attributes = CALLS[type(layer)]
        values = [getattr(layer, each) for each in attributes]
        return f"{name}({', '.join([operand, *map(literal, values)])})"
    if type(layer) in (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d):
        value = f", value={literal(layer.value)}" if layer.value else ""
        return f"F.pad({operand}, {literal(tuple(layer.padding))}{value})"
    if kind.startswith("MaxPool") and type(layer) is getattr(nn, kind, None) and not layer.return_indices:
        return f"F.max_pool{kind[-2]}d({_window(layer, operand)})"
    if kind.startswith("AdaptiveAvgPool") and type(layer) is getattr(nn, kind, None):
        return f"F.adaptive_avg_pool{kind[-2]}d({operand}, {literal(_argument(layer, 'output_size'))})"
    if kind.startswith("AvgPool") and type(layer) is getattr(nn, kind, None):
        return f"F.avg_pool{kind[-2]}d({_window(layer, operand)})"
    if type(layer) is nn.Flatten:
        end = "" if layer.end_dim == -1 else f", {layer.end_dim}"
        return f"torch.flatten({operand}, {layer.start_dim}{end})"
    return None


def _window(layer: nn.Module, operand: str) -> str:
    """A pool's arguments, with the names of its layer, which the function shares."""
    arguments = constructor(layer, "").partition("(")[2].removesuffix(")")
    return f"{operand}, {arguments}"


CALLS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("F.relu",),
    nn.ReLU6: ("F.relu6",),
    nn.Hardtanh: ("F.hardtanh", "min_val", "max_val"),
    nn.LeakyReLU: ("F.leaky_relu", "negative_slope"),
    nn.ELU: ("F.elu", "alpha"),
    nn.SELU: ("F.selu",),
    nn.SiLU: ("F.silu",),
    nn.Mish: ("F.mish",),
    nn.Hardswish: ("F.hardswish",),
    nn.Hardsigmoid: ("F.hardsigmoid",),
    nn.Sigmoid: ("torch.sigmoid",),
    nn.Tanh: ("torch.tanh",),
    nn.Softmax: ("F.softmax", "dim"),
    nn.LogSoftmax: ("F.log_softmax", "dim"),
    nn.PixelShuffle: ("F.pixel_shuffle", "upscale_factor"),
    nn.PixelUnshuffle: ("F.pixel_unshuffle", "downscale_factor"),
}


def declared(tensor: Tensor) -> str:
    """``torch.zeros(8, 1, 1)``: a tensor of this shape and type, to be filled from the file."""
    shape = ", ".join(map(str, tensor.shape)) if tensor.dim() else "()"
    dtype = "" if tensor.dtype == torch.float32 else f", dtype={tensor.dtype}"
    return f"torch.zeros({shape}{dtype})"
