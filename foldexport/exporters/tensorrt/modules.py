"""ONNX nodes in the user's own module names, for every message and every report."""

from __future__ import annotations

import re
from collections.abc import Callable

import onnx
from torch import fx, nn

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


class NodeModules:
    """Modules of an ONNX graph's nodes, told by the names of the weights they read (``layer1.0.conv1.weight``)."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        weights = {tensor.name for tensor in proto.graph.initializer}
        self._own: dict[str, str] = {}
        self.inputs: dict[str, list[str]] = {}  # values that each node reads
        self._operators = {node.name: node.op_type for node in proto.graph.node}
        self._makers = {value: node.name for node in proto.graph.node for value in node.output}
        for node in proto.graph.node:
            self.inputs[node.name] = list(node.input)
            named = [name for name in node.input if name in weights and "." in name]
            if named:
                self._own[node.name] = named[0].rpartition(".")[0]

    def of(self, node: str) -> str:
        """The module whose weights the node reads; empty where it reads none."""
        return self._own.get(node, "")

    def multiplies(self, node: str) -> bool:
        """Whether the node is a convolution or a matrix product."""
        return self._operators.get(node) in PRODUCTS

    def behind(self, node: str) -> str:
        """The nearest module in front of the node; empty where there is none."""
        queue, seen = [node], {node}
        while queue:
            at = queue.pop(0)
            if self.of(at):
                return self.of(at)
            for value in self.inputs.get(at, ()):
                maker = self._makers.get(value)
                if maker is not None and maker not in seen:
                    seen.add(maker)
                    queue.append(maker)
        return ""

    def named(self, text: str) -> str:
        """The text with the module behind every quoted node: ``'node_linear'`` → ``'node_linear' (`fc`)``."""
        return re.sub(r"'([^']+)'", lambda found: found[0] + (f" (`{self.of(found[1])}`)" if self.of(found[1]) else ""), text)


def onnx_nodes(metadata: str) -> list[str]:
    """Names in a layer's metadata, which TensorRT writes as ``[ONNX Layer: node_conv2d]…``."""
    return list(dict.fromkeys(LAYER.findall(metadata or "")))


def origin(node: str, module: nn.Module, scopes: Callable[[], dict[str, tuple[str, str, str]]], modules: NodeModules) -> str:
    """Where a node comes from, as a message says it: "in `head.odd`", "behind `stem`", or nothing.

    scopes: of `foldexport.exporters.onnx.exporter.scopes`, asked only here since it writes the graph once more.
    """
    if modules.of(node):
        return f"in `{modules.of(node)}`"
    found = scopes()
    path, value, target = found.get(node, ("", "", ""))
    if not path and target:
        alike = list(dict.fromkeys(each[1] for each in found.values() if each[2] == target))
        path = _recorded(module, target, alike.index(value))
    if path:
        return f"in `{path}`"
    return f"behind `{modules.behind(node)}`" if modules.behind(node) else ""


def _recorded(module: nn.Module, target: str, place: int) -> str:
    """The user's module that the fold recorded beside the ``place``-th call of an operator; empty where it did not."""
    graphs = [each.graph for each in module.modules() if isinstance(each, fx.GraphModule)]
    calls = [node for graph in graphs for node in graph.nodes if node.op == "call_function" and str(node.target) == target]
    return str(calls[place].meta.get("module") or "") if place < len(calls) else ""
