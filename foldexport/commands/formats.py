"""``foldexport formats``: what can be written, and whether it can here."""

from __future__ import annotations

import click

from foldexport import exporters
from foldexport.commands.options import output_options


@click.command(short_help="The formats, and whether each works here.")
@output_options
def formats(as_json: bool, quiet: bool, debug: bool) -> None:
    """Each format with its file suffix, and whether it works on this machine or what installs it."""
    from foldexport.report import console, document
    from foldexport.report.terminal import Terminal

    rows = exporters.status()
    Terminal(as_json, quiet).show(lambda screen: console.formats(screen, rows), document.formats(rows))
