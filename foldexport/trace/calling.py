"""How the network is called: without what is wrapped around it, with the inputs that its forward takes by keyword."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foldexport.errors import ModelError

Inputs = tuple[Tensor, ...]
LAZY_BYTES = 2**26  # of a weight that is copied when it is written to, and not before


class ByKeyword(nn.Module):
    """A network whose last inputs go by keyword, called with all of them in order."""

    def __init__(self, network: nn.Module, keywords: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.keywords = network, keywords
        self.training = network.training

    def forward(self, *inputs: Any) -> Any:
        args, kwargs = arranged(inputs, self.keywords)
        return self.network(*args, **kwargs)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside of ``nn.DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` or ``torch.compile``.

    They compute what it computes. torch.export and the stateless calls of PyTorch take none of them.
    """
    while True:
        if isinstance(module, _wrappers()):
            module = module.module
        elif type(module).__name__ == "OptimizedModule":  # of torch._dynamo, which takes seconds to import
            module = module._orig_mod
        else:
            return module


def _wrappers() -> tuple[type, ...]:
    from torch.optim.swa_utils import AveragedModel

    return nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel


def refuse_hidden_methods(module: nn.Module) -> None:
    """Raises ModelError where an attribute of the user's hides a method of ``nn.Module`` that PyTorch itself calls.

    Lists, tuples and dicts are let through: `answer_hidden_methods` makes them answer for the method.
    """
    for name, child, key, value in _hiding(module):
        if type(value) not in _HOLDERS:
            kind = type(child).__name__
            where = f"module '{name}' ({kind})" if name else kind
            raise ModelError(
                f"{where} sets self.{key} ({type(value).__name__}), which hides nn.Module.{key}() from PyTorch.\n"
                f"Rename the attribute, for example to self.{key}_."
            )


def answer_hidden_methods(module: nn.Module) -> None:
    """Lists, tuples and dicts that hide a method of ``nn.Module`` are replaced by equal ones that can be called as it.

    ``self.modules = [self.conv1, self.conv2]`` works in forward, while PyTorch calls ``modules()``. The change is to
    the attributes, for the caller to undo.
    """
    for _, child, key, value in list(_hiding(module)):
        if type(value) in _HOLDERS:
            vars(child)[key] = _answering(getattr(nn.Module, key).__get__(child), value)


_HOLDERS = (list, tuple, dict)


def _hiding(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """(name of the module, the module, the attribute that hides a method, its value)."""
    for name, child in nn.Module.named_modules(module):
        for key, value in vars(child).items():
            if callable(getattr(nn.Module, key, None)) and not callable(value):
                yield name, child, key, value


def _answering(method: Callable[..., Any], value: Any) -> Any:
    """An equal list, tuple or dict that is called as ``method``."""
    kind = type(value)
    return type(kind.__name__, (kind,), {"__call__": lambda self, *args, **kwargs: method(*args, **kwargs)})(value)


def keywords_of(module: nn.Module, count: int) -> tuple[str, ...]:
    """The names of the last of ``count`` inputs, where forward takes fewer by position and the rest by keyword."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return ()
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    named.sort(key=lambda p: p.default is not p.empty)
    return tuple(p.name for p in named[: max(0, count - positional)])


def arranged(inputs: tuple[Any, ...], keywords: tuple[str, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, by keyword): the last inputs have the keywords."""
    first = len(inputs) - len(keywords)
    return tuple(inputs[:first]), dict(zip(keywords, inputs[first:]))


def parameters_of(module: nn.Module) -> str:
    """``(image, mask=None)``: what forward takes."""
    try:
        return str(inspect.signature(module.forward))
    except (TypeError, ValueError):
        return "(…)"


class _Repeated(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, calls: int, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
        results = []
        for _ in range(calls):
            torch.manual_seed(0)  # PyTorch's own random operators are in the graph, and told of there
            results.append(self.network(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        return results


def _copied(tensor: Tensor) -> Tensor:
    """A copy that may be written to; of a large one, PyTorch copies the memory only when it is written to."""
    if tensor.nbytes >= LAZY_BYTES:
        with contextlib.suppress(AttributeError, RuntimeError):  # no such function in this PyTorch, or memory of another kind
            return torch._lazy_clone(tensor)
    return tensor.clone()


@torch.no_grad()
def run(module: nn.Module, inputs: Inputs, keywords: tuple[str, ...], calls: int = 1) -> list[Any]:
    """What the plain network gives, call after call, on copies of inputs, parameters and buffers.

    ``kept`` (kept.py) puts back what it does to its attributes and to random generators.
    """
    repeated = _Repeated(module)
    tensors = {f"network.{name}": _copied(t.detach()) for name, t in [*module.named_parameters(), *module.named_buffers()]}
    return torch.func.functional_call(repeated, tensors, (calls, *arranged(inputs, keywords)))
