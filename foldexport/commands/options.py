"""Options that several commands share, and what their values look like."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from foldexport.exporters import Format, resolve

AXES = ("batch", "height", "width")


class Shape(click.ParamType):
    """``1x3x224x224`` → ``(1, 3, 224, 224)``, the batch first."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"[1-9]\d*([x×,*][1-9]\d*)*", value.strip(), re.IGNORECASE):
            self.fail(f"{value!r}: wanted sizes with the batch first, such as 1x3x224x224.", param, ctx)
        return tuple(int(size) for size in re.split(r"[x×,*]", value.strip().lower()))


class Axes(click.ParamType):
    """``batch,height`` → ``("batch", "height")``; ``none`` → ``()``."""

    name = "axes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        axes = tuple(dict.fromkeys(word.strip().lower() for word in value.split(",") if word.strip()))
        if axes == ("none",):
            return ()
        unknown = [axis for axis in axes if axis not in AXES]
        if unknown or not axes:
            self.fail(f"{value!r}: wanted any of {', '.join(AXES)}, separated by commas, or none.", param, ctx)
        return axes


class Formats(click.ParamType):
    """``onnx,ts`` → rows of the registry."""

    name = "formats"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Sequence[Format]:
        return resolve(value) if isinstance(value, str) else value


class Checkpoint(click.Path):
    """A file or a folder; an empty word is neither, though a path of it would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == "":
            self.fail("an empty name: wanted a checkpoint file, or a folder of them.", param, ctx)
        return super().convert(value, param, ctx)


def names_of(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> tuple[str, ...]:
    """``("a,b", "c")`` → ``("a", "b", "c")``: names of an option that is repeatable, and takes commas."""
    words = [word.strip() for each in value for word in each.split(",")]
    if not all(words):
        raise click.BadParameter("an empty name; wanted names with commas between them.", ctx, param)
    return tuple(dict.fromkeys(words))


FILE = click.Path(path_type=Path)

_CHECKPOINT = (click.argument("checkpoint", type=FILE),)
_CHECKPOINTS = (
    click.argument("checkpoints", metavar="CHECKPOINT… | FOLDER", nargs=-1, required=True, type=Checkpoint(path_type=Path)),
    click.option("--recursive", is_flag=True, help="Look into the folders of a FOLDER too."),
    click.option("--jobs", type=click.IntRange(min=1), metavar="N", default=1,
                 help="Checkpoints to work on at a time, which share the cores. Default: 1."),
)  # fmt: skip
_NETWORK = (
    click.option("--arch", metavar="SPEC", help="The network where the file is not recognised: "
                 "package.module:callable, path/file.py:callable, or a zoo name."),
    click.option("--arch-arg", "arch_args", metavar="KEY=VALUE", multiple=True, help="An argument of it; repeatable."),
    click.option("--input-shape", "input_shapes", type=Shape(), metavar="1x3x224x224", multiple=True,
                 help="Default: the architecture's own. Repeat for several inputs."),
    click.option("--data", type=FILE, metavar="NPZ|DIR",
                 help="Your own inputs to prove it on: an .npz or a folder of images."),
    click.option("--seed", type=int, default=0, metavar="N", help="Of the drawn inputs. Default: 0."),
    click.option("--ema/--no-ema", "use_ema", default=None, help="Take the averaged weights, or never do. "
                 "Default: only where there are no others."),
    click.option("--trust-pickle", is_flag=True, help="Open a pickle with code in it, which then runs."),
)  # fmt: skip

_OUTPUT = (
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, all else on stderr."),
    click.option("--quiet", is_flag=True, help="Nothing but errors."),
    click.option("--debug", is_flag=True, help="The traceback of an error."),
)


def network_options(command: Callable) -> Callable:
    """CHECKPOINT and everything that says what is in it."""
    return _with(command, (*_CHECKPOINT, *_NETWORK))


def networks_options(command: Callable) -> Callable:
    """CHECKPOINT…, folders of them, and everything that says what is in each."""
    return _with(command, (*_CHECKPOINTS, *_NETWORK))


def output_options(command: Callable) -> Callable:
    """How a command talks."""
    return _with(command, _OUTPUT)


def _with(command: Callable, decorators: Sequence[Callable]) -> Callable:
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def question(options: dict[str, Any]) -> Any:
    """The `Question` that the options of `network_options` ask; they are taken out of ``options``."""
    from foldexport.arch import parse_arch_args
    from foldexport.errors import UsageError
    from foldexport.study import Question

    arch_args = parse_arch_args(options.pop("arch_args"))
    names = ("checkpoint", "arch", "input_shapes", "data", "seed", "use_ema", "trust_pickle")
    given = {name: options.pop(name) for name in names}
    if not 0 <= given["seed"] < 2**31:
        raise UsageError(f"--seed {given['seed']}: wanted a number from 0 to {2**31 - 1}.")
    if arch_args and not given["arch"]:
        raise UsageError(f"--arch-arg {next(iter(arch_args))}=…: is an argument of --arch, which is not given.")
    fold, chain = options.pop("fold", True), options.pop("chain", False)
    if chain and not fold:
        raise UsageError("--chain: is done by the fold, which --no-fold leaves out.")
    images = {name: options.pop(name, None) for name in ("mean", "std", "normalize", "class_names")}
    return Question(**given, arch_args=arch_args, fold=fold, chain=chain, **images)
