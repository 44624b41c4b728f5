"""Options of the main command that are for tensorrt alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from foldexport.commands.options import Shape
from foldexport.errors import UsageError
from foldexport.exporters import Format
from foldexport.exporters.tensorrt.options import FLAVOURS, HARDWARE, compute_capabilities, size_bytes


class Size(click.ParamType):
    """``2GiB`` → 2147483648."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return size_bytes(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


class Targets(click.ParamType):
    """``8.6,8.9`` → ``("8.6", "8.9")``."""

    name = "targets"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return compute_capabilities(value) if isinstance(value, str) else value


_SHAPES = (
    ("--min-shape", "minimum", "The smallest input that the engine takes. Repeat for several inputs."),
    ("--opt-shape", "optimum", "The one that it is tuned for."),
    ("--max-shape", "maximum", "The largest. Without these three: the sizes of --input-shape only."),
)
_OPTIONS = (
    *(click.option(name, key, type=Shape(), metavar="1x3x224x224", multiple=True, help=said) for name, key, said in _SHAPES),
    click.option("--flavour", "--flavor", "flavour", type=click.Choice(FLAVOURS), default=None,
                 help="Full TensorRT, which builds on the GPU it is for, or TensorRT-RTX, which builds anywhere. "
                 "Default: the one that is installed."),
    click.option("--compute-capability", "targets", type=Targets(), default=None, metavar="8.6,8.9,12.0",
                 help="GPUs that TensorRT-RTX builds for. Default: 8.0 and later."),
    click.option("--workspace", type=Size(), metavar="2GiB", help="Scratch memory that layers may use."),
    click.option("--optimisation-level", "--optimization-level", "level", type=int, metavar="0..5",
                 help="How long the builder searches."),
    click.option("--tf32", is_flag=True, default=None, help="Let float32 layers round to TF32. Default: they do not."),
    click.option("--no-timing-cache", "timing_cache", is_flag=True, flag_value=False, default=None,
                 help="Measure everything anew (full TensorRT)."),
    click.option("--hardware-compatibility", "hardware", type=click.Choice(tuple(HARDWARE)), default=None,
                 help="Of a full engine with other GPUs."),
    click.option("--version-compatible", "version", is_flag=True, default=None, help="A full engine for later versions too."),
)  # fmt: skip
#: Of the click parameters, in the order in which the help lists them.
NAMES = (
    "minimum", "optimum", "maximum", "flavour", "targets", "workspace", "level", "tf32", "timing_cache", "hardware", "version",
)  # fmt: skip
_FIELDS = {
    "flavour": ("flavour", "--flavour"), "targets": ("compute_capabilities", "--compute-capability"),
    "workspace": ("workspace_bytes", "--workspace"), "level": ("optimisation_level", "--optimisation-level"),
    "tf32": ("tf32", "--tf32"), "timing_cache": ("timing_cache", "--no-timing-cache"),
    "hardware": ("hardware_compatibility", "--hardware-compatibility"),
    "version": ("version_compatible", "--version-compatible"),
}  # fmt: skip


def engine_options(command: Callable) -> Callable:
    """Everything that says how an engine is built."""
    for decorate in reversed(_OPTIONS):
        command = decorate(command)
    return command


def take(options: dict[str, Any], formats: Sequence[Format]) -> dict[str, Any]:
    """``tensorrt`` and ``profile`` of an `Order`; their options are taken out of ``options``.

    Raises UsageError where one is given and tensorrt is not asked for.
    """
    from foldexport.exporters.tensorrt.options import TensorRTOptions
    from foldexport.exporters.tensorrt.profile import Profile

    shapes = {key: options.pop(key) for _, key, _ in _SHAPES}
    given = {name: options.pop(name) for name in _FIELDS}
    used = [option for option, key, _ in _SHAPES if shapes[key]]
    used += [_FIELDS[name][1] for name, value in given.items() if value is not None]
    if all(row.name != "tensorrt" for row in formats):
        if used:
            raise UsageError(f"{used[0]}: is for tensorrt, which --to does not name.")
        return {}
    fields = {_FIELDS[name][0]: value for name, value in given.items() if value is not None}
    return {"tensorrt": TensorRTOptions(**fields), "profile": Profile.given(**shapes)}
