"""``foldexport inspect CHECKPOINT``: what it is, what folds, what does not and why."""

from __future__ import annotations

from typing import Any

import click

from foldexport.commands.options import network_options, output_options, question


@click.command(short_help="What a checkpoint is, what folds, what does not and why.")
@network_options
@output_options
def inspect(**options: Any) -> None:
    """Recognise, fold and prove a checkpoint without writing a file: the whole ledger and the certificate."""
    from foldexport.report.terminal import Terminal

    terminal = Terminal(options.pop("as_json"), options.pop("quiet"))
    options.pop("debug")
    with terminal.working() as progress:
        from foldexport import pipeline

        asked = question(options)
        found = pipeline.inspect(asked, progress)
    from foldexport.report import console, document

    terminal.show(lambda screen: console.study(screen, found), document.study(asked, found))
