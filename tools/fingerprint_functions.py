"""Which networks with the same keys and shapes compute the same: both run, in float64, with the same random weights."""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foldexport import zoo
from foldexport.errors import FoldexportError
from foldexport.fingerprints.build import constructor
from foldexport.fingerprints.table import Candidate, Shape, counted
from tests.statistics import randomise

# An even and an odd size, where the network takes them; then what it may be made for.
SIZES = ((64, 64), (75, 97), (96, 96), (128, 128), (160, 160), (192, 192), (224, 224), (256, 256), (384, 384), (300, 300))
VIDEO_SIZES = ((16, 64, 64), (16, 112, 112), (16, 224, 224))
ASKED_SIZES = 2
LARGE = 4 * 10**7  # weights
RTOL = 1e-9  # of the largest output; the closest that differ, eps 1e-5 and 1e-3, are 1e-4 apart
INFORMATIVE = 1e-6  # two images must give outputs that differ by this
UNFIT = (RuntimeError, AssertionError, ValueError, IndexError)  # what networks raise for sizes that they do not take


class Sample:
    """One network with random weights, and what it makes of random images. A large one is built anew whenever it is asked."""

    def __init__(self, make: Callable[[], nn.Module], state: Mapping[str, Tensor], sizes: Sequence[tuple[int, ...]]) -> None:
        self.sizes = sizes
        self._make, self._state = make, state
        self._network: nn.Module | None = None
        self._made: dict[tuple[int, ...], list[Tensor] | None] = {}

    def outputs(self, size: tuple[int, ...]) -> list[Tensor] | None:
        """What it makes of two images of one size; None where it does not take that size."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
        if size not in self._made:
            network = self._loaded()
            try:
                with torch.no_grad():
                    self._made[size] = list(_tensors(network(images)))
            except UNFIT:
                self._made[size] = None
        return self._made[size]

    def _loaded(self) -> nn.Module:
        if self._network is not None:
            return self._network
        network = self._make().double().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network.load_state_dict(dict(self._state), strict=False)
        if sum(each.numel() for each in self._state.values()) < LARGE:
            self._network = network
        return network


def build(candidate: Candidate, **counts: int) -> nn.Module:
    """The network of a candidate, its weights at their initialisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return constructor(candidate)(**{**candidate.arguments, **counts})


def random_state(network: nn.Module, sizes: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights, with batch-norm statistics around those of a batch, so that no gamma or scale hides a branch and the
    outputs depend on the image."""
    for name, parameter in network.named_parameters():
        if bool((parameter == parameter.reshape(-1)[0]).all()):  # scales of layers and branches, tables of positions
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.data.copy_(0.5 + drawn if parameter.dim() < 2 else 0.1 * (drawn - 0.5))
    for size in sizes:
        try:
            with torch.no_grad():
                randomise(network, 0, example=torch.randn(2, 3, *size))
            break
        except UNFIT:
            continue
    return {key: value for key, value in network.state_dict().items() if value.is_floating_point() and counted(key)}


def functions(
    candidates: Sequence[Candidate], shapes: Mapping[str, Shape], video: bool, **counts: int
) -> tuple[list[list[Candidate]], int | None, list[str]]:
    """Candidates of one fingerprint by what they compute, which of these the zoo computes, and what could not be told."""
    sizes = VIDEO_SIZES if video else SIZES
    if len(candidates) == 1 and not _in_zoo(shapes):
        return [list(candidates)], None, []
    state = random_state(build(candidates[0], **counts), sizes)
    found: list[tuple[Sample, list[Candidate]]] = []
    doubts: list[str] = []
    for candidate in candidates:
        sample = Sample(functools.partial(build, candidate, **counts), state, sizes)
        names = f"{candidate.name} and {found[0][1][0].name}" if found else ""
        same = next((members for known, members in found if _same(known, sample, names, doubts)), None)
        if same is None:
            found.append((sample, [candidate]))
        else:
            same.append(candidate)
    return [members for _, members in found], _of_zoo(state, found, doubts), doubts


def _in_zoo(shapes: Mapping[str, Shape]) -> bool:
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return any(family.recognises(empty) for family in zoo.FAMILIES)


def _of_zoo(state: Mapping[str, Tensor], found: list[tuple[Sample, list[Candidate]]], doubts: list[str]) -> int | None:
    """The place of the function that the zoo's own network computes; -1 where that computes another; None without one."""
    if not _in_zoo({key: tuple(tensor.shape) for key, tensor in state.items()}):
        return None
    try:
        network = zoo.identify(state).module
    except FoldexportError:
        return None
    sample = Sample(lambda: network, {}, found[0][0].sizes)
    places = [place for place, (known, _) in enumerate(found) if _same(known, sample, "the zoo's", doubts)]
    if not places:
        doubts.append(f"the zoo's {type(network).__name__} computes something else")
    return places[0] if places else -1


def _same(first: Sample, second: Sample, names: str, doubts: list[str]) -> bool:
    """Whether they compute the same at every one of the first sizes that both take; False where they share no size."""
    compared = 0
    for size in first.sizes:
        theirs, ours = first.outputs(size), second.outputs(size)
        if theirs is None or ours is None:
            continue
        if not _equal(theirs, ours):
            return False
        if not _informative(theirs):
            doubts.append(f"{names} at {size}: two images give the same")
        compared += 1
        if compared == ASKED_SIZES:
            break
    if not compared:
        doubts.append(f"{names} share no size")
    return compared > 0


def _equal(theirs: list[Tensor], ours: list[Tensor]) -> bool:
    if [each.shape for each in theirs] != [each.shape for each in ours]:
        return False
    return all(float((a - b).abs().max()) <= RTOL * float(a.abs().max()) for a, b in zip(theirs, ours))


def _informative(outputs: list[Tensor]) -> bool:
    return all(float((each[0] - each[1]).abs().max()) > INFORMATIVE * float(each.abs().max()) for each in outputs)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from (tensor for each in outputs.values() for tensor in _tensors(each))
    elif isinstance(outputs, list | tuple):
        yield from (tensor for each in outputs for tensor in _tensors(each))
