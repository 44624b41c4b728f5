"""What builds a user's network, and which of its arguments would make a checkpoint fit.

The search builds the network with other arguments, drawn from how the shapes and numbers of layers differ, and keeps what
leaves fewer names unfit, until none is left. So what it suggests has been tried.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foldexport.checkpoint.misfit import Misfit, changed_depths, changed_sizes, misfit, numbered

#: What constructors call the number of classes and of input channels, for those that do not say what they take.
CLASSES = ("num_classes", "n_classes", "classes", "num_labels", "nb_classes", "num_class", "nclass", "nc", "out_features")
CHANNELS = ("in_chans", "in_channels", "in_ch", "input_channels", "num_channels", "n_channels", "channels", "input_nc")
#: Depths in the names of published networks.
DEPTHS = (8, 11, 13, 14, 16, 18, 19, 20, 22, 26, 28, 32, 34, 38, 40, 44, 50, 56, 101, 110, 121, 152, 161, 164, 169, 200, 201)

ROUNDS = 3
SECONDS = 20.0

Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class Builder:
    """A callable that gives a network, and the arguments it was called with.

    settings: what it takes, with the present value, given or by default. open: whether it takes names that it does not list.
    """

    build: Build
    arguments: Mapping[str, Any]
    settings: Mapping[str, Any]
    open: bool

    def suggestion(self, found: Misfit, tensors: Mapping[str, Tensor]) -> str:
        """``--arch-arg num_classes=7 …`` under which every name and shape fits; '' where the search finds none."""
        changes = self._search(found, tensors)
        return " ".join(f"--arch-arg {name}={_written(value)}" for name, value in changes.items())

    def _search(self, found: Misfit, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        until = time.monotonic() + SECONDS
        for _ in range(ROUNDS):
            best, best_change = found, {}
            for change in self._candidates(found, changes):
                left = self._tried({**changes, **change}, tensors)
                if left is not None and left.size < best.size:
                    best, best_change = left, change
                if not best.size or time.monotonic() > until:
                    break
            if not best_change:
                return {}
            changes |= best_change
            found = best
            if not found.size:
                return changes
        return {}

    def _tried(self, changes: dict[str, Any], tensors: Mapping[str, Tensor]) -> Misfit | None:
        for device in ("meta", "cpu"):  # some constructors need values, such as .item() of a linspace
            with contextlib.suppress(Exception, SystemExit), _aside(device):  # user code: not every argument makes a network
                state = self.build(**{**self.arguments, **changes}).state_dict()
                return misfit(tensors, {key: value for key, value in state.items() if isinstance(value, Tensor)})
        return None

    def _candidates(self, found: Misfit, changes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Changes of one argument each, likeliest first, none twice."""
        tried: set[str] = set()
        settings = {**self.settings, **changes}
        for name, value in _proposals(settings, found, self.open):
            if repr((name, value)) not in tried and value != settings.get(name, ...):
                tried.add(repr((name, value)))
                yield {name: value}


def builder_of(build: Build, arguments: Mapping[str, Any], network: nn.Module) -> Builder:
    """The builder of a network: what ``build`` takes, or, where that is ``**options``, what the network's class does."""
    settings, is_open = _settings(build)
    inner, _ = _settings(type(network)) if is_open else ({}, False)
    return Builder(build, arguments, {**inner, **settings, **arguments}, is_open)


def _settings(target: Any) -> tuple[dict[str, Any], bool]:
    """Names and defaults of what a callable takes by name, and whether it takes any name."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return {}, True
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default for p in named if p.default is not p.empty}, any(p.kind is p.VAR_KEYWORD for p in parameters)


# ---- which values could explain what differs


def _proposals(settings: Mapping[str, Any], found: Misfit, is_open: bool) -> Iterator[tuple[str, Any]]:
    sizes, depths = changed_sizes(found), changed_depths(found)
    numbers = {name: value for name, value in settings.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    lists = {name: value for name, value in settings.items() if isinstance(value, list | tuple) and value}
    for mine, theirs in sizes:
        yield from ((name, theirs) for name, value in numbers.items() if value == mine)
    if is_open:
        for _, theirs in sizes[:2]:
            yield from ((name, theirs) for name in (*CLASSES, *CHANNELS) if name not in settings)
    for mine, theirs in sizes[:3]:
        yield from ((name, _scaled(value, theirs, mine)) for name, value in numbers.items())
    for name, value in lists.items():
        yield name, _mapped(value, dict(sizes))
        yield from ((name, counted) for counted in _counted(value, found))
    for _, mine, theirs in depths:
        yield from ((name, theirs) for name, value in numbers.items() if value == mine)
        yield from ((name, value + (theirs - mine) * step) for name, value in numbers.items() for step in (1, 2, 3, 6))
    if depths or found.missing and found.surplus:
        yield from ((name, known) for name, value in numbers.items() if value in DEPTHS for known in DEPTHS)
    yield from ((name, not value) for name, value in settings.items() if isinstance(value, bool))


def _scaled(value: float, theirs: int, mine: int) -> float:
    scaled = value * theirs / mine if mine else value
    return int(scaled) if isinstance(value, int) and scaled == int(scaled) else scaled


def _mapped(values: Any, sizes: Mapping[int, int]) -> Any:
    return type(values)(sizes.get(value, value) if isinstance(value, int) else value for value in values)


def _counted(values: Any, found: Misfit) -> Iterator[Any]:
    """A list of numbers of layers as the checkpoint has them, where the network's are those of the list."""
    mine, theirs = numbered(found.expected), numbered(found.named)
    names = [name for name in mine if name in theirs]
    for at in range(len(names) - len(values) + 1):
        part = names[at : at + len(values)]
        if [mine[name] for name in part] == list(values):
            yield type(values)(theirs[name] for name in part)


def _written(value: Any) -> str:
    text = repr(value).replace(" ", "")
    return f"'{text}'" if any(mark in text for mark in "()[]'\"") else text


@contextlib.contextmanager
def _aside(device: str) -> Iterator[None]:
    """Tensors made on a device, nothing printed, random generators as they were."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device(device))
        yield
