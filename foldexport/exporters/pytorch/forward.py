"""A graph of layers as the lines of ``__init__`` and ``forward``, with variables named as a person would name them."""

from __future__ import annotations

import keyword
import operator
import re
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from foldexport.device import named_in
from foldexport.errors import UsageError
from foldexport.exporters.pytorch.calls import BINARY, Text, call, is_method
from foldexport.exporters.pytorch.layers import constructor, declared, functional, literal

POOL = ("x", "y", "z")  # what values are called that do not live long
LONG = 12  # lines; what lives longer is called after its module
RESERVED = frozenset({"self", "torch", "nn", "F", "load", "load_file", "Network", "float", "slice", "super", *POOL})


@dataclass(eq=False)
class Body:
    """layers: the lines of ``__init__``. lines: those of ``forward``. inputs: its parameters. tensors: what the file holds."""

    layers: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def body_of(module: fx.GraphModule) -> Body:
    """Raises UsageError for a layer or a function that is not PyTorch's own."""
    return _Writer(module).body


class _Writer:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.body = module, Body()
        self.nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr") and _is_read(node)]
        self.members: dict[str, str] = {}  # path in the module → attribute of the class
        self.taken: set[str] = set(RESERVED)
        self.named: dict[fx.Node, Text] = {}
        self.lines_of = self._statements()
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
        self._forward()

    # ── which operators share a line ──────────────────────────────────────────────────────────────────────────────

    def _statements(self) -> dict[fx.Node, int]:
        """Node → line. An operator joins the next one's line where that alone reads it and no layer nests in a layer."""
        depth: dict[fx.Node, int] = {}
        line, found = 0, {}
        for node, after in zip(self.nodes, [*self.nodes[1:], None]):
            joined = [each for each in node.all_input_nodes if found.get(each) == line and each in depth]
            inner = max((depth[each] for each in joined), default=0)
            depth[node] = inner + (0 if _is_binary(node) or is_method(node) or self._is_identity(node) else 1)
            found[node] = line
            if after is None or not self._joins(node, after, depth[node]):
                line += 1
        return found

    def _joins(self, node: fx.Node, after: fx.Node, depth: int) -> bool:
        if _references(node, after) != 1 or len(node.users) != 1:
            return False
        if after.op == "output":
            return depth <= 2 and after.args[0] is node
        return depth <= 1 and not (after.op == "call_module" and functional(self._layer(after), "") is None)

    def _layer(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(node.target)

    def _is_identity(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._layer(node), nn.Identity)

    # ── forward ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _forward(self) -> None:
        last = {node: max((self.lines_of[user] for user in node.users if user in self.lines_of), default=-1) for node in
                self.module.graph.nodes}  # fmt: skip
        if any(map(named_in, self.nodes)):  # that of the first input, whose name is then given to no other value
            last[next(node for node in last if node.op == "placeholder")] = len(self.nodes)
        holders: dict[str, fx.Node] = {str(name): node for node, name in self.named.items() if node.op == "placeholder"}
        for place, node in enumerate(self.nodes):
            for held in node.all_input_nodes:
                if held.op == "get_attr" and held not in self.named:  # declared where it is first read
                    self.named[held] = Text.of(f"self.{self._tensor(held.target)}")
            if node.op == "output":
                self.body.lines.append(f"return {self._returned(node.args[0])}")
                break
            text = self._text(node)
            line = self.lines_of[node]
            if place + 1 < len(self.nodes) and self.lines_of[self.nodes[place + 1]] == line:
                self.named[node] = text
                continue
            name = self._variable(node, holders, last, line)
            holders[name] = node
            self.named[node] = Text.of(name)
            if text != name:
                self.body.lines.append(f"{name} = {text}")

    def _text(self, node: fx.Node) -> Text:
        if node.op != "call_module":
            return call(node, self.named.__getitem__, f"{self.body.inputs[0]}.device")
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            raise UsageError(f"pytorch: `{node.target}` is called with more than one tensor; use onnx or torchscript.")
        operand, layer = self.named[node.args[0]], self._layer(node)
        if isinstance(layer, nn.Identity):
            return operand
        written = functional(layer, operand)
        return Text.of(written if written is not None else f"self.{self._member(node.target, layer)}({operand})")

    def _variable(self, node: fx.Node, holders: dict[str, fx.Node], last: dict[fx.Node, int], line: int) -> str:
        """The first short name whose value is read no more; what lives long is called after its module."""
        if str(node.target) == "aten.sym_size.int":
            return self._free("batch" if node.args[1] == 0 else "size")
        if last[node] - line > LONG:
            return self._free(self._origin(node))
        for name in (*POOL, *(f"x{place}" for place in range(2, 10**6))):
            holder = holders.get(name)
            free = name not in self.taken or name in POOL
            if (holder is None and free) or (holder is not None and last[holder] <= line and name not in self.body.inputs[1:]):
                return name
        raise AssertionError("names do not run out")

    def _origin(self, node: fx.Node) -> str:
        """``after_layer1_0_conv2``: the layer that made the value, looking through functions."""
        origin = node
        while origin.op not in ("call_module", "placeholder") and origin.all_input_nodes:
            origin = origin.all_input_nodes[0]
        return f"after_{_identifier(str(origin.target)).strip('_')}"

    def _returned(self, value: object) -> str:
        """A tuple of several without its brackets."""
        several = isinstance(value, tuple) and len(value) > 1
        return ", ".join(map(self._structure, value)) if several else self._structure(value)

    def _structure(self, value: object) -> str:
        if isinstance(value, fx.Node):
            return self.named[value]
        if isinstance(value, dict):
            return "{" + ", ".join(f"{literal(key)}: {self._structure(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list | tuple):
            inner = [self._structure(item) for item in value]
            return f"[{', '.join(inner)}]" if isinstance(value, list) else f"({', '.join(inner)}{',' * (len(inner) == 1)})"
        return literal(value)

    # ── what the class holds ──────────────────────────────────────────────────────────────────────────────────────

    def _input(self, node: fx.Node) -> None:
        name = str(node.target).lstrip("*")
        name = name if name in POOL and name not in self.body.inputs else self._free(name)
        self.body.inputs.append(name)
        self.named[node] = Text.of(name)

    def _member(self, path: str, layer: nn.Module) -> str:
        if path not in self.members:
            name = self.members[path] = self._attribute(path)
            self.body.layers.append(f"self.{name} = {constructor(layer, path)}")
            for key, value in layer.state_dict().items():
                self.body.tensors[f"{name}.{key}"] = value.detach().clone().contiguous()
        return self.members[path]

    def _tensor(self, path: str) -> str:
        if path not in self.members:
            value = operator.attrgetter(path)(self.module)
            if not isinstance(value, Tensor):
                raise UsageError(f"pytorch: `{path}` is a {type(value).__name__}, not a tensor; use onnx or torchscript.")
            name = self.members[path] = self._attribute(path)
            kind = f"self.{name} = nn.Parameter({declared(value)})" if isinstance(value, nn.Parameter) else (
                f'self.register_buffer("{name}", {declared(value)})')  # fmt: skip
            self.body.layers.append(kind)
            self.body.tensors[name] = value.detach().clone().contiguous()
        return self.members[path]

    def _attribute(self, path: str) -> str:
        """``layer1.0.conv1`` to ``layer1_0_conv1``: the first that is no method of nn.Module and not taken."""
        name = _identifier(path)
        while name in self.members.values() or hasattr(nn.Module, name) or name == "training":
            name += "_"
        return name

    def _free(self, path: str) -> str:
        name = _identifier(path)
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _identifier(path: str) -> str:
    name = re.sub(r"\W", "_", path)
    name = f"layer_{name}" if not name or name[0].isdigit() else name
    return f"{name}_" if keyword.iskeyword(name) else name


def _is_read(node: fx.Node) -> bool:
    return bool(node.users) or node.op == "output"


def _is_binary(node: fx.Node) -> bool:
    return node.target in BINARY or node.target is operator.getitem


def _references(node: fx.Node, user: fx.Node) -> int:
    """How often ``user`` names ``node`` among its arguments."""
    found: Counter[fx.Node] = Counter()
    fx.node.map_arg((user.args, user.kwargs), lambda each: found.update([each]))
    return found[node]
