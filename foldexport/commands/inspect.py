"""``foldexport inspect CHECKPOINT``: what it is, what folds, what does not and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foldexport.commands import images
from foldexport.commands.options import FILE, network_options, output_options, question
from foldexport.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from foldexport.propagation import Propagation


@click.command(short_help="What a checkpoint is, what folds, what does not and why.")
@network_options
@images.image_options
@click.option("--plot", type=FILE, metavar="FILE.png",
              help="Draw the variance of activations and gradients along the network, before and after the fold.")  # fmt: skip
@click.option("--report", type=FILE, metavar="FILE.html", help="A page with the network before and after, and its proof.")
@click.option("--overwrite", is_flag=True, help="Replace a picture or a report that exists.")
@output_options
def inspect(**options: Any) -> None:
    """Recognise, fold and prove a checkpoint without exporting it: the whole ledger and the certificate."""
    from foldexport.report.terminal import Terminal

    terminal = Terminal(options.pop("as_json"), options.pop("quiet"))
    options.pop("debug")
    picture, page, overwrite = options.pop("plot"), options.pop("report"), options.pop("overwrite")
    measured = None
    with terminal.working() as progress:
        from foldexport import pipeline

        asked = question(options)
        if picture is None and page is None and overwrite:
            raise UsageError("--overwrite: is for --plot and --report, neither of which is given.")
        if picture is not None:
            pipeline.check_plot(picture, overwrite=overwrite)
        if page is not None:
            pipeline.check_report(page, asked.checkpoint, overwrite=overwrite)
        found = pipeline.inspect(asked, progress)
        if picture is not None:
            measured = pipeline.plot(found, picture, seed=asked.seed, overwrite=overwrite, progress=progress)
        if page is not None:
            command = tuple(click.get_current_context().meta["foldexport.argv"])
            pipeline.report(found, asked, page, command=command, overwrite=overwrite, progress=progress)
    from foldexport.report import console, document

    record = document.study(asked, found)
    if measured is not None:
        record["propagation"] = {"file": str(picture), **measured.to_dict()}
    if page is not None:
        record["report"] = str(page)

    def render(screen: Console) -> None:
        console.study(screen, found)
        if measured is not None:
            console.heading(screen, "signal propagation")
            for line in _lines(measured, picture):
                screen.print(f"  {line}", soft_wrap=True)
        if page is not None:
            console.heading(screen, "report")
            screen.print(f"  {page}", soft_wrap=True)

    terminal.show(render, record)


def _lines(found: Propagation, picture: Path) -> list[str]:
    """How far the two variances are apart, first point against last, and where the picture is."""
    said = []
    for what, values in (("activation", found.training.activation), ("gradient", found.training.gradient)):
        known = [value for value in values if value > 0]
        if known:
            said.append(f"{what} variance {known[0]:.2g} at the first {found.kind}, {known[-1]:.2g} at the last")
    return [*said, f"{len(found.names)} {found.kind}s, {found.samples} samples: {picture}"]
