"""Options that say how images become the network's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from foldexport.commands.options import FILE

NAMES = ("mean", "std", "normalize", "class_names")
RANGES = ("1", "255")


class Numbers(click.ParamType):
    """``0.485,0.456,0.406`` → ``(0.485, 0.456, 0.406)``."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(word) for word in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: wanted a number for each channel, with commas between them.", param, ctx)


class Range(click.Choice):
    """The largest value of raw pixels."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        if value not in RANGES:
            self.fail(f"{value!r}: wanted 1 or 255, the largest value of a pixel; without a value it means 1.", param, ctx)
        return float(value)


_OPTIONS = (
    click.option("--mean", type=Numbers(), metavar="R,G,B", help="Of the images that it was trained on, one number for each "
                 "channel, of pixels from 0 to 1. Default: what the checkpoint says."),
    click.option("--std", type=Numbers(), metavar="R,G,B", help="Their deviation, likewise."),
    click.option("--normalize", type=Range(RANGES), is_flag=False, flag_value="1", metavar="[1|255]",
                 help="Put mean and std into the network, so that it takes pixels from 0 to 1, or to 255."),
    click.option("--class-names", type=FILE, metavar="FILE", help="Names of the outputs, one a line, for the manifest and "
                 "the folders of --data. Default: what the checkpoint says."),
)  # fmt: skip


def image_options(command: Callable) -> Callable:
    """What is said of the images."""
    for decorate in reversed(_OPTIONS):
        command = decorate(command)
    return command
