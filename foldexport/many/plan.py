"""One task per checkpoint, or a refusal before any work: the words of its own command line, and where its files go."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from foldexport import destination
from foldexport.destination import Destination
from foldexport.errors import UsageError
from foldexport.exporters import FORMATS, Format


@dataclass(frozen=True)
class Task:
    """A checkpoint, the command line that converts it alone, and the folder that its files go to."""

    path: Path
    words: list[str]
    folder: Path


def tasks(
    checkpoints: Sequence[Path], options: Sequence[str], output: str | None, formats: Sequence[Format], reserved: Collection[str]
) -> list[tuple[Task, Destination]]:
    """A task for every checkpoint.

    options: of :func:`option_words`.     reserved: words that are commands, which no checkpoint may look like.

    Raises UsageError where ``output`` is no folder, or where two checkpoints would write the same file.
    """
    if output is not None and not (destination.is_folder(output) and _leads_into(output, formats)):
        raise UsageError(
            f"-o {output} names one file, but several checkpoints are given: name a folder, such as {_folder(output)}."
        )
    planned = [(path, destination.plan(path, output, formats)) for path in checkpoints]
    _refuse_collisions(planned)
    return [(Task(path, [_word(path, reserved), *options], places.folder), places) for path, places in planned]


def option_words(words: Sequence[str], command: click.Command, left_out: Collection[str]) -> list[str]:
    """The options of a command line that ``command`` accepts, in their order, without its checkpoints.

    left_out: names of parameters whose options are dropped.
    """
    parsed, _, order = command.make_parser(click.Context(command)).parse_args(list(words))
    kept: list[str] = []
    for option in dict.fromkeys(each for each in order if isinstance(each, click.Option) and each.name not in left_out):
        value = parsed[option.name]
        for each in value if option.multiple else [value]:
            if option.is_flag:
                kept.append((option.opts if each or not option.secondary_opts else option.secondary_opts)[0])
            else:  # what is not text stands for a value that was left out
                kept += [option.opts[0], *([each] if isinstance(each, str) else [])]
    return kept


def refuse_misplaced(paths: Iterable[Path]) -> None:
    """Raise UsageError for a format that was written as if it were a checkpoint: ``--to onnx torchscript``."""
    names = {name: row.name for row in FORMATS.values() for name in row.names}
    for path in paths:
        row = names.get(str(path).lower())
        if row is not None and not os.path.lexists(path):
            raise UsageError(f"{path}: is no file, but a format: several formats are one word, with commas: --to onnx,{row}.")


def _leads_into(output: str, formats: Sequence[Format]) -> bool:
    """Not so for a folder that is an artifact itself, ``net.mlpackage``."""
    return destination.plan(Path("net"), output, formats).folder == Path(output)


def _refuse_collisions(planned: Sequence[tuple[Path, Destination]]) -> None:
    """Raise UsageError where a file would be written twice, or over another of the checkpoints."""
    writers: dict[str, Path] = {}
    read = {_place(path): path for path, _ in planned}
    for path, places in planned:
        for file in (*places.artifacts, places.manifest, *(each for group in places.companions for each in group)):
            place = _place(file)
            other = writers.setdefault(place, path)
            if other is not path:
                raise UsageError(
                    f"{other} and {path} would both write {file}: rename one of them, or convert it alone with its own -o."
                )
            if place in read and read[place] is not path:
                raise UsageError(f"{path} would write {file}, which is another of the checkpoints: choose another folder with -o.")


def _place(path: Path) -> str:
    """The same text for every way to name a file."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def _folder(output: str) -> str:
    stem = Path(output).name.partition(".")[0] or "out"
    return str(Path(output).with_name(stem)) + os.sep


def _word(path: Path, reserved: Collection[str]) -> str:
    """The path as a command line has it: ``./inspect`` where it would be read as something else."""
    text = str(path)
    return os.path.join(os.curdir, text) if text in reserved or text.startswith("-") else text
