"""Which operator of the user's network a runtime or its converter refuses: by what it says, else by trying them one by one."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

SURE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Flatten, nn.Identity)
OPERATOR = re.compile(r"\b(?:aten|prims|torchvision)(?:\.|::)(\w+)")


def named(module: nn.Module, operators: Sequence[str]) -> str:
    """The operators, each with the first of the user's modules that has one, "torch.unbind (`layer1.attn`), F.fold"."""
    found = []
    for name in operators:
        kind = _plain(name)
        node = next((node for node in _calls(module) if any(each.endswith(kind) for each in _kinds(module, node))), None)
        found.append(name + (f" (`{_label(node)}`)" if node is not None else ""))
    return ", ".join(found)


def culprit(module: nn.Module, example: tuple, reason: str, fails: Callable[[nn.Module, tuple], bool]) -> str:
    """The operator that a reason names, or that fails by itself, as "`layer1.attn` (unbind)"; empty where none does.

    example: the network's inputs. fails: (a module of one operator, its inputs) → whether it is refused.
    """
    said = {_plain(word) for word in OPERATOR.findall(reason)}
    for node in _calls(module):
        if {_plain(kind) for kind in _targets(module, node)} & said:
            return _described(module, node)
    if not isinstance(module, fx.GraphModule):
        return ""
    try:
        with torch.no_grad():
            for node, alone, inputs in _Alone.each(module, example):
                if fails(alone, inputs):
                    return _described(module, node)
    except Exception:  # the refusal stands whether its place is found or not
        return ""
    return ""


class _Alone(nn.Module):
    """One operator of a graph; what it reads and is no tensor on data stays as it was."""

    def __init__(self, call: Callable, args: tuple, kwargs: dict, places: Sequence[int], used: Sequence[int]) -> None:
        """places: of the arguments that are its inputs. used: of its results where it has several."""
        super().__init__()
        self._call, self._args, self._kwargs, self._places, self._used = call, args, kwargs, places, used

    def forward(self, *tensors: Tensor) -> Any:
        args = list(self._args)
        for place, value in zip(self._places, tensors, strict=True):
            args[place] = value
        made = self._call(*args, **self._kwargs)
        return tuple(made[place] for place in self._used) if self._used else made

    @classmethod
    def each(cls, module: fx.GraphModule, example: tuple) -> Iterator[tuple[fx.Node, nn.Module, tuple]]:
        """(node, operator, its inputs), one of each kind, in the order in which they run."""
        run, seen, values = fx.Interpreter(module), set(), iter(example)
        for node in module.graph.nodes:
            if node.op == "output":
                return
            if node.op == "placeholder":
                run.env[node] = next(values)
                continue
            args, kwargs = run.fetch_args_kwargs_from_env(node)
            key = type(module.get_submodule(node.target)) if node.op == "call_module" else (node.op, node.target)
            places = [at for at, value in enumerate(args) if isinstance(value, Tensor)]
            if node.op in ("call_function", "call_module") and key not in seen and places and not _sure(key):
                seen.add(key)
                call = module.get_submodule(node.target) if node.op == "call_module" else node.target
                used = sorted({user.args[1] for user in node.users if user.target is operator.getitem})
                yield node, cls(call, tuple(args), kwargs, places, used).eval(), tuple(args[at] for at in places)
            run.env[node] = getattr(run, node.op)(node.target, args, kwargs)


def _sure(key: object) -> bool:
    return isinstance(key, type) and issubclass(key, SURE)


def _calls(module: nn.Module) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op.startswith("call_")] if isinstance(module, fx.GraphModule) else []


def _targets(module: fx.GraphModule, node: fx.Node) -> set[str]:
    """Names of what a node calls."""
    if node.op == "call_module":
        return {type(module.get_submodule(str(node.target))).__name__}
    packet = getattr(node.target, "overloadpacket", node.target)
    return {str(getattr(packet, "__name__", packet)).rpartition(".")[2]}


def _kinds(module: fx.GraphModule, node: fx.Node) -> set[str]:
    return {_plain(kind) for kind in (*_targets(module, node), node.meta.get("kind") or "", node.meta.get("origin") or "") if kind}


def _plain(name: str) -> str:
    """"aten::grid_sampler" and "F.grid_sampler" alike."""
    return re.split(r"[.:]", name)[-1].replace("_", "").lower()


def _label(node: fx.Node) -> str:
    """The user's module; for an operator at the top of the network the layer that it reads, else its own name."""
    if node.op == "call_module":
        return str(node.target)
    return node.meta.get("module") or node.meta.get("origin") or node.name


def _described(module: fx.GraphModule, node: fx.Node) -> str:
    kind = node.meta.get("kind") or next(iter(_targets(module, node)))
    return f"`{_label(node)}` ({kind})"
