"""ATen calls that a ``torch.nn`` layer makes: the folded module then reads as the user would have written it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from foldexport.fold.emitter import Operand


def _pool(kind: str) -> Callable[[dict], nn.Module]:
    def make(args: dict) -> nn.Module:
        stride = args["stride"] or None
        rank = len(args["kernel_size"])
        square = lambda value: value[0] if len(set(value)) == 1 else tuple(value)  # noqa: E731 - as a user writes it
        window = (square(args["kernel_size"]), square(stride) if stride else None, square(args["padding"]))
        if kind == "max":
            layer = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[rank - 1]
            return layer(*window, dilation=square(args["dilation"]), ceil_mode=args["ceil_mode"])
        layer = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[rank - 1]
        extra = {"divisor_override": args["divisor_override"]} if rank > 1 else {}
        return layer(*window, ceil_mode=args["ceil_mode"], count_include_pad=args["count_include_pad"], **extra)

    return make


def _adaptive(layers: dict[int, type[nn.Module]]) -> Callable[[dict], nn.Module]:
    def make(args: dict) -> nn.Module:
        size = args["output_size"]
        sizes = [size] if isinstance(size, int) else list(size)
        return layers[len(sizes)](sizes[0] if len(set(sizes)) == 1 else tuple(sizes))

    return make


_AVERAGES = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def _softmax(layer: type[nn.Module]) -> Callable[[dict], nn.Module | None]:
    return lambda args: layer(dim=args["dim"]) if args.get("dtype") is None else None


def _elu(args: dict) -> nn.Module | None:
    return nn.ELU(args["alpha"]) if args["scale"] == 1 and args["input_scale"] == 1 else None


LAYERS: dict[str, Callable[[dict], nn.Module | None]] = {
    **{f"max_pool{d}d": _pool("max") for d in (1, 2, 3)},
    **{f"avg_pool{d}d": _pool("average") for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": _adaptive(_AVERAGES) for d in (1, 2, 3)},
    "flatten": lambda args: nn.Flatten(args["start_dim"], args["end_dim"]),
    "sigmoid": lambda args: nn.Sigmoid(),
    "tanh": lambda args: nn.Tanh(),
    "silu": lambda args: nn.SiLU(),
    "mish": lambda args: nn.Mish(),
    "selu": lambda args: nn.SELU(),
    "hardswish": lambda args: nn.Hardswish(),
    "hardsigmoid": lambda args: nn.Hardsigmoid(),
    "gelu": lambda args: nn.GELU(args["approximate"]),
    "elu": _elu,
    "softmax": _softmax(nn.Softmax),
    "log_softmax": _softmax(nn.LogSoftmax),
    "pixel_shuffle": lambda args: nn.PixelShuffle(args["upscale_factor"]),
    "pixel_unshuffle": lambda args: nn.PixelUnshuffle(args["downscale_factor"]),
}


def named_layer(op: str, target: Any, args: tuple, kwargs: dict) -> nn.Module | None:
    """The layer for an ATen call with one tensor operand, or None."""
    schema = getattr(target, "_schema", None)
    if op not in LAYERS or schema is None or schema.name != f"aten::{op}":
        return None
    values = {a.name: a.default_value for a in schema.arguments}
    values.update(zip((a.name for a in schema.arguments), args, strict=False))
    values.update(kwargs)
    operands = [value for value in values.values() if isinstance(value, Operand)]
    if len(operands) != 1 or not all(_plain(v) for v in values.values() if not isinstance(v, Operand)):
        return None
    return LAYERS[op](values)


def _plain(value: Any) -> bool:
    """No operand hidden in a list (a size that is computed while running)."""
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return not isinstance(value, Operand)
