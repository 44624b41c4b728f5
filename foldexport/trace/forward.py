"""The user's forward while it is traced: what PyTorch's tracing does not see is said in operators that it does see.

    x.data              →  x.detach()       a write through it reaches x, as in eager mode
    x.data = y          →  x.copy_(y)
    copy.deepcopy(x)    →  x.clone()
    F.avg_pool2d(x, x.shape[2:])  →  x.mean((2, 3), keepdim=True)       whole_pool.py
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from foldexport.trace.kept import Saved
from foldexport.trace.user_code import is_users
from foldexport.trace.whole_pool import WHOLE


class Untraceable(Exception):
    """Raised inside of the user's forward, at the line that cannot be traced. why, help: a clause each."""

    def __init__(self, why: str, help: str) -> None:
        super().__init__(f"{why}. {help}")
        self.why, self.help = why, help


#: Numbers without values, which print but take no format such as ``.3f``.
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Plain(TorchFunctionMode):
    """Calls of PyTorch's functions, some replaced by what tracing sees."""

    def __enter__(self) -> Any:
        self._formats = [kind.__format__ for kind in _NUMBERS]
        for kind in _NUMBERS:
            kind.__format__ = lambda number, how: str(number)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for kind, before in zip(_NUMBERS, self._formats):
            kind.__format__ = before
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def _set_data(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        raise Untraceable("a tensor of another shape or type is assigned to .data", "Make a new tensor instead")
    if value is not tensor:
        tensor.copy_(value)


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.clone()
    return memo[id(tensor)]


REPLACED: dict[Any, Callable[..., Any]] = {
    Tensor.data.__get__: torch.Tensor.detach,
    Tensor.data.__set__: _set_data,
    Tensor.__deepcopy__: _deep_copy,
    **WHOLE,
}


@dataclass
class Watch:
    """What was seen while forward ran.

    changed: names of the attributes and weights that it put something else in the place of. fixed: the line that made a
    number of a symbolic size, as (file, line, function).
    """

    changed: list[str] = field(default_factory=list)
    fixed: tuple[str, int, str] | None = None


@contextlib.contextmanager
def under(module: nn.Module, mode: Callable[[], TorchFunctionMode], watch: Watch) -> Iterator[None]:
    """Runs module's forward under a mode of its own, and under watch, for the length of the block."""
    forward, before = module.forward, vars(module).get("forward")

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        saved = Saved(module)
        try:
            with mode():
                return forward(*args, **kwargs)
        finally:
            watch.changed += saved.changed()
            watch.fixed = watch.fixed or _fixing_line((args, kwargs))

    vars(module)["forward"] = wrapped
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, tied ones under each of theirs."""
    yield from nn.Module.named_parameters(module, remove_duplicate=False)
    yield from nn.Module.named_buffers(module, remove_duplicate=False)


def _fixing_line(inputs: Any) -> tuple[str, int, str] | None:
    """The user's line after which a symbolic size of the inputs is known to be a number, or less than one."""
    sizes = [size for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) for size in leaf.shape]
    symbols = [size for size in sizes if isinstance(size, torch.SymInt)]
    for guard in symbols[0].node.shape_env.guards if symbols else ():
        at = guard.sloc.framework_loc
        if isinstance(at, traceback.FrameSummary) and is_users(at.filename) and not isinstance(guard.expr, sympy.Ne):
            return at.filename, at.lineno or 0, at.name
    return None
