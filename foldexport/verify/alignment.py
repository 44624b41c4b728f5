"""Which value of an artifact is which value of the module that was exported.

Names of weights say it where a layer has some: the operator of the artifact that reads ``layer1.0.conv1.weight`` is that
layer, its input is the layer's input. From there, operators without weights are followed one by one, and what was found so
counts only where the next layer's input, or the network's output, comes out where it was expected: a writer may have put
several operators for one, or one for several.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx, nn

from foldexport.exporters.inner import Inner, Operator

CLAMPS = dict.fromkeys(("relu6", "hardtanh", "clamp"), "clip")  # their bounds are what is compared


def traced(module: nn.Module) -> fx.GraphModule:
    """The module as a graph of layers. Raises what torch.fx raises where it cannot trace it."""
    return module if isinstance(module, fx.GraphModule) else fx.symbolic_trace(module)


def align(module: Inner, artifact: Inner) -> dict[str, str]:
    """The module's value → the artifact's, for those values whose place in the artifact is sure."""
    return _Alignment(module, artifact).found


class _Alignment:
    def __init__(self, module: Inner, artifact: Inner) -> None:
        self.module, self.artifact = module, artifact
        self.found = dict(zip(module.inputs, artifact.inputs, strict=True))
        self.guessed: dict[str, str] = {}
        self.behind: dict[str, tuple[str, ...]] = {}  # what a guess was made from
        self.readers, self.there = _readers(module), _readers(artifact)
        self.makers = {operator.output: operator for operator in artifact.operators}
        anchors = _anchors(module, artifact)
        for operator in module.operators:
            if operator.output in anchors:
                first, last = anchors[operator.output]
                if len(operator.inputs) == 1 and first is not None and len(first.inputs) == 1:
                    self._settle_input(operator.inputs[0], first.inputs[0])
                if len(last.inputs) <= len(operator.inputs):  # else it does more than the layer
                    self._settle(self._end(operator, last), last.output)
            else:
                self._guess(operator)
        if len(module.outputs) == len(artifact.outputs):
            for name, value in zip(module.outputs, artifact.outputs, strict=True):
                self._settle(name, value)

    def _end(self, operator: Operator, there: Operator) -> str:
        """The module's value that the artifact's operator makes of the same; "" where none is.

        That of the activation behind the layer, where this is a part of the operator.
        """
        if not there.fused:
            return "" if _is_part(operator, there) else operator.output
        after = self.readers[operator.output]
        same = len(after) == 1 and len(after[0].inputs) == 1 and _activation(after[0].kind) == _activation(there.fused)
        return after[0].output if same else ""

    def _guess(self, operator: Operator) -> None:
        """The one operator of the artifact that reads the same values, where both graphs read them equally often."""
        inputs = [self.found.get(name, self.guessed.get(name)) for name in operator.inputs]
        if None in inputs or operator.output in self.found or operator.output in self.guessed:
            return
        same = [len(self.readers[mine]) == len(self.there[its]) for mine, its in zip(operator.inputs, inputs, strict=True)]
        fitting = [each for each in self.there[inputs[0]] if set(each.inputs) == set(inputs)]
        end = self._end(operator, fitting[0]) if all(same) and len(fitting) == 1 else ""
        if end:
            self.guessed[end], self.behind[end] = fitting[0].output, operator.inputs

    def _settle_input(self, name: str, value: str) -> None:
        """Of a layer, which may pad what it reads by itself: then its input is what is padded, if that was expected."""
        maker = self.makers.get(value)
        if maker is not None and maker.pads and self.guessed.get(name) != value:
            if self.guessed.get(name) != maker.inputs[0]:
                return
            value = maker.inputs[0]
        self._settle(name, value)

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
            if guess is None:
                continue
            if right:
                self.found.setdefault(each, guess)
            waiting += [other for other in self.behind[each] if other in self.guessed]


def _activation(kind: str) -> str:
    plain = kind.lower().replace("_", "")
    return CLAMPS.get(plain, plain)


def _is_part(operator: Operator, there: Operator) -> bool:
    """Of an activation with weights: whether the artifact has it in several operators, which go on after the weights."""
    return "prelu" in operator.kind.lower() and "prelu" not in there.kind.lower()


def _readers(graph: Inner) -> dict[str, list[Operator]]:
    found: dict[str, list[Operator]] = defaultdict(list)
    for operator in graph.operators:
        for name in operator.inputs:
            found[name].append(operator)
    return found


def _anchors(module: Inner, artifact: Inner) -> dict[str, tuple[Operator | None, Operator]]:
    """The module's value → the artifact's operators that read the layer's first weight, and any of its weights last.

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
    found: dict[str, tuple[Operator | None, Operator]] = {}
    merged: list[Operator] = []
    for weights, same in calls.items():
        there = {name: reading[name] for name in weights if name in reading}
        if not there:
            merged += same
        if not there or any(len(operators) != len(same) for operators in there.values()):
            continue
        for number, operator in enumerate(same):
            last = max((operators[number] for operators in there.values()), key=lambda each: place[each.output])
            first = there[weights[0]][number] if weights[0] in there and _begins(operator, there, number) else None
            found[operator.output] = (first, last)
    for operator in merged:
        for name in operator.inputs:
            found.pop(name, None)
    return found


def _begins(operator: Operator, there: dict[str, list[Operator]], number: int) -> bool:
    """Whether what reads a layer's first weight reads its input too: a norm in several operators takes statistics before."""
    return "norm" not in operator.kind.lower() or (len(there) > 1 and len({each[number].output for each in there.values()}) == 1)
