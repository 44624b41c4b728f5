"""A checkpoint, the functions that its keys and shapes may be of, and which of these the file says it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from foldexport.checkpoint import Checkpoint, check_finite, check_running_var
from foldexport.errors import CheckpointError
from foldexport.fingerprints import build, evidence, inputs
from foldexport.fingerprints.data import USUAL_CLASSES, table
from foldexport.fingerprints.detection import ConvolutionalPart
from foldexport.fingerprints.evidence import Claim
from foldexport.fingerprints.table import Candidate, Function, plain_keys
from foldexport.zoo.family import Identified

SHOWN_FUNCTIONS = 4
FACTORIES = ("timm:create_model", "timm.models:create_model")
DETECTION = f"{ConvolutionalPart.__module__}:convolutional_part"


@dataclass(eq=False)
class Match:
    """``functions``: those that remain once the file has spoken.   ``claim``: what it says, where that names one of them.

    ``notes``: what it says that does not go with its shapes.   ``tensors``: the file's, without ``prefix``.
    """

    read: Checkpoint
    tensors: Mapping[str, Tensor]
    prefix: str
    functions: list[Function]
    claim: Claim | None
    notes: list[str] = field(default_factory=list)

    @property
    def settled(self) -> Function | None:
        """The one function that it can be."""
        return self.functions[0] if len(self.functions) == 1 else None

    @property
    def before_zoo(self) -> bool:
        """Whether the file itself says that it is a network which the zoo would take for another."""
        return self.claim is not None and self.settled is not None and self.settled.zoo is not True

    @property
    def of_zoo(self) -> bool:
        """Whether the zoo has a network that is it, with the file's own counts: what the zoo says against the file then holds."""
        return any(each.zoo and each.in_chans is None and each.num_classes != 0 for each in self.functions)

    def identified(self, arch_args: Mapping[str, Any]) -> Identified:
        """The network, built by its package, with the file's weights.

        Raises CheckpointError where several functions remain, with the question for the user, and where weights are damaged
        or do not fit; MissingDependencyError and UsageError as `build.network` does.
        """
        source = str(self.read.path)
        check_finite(self.tensors, source)
        check_running_var(self.tensors, source)
        everything = [candidate for each in self.functions for candidate in each.candidates]
        told = {key: value for key, value in arch_args.items() if any(key in each.arguments for each in everything)}
        asked = [each for each in self.functions if any(_has(candidate, told) for candidate in each.candidates)]
        if len(asked or self.functions) > 1:
            raise CheckpointError(self.question())
        function = (asked or self.functions)[0]
        order = sorted(function.candidates, key=lambda each: (not _has(each, told), not self._claimed(each)))
        module, candidate, notes = build.network(function, order, self.tensors, arch_args, source)
        classes = arch_args.get("num_classes", function.num_classes)
        fields, more = self._inputs(function, {})
        return Identified(
            module, candidate.name, described(candidate, classes), self.reason(candidate), _shape(fields), classes,
            _of_images(fields, classes), [*self._prefix_note(), *notes, *self.notes, *_left_out(module), *more],
        )  # fmt: skip

    def inform(self, found: Identified) -> None:
        """Gives a network that the zoo recognised what published weights say, and the user what else it could have been."""
        of_zoo = next((each for each in self.functions if each.zoo), None)
        found.notes += self.notes
        if self.claim is not None:
            found.reason += f"; {self.claim.said}"
        if others := [each for each in self.functions if each.zoo is False]:
            shown, more = self._listed(others)
            found.notes.append(
                f"its keys and shapes are also those of {shown}{more}, which compute{'s' if len(others) == 1 else ''} something "
                f"else: if it is one, pass --arch, for instance {_options(others[0])}"
            )
        if of_zoo is None:
            return
        fields, notes = self._inputs(of_zoo, found.preprocessing)
        found.preprocessing |= _of_images(fields, found.num_classes)
        found.notes += [note for note in notes if note not in found.notes]
        found.input_shape = _shape(fields) or found.input_shape

    def common_inputs(self) -> tuple[dict[str, Any], tuple[int, ...], list[str]]:
        """Preprocessing, input shape and notes, whichever of the functions it is."""
        candidates = tuple(candidate for each in self.functions for candidate in each.candidates)
        function = Function(candidates, None, self.functions[0].num_classes, self.functions[0].in_chans)
        fields, notes = self._inputs(function, {})
        return _of_images(fields, function.num_classes), _shape(fields), notes

    def reason(self, candidate: Candidate) -> str:
        said = f"; {self.claim.said}" if self.claim is not None else ""
        return f"its {len(self.tensors)} keys and their shapes are those of {candidate}{said}"

    def question(self) -> str:
        """What the user is asked where several functions remain."""
        shown, more = self._listed(self.functions)
        return (
            f"{self.read.path}: its keys and shapes are those of {len(self.functions)} networks that compute different things: "
            f"{shown}{more}.\nSay which: {'; or '.join(_choices(self.functions[:SHOWN_FUNCTIONS]))}."
        )

    def _claimed(self, candidate: Candidate) -> bool:
        claim = self.claim
        return claim is not None and claim.fits(candidate) and claim.package in ("", candidate.package)

    def _inputs(self, function: Function, usual: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        stated, where = evidence.stated_inputs(self.read)
        stated = {name: _frozen(stated[name]) for name in inputs.FIELDS if stated.get(name)}
        fields, notes = inputs.taken(inputs.published(function, self.claim, table()), usual, function.in_chans)
        if not stated:
            return fields, notes
        return {**fields, **stated}, [f"preprocessing taken from {where}: {', '.join(stated)}"]

    def _prefix_note(self) -> list[str]:
        return [f"matched names by stripping the prefix `{self.prefix}` from the checkpoint's"] if self.prefix else []

    def _listed(self, functions: Sequence[Function]) -> tuple[str, str]:
        shown = ", ".join(str(each.candidates[0]) for each in functions[:SHOWN_FUNCTIONS])
        more = len(functions) - SHOWN_FUNCTIONS
        return shown, f" and {more} more" if more > 0 else ""


def match(read: Checkpoint) -> Match | None:
    """What the table knows of a checkpoint's keys and shapes, and what the file says to it; None where it knows nothing."""
    for tensors, prefix in _unwrapped(read.tensors):
        named = plain_keys(tensors)
        functions = table().lookup({named[key]: tuple(tensor.shape) for key, tensor in tensors.items()})
        if functions:
            return _narrowed(read, tensors, prefix, functions)
    return None


def unlike(read: Checkpoint) -> str | None:
    """The message for a file that says which network of the table it is, and has not its keys and shapes; else None."""
    known = {each.name: each for row in table().rows.values() for members in row.functions for each in members}
    said = (claim for claim in evidence.claims(read, known, table()) if claim.name in known)
    if (claim := next(said, None)) is None:
        return None
    candidate = known[claim.name]
    return (
        f"{read.path}: {claim.said}, but its keys and shapes are not those of {candidate}.\n"
        f"To see what differs, pass --arch {candidate.spec}{_appended(_words(candidate.arguments))}; for a changed network, --arch "
        "with a callable that builds it."
    )


def _appended(words: str) -> str:
    return f" {words}" if words else ""


def _narrowed(read: Checkpoint, tensors: Mapping[str, Tensor], prefix: str, functions: list[Function]) -> Match:
    names = {candidate.name for function in functions for candidate in function.candidates}
    left, first, notes = functions, None, []
    for claim in evidence.claims(read, names, table()):
        agreeing = [each for each in left if any(claim.fits(candidate) for candidate in each.candidates)]
        if agreeing:
            left, first = agreeing, first or claim
        elif claim.sure and first is None:
            notes.append(f"{claim.said}, but its keys and shapes are not those of {claim.name}")
    if first is None:
        unknown = evidence.unknown_names(read, table())
        notes += [f"{said}, which names no known network; its keys and shapes are those of one" for said in unknown]
    return Match(read, tensors, prefix, left, first, notes)


def _unwrapped(tensors: Mapping[str, Tensor]) -> Iterator[tuple[Mapping[str, Tensor], str]]:
    """The tensors as they are, then without each prefix that all their keys share: "encoder.net." hides a network."""
    yield tensors, ""
    parts = os.path.commonprefix([key.split(".")[:-1] for key in tensors])
    for count in range(len(parts)):
        prefix = ".".join(parts[: count + 1]) + "."
        yield {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}, prefix


def described(candidate: Candidate, classes: int | None) -> str:
    """ "resnet50 of torchvision, 1000 classes"."""
    counted = "no last layer" if classes == 0 else f"{classes} classes" if classes is not None else ""
    return ", ".join(each for each in (f"{candidate.name} of {candidate.package}", counted) if each)


def _left_out(module: nn.Module) -> list[str]:
    if not isinstance(module, ConvolutionalPart):
        return []
    kept = "backbone and head, with scores and boxes of every anchor" if module.one_stage else "backbone, with its feature maps"
    return [f"proposals, box decoding and non-maximum suppression depend on values and are left out: this is the {kept}"]


def _has(candidate: Candidate, arguments: Mapping[str, Any]) -> bool:
    return all(key in candidate.arguments and candidate.arguments[key] == value for key, value in arguments.items())


def _choices(functions: Sequence[Function]) -> list[str]:
    """The options for each function: the arguments in which they differ, where one constructor makes them all."""
    first = [each.candidates[0] for each in functions]
    if len({(each.spec, each.name) for each in first}) > 1:
        return [_options(each) for each in functions]
    differing = [key for key in first[0].arguments if len({repr(each.arguments.get(key)) for each in first}) > 1]
    return [_words({key: each.arguments.get(key) for key in differing}) for each in first]


def _options(function: Function) -> str:
    """The options that build a function's first candidate."""
    candidate = function.candidates[0]
    return f"--arch {candidate.spec}{_appended(_words(function.arguments(candidate)))}"


def _words(arguments: Mapping[str, Any]) -> str:
    return " ".join(f"--arch-arg {key}={_written(value)}" for key, value in arguments.items())


def _written(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shape(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Of one input, batch first; empty where nothing says."""
    return (1, *fields["input_size"]) if "input_size" in fields else ()


def _of_images(fields: Mapping[str, Any], classes: int | None) -> dict[str, Any]:
    """Without the size of a film, which is no image's; with the number of classes."""
    kept = {name: value for name, value in fields.items() if name != "input_size" or len(value) == 3}
    return kept if classes is None else {**kept, "num_classes": classes}


def told_inputs(read: Checkpoint, arch: str, arch_args: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, ...], list[str]]:
    """Preprocessing, input shape and notes of a network of the table that the user named: ``timm:create_model`` with a
    ``model_name``, or a constructor of either package. All are empty for what the table does not have."""
    candidate = _constructor(arch, arch_args)
    function = Function((candidate,), None, arch_args.get("num_classes", USUAL_CLASSES), arch_args.get("in_chans"))
    if not table().published.get(candidate.package, {}).get(candidate.name):
        return {}, (), []
    said = evidence.claims(read, {candidate.name}, table())
    claim = next((each for each in said if each.fits(candidate)), None)
    fields, notes = Match(read, read.tensors, "", [function], claim)._inputs(function, {})
    return _of_images(fields, None), _shape(fields), notes


def _constructor(arch: str, arch_args: Mapping[str, Any]) -> Candidate:
    if arch in FACTORIES and isinstance(name := arch_args.get("model_name"), str):
        return Candidate(f"timm.models:{name.rpartition('/')[2].partition('.')[0]}", arch_args)
    known = arch.startswith(("timm.", "torchvision.")) or arch == DETECTION
    return Candidate(arch if known else "", arch_args)
