"""From a checkpoint to a network that is folded and proved, ready to be exported: what every command begins with."""

from __future__ import annotations

import copy
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from foldexport import api, costs, normalise, preprocessing, samples
from foldexport.certify import Certificate
from foldexport.costs import Costs
from foldexport.errors import UsageError
from foldexport.extremes import Extremes, absurd
from foldexport.fold.constants import Constants
from foldexport.fold.ledger import Ledger
from foldexport.fold.rebuild import Program, in_dtype
from foldexport.recognise import Network, recognise
from foldexport.trace import Graph, trace
from foldexport.trace.rejected import OtherType
from foldexport.verify.golden import golden_inputs

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """What the user says about a checkpoint; the fields are the options of the command line.

    normalize: the largest value of raw pixels, 1 or 255, where mean and std are to be part of the network.
    """

    checkpoint: Path
    arch: str | None = None
    arch_args: dict[str, Any] = field(default_factory=dict)
    input_shapes: tuple[tuple[int, ...], ...] = ()
    data: Path | None = None
    seed: int = 0
    fold: bool = True
    trust_pickle: bool = False
    use_ema: bool | None = None
    free_axes: tuple[str, ...] = ()
    chain: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    normalize: float | None = None
    class_names: Path | None = None


@dataclass(eq=False)
class Study:
    """A network, traced, folded and proved.

    module: what is to be exported, in float32.     graph: the training graph.     example: inputs of the user's batch.
    evaluated: weights that a formula made ("DiracConv2d": 12), computed once.      levels: float32 noise per output.
    after, ledger, certificate: None where the user asked for no fold.              seconds: per stage.
    refold: the folded network in float64 once more.
    """

    network: Network
    module: nn.Module
    graph: Graph
    example: tuple[Tensor, ...]
    data: list[np.ndarray] | None
    before: Costs
    after: Costs | None
    ledger: Ledger | None
    certificate: Certificate | None
    evaluated: dict[str, int]
    seconds: dict[str, float]
    extremes: Extremes | None = None
    refold: Callable[[], Program] | None = None

    @property
    def levels(self) -> list[float] | None:
        rounding = None if self.certificate is None else self.certificate.rounding
        return None if rounding is None else rounding.levels


class Clock:
    """Seconds per stage, and a word to the user as each begins."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.tell = progress or (lambda step: None)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.tell(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def study(question: Question, clock: Clock) -> Study:
    """Read, recognise, trace, fold and certify.

    Raises what those stages raise, and UsageError for inputs that do not fit.
    """
    with clock.stage("read"):
        network = recognise(
            question.checkpoint, arch=question.arch, arch_args=question.arch_args,
            trust_pickle=question.trust_pickle, use_ema=question.use_ema,
        )  # fmt: skip
        names, raw = _settled(network, question)
        data = samples.load(question.data, network.preprocessing) if question.data else None
        example = example_inputs(network, question, data, raw)
        if raw is not None:
            network.module = normalise.normalized(network.module, example, raw)
    with _of_data(question.data if data is not None else None):
        found = _folded(network, example, data, question, clock) if question.fold else _plain(network, example, data, clock)
    _name_classes(found, names, question)
    return found


@contextmanager
def _of_data(path: Path | None) -> Iterator[None]:
    """Inputs of a type that the network does not take are told of by the name of their file. Raises UsageError."""
    try:
        yield
    except OtherType as error:
        if path is None:
            raise
        raise UsageError(
            f"--data {path}: {path.name} is {error.found}; the network takes {error.wanted}: save it as {error.wanted}, "
            "scaled as in training."
        ) from error


def _settled(network: Network, question: Question) -> tuple[tuple[str, ...], normalise.Raw | None]:
    """What the user says of the inputs, put into the network's preprocessing; class names, and the pixels of --normalize.

    Raises UsageError for what does not fit.
    """
    names = preprocessing.read_names(question.class_names) if question.class_names else ()
    if names:
        preprocessing.require_names(names, network.num_classes, f"--class-names {question.class_names}")
    shapes = question.input_shapes or network.input_shapes
    if question.data is not None and question.data.is_dir() and len(shapes) == 1 and len(shapes[0]) == 4:
        network.preprocessing.setdefault("input_size", tuple(shapes[0][1:]))
    network.notes += preprocessing.settle(
        network.preprocessing, shapes, mean=question.mean, std=question.std, asked=bool(question.input_shapes)
    )
    if question.normalize is None:
        return names, None
    raw = preprocessing.raw_of(network.preprocessing, question.normalize)
    network.notes.append(preprocessing.taken_in(network.preprocessing, raw))
    return names, raw


def _name_classes(found: Study, given: tuple[str, ...], question: Question) -> None:
    """The user's class names, or those of the file where there is one for each output. Raises UsageError for a wrong count."""
    fields = found.network.preprocessing
    leaf = next(iter(found.graph.fx.output_node().args[0]), None)
    shape = getattr(getattr(leaf, "meta", {}).get("val"), "shape", ())
    count = int(shape[1]) if len(shape) > 1 and isinstance(shape[1], int) else None
    if given:
        preprocessing.require_names(given, count, f"--class-names {question.class_names}")
        fields["label_names"] = given
    elif fields.get("label_names") and len(fields["label_names"]) != count:
        known = len(fields["label_names"])
        found.network.notes.append(f"left out the {known} class names of the file: the network has {count} outputs")
        del fields["label_names"]


def _folded(network: Network, example: tuple, data: list | None, question: Question, clock: Clock) -> Study:
    folded = api.fold(
        network.module, example, data=data, seed=question.seed, free=question.free_axes, chain=question.chain,
        progress=clock.tell,
    )  # fmt: skip
    clock.seconds |= folded.seconds
    network.notes += [*folded.graph.notes, *absurd(folded.graph.tensors)]
    with clock.stage("count"):
        before = costs.of_graph(folded.graph, network.module, folded.counts_before)
        after = costs.of_module(folded.module, folded.graph.example, folded.counts_after)
        evaluated = evaluated_weights(folded.graph)
    return Study(
        network, in_dtype(folded.module, torch.float32), folded.graph, _as_float32(example), data, before, after,
        folded.ledger, folded.certificate, evaluated, clock.seconds, folded.extremes, folded.refold,
    )  # fmt: skip


def _plain(network: Network, example: tuple, data: list | None, clock: Clock) -> Study:
    with clock.stage("trace"):
        graph = trace(network.module, example)
        api.check_deterministic(graph)
        api.check_finite(graph)
        before = costs.of_graph(graph, network.module, api.count_operators(graph))
    network.notes += [*graph.notes, *absurd(graph.tensors)]
    wide = api.weights_dtype(graph) != torch.float32
    module = copy.deepcopy(graph.module).float() if wide else graph.module
    _take_by_position(module, len(example))
    return Study(network, module, graph, _as_float32(example), data, before, None, None, None, {}, clock.seconds)


def _take_by_position(module: nn.Module, count: int) -> None:
    """Where forward is ``forward(*inputs)``, as in networks that were TorchScript: gives it that many named parameters.

    Exporters match the free axes of inputs with the parameters of forward.
    """
    forward = module.forward
    if all(each.kind is not each.VAR_POSITIONAL for each in inspect.signature(forward).parameters.values()):
        return

    def positional(*inputs: Any) -> Any:
        return forward(*inputs)

    names = [f"input_{place}" for place in range(count)]
    positional.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    module.forward = positional


def example_inputs(
    network: Network, question: Question, data: list[np.ndarray] | None, raw: normalise.Raw | None = None
) -> tuple[Tensor, ...]:
    """Inputs to trace at: of the asked shapes, else of the network's own, else the first sample of the data.

    Raises UsageError where nothing says what the inputs are, or the data has other shapes.
    """
    shapes = question.input_shapes or network.input_shapes
    if not shapes and data is None:
        who = f"--arch {question.arch}" if question.arch else network.description
        raise UsageError(f"{who} does not say what its input is: pass --input-shape, for example 1x3x224x224.")
    floats = next((p.dtype for p in network.module.parameters() if p.is_floating_point()), torch.float32)
    if not shapes:
        first = tuple(torch.as_tensor(array[:1]) for array in data or ())
        return tuple(value.to(floats) if value.is_floating_point() else value for value in first)
    if data is not None:
        _require_same_shapes(shapes, data, question.data)
    try:
        if raw is not None:
            normalise.require_image(shapes, raw)
        drawn = golden_inputs(shapes, question.seed, raw)
    except (MemoryError, ValueError, RuntimeError) as error:  # what numpy and torch raise for sizes beyond memory
        written = ", ".join("x".join(map(str, shape)) for shape in shapes)
        raise UsageError(f"--input-shape {written}: no such input can be made ({error}).") from error
    kinds = [array.dtype for array in data] if data is not None else [np.dtype("float32")] * len(drawn)
    return tuple(
        value.to(floats) if kind.kind == "f" else torch.as_tensor(array[:1])
        for value, kind, array in zip(drawn, kinds, data or drawn, strict=True)
    )


def _require_same_shapes(shapes: tuple, data: list[np.ndarray], path: Path | None) -> None:
    wanted = ["x".join(map(str, shape[1:])) for shape in shapes]
    found = ["x".join(map(str, array.shape[1:])) for array in data]
    if wanted != found:
        seen, known = ", ".join(found), ", ".join(wanted)
        _require_same_channels(shapes, data, f"--data {path}: samples are {seen}, the network's input is {known}")
        raise UsageError(f"--data {path}: samples are {seen}, the network's input is {known}; pass --input-shape.")


def _require_same_channels(shapes: tuple, data: list[np.ndarray], said: str) -> None:
    """Raise UsageError where images have another number of channels, which no --input-shape changes."""
    for shape, array in zip(shapes, data, strict=False):
        if len(shape) == array.ndim > 2 and shape[1] != array.shape[1]:
            raise UsageError(f"{said}: the network takes images of {_channels(shape[1])}, these have {array.shape[1]}.")


def _channels(count: int) -> str:
    return "1 channel" if count == 1 else f"{count} channels"


def evaluated_weights(graph: Graph) -> dict[str, int]:
    """How many weights a formula over constants makes, by the class of the user's module: ``{"DiracConv2d": 12}``."""
    constants = Constants(graph)
    found: Counter[str] = Counter()
    for node in graph.fx.nodes:
        reads = node.args[1] if node.op == "call_function" and len(node.args) > 1 and node not in constants else None
        made = isinstance(reads, fx.Node) and reads.op == "call_function" and reads in constants
        if made and reads.meta["val"].dim() > 1:
            found[node.meta.get("module_type") or "functional"] += 1
    return dict(found)


def _as_float32(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() if value.is_floating_point() else value for value in example)
