"""Inputs on which the folded network is compared with its training graph.

Values come from Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") through integer arithmetic
alone, so a seed gives the same bits on every machine, and every value is a multiple of 2^-16 below 8: exact in float32,
so that a float32 run and its float64 reference read the very same input.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from foldexport.errors import UsageError
from foldexport.normalise import Raw

if TYPE_CHECKING:
    from foldexport.trace import Graph

LARGE_SAMPLE = 3 * 448 * 448  # input elements of one sample; above, probes stay at batch 1
HUGE_SAMPLE = 3 * 640 * 640  # above, one probe has the user's size and the others a quarter of it where the network allows
SMALL_SAMPLE = 3 * 128 * 128  # elements up to which a batch costs less than its samples one by one
NOISE_SAMPLES = 8  # samples behind the float32 noise of the training graph
HUGE_NOISE_SAMPLES = 4  # of huge samples, of which each takes seconds; more are drawn where the outcome is near the warning
SPECIAL = ("uniform", "constant", "impulse")
USER_SAMPLES = 4  # samples taken from the user's data


@dataclass(frozen=True, eq=False)
class Probe:
    """One set of inputs of the network, in the order of the training graph's placeholders.

    name: "normal", "uniform" (in [0, 1)), "constant" (in space, a normal value per channel), "impulse" (in two
        corners), "second size" (normal), "data" (the user's). Where the network takes raw pixels, uniform is of their whole
        range, and the others are what it normalises to these values.
    inputs: floating inputs in float64, the others in the network's own dtype; what is not a tensor is passed as it is.
    optional: the network was not traced for this shape; a network or fold that does not take it is recorded only.
    resized: of other spatial sizes than the example. instead: the probe to judge where this one is not taken.
    """

    name: str
    inputs: tuple
    optional: bool = False
    resized: bool = False
    instead: Probe | None = None

    @property
    def shapes(self) -> list[list[int]]:
        """Sizes of the inputs, for the record."""
        return [list(value.shape) for value in self.inputs if isinstance(value, Tensor)]

    @property
    def samples(self) -> int:
        """Length of the first axis of the first tensor that has one."""
        return next((value.shape[0] for value in self.inputs if isinstance(value, Tensor) and value.dim()), 1)


@dataclass(frozen=True)
class Slot:
    """What a placeholder takes: example value, axes that follow the batch, exclusive range of integers, raw pixels."""

    name: str
    example: object
    batch_axes: tuple[int, ...]
    integers: tuple[int, int]
    fraction: float
    raw: Raw | None = None

    @property
    def is_float(self) -> bool:
        return isinstance(self.example, Tensor) and self.example.is_floating_point()


def make(graph: Graph, *, seed: int = 0, data: Sequence | None = None) -> list[Probe]:
    """The probes of a certificate: the decisive one first, batches of three and of one, and a second spatial size; an odd one too
    where height or width are free.

    Above `HUGE_SAMPLE` the special ones and the batch of three have a quarter of the example's height and width.
    data: the user's own inputs, one array per input of the network with the batch first; at most four samples are used.

    Raises :class:`UsageError` when the data does not match the inputs.
    """
    slots = _slots(graph)
    elements = _sample_elements(slots)
    large, huge = elements > LARGE_SAMPLE, elements > HUGE_SAMPLE
    many, one = (_batch_size(graph, slots, 1 if large else 3), _batch_size(graph, slots, 1))
    probes = [Probe("normal", _draw(slots, many, "normal", seed))]
    special = [Probe(kind, _draw(slots, one, kind, seed)) for kind in SPECIAL]
    resized = [_other_size(slot.example, large, huge) if slot.is_float else None for slot in slots]
    if any(resized):
        inputs = _draw(slots, _batch_size(graph, slots, 3 if large else 1), "normal", seed + 1, resized)
        second = Probe("second size", inputs, optional=not _dynamic_space(graph), resized=True)
        if huge:
            special = [
                Probe(full.name, _draw(slots, one, full.name, seed, resized), optional=True, resized=True, instead=full)
                for full in special
            ]
        odd = _odd_size(graph, slots, resized, seed)
        special = [second, *odd, *special] if huge else [*special, second, *odd]
    probes += special
    if data is not None:
        probes.append(Probe("data", _user_inputs(graph, slots, data)))
    return probes


def first_sample(graph: Graph, probe: Probe) -> Probe:
    """The probe cut to its first sample, where the network's batch is free."""
    slots = _slots(graph)
    if _batch_size(graph, slots, 1) is None:
        return probe
    traced = _traced_batch(slots)
    values = list(probe.inputs)
    for place, slot in enumerate(slots):
        for axis in slot.batch_axes:
            values[place] = values[place].narrow(axis, 0, slot.example.shape[axis] // traced)
    return replace(probe, inputs=tuple(values))


def noise_probes(graph: Graph, *, seed: int = 0, first: Probe | None = None) -> list[Probe]:
    """At least eight normal samples (four huge ones), several at a time where the network's batch is free and samples are small.

    first: a probe of normal samples that is run anyway and counts among them.
    """
    slots = _slots(graph)
    total = HUGE_NOISE_SAMPLES if _sample_elements(slots) > HUGE_SAMPLE else NOISE_SAMPLES
    wanted = total - (first.samples if first is not None else 0)
    batch = _batch_size(graph, slots, 1 if _sample_elements(slots) > SMALL_SAMPLE else min(4, max(1, wanted)))
    seeds = range(seed + 2, seed + 2 + math.ceil(wanted / (batch or _traced_batch(slots))))
    return [first] * (first is not None) + [Probe("normal", _draw(slots, batch, "normal", each)) for each in seeds]


def further_noise_probes(graph: Graph, *, seed: int = 0, samples: int = 40) -> Iterator[Probe]:
    """Normal samples beyond those of `noise_probes`, up to ``samples`` in all, drawn when they are asked for."""
    for more in range(1, math.ceil(samples / NOISE_SAMPLES)):
        yield from noise_probes(graph, seed=seed + 1000 * more)


def second_size(example: Tensor, large: bool) -> tuple[int, ...] | None:
    """Other sizes for the spatial axes (2 and up), unequal to each other and multiples of the usual strides.

    Smaller where there is room, for a smaller size costs less: 224×224 gives 192×160, 32×32 gives 40×48.
    """
    if example.dim() < 3:
        return None
    sizes = []
    for place, size in enumerate(example.shape[2:], start=1):
        if large and size >= 256:
            sizes.append(size // 64 * 32 + 32 * (place - 1))
        elif size >= 128:
            sizes.append(size - 32 * place)
        else:
            sizes.append(size + max(1, min(8, size // 4)) * place)
    return tuple(sizes)


def _other_size(example: Tensor, large: bool, huge: bool) -> tuple[int, ...] | None:
    """`second_size`; of huge samples a quarter of the spatial axes, in multiples of 32: 1024×1024 gives 256×288."""
    if not huge or example.dim() < 3:
        return second_size(example, large)
    return tuple(size // 128 * 32 + 32 * place if size >= 256 else size for place, size in enumerate(example.shape[2:]))


def _odd_size(graph: Graph, slots: list[Slot], even: Sequence[tuple[int, ...] | None], seed: int) -> list[Probe]:
    """Odd heights and widths, where padding and halving go another way, if those are free and the network takes them.

    A network that adds what it halved and doubled does not.
    """
    from foldexport.trace.elsewhere import takes

    if not _dynamic_space(graph) or graph.module is None:
        return []
    odd = [tuple(max(1, size - 1 + size % 2) for size in sizes) if sizes else None for sizes in even]
    inputs = _draw(slots, _batch_size(graph, slots, 1), "normal", seed + 1, odd)
    given = [value.to(slot.example.dtype) if slot.is_float else value for slot, value in zip(slots, inputs, strict=True)]
    return [Probe("odd size", inputs, resized=True)] if takes(graph.module, tuple(given)) else []


def is_huge(graph: Graph) -> bool:
    """Whether one sample is so large that only what must be is run at its size."""
    return _sample_elements(_slots(graph)) > HUGE_SAMPLE


def normal(words: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """``[count]`` values of mean 0 and variance 1: the sum of twelve uniforms of 16 bits (Irwin-Hall), minus 6."""
    raw = words(3 * count).reshape(3, count)
    lanes = np.uint64(0x0000FFFF0000FFFF)  # two sums of six at once, in halves of 32 bits
    pairs = (raw & lanes).sum(0) + ((raw >> np.uint64(16)) & lanes).sum(0)
    parts = (pairs & np.uint64(0xFFFFFFFF)) + (pairs >> np.uint64(32))
    return (parts.astype(np.float64) - 6 * 0xFFFF) / 65536.0


def uniform(words: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """``[count]`` values in [0, 1) on a grid of 2^-16."""
    return (words(count) >> np.uint64(48)).astype(np.float64) / 65536.0


def _words(seed: int, name: str) -> Callable[[int], np.ndarray]:
    """A source of 64-bit words that depends on the seed and the purpose only."""
    return np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(name.encode())]).random_raw


def _draw(slots: list[Slot], batch: int | None, kind: str, seed: int, resized: list | None = None) -> tuple:
    """One value per slot; ``batch`` None keeps the traced batch."""
    traced = _traced_batch(slots)
    values = []
    for place, slot in enumerate(slots):
        if not isinstance(slot.example, Tensor):
            values.append(slot.example)
            continue
        shape = list(slot.example.shape)
        for axis in slot.batch_axes if batch is not None else ():
            shape[axis] = shape[axis] // traced * batch
        if resized is not None and resized[place] is not None:
            shape[2:] = resized[place]
        words = _words(seed, f"{kind}/{place}")
        values.append(_raw(kind, _float_value(kind, shape, words), slot.raw) if slot.is_float else _other_value(slot, shape, words))
    return tuple(values)


def _raw(kind: str, drawn: Tensor, raw: Raw | None) -> Tensor:
    if raw is None:
        return drawn
    return raw.top * drawn if kind == "uniform" else raw.pixels(drawn)


def _float_value(kind: str, shape: list[int], words: Callable[[int], np.ndarray]) -> Tensor:
    count = math.prod(shape)
    if kind == "normal":
        return torch.from_numpy(normal(words, count)).reshape(shape)
    if kind == "uniform":
        return torch.from_numpy(uniform(words, count)).reshape(shape)
    if kind == "constant":
        space = len(shape) - min(2, len(shape))
        drawn = torch.from_numpy(normal(words, math.prod(shape[: len(shape) - space])))
        return drawn.reshape(shape[: len(shape) - space] + [1] * space).expand(shape).contiguous()
    return _impulse(shape)


def _impulse(shape: list[int]) -> Tensor:
    """Zero but for two opposite corners of space: 4 in the first, −3 in the last, so both ends of a padding are met."""
    value = torch.zeros(shape, dtype=torch.float64)
    if value.numel():
        space = max(len(shape) - 2, min(len(shape) - 1, 1))
        value[(...,) + (-1,) * space] = -3.0
        value[(...,) + (0,) * space] = 4.0
    return value


def _other_value(slot: Slot, shape: list[int], words: Callable[[int], np.ndarray]) -> Tensor:
    """Integers inside the slot's range; booleans with the example's fraction of True; complex with normal parts."""
    example, count = slot.example, math.prod(shape)
    if example.is_complex():
        parts = [torch.from_numpy(normal(words, count)).reshape(shape) for _ in range(2)]
        return torch.complex(*parts)
    if example.dtype == torch.bool:
        return torch.from_numpy(uniform(words, count) < slot.fraction).reshape(shape)
    low, high = slot.integers
    drawn = low + np.floor(uniform(words, count) * (high - low)).astype(np.int64)
    return torch.from_numpy(drawn).reshape(shape).to(example.dtype)


def _slots(graph: Graph) -> list[Slot]:
    placeholders = [node for node in graph.fx.nodes if node.op == "placeholder"]
    return [_slot(graph, node, value) for node, value in zip(placeholders, graph.example, strict=True)]


def _slot(graph: Graph, node: torch.fx.Node, example: object) -> Slot:
    if not isinstance(example, Tensor):
        return Slot(node.name, example, (), (0, 1), 0.0)
    symbolic = getattr(node.meta.get("val"), "shape", ())
    axes = tuple(axis for axis, size in enumerate(symbolic) if not isinstance(size, int) and axis == 0)
    discrete = example.numel() > 0 and not example.is_complex() and not example.is_floating_point()
    values = example.long() if discrete else torch.zeros(1, dtype=torch.long)
    integers = _index_range(graph, node) or (int(values.min()), int(values.max()) + 1)
    return Slot(node.name, example, axes, integers, float(values.double().mean()), graph.raw)


def _index_range(graph: Graph, node: torch.fx.Node) -> tuple[int, int] | None:
    """``[0, rows)`` when the input is looked up in an embedding; an index outside of it would be refused."""
    rows = [
        graph.tensors[user.args[0].target].shape[0]
        for user in node.users
        if "embedding" in str(user.target) and isinstance(user.args[0], torch.fx.Node) and user.args[0].op == "get_attr"
    ]
    return (0, min(rows)) if rows else None


def _batch_size(graph: Graph, slots: list[Slot], wanted: int) -> int | None:
    """The wanted batch where it is free, None (as traced) where it is not."""
    free = graph.dynamic.get("batch", False) and any(slot.batch_axes for slot in slots)
    return wanted if free else None


def _traced_batch(slots: list[Slot]) -> int:
    sizes = [slot.example.shape[axis] for slot in slots for axis in slot.batch_axes]
    if not sizes:
        sizes = [slot.example.shape[0] for slot in slots if isinstance(slot.example, Tensor) and slot.example.dim()]
    return max(1, min(sizes, default=1))


def _dynamic_space(graph: Graph) -> bool:
    return bool(graph.dynamic.get("height") or graph.dynamic.get("width"))


def _sample_elements(slots: list[Slot]) -> int:
    batch = _traced_batch(slots)
    return sum(slot.example.numel() for slot in slots if isinstance(slot.example, Tensor)) // batch


def _user_inputs(graph: Graph, slots: list[Slot], data: Sequence) -> tuple:
    """The first samples of the user's data, repeated where the network's batch is fixed and larger."""
    if len(data) != len(slots):
        raise UsageError(f"the data holds {len(data)} arrays, the network takes {len(slots)}: give one per input")
    arrays = [value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value)) for value in data]
    batched = [value for slot, value in zip(slots, arrays, strict=True) if slot.batch_axes and value.dim()]
    count = min([USER_SAMPLES, *(len(value) for value in batched)])
    return tuple(_user_value(slot, value, count) for slot, value in zip(slots, arrays, strict=True))


def _user_value(slot: Slot, value: Tensor, count: int) -> object:
    example = slot.example
    if not isinstance(example, Tensor):
        return example
    if value.dim() != example.dim() or value.numel() == 0:
        found, wanted = list(value.shape), list(example.shape)
        raise UsageError(f"input {slot.name!r}: the data has shape {found}, the network takes {wanted}")
    if value.dim():
        value = value[torch.arange(count if slot.batch_axes else example.shape[0]) % len(value)]
    return value.double() if slot.is_float else value.to(example.dtype)
