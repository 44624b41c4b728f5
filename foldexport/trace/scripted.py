"""TorchScript modules as Python modules, so that they can be traced.

torch.export takes no ScriptModule, and what runs inside of one has no names. ``unscripted`` makes modules with the same
children and the same tensors, whose root runs the TorchScript graph operator by operator: each operator as a call of the
module whose weights it reads. TorchScript's operators are described in PyTorch's "TorchScript Language Reference".
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldexport.trace.forward import Untraceable


@dataclass(frozen=True)
class Part:
    """A submodule as a value of a TorchScript graph. path: its name."""

    path: str

    def child(self, name: str) -> Part:
        return Part(f"{self.path}.{name}".lstrip("."))


class Scripted(nn.Module):
    """A part of a TorchScript module: its tensors and children. Called with an operator, it runs that."""

    def __init__(self, source: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.training = getattr(source, "training", False)  # a frozen module has no mode
        for name, parameter in source.named_parameters(recurse=False):
            # A loaded module gives them as plain tensors.
            known = isinstance(parameter, nn.Parameter)
            self._parameters[name] = parameter if known else nn.Parameter(parameter.detach(), parameter.requires_grad)
        for name, buffer in source.named_buffers(recurse=False):
            self._buffers[name] = buffer
        for name, child in source.named_children():
            self._modules[name] = _named(child)
        vars(self)["source"] = source

    def forward(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)


class Program(Scripted):
    """A TorchScript module as a Python module: takes and gives what it does."""

    def forward(self, *inputs: Any) -> Any:
        graph = self.source.inlined_graph
        values: dict[str, Any] = {}
        for value, given in zip(graph.inputs(), (Part(""), *inputs)):
            values[value.debugName()] = given
        for value in list(graph.inputs())[1 + len(inputs) :]:
            values[value.debugName()] = self._default(value)
        return _results(_Run(self, values).block(graph), list(graph.outputs()))

    def _default(self, value: Any) -> Any:
        arguments = self.source.forward.schema.arguments
        found = [a for a in arguments if a.name == value.debugName().partition(".")[0] and a.has_default_value()]
        if not found:
            raise TypeError(f"forward() missing a required argument: '{value.debugName()}'")
        return found[0].default_value


def _named(source: torch.jit.ScriptModule, base: type[Scripted] = Scripted) -> Scripted:
    """Of a class with the name of the class that was compiled."""
    return type(source.original_name, (base,), {})(source)


def unscripted(source: torch.jit.ScriptModule) -> nn.Module:
    """The module that computes what a ScriptModule computes, on the same tensors, in Python."""
    return _named(source, Program)


def unscript_parts(module: nn.Module) -> None:
    """Replaces each outermost TorchScript part of module; the change is to ``_modules``, for the caller to undo."""
    for name, child in list(module._modules.items()):
        if isinstance(child, torch.jit.ScriptModule):
            module._modules[name] = unscripted(child)
        elif child is not None:
            unscript_parts(child)


def _results(values: list[Any], outputs: list[Any]) -> Any:
    return values[0] if len(outputs) == 1 else tuple(values)


class _Run:
    """One run of a graph. values: by the names that TorchScript gives them."""

    def __init__(self, root: Program, values: dict[str, Any]) -> None:
        self._root, self._values = root, values
        self._modules = {name: module for name, module in root.named_modules() if name}
        self._owner: dict[str, str] = {}  # a tensor's name in the graph -> the module whose weight it is

    def block(self, block: Any) -> list[Any]:
        """Runs the nodes of a graph or block, and gives what it returns."""
        for node in block.nodes():
            special = _SPECIAL.get(node.kind())
            results = special(self, node) if special is not None else self._operator(node)
            outputs = [value.debugName() for value in node.outputs()]
            if len(outputs) == 1 and node.kind() not in _SEVERAL:
                results = [results]
            self._values.update(zip(outputs, results or ()))
        return [self._values[value.debugName()] for value in block.outputs()]

    def inputs(self, node: Any) -> list[Any]:
        return [self._values[value.debugName()] for value in node.inputs()]

    def _operator(self, node: Any) -> Any:
        name, args = node.kind().partition("::")[2], self.inputs(node)
        on_container = bool(args) and isinstance(args[0], list | tuple | dict | str)
        if name in _PLAIN and (on_container or not any(isinstance(each, Tensor) for each in args)):
            return _PLAIN[name](*args)
        if node.kind() == "aten::_convolution":
            return self._at(node)(_convolution, *args)
        target, keywords = _overload(node)
        split = len(args) - len(keywords)
        return self._at(node)(target, *args[:split], **dict(zip(keywords, args[split:])))

    def _at(self, node: Any) -> Callable[..., Any]:
        """The module that a node works for: that of its weights, or that of its scope in a traced module."""
        owners = [self._owner[v.debugName()] for v in node.inputs() if v.debugName() in self._owner]
        scope = node.scopeName().rpartition("__module.")[2]
        path = owners[0] if owners else scope
        return self._modules.get(path, _call)

    def attribute(self, node: Any) -> Any:
        """``prim::GetAttr``: a submodule, a tensor as it is now, or a setting."""
        owner, name = self.inputs(node)[0], node.s("name")
        if not isinstance(owner, Part):
            return getattr(owner, name)
        holder = self._root.get_submodule(owner.path)
        if name in holder._modules:
            return owner.child(name)
        if name in holder._parameters or name in holder._buffers:
            self._owner[node.output().debugName()] = owner.path
            return getattr(holder, name)
        return getattr(holder.source, name)

    def set_attribute(self, node: Any) -> None:
        owner, value = self.inputs(node)
        holder = self._root.get_submodule(owner.path)
        if node.s("name") not in holder._buffers:
            name = owner.child(node.s("name")).path
            raise Untraceable(f"its TorchScript code sets self.{name} at each call", "Give the Python module it was made from")
        holder._buffers[node.s("name")] = value

    def branch(self, node: Any) -> list[Any]:
        """``prim::If``."""
        taken, other = node.blocks()
        return self.block(taken if self.inputs(node)[0] else other)

    def loop(self, node: Any) -> list[Any]:
        """``prim::Loop(trips, condition, carried…)``."""
        trips, going, *carried = self.inputs(node)
        (body,) = node.blocks()
        names = [value.debugName() for value in body.inputs()]
        trip = 0
        while going and trip < trips:
            self._values.update(zip(names, (trip, *carried)))
            going, *carried = self.block(body)
            trip += 1
        return carried


def _call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _overload(node: Any) -> tuple[Any, list[str]]:
    """The operator of a node, and the names of its keyword-only arguments, which come last."""
    schema = node.schema()
    if schema == "(no schema)":
        raise Untraceable(f"TorchScript's {node.kind()} has no operator", "Give the Python module it was made from")
    parsed = torch._C.parse_schema(schema)
    space, _, name = parsed.name.partition("::")
    packet = getattr(getattr(torch.ops, space), name)
    keywords = [argument.name for argument in parsed.arguments if argument.kwarg_only]
    return getattr(packet, parsed.overload_name or "default"), keywords


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """``aten::_convolution``, which traced modules have, as the convolution that was called."""
    stride, padding, dilation, transposed, output_padding, groups = settings[:6]
    rank = len(stride)
    if transposed:
        transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        return transpose(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return (F.conv1d, F.conv2d, F.conv3d)[rank - 1](x, weight, bias, stride, padding, dilation, groups)


def _raise(run: _Run, node: Any) -> None:
    raise RuntimeError(str(run.inputs(node)[0]))


def _dict_of(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2]))


_SEVERAL = frozenset({"prim::If", "prim::Loop", "prim::ListUnpack", "prim::TupleUnpack"})

_SPECIAL: dict[str, Callable[[_Run, Any], Any]] = {
    "prim::Constant": lambda run, node: node.output().toIValue(),
    "prim::GetAttr": _Run.attribute,
    "prim::SetAttr": _Run.set_attribute,
    "prim::If": _Run.branch,
    "prim::Loop": _Run.loop,
    "prim::RaiseException": _raise,
    "prim::ListConstruct": lambda run, node: run.inputs(node),
    "prim::TupleConstruct": lambda run, node: tuple(run.inputs(node)),
    "prim::DictConstruct": lambda run, node: _dict_of(run.inputs(node)),
    "prim::ListUnpack": lambda run, node: list(run.inputs(node)[0]),
    "prim::TupleUnpack": lambda run, node: list(run.inputs(node)[0]),
    "prim::TupleIndex": lambda run, node: run.inputs(node)[0][run.inputs(node)[1]],
    "prim::unchecked_cast": lambda run, node: run.inputs(node)[0],
    "prim::unchecked_unwrap_optional": lambda run, node: run.inputs(node)[0],
    "prim::Uninitialized": lambda run, node: None,
    "prim::NumToTensor": lambda run, node: run.inputs(node)[0],
    "prim::data": lambda run, node: run.inputs(node)[0].detach(),
    "prim::dtype": lambda run, node: run.inputs(node)[0].dtype,
    "prim::device": lambda run, node: run.inputs(node)[0].device,
    "prim::is_cuda": lambda run, node: run.inputs(node)[0].is_cuda,
    "aten::size": lambda run, node: list(run.inputs(node)[0].shape) if len(run.inputs(node)) == 1
    else run.inputs(node)[0].shape[run.inputs(node)[1]],
    "aten::dim": lambda run, node: run.inputs(node)[0].dim(),
    "aten::numel": lambda run, node: run.inputs(node)[0].numel(),
    "aten::Int": lambda run, node: _number(run.inputs(node)[0], int),
    "aten::Float": lambda run, node: _number(run.inputs(node)[0], float),
    "aten::Bool": lambda run, node: bool(run.inputs(node)[0]),
    "aten::ScalarImplicit": lambda run, node: _number(run.inputs(node)[0], None),
    "aten::IntImplicit": lambda run, node: _number(run.inputs(node)[0], int),
    "aten::FloatImplicit": lambda run, node: _number(run.inputs(node)[0], float),
    "aten::warn": lambda run, node: None,
}  # fmt: skip


def _number(value: Any, kind: type | None) -> Any:
    """A number that may be symbolic; a traced module passes sizes through tensors."""
    if isinstance(value, Tensor):
        value = value.item()
    return value if kind is None or isinstance(value, torch.SymInt | torch.SymFloat) else kind(value)


#: Operators on numbers, text and lists.
_PLAIN: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, *alpha: a + b, "sub": lambda a, b, *alpha: a - b, "mul": operator.mul, "div": operator.truediv,
    "floordiv": operator.floordiv, "floor_divide": operator.floordiv, "remainder": operator.mod, "neg": operator.neg,
    "pow": operator.pow, "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
    "ge": operator.ge, "__and__": operator.and_, "__or__": operator.or_, "__not__": operator.not_, "__is__": operator.is_,
    "__isnot__": operator.is_not, "__contains__": operator.contains, "__getitem__": operator.getitem, "len": len,
    "list": list, "append": lambda items, item: items.append(item) or items, "extend": lambda a, b: a.extend(b),
    "slice": lambda items, start=None, end=None, step=1: items[start:end:step], "format": lambda text, *a: text.format(*a),
    "min": min, "max": max, "sqrt": lambda a: a**0.5, "ceil": lambda a: -((-a) // 1), "floor": lambda a: a // 1,
    "str": str, "keys": lambda d: list(d.keys()), "values": lambda d: list(d.values()), "is_scripting": lambda: False,
    "__range_length": lambda start, end, step: len(range(start, end, step)),
    "__derive_index": lambda index, start, step: start + index * step, "_set_item": operator.setitem,
}  # fmt: skip
