"""argv → command → exit code. No tensors here, and nothing heavy is imported before a command runs.

``foldexport CHECKPOINT… --to onnx`` is the main command; a first word that names one of the others runs that one instead
(a checkpoint of such a name is passed as ``./inspect``).
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from foldexport import __version__
from foldexport.commands import engine, images
from foldexport.commands.bench import bench
from foldexport.commands.convert import convert
from foldexport.commands.formats import formats
from foldexport.commands.inspect import inspect
from foldexport.commands.verify import verify
from foldexport.errors import FoldexportError
from foldexport.exporters import FORMATS

#: The main command's options as its help groups them.
SECTIONS = {
    "Output": (
        "formats",
        "output",
        "bundle",
        "overwrite",
        "report",
        "dynamic",
        "precision",
        "keep_fp32",
        "half_io",
        "max_drop",
        "opset",
        "input_names",
        "output_names",
        "fold",
        "chain",
    ),
    "Several checkpoints": ("recursive", "jobs"),
    "Network": ("arch", "arch_args", "input_shapes", "use_ema", "trust_pickle"),
    "Images": images.NAMES,
    "Proof": ("data", "seed", "atol", "rtol", "device"),
    "TensorRT": engine.NAMES,
    "Talk": ("as_json", "quiet", "debug"),
}
OTHERS = ("inspect", "bench", "verify", "formats")
HELP = ("-h", "--help")
INTERRUPTED = 130
TERMINATED = 143


class Commands(click.Group):
    """A group whose main command needs no word; its help shows the main command's options and the other commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["foldexport.argv"] = ["foldexport", *args]
        if args and args[0] not in (*OTHERS, *HELP, "--version"):
            self._refuse_misspelt(ctx, args)
            args = ["--help"] if any(word in HELP for word in before_dashes(args)) else [convert.name or "", *args]
        return super().parse_args(ctx, args)

    def _refuse_misspelt(self, ctx: click.Context, args: list[str]) -> None:
        near = difflib.get_close_matches(args[0], OTHERS, n=1, cutoff=0.7)
        if near and not os.path.exists(args[0]):
            ctx.fail(f"{args[0]} is no file and no command; did you mean: foldexport {near[0]}?")

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(OTHERS)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "CHECKPOINT… | FOLDER --to FORMAT[,FORMAT…] [OPTIONS]")
        formatter.write_usage(ctx.command_path, "inspect | bench | verify | formats …", prefix=" " * len("Usage: "))

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        convert.format_help_text(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with click.Context(convert, parent=ctx) as inner:
            records = {each.name: each.get_help_record(inner) for each in convert.params}
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records[name])])
        self.format_commands(ctx, formatter)


@click.group(cls=Commands, context_settings={"help_option_names": list(HELP)})
@click.version_option(__version__, prog_name="foldexport", message="%(prog)s %(version)s")
def commands() -> None:
    """Replaced by the main command's help."""


for each in (convert, inspect, bench, verify, formats):
    commands.add_command(each)


@dataclass(frozen=True)
class Ending:
    """How a command ended: its exit code, and what to say where it failed."""

    code: int
    message: str | None = None
    error: BaseException | None = None

    @property
    def kind(self) -> str:
        """The error's class; a command that was interrupted met none."""
        return type(self.error).__name__ if self.error is not None else "Interrupted"


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code; errors are one or two lines on stderr."""
    words = sys.argv[1:] if argv is None else list(argv)
    # Threads that spin while they wait make PyTorch several times slower wherever something else wants the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ending = run(words)
    return ending.code if ending.message is None else _failed(words, ending)


def run(words: list[str], terminal: Any = None) -> Ending:
    """Run one command line; nothing is printed about an error. terminal: in place of the `Terminal` that a command would make."""
    try:
        with _polite():
            code = commands.main(args=words or ["--help"], prog_name="foldexport", standalone_mode=False, obj=terminal)
    except click.exceptions.Abort:
        return Ending(INTERRUPTED, "interrupted; nothing was left behind.")
    except click.ClickException as error:
        return Ending(2, _usage(error), error)
    except FoldexportError as error:
        return Ending(error.exit_code, _bug(error) if error.exit_code == 1 else str(error), error)
    except Exception as error:  # the last resort: whatever else is raised is a mistake in this program
        return Ending(1, _bug(error), error)
    return Ending(code if isinstance(code, int) else 0)


def before_dashes(words: list[str]) -> list[str]:
    """The words that can be options."""
    return words[: words.index("--")] if "--" in words else words


def _usage(error: click.ClickException) -> str:
    if isinstance(error, click.MissingParameter) and error.param is not None and error.param.name == "formats":
        return f"which format? Pass --to {' or --to '.join(FORMATS)} (several with commas)."
    return error.format_message()


def _bug(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"this is a bug of ours: {what}\nRun with --debug and report what it prints."


def _failed(words: list[str], ending: Ending) -> int:
    options = before_dashes(words)
    if "--debug" in options and ending.error is not None:
        traceback.print_exception(ending.error)
    click.echo(f"{click.style('error:', fg='red', bold=True)} {ending.message}", err=True)
    if "--json" in options:
        from foldexport.report.terminal import write_json

        write_json({"ok": False, "error": {"type": ending.kind, "message": ending.message, "exit_code": ending.code}})
    return ending.code


@contextmanager
def _polite() -> Iterator[None]:
    """Marks that a terminal's encoding lacks become "?"; a kill cleans up as Ctrl-C does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> None:
    raise SystemExit(TERMINATED)
