"""``foldexport verify MANIFEST``: an exported set proved again, on the machine where it will work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from foldexport.commands.options import FILE, Formats, output_options
from foldexport.errors import EquivalenceError, MissingDependencyError
from foldexport.exporters import Format


@click.command(short_help="Prove exported files again, on the machine where they will work.")
@click.argument("manifest", type=FILE, metavar="MANIFEST|BUNDLE")
@click.option(
    "--format", "formats", type=Formats(), metavar="FORMAT[,FORMAT…]", help="Only these. Default: all in the manifest."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu",
              help="Where files are run if their runtimes can. Default: cpu.")  # fmt: skip
@output_options
def verify(
    manifest: Path, formats: Sequence[Format] | None, device: str, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Check the files beside NAME.manifest.json: their SHA-256, and their outputs on the manifest's golden inputs.

    Exits 4 where one differs, 5 where a runtime or its GPU is not there; of a bundle (its folder or FILE.zip), 5 where none is.
    """
    from foldexport.report.terminal import Terminal

    terminal = Terminal(as_json, quiet)
    with terminal.working() as progress:
        from foldexport import recheck
        from foldexport.bundle import opened

        with opened.manifest_of(manifest) as path:
            checked, in_bundle = recheck.recheck(path, formats or (), progress, device=device), opened.is_bundle(path)
    from foldexport.report import console, document

    terminal.show(lambda screen: console.checked(screen, checked), document.checked(checked))
    try:
        recheck.require(checked, every=not in_bundle)
    except (EquivalenceError, MissingDependencyError) as error:
        terminal.complain(error)
        raise click.exceptions.Exit(error.exit_code) from error
