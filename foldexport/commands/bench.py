"""``foldexport bench CHECKPOINT | ARTIFACT…``: folded against unfolded latency, or files against one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from foldexport.commands.options import FILE, Shape, output_options, question
from foldexport.errors import UsageError


class Shapes(click.ParamType):
    """``1x3x32x32+1x10`` → the shapes of all inputs of a network, ``((1, 3, 32, 32), (1, 10))``."""

    name = "shapes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[tuple[int, ...], ...]:
        if isinstance(value, tuple):
            return value
        return tuple(Shape().convert(part, param, ctx) for part in value.split("+"))


class Batches(click.ParamType):
    """``1,8,32`` → ``(1, 8, 32)``."""

    name = "batches"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",") if word.strip()]
        if not words or not all(word.isdigit() and int(word) > 0 for word in words):
            self.fail(f"{value!r}: wanted batch sizes such as 1,8,32.", param, ctx)
        return tuple(dict.fromkeys(map(int, words)))


@click.command(short_help="Time folded against unfolded, or files against one another.")
@click.argument("targets", metavar="CHECKPOINT | ARTIFACT…", nargs=-1, required=True, type=FILE)
@click.option("--runtimes", metavar="NAME[,NAME…]",
              help="Any of eager, compile, torchscript, onnxruntime, onnxruntime-plain (without its own optimisations), openvino, "
              "tensorrt, cudagraphs. Default: those that work here; for files the usual one of their format. Only when named: "
              "source, pt2, aotinductor, onnxruntime-web, executorch, litert, ncnn.")
@click.option("--batch", "batches", type=Batches(), metavar="1,8,32", default=(), help="Sizes of the batch, each timed.")
@click.option("--input-shape", "sizes", type=Shapes(), metavar="1x3x224x224", multiple=True,
              help="Default: the network's own. Repeat to time several; join the inputs of one network with +.")
@click.option("--threads", type=int, metavar="N", help="Default: every core that this process may use.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where everything is timed. Default: cpu.")
@click.option("--seconds", type=float, default=6.0, metavar="S", help="Of timing, per runtime and size. Default: 6.")
@click.option("--rounds", type=int, metavar="N", help="Of each process, in place of --seconds.")
@click.option("--processes", type=int, default=6, metavar="N",
              help="That every measurement is repeated in, each with memory laid out anew. Default: 6.")
@click.option("--level", type=float, default=0.99, metavar="P", help="At which all intervals hold together. Default: 0.99.")
@click.option("--baseline", metavar="NAME", help="What the others are compared with. Default: unfolded, or the first file.")
@click.option("--rtol", type=float, metavar="X", help="Let outputs differ by X of their peak: for files of lower precision.")
@click.option("--plot", type=FILE, metavar="FILE.png", help="Draw the result.")
@click.option("--report", "page", type=FILE, metavar="FILE.html", help="The result as a page.")
@click.option("--overwrite", is_flag=True, help="Replace a picture or a report that exists.")
@click.option("--arch", metavar="SPEC", help="The network where the file is not recognised: package.module:callable, "
              "path/file.py:callable, or a zoo name.")
@click.option("--arch-arg", "arch_args", metavar="KEY=VALUE", multiple=True, help="An argument of it; repeatable.")
@click.option("--chain", is_flag=True, help="Time the network without skip connections.")
@click.option("--seed", type=int, default=0, metavar="N", help="Of the drawn inputs and orders. Default: 0.")
@click.option("--ema/--no-ema", "use_ema", default=None, help="Take the averaged weights, or never do.")
@click.option("--trust-pickle", is_flag=True, help="Open a pickle with code in it, which then runs.")
@output_options
def bench(**options: Any) -> None:
    """Time a checkpoint's network folded against unfolded in every runtime, or exported files against one another.

    \b
        foldexport bench net.pth --batch 1,8
        foldexport bench net.pth --runtimes onnxruntime,openvino --plot bench.png
        foldexport bench old.onnx new.onnx

    Both are checked against the training graph (files against the first file) before they are timed. They run in turn, in an
    order drawn for each round, in several processes; a difference is reported only where its interval leaves out 1.
    """  # fmt: skip
    from foldexport.report.terminal import Terminal

    terminal = Terminal(options.pop("as_json"), options.pop("quiet"))
    options.pop("debug")
    targets: tuple[Path, ...] = options.pop("targets")
    picture, page, overwrite = options.pop("plot"), options.pop("page"), options.pop("overwrite")
    with terminal.working() as progress:
        if picture is None and page is None and overwrite:
            raise UsageError("--overwrite: is for --plot and --report, neither of which is given.")
        from foldexport import pipeline
        from foldexport.benchmark import files, library, plot

        wish = _wish(options)
        if picture is not None:
            pipeline.check_plot(picture, overwrite=overwrite)
        if page is not None:
            pipeline.check_report(page, *targets, overwrite=overwrite)
        sizes = options.pop("sizes")
        if len(targets) > 1 or files.readers(targets[0]) and not _is_checkpoint(targets[0], options):
            _refuse_network_options(options)
            timing = library.of_files(targets, sizes, wish, progress)
        else:
            asked = question({**options, "checkpoint": targets[0], "input_shapes": (), "data": None})
            timing = library.of_checkpoint(asked, sizes, wish, progress)
        if picture is not None:
            plot.save(timing, picture, overwrite=overwrite)
    from foldexport.report import bench as report

    record = report.document(timing, picture)
    if page is not None:
        report.save(record, page, command=click.get_current_context().meta["foldexport.argv"], overwrite=overwrite)
        record["report"] = str(page)
    terminal.show(lambda screen: report.console(screen, timing, picture, page), record)


def _wish(options: dict[str, Any]) -> Any:
    """The measuring options, taken out of ``options``."""
    from foldexport.benchmark import library
    from foldexport.benchmark.runtimes import resolve

    rtol = options.pop("rtol")
    if rtol is not None and not 0 <= rtol < float("inf"):
        raise UsageError(f"--rtol {rtol}: wanted a number of 0 or more.")
    given = {name: options.pop(name) for name in ("threads", "device", "seconds", "rounds", "processes", "level")}
    settings = library.settings_of(**given, seed=options["seed"], rtol=rtol)
    names = options.pop("runtimes")
    rows = resolve(names) if names is not None else ()
    return library.Wish(settings, rows, options.pop("batches"), options.pop("baseline"))


def _is_checkpoint(path: Path, options: dict[str, Any]) -> bool:
    """A TorchScript archive and a program of torch.export can be either: on its own it is read as a checkpoint."""
    compiled = path.name.endswith(".aoti.pt2")
    return path.suffix in (".pt", ".pth", ".pt2") and not compiled or options["arch"] is not None


def _refuse_network_options(options: dict[str, Any]) -> None:
    for name, value in (("--arch", options["arch"]), ("--arch-arg", options["arch_args"]), ("--chain", options["chain"])):
        if value:
            raise UsageError(f"{name}: is for a checkpoint; these are exported files.")
