"""One function call of a graph as text: an operator, a method or function of torch, else the ATen operator itself."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from foldexport.errors import UsageError
from foldexport.exporters.pytorch.layers import literal

#: Binary operators and how tightly they bind.
BINARY = {operator.add: ("+", 1), operator.sub: ("-", 1), operator.mul: ("*", 2), operator.truediv: ("/", 2),
          operator.floordiv: ("//", 2), operator.mod: ("%", 2)}  # fmt: skip
ATEN_BINARY = {"add.Tensor": operator.add, "sub.Tensor": operator.sub, "mul.Tensor": operator.mul, "div.Tensor": operator.truediv}
#: Of a tensor, where a user writes the method.
METHODS = frozenset({
    "reshape", "view", "permute", "transpose", "mean", "sum", "amax", "unsqueeze", "squeeze", "expand", "chunk", "contiguous",
    "repeat", "to", "clone",
})  # fmt: skip
SPREAD = frozenset({"reshape", "view", "permute", "expand", "repeat"})  # whose list may stand without brackets
MODES = {"nearest1d": "nearest", "nearest2d": "nearest", "nearest3d": "nearest", "linear1d": "linear", "bilinear2d": "bilinear",
         "bicubic2d": "bicubic", "trilinear3d": "trilinear"}  # fmt: skip
ENDLESS = 2**62  # an end of a slice that no axis reaches
ATOM = 9


class Text(str):
    """Source of a value, and how tightly its outermost operator binds."""

    binds: int = ATOM

    @classmethod
    def of(cls, text: str, binds: int = ATOM) -> Text:
        made = cls(text)
        made.binds = binds
        return made


def call(node: fx.Node, operand: Callable[[fx.Node], Text], device: str) -> Text:
    """The text of a ``call_function`` or ``call_method`` node; ``device`` stands for every device, so that the file runs on any.

    Raises UsageError for a function that torch does not have.
    """

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return operand(value)
        if isinstance(value, torch.device):
            return device
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            inner = ", ".join(map(text, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, slice):
            return f"slice({text(value.start)}, {text(value.stop)}, {text(value.step)})"
        return literal(value)

    def atom(value: Any) -> str:
        made = text(value)
        return f"({made})" if getattr(made, "binds", ATOM) < ATOM or made.startswith("-") else made

    def applied(name: str, args: tuple, kwargs: dict) -> Text:
        return Text.of(f"{name}({', '.join([*map(text, args), *(f'{key}={text(each)}' for key, each in kwargs.items())])})")

    def binary(function: Callable, left: Any, right: Any) -> Text:
        sign, binds = BINARY[function]
        sides = [text(left), text(right)]
        # The left side may bind as loosely as the operator itself: + and * are evaluated from the left.
        loose = [getattr(side, "binds", ATOM) < binds + place for place, side in enumerate(sides)]
        sides = [f"({side})" if wrap or side.startswith("-") else side for side, wrap in zip(sides, loose)]
        return Text.of(f"{sides[0]} {sign} {sides[1]}", binds)

    target, args = node.target, node.args
    kwargs = {key: value for key, value in node.kwargs.items() if (key, value) != ("inplace", False)}
    if node.op == "call_method":
        return applied(f"{atom(args[0])}.{target}", args[1:], kwargs)
    if target in BINARY and not kwargs:
        return binary(target, *args)
    if target is operator.getitem:
        return Text.of(f"{atom(args[0])}[{_index(args[1], text)}]")
    if target is getattr and len(args) == 2:
        return Text.of(f"{atom(args[0])}.{args[1]}")
    if target is operator.neg:
        return Text.of(f"-{atom(args[0])}", 3)
    if isinstance(target, torch._ops.OpOverload):
        return _aten(target, args, kwargs, text, atom, applied, binary)
    name = getattr(target, "__name__", "")
    for prefix, owner in (("torch", torch), ("F", F)):
        if getattr(owner, name, None) is target:
            return applied(f"{prefix}.{name}", args, kwargs)
    raise UsageError(
        f"pytorch: `{node.meta.get('module') or node.name}` calls {name or target}, which is no function of torch; "
        "use onnx or torchscript."
    )


def _aten(target: Any, args: tuple, kwargs: dict, text, atom, applied, binary) -> Text:
    if target.namespace != "aten":
        raise UsageError(f"pytorch: the network calls {target}, which plain PyTorch does not have; use onnx or torchscript.")
    full = str(target).partition(".")[2]
    name = full.partition(".")[0]
    if full in ATEN_BINARY and len(args) == 2 and not kwargs:
        return binary(ATEN_BINARY[full], *args)
    if full == "slice.Tensor" and not kwargs and len(args) >= 2 and isinstance(args[1], int) and args[1] >= 0:
        start, end, step = (*args[2:], *(None,) * 3)[:3]
        ends = ["" if start in (None, 0) else text(start), "" if end is None or _endless(end) else text(end)]
        steps = [] if step in (None, 1) else [text(step)]
        return Text.of(f"{atom(args[0])}[{':, ' * args[1]}{':'.join(ends + steps)}]")
    if full == "select.int" and not kwargs and isinstance(args[1], int) and args[1] >= 0:
        return Text.of(f"{atom(args[0])}[{':, ' * args[1]}{text(args[2])}]")
    if full == "sym_size.int" and not kwargs:
        return Text.of(f"{atom(args[0])}.shape[{text(args[1])}]")
    if full.endswith(".vec") and name.removeprefix("upsample_") in MODES and not kwargs:
        return applied("F.interpolate", args[:1], _interpolation(name.removeprefix("upsample_"), *args[1:]))
    if name in SPREAD and len(args) == 2 and isinstance(args[1], list | tuple) and args[1] and not kwargs:
        return applied(f"{atom(args[0])}.{name}", tuple(args[1]), {})
    if name in METHODS and args and isinstance(args[0], fx.Node):
        args, kwargs = _named(target, args, kwargs)
        return applied(f"{atom(args[0])}.{name}", args[1:], kwargs)
    if callable(getattr(torch, name, None)) and not name.startswith("_") and not target._schema.is_mutable:
        return applied(f"torch.{name}", args, kwargs)
    return applied(f"torch.ops.{target}", args, kwargs)


def is_method(node: fx.Node) -> bool:
    """Whether the node is written ``x.method(…)``, which nests without brackets."""
    return isinstance(node.target, torch._ops.OpOverload) and str(node.target).split(".")[1] in METHODS


def _named(target: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Switches, and what stands behind them, by name: ``keepdim=True``."""
    first = next((place for place, value in enumerate(args) if isinstance(value, bool)), len(args))
    names = [each.name for each in target._schema.arguments]
    return args[:first], dict(zip(names[first:], args[first:])) | kwargs


def _interpolation(kind: str, size: Any, *rest: Any) -> dict[str, Any]:
    """The arguments of ``F.interpolate`` for those of an upsampling operator, ``(size, [align_corners,] scales)``."""
    *corners, scales = rest if len(rest) == (1 if MODES[kind] == "nearest" else 2) else (*rest, None)
    found: dict[str, Any] = {"size": size} if size is not None else {}
    if scales is not None:
        found["scale_factor"] = scales[0] if len(set(scales)) == 1 else scales
    return found | {"mode": MODES[kind]} | ({"align_corners": True} if any(corners) else {})


def _endless(end: Any) -> bool:
    return isinstance(end, int) and end >= ENDLESS


def _index(index: Any, text: Callable[[Any], str]) -> str:
    """What stands between brackets; slices as colons."""
    items = index if isinstance(index, tuple) else (index,)
    parts = []
    for each in items:
        if isinstance(each, slice):
            ends = ["" if end is None else text(end) for end in (each.start, each.stop)]
            parts.append(":".join(ends + ([] if each.step is None else [text(each.step)])))
        else:
            parts.append(text(each))
    return ", ".join(parts) + ("," if isinstance(index, tuple) and len(items) == 1 else "")
