"""The main command: ``foldexport CHECKPOINT --to onnx``."""

from __future__ import annotations

import math
from typing import Any

import click

from foldexport.commands import engine, images, several
from foldexport.commands.options import FILE, Axes, Formats, names_of, networks_options, output_options, question
from foldexport.errors import UsageError
from foldexport.exporters import FORMATS


@click.command(short_help="Fold, prove and export a checkpoint.")
@networks_options
@click.option("--to", "formats", type=Formats(), metavar="FORMAT[,FORMAT…]", required=True,
              help=f"What to write: {', '.join(FORMATS)}; see foldexport formats.")  # fmt: skip
@click.option("-o", "--output", metavar="PATH",
              help="A folder, or for one format a file with its suffix. Default: beside the checkpoint.")  # fmt: skip
@click.option("--bundle", type=FILE, metavar="DIR|FILE.zip",
              help="Everything in one folder or zip, with a card and a verify.py that proves it without foldexport.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.option("--report", type=FILE, metavar="FILE.html", help="A page with the network before and after, and its proof.")
@click.option("--dynamic", type=Axes(), metavar="AXES",
              help="Axes of any length: batch (default), batch,height,width, or none.")  # fmt: skip
@click.option("--precision", default="fp32", metavar="TYPE",
              help="Of weights and arithmetic in the file: fp32 (default), fp16, bf16, or int8 for onnx, with --data.")  # fmt: skip
@click.option("--max-drop", type=float, metavar="POINTS",
              help="With int8: accuracy that may be lost on the labelled samples of --data. Default: 1.")  # fmt: skip
@click.option("--keep-fp32", "keep_fp32", metavar="NAME[,NAME…]", multiple=True, callback=names_of,
              help="With fp16 or bf16: modules that stay in float32, with all below them. Repeatable.")  # fmt: skip
@click.option("--half-io", is_flag=True, help="With fp16: inputs and outputs in fp16 too.")
@click.option("--opset", type=int, metavar="N", help="Of ONNX. Default: the newest that torch.onnx writes well.")
@click.option("--input-name", "input_names", metavar="NAME", multiple=True, help="Default: input. Repeat for several.")
@click.option(
    "--output-name", "output_names", metavar="NAME", multiple=True,
    help="Default: output, or the keys of the dict that the network returns. Repeat for several.",
)
@click.option(
    "--no-fold", "fold", is_flag=True, flag_value=False, default=True, help="Write the training graph as it is."
)
@click.option("--chain", is_flag=True, help="Take out skip connections as well, exactly: it costs multiply-adds.")
@click.option("--atol", type=float, metavar="X", help="Allow an error of atol + rtol × the output's peak instead of 8 "
              "times the network's own float32 noise.")  # fmt: skip
@click.option("--rtol", type=float, metavar="X", help="See --atol.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu",
              help="Where the training graph, the folded network and, where their runtimes can, the files are run to be "
              "compared. Default: cpu.")  # fmt: skip
@images.image_options
@engine.engine_options
@output_options
def convert(**options: Any) -> None:
    """Fold a trained convolutional network into plain convolutions, prove that nothing changed, and export it.

    \b
        foldexport net.pth --to onnx
        foldexport net.pth --to onnx,torchscript -o build/
        foldexport net.pth --to onnx --arch net.py:Net --input-shape 1x3x224x224
        foldexport checkpoints/ --to onnx -o build/ --jobs 4

    The architecture is recognised from the checkpoint's keys and shapes, or built by --arch. Every artifact is run
    in its own runtime and compared with the training graph in float64 before any file is put in place.
    """
    from foldexport.report.terminal import Terminal

    context = click.get_current_context()
    checkpoints, recursive, jobs = options.pop("checkpoints"), options.pop("recursive"), options.pop("jobs")
    if context.obj is None and several.meant(checkpoints):
        several.convert(context, checkpoints, options, recursive=recursive, jobs=jobs)
    options["checkpoint"] = checkpoints[0]
    terminal = context.obj or Terminal(options["as_json"], options["quiet"])
    for name in ("as_json", "quiet", "debug"):
        options.pop(name)
    with terminal.working() as progress:
        from foldexport import pipeline

        asked = question(options)
        outcome = pipeline.convert(asked, _order(options), progress)
    from foldexport.report import console, document

    terminal.show(lambda screen: console.outcome(screen, outcome), document.outcome(outcome))


def _order(options: dict[str, Any]) -> Any:
    from foldexport.pipeline import Order
    from foldexport.verify import Tolerance

    atol, rtol = options.pop("atol"), options.pop("rtol")
    for name, value in (("--atol", atol), ("--rtol", rtol)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{name} {value}: wanted a number of 0 or more.")
    if options["max_drop"] is not None and not 0 <= options["max_drop"] <= 100:
        raise UsageError(f"--max-drop {options['max_drop']}: wanted points of accuracy, 0 to 100.")
    tolerance = None if atol is None and rtol is None else Tolerance(atol or 0.0, rtol or 0.0)
    names = {key: tuple(options.pop(key)) or None for key in ("input_names", "output_names")}
    formats = tuple(options.pop("formats"))
    names |= engine.take(options, formats)
    command = tuple(click.get_current_context().meta["foldexport.argv"])
    return Order(formats=formats, tolerance=tolerance, command=command, **names, **options)
