"""Families whose constructor arguments can be read off the keys and shapes of a checkpoint.

A family says which arguments the file could have been built with; of these candidates the ones whose network has
exactly the file's keys and shapes are possible. One: it is recognised. Several: the user is asked. None: the report of
missing, surplus and misshapen keys is that of the likeliest candidate.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foldexport.errors import CheckpointError, UsageError
from foldexport.zoo.family import Family, Identified
from foldexport.zoo.loading import load_strictly

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """Arguments that a checkpoint's network may have been built with, and which keys and shapes say so.

    ``notes``: what was assumed because no key says it.
    """

    arguments: dict[str, Any]
    reason: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """One way that a family's files name their tensors: ``rules`` are (regular expression, name in the network).

    The first rule that matches a key in full renames it; a key that no rule matches keeps its name. ``published``: rules of
    the way back, for the names of keys that a file lacks. ``settles``: arguments that no key shows, and that the code with
    these names has.
    """

    name: str
    mark: str  # a regular expression that some key of such a file matches in full, and no key of another layout
    rules: tuple[tuple[str, str], ...]
    published: tuple[tuple[str, str], ...] = ()
    settles: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, mark: str, pairs: Sequence[tuple[str, str]], settles: Mapping[str, Any] | None = None) -> Layout:
        """``pairs`` of published and network names, with ``#`` for a number and ``*`` for the rest, in the same order in both:
        ``("block1.layer.#.bn1.*", "group0.block#.bn0.*")``."""
        forth = tuple((_pattern(theirs), _template(ours)) for theirs, ours in pairs)
        back = tuple((_pattern(ours), _template(theirs)) for theirs, ours in pairs)
        return cls(name, mark, forth, back, settles or {})

    def applies(self, keys: Sequence[str]) -> bool:
        mark = re.compile(self.mark)
        return any(mark.fullmatch(key) for key in keys)

    def network_key(self, key: str) -> str:
        return _renamed_by(self.rules, key)

    def file_key(self, name: str) -> str:
        return _renamed_by(self.published, name)


def _renamed_by(rules: Sequence[tuple[str, str]], key: str) -> str:
    for pattern, name in rules:
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return key


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")


def _template(name: str) -> str:
    places = itertools.count(1)
    return re.sub(r"[#*]", lambda mark: rf"\g<{next(places)}>", name)


@dataclass(frozen=True)
class Structure:
    """What a family declares.

    ``build(**arguments)``: the training graph.   ``read(state)``: the candidates, likeliest first, for a state dict
    under the network's own names; lenient, so that one damaged tensor is reported and not the whole file refused.
    ``describe(arguments)``: the network in words.   ``preprocessing(arguments)``: timm's field names, ``input_size``
    and ``num_classes`` among them.   ``recognises(state)``: whether this is one of its checkpoints.
    ``constants(arguments)``: tensors by regular expression of their key, for constants that files may leave out.
    """

    name: str
    arch: str
    keys: tuple[str, ...]
    arguments: tuple[str, ...]
    recognises: Callable[[State], bool]
    read: Callable[[State], Sequence[Candidate]]
    build: Callable[..., nn.Module]
    describe: Callable[[Mapping[str, Any]], str]
    preprocessing: Callable[[Mapping[str, Any]], dict[str, Any]]
    layouts: tuple[Layout, ...] = ()
    constants: Callable[[Mapping[str, Any]], Mapping[str, Tensor]] = field(default=lambda arguments: {})

    def family(self) -> Family:
        """The entry for ``FAMILIES``."""
        return Family(self.name, self.arch, self.keys, self._recognises, self.load)

    def _recognises(self, tensors: State) -> bool:
        return self.recognises(_renamed(tensors, self._layout(tensors))[0])

    def load(self, tensors: dict[str, Tensor], arch_args: dict[str, Any], source: str) -> Identified:
        """The network that the tensors are of; ``arch_args`` overrule what the shapes say, and settle what they leave open.

        Raises CheckpointError where no candidate, or more than one, has these keys and shapes; UsageError for unknown
        or impossible ``arch_args``.
        """
        if unknown := sorted(arch_args.keys() - set(self.arguments)):
            raise UsageError(f"--arch {self.arch} takes no {unknown[0]}; it takes {', '.join(self.arguments)}.")
        layout = self._layout(tensors)
        state, file_key = _renamed(tensors, layout)
        found = self._candidates(state, arch_args, source)
        if layout is not None:
            found = [each for each in found if layout.settles.items() <= each.arguments.items()] or found
        filled = [(each, self._filled(state, each)) for each in found]
        fitting = [(each, whole) for each, whole in filled if self._fits(each, whole)]
        if len(fitting) > 1:
            raise CheckpointError(self._ambiguous([each for each, _ in fitting], source))
        candidate, whole = (fitting or filled)[0]
        module = self._empty(candidate.arguments, bool(arch_args), source)
        description = self.describe(candidate.arguments)
        load_strictly(module, whole, [], file_key, f"{source}, as {description}")
        preprocessing = self.preprocessing(candidate.arguments)
        return Identified(
            module, self.name, description, candidate.reason, (1, *preprocessing["input_size"]),
            preprocessing["num_classes"], preprocessing, list(candidate.notes),
        )  # fmt: skip

    def _layout(self, tensors: State) -> Layout | None:
        keys = list(tensors)
        return next((each for each in self.layouts if each.applies(keys)), None)

    def _candidates(self, state: State, arch_args: Mapping[str, Any], source: str) -> list[Candidate]:
        try:
            found = list(self.read(state))
        except (KeyError, IndexError, ValueError, ZeroDivisionError):  # a file too damaged to be read off
            found = []
        if not arch_args:
            if not found:
                raise CheckpointError(
                    f"{source}: looks like a {self.name}, but its keys and shapes are those of none.\n"
                    f"Pass --arch {self.arch} with --arch-arg ({', '.join(self.arguments)}), or the file as it was saved."
                )
            return found
        agreeing = [each for each in found if all(each.arguments.get(k) == v for k, v in arch_args.items())]
        if agreeing:
            return agreeing
        asked = ", ".join(f"{key}={value}" for key, value in arch_args.items())
        bases = found or [Candidate({}, "")]
        overruled = {repr(sorted((e.arguments | dict(arch_args)).items(), key=str)): e for e in bases}
        return [Candidate({**e.arguments, **arch_args}, f"asked for: {asked}", e.notes) for e in overruled.values()]

    def _filled(self, state: State, candidate: Candidate) -> dict[str, Tensor]:
        whole = dict(state)
        try:
            constants = self.constants(candidate.arguments)
            wanted = self._shapes(candidate.arguments) if constants else {}
        except (ValueError, TypeError):
            return whole
        for key in wanted.keys() - whole.keys():
            for pattern, value in constants.items():
                if re.fullmatch(pattern, key):
                    whole[key] = value.clone()
        return whole

    def _fits(self, candidate: Candidate, state: State) -> bool:
        try:
            wanted = self._shapes(candidate.arguments)
        except (ValueError, TypeError):
            return False
        wanted = {key: shape for key, shape in wanted.items() if not key.endswith("num_batches_tracked")}
        found = {key: tuple(t.shape) for key, t in state.items() if not key.endswith("num_batches_tracked")}
        return found == wanted

    def _shapes(self, arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            return {key: tuple(tensor.shape) for key, tensor in self.build(**arguments).state_dict().items()}

    def _empty(self, arguments: Mapping[str, Any], asked: bool, source: str) -> nn.Module:
        try:
            with torch.device("meta"):
                return self.build(**arguments)
        except (ValueError, TypeError) as error:
            if asked:
                raise UsageError(f"--arch {self.arch}: {error}.") from error
            raise CheckpointError(f"{source}: no {self.name} can be made of it: {error}.") from error

    def _ambiguous(self, fitting: Sequence[Candidate], source: str) -> str:
        """The candidates by the arguments in which they differ, the first as a command to paste."""
        differing = [
            name for name in self.arguments if len({repr(each.arguments.get(name)) for each in fitting}) > 1
        ]  # fmt: skip
        choices = {name: dict.fromkeys(str(each.arguments[name]) for each in fitting) for name in differing}
        listed = "; ".join(f"{name} {', '.join(values)}" for name, values in choices.items())
        options = " ".join(f"--arch-arg {name}={fitting[0].arguments[name]}" for name in differing)
        return (
            f"{source}: is a {self.name}, but its keys and shapes are those of {len(fitting)} networks ({listed}).\n"
            f"Say which, for instance --arch {self.arch} {options}."
        )


def _renamed(tensors: State, layout: Layout | None) -> tuple[dict[str, Tensor], Callable[[str], str]]:
    """The state under the network's names, and from a name of the network to the file's."""
    if layout is None:
        return dict(tensors), lambda name: name
    files: dict[str, str] = {}
    for key in tensors:
        name = layout.network_key(key)
        # Of two keys with one name the second keeps its own, so that it is reported and not lost.
        files[key if name in files or (name != key and name in tensors) else name] = key
    return {name: tensors[key] for name, key in files.items()}, lambda name: files.get(name) or layout.file_key(name)
