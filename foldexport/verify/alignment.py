"""Which value of an artifact is which value of the module that was exported.

Names of weights say it where a layer has some: the operator of the artifact that reads ``layer1.0.conv1.weight`` is that
layer, its input is the layer's input. From there, operators without weights are followed one by one, and what was found so
counts only where the next layer's input, or the network's output, comes out where it was expected: a writer may have put
several operators for one, or one for several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import fx, nn
from torch.utils import _pytree as pytree

from foldexport.exporters.inner import Inner, Operator, Row, operators_of

PASSING = frozenset({"Dropout", "Dropout2d", "Identity", "to", "float", "half", "contiguous", "clone", "detach", "dropout"})
SIZES = frozenset({"size", "dim", "sym_size", "getattr"})


def traced(module: nn.Module) -> fx.GraphModule:
    """The module as a graph of layers. Raises what torch.fx raises where it cannot trace it."""
    return module if isinstance(module, fx.GraphModule) else fx.symbolic_trace(module)


def module_operators(module: fx.GraphModule) -> Inner:
    """The module's operators on data, named as the nodes of its graph."""
    nodes = list(module.graph.nodes)
    inputs = [node.name for node in nodes if node.op == "placeholder"]
    operators, known = operators_of(inputs, _rows(module, nodes), passing=PASSING, sizes=SIZES)
    leaves = pytree.tree_leaves(nodes[-1].args[0])
    return Inner(operators, inputs, [known.get(leaf.name, "") for leaf in leaves if isinstance(leaf, fx.Node)], _not_run)


def _not_run(names: Sequence[str], arrays: Sequence) -> list:
    raise NotImplementedError


def _rows(module: fx.GraphModule, nodes: list[fx.Node]) -> Iterator[Row]:
    for node in nodes:
        reads = [each.name for each in node.all_input_nodes]
        if node.op == "call_module":
            layer = module.get_submodule(node.target)
            tensors = [*layer.named_parameters(), *layer.named_buffers()]
            yield Row(type(layer).__name__, reads, [node.name], [f"{node.target}.{name}" for name, _ in tensors])
        elif node.op in ("call_function", "call_method"):
            held = [str(each.target) for each in node.all_input_nodes if each.op == "get_attr"]
            kind = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            yield Row(kind.partition(".")[0], reads, [node.name], held)


def align(module: Inner, artifact: Inner) -> dict[str, str]:
    """The module's value → the artifact's, for those values whose place in the artifact is sure."""
    return _Alignment(module, artifact).found


class _Alignment:
    def __init__(self, module: Inner, artifact: Inner) -> None:
        self.module, self.artifact = module, artifact
        self.found = dict(zip(module.inputs, artifact.inputs, strict=True))
        self.guessed: dict[str, str] = {}
        self.makers = {operator.output: operator for operator in module.operators}
        self.readers, self.there = _readers(module), _readers(artifact)
        anchors = _anchors(module, artifact)
        for operator in module.operators:
            if operator.output in anchors:
                first, output = anchors[operator.output]
                if len(operator.inputs) == 1 and first is not None and len(first.inputs) == 1:
                    self._settle(operator.inputs[0], first.inputs[0])
                self._settle(operator.output, output)
            else:
                self._guess(operator)
        if len(module.outputs) == len(artifact.outputs):
            for name, value in zip(module.outputs, artifact.outputs, strict=True):
                self._settle(name, value)

    def _guess(self, operator: Operator) -> None:
        """The one operator of the artifact that reads the same values, where both graphs read them equally often."""
        inputs = [self.found.get(name, self.guessed.get(name)) for name in operator.inputs]
        if None in inputs:
            return
        same = [len(self.readers[mine]) == len(self.there[its]) for mine, its in zip(operator.inputs, inputs, strict=True)]
        fitting = [each for each in self.there[inputs[0]] if set(each.inputs) == set(inputs)]
        if all(same) and len(fitting) == 1:
            self.guessed[operator.output] = fitting[0].output

    def _settle(self, name: str, value: str) -> None:
        """``name`` is ``value`` for sure: what led there was right if it led to the same, else it counts for nothing."""
        if name in self.found or not name or value in self.found.values():
            return
        right = self.guessed.get(name) == value
        self.found[name] = value
        waiting = [name]
        while waiting:
            each = waiting.pop()
            guess = self.guessed.pop(each, None)
            if guess is not None and right:
                self.found.setdefault(each, guess)
            if each in self.makers and (guess is not None):
                waiting += [other for other in self.makers[each].inputs if other in self.guessed]


def _readers(graph: Inner) -> dict[str, list[Operator]]:
    found: dict[str, list[Operator]] = defaultdict(list)
    for operator in graph.operators:
        for name in operator.inputs:
            found[name].append(operator)
    return found


def _anchors(module: Inner, artifact: Inner) -> dict[str, tuple[Operator | None, str]]:
    """The module's value → the artifact's operator that reads the layer's first weight, and the layer's result there.

    The calls of a layer are in the same order in both. A layer whose weights are not in the artifact was merged into the one
    before it, which then has no value of its own.
    """
    place = {operator.output: at for at, operator in enumerate(artifact.operators)}
    reading: dict[str, list[Operator]] = defaultdict(list)
    for operator in artifact.operators:
        for name in operator.weights:
            reading[name].append(operator)
    calls: dict[tuple[str, ...], list[Operator]] = defaultdict(list)
    for operator in module.operators:
        if operator.weights:
            calls[operator.weights].append(operator)
    found: dict[str, tuple[Operator | None, str]] = {}
    merged: list[Operator] = []
    for weights, same in calls.items():
        there = {name: reading[name] for name in weights if name in reading}
        if not there:
            merged += same
        if not there or any(len(operators) != len(same) for operators in there.values()):
            continue
        for number, operator in enumerate(same):
            last = max((operators[number] for operators in there.values()), key=lambda each: place[each.output])
            first = there[weights[0]][number] if weights[0] in there else None
            found[operator.output] = (first, last.output)
    for operator in merged:
        for name in operator.inputs:
            found.pop(name, None)
    return found
