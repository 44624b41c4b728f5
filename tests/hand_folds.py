"""Folds made by hand, so that the certificate is tested without the engine that it judges."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from foldexport import probes as probing
from foldexport.certify import Certificate, certify
from foldexport.fold.rebuild import Program, Record
from foldexport.interpret import cast
from foldexport.trace import Graph, trace
from tests.statistics import randomise

IMAGE = torch.zeros(2, 3, 10, 10)


def column(vector: Tensor) -> Tensor:
    """``[C]`` as ``[1, C, 1, 1]`` in float64."""
    return vector.detach().double().reshape(1, -1, 1, 1)


def batch_norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """``k = γ/√(σ²+ε)`` and ``β − k·μ``."""
    k = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return k, norm.bias.detach().double() - k * norm.running_mean.double()


def fold_chain(net: nn.Sequential, example: Tensor) -> tuple[Graph, Program]:
    """conv → bn becomes one convolution that stores the batch norm's value; every other layer stays."""
    graph = trace(net.eval(), example)
    values = [node.name for node in graph.fx.nodes if node.op == "call_function"]
    root, folded, records, labels = nn.Module(), fx.Graph(), {}, {}
    last = folded.placeholder("x")
    for place, (name, layer) in enumerate(net.named_children()):
        if isinstance(layer, nn.BatchNorm2d):
            continue
        layer, identity = copy.deepcopy(layer).double(), [one(values[place])]
        after = net[place + 1] if place + 1 < len(net) else None
        if isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
            k, shift = batch_norm_affine(after)
            bias = torch.zeros(len(k), dtype=torch.float64) if layer.bias is None else layer.bias.detach()
            layer.weight.data.mul_(k.reshape(-1, 1, 1, 1))
            layer.bias = nn.Parameter(k * bias + shift)
            inverse = torch.where(k == 0, 0.0, 1 / torch.where(k == 0, 1.0, k))
            alias = Record(values[place], column(inverse), column(-shift * inverse), column(k) != 0)
            identity = [alias, one(values[place + 1])]
        root.add_module(f"folded{name}", layer)
        last = folded.call_module(f"folded{name}", (last,))
        records[last.name], labels[last.name] = identity, f"stage.{name}"
    folded.output(last)
    return graph, Program(fx.GraphModule(root, folded), records, labels)


def one(value: str) -> Record:
    """The stored tensor is the training value."""
    return Record(value, torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64))


def plain(depth: int = 3, width: int = 6, seed: int = 0, **statistics) -> nn.Sequential:
    layers: list[nn.Module] = []
    for place in range(depth):
        layers += [nn.Conv2d(width if place else 3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, 5, 1), nn.ReLU()]
    return randomise(nn.Sequential(*layers), seed, **statistics)


def copy_of(graph: Graph) -> Program:
    """The training graph itself as a folded program, every value its own record."""
    folded, root, table, records = fx.Graph(), nn.Module(), {}, {}
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            root.register_buffer(node.target.replace(".", "_"), cast(graph.tensors[node.target], torch.float64))
            table[node] = folded.get_attr(node.target.replace(".", "_"))
        else:
            table[node] = folded.node_copy(node, table.__getitem__)
        if node.op == "call_function":
            records[table[node].name] = [Record(node.name, torch.ones(()).double(), torch.zeros(()).double())]
    return Program(fx.GraphModule(root, folded), records, {})


def run(graph: Graph, program: Program, **options) -> Certificate:
    return certify(graph, program, probing.make(graph), **options)


def plant(program: Program, name: str, change) -> None:
    with torch.no_grad():
        change(getattr(program.module, name))
