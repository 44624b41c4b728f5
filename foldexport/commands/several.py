"""The main command on several checkpoints: ``foldexport A.pth B.pth FOLDER --to onnx --jobs 2``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from foldexport.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from foldexport.destination import Destination
    from foldexport.many.find import Found
    from foldexport.many.plan import Task
    from foldexport.report.many import Lines

#: Options that are about all of them and not about each.
OF_ALL = ("recursive", "jobs", "as_json", "quiet", "debug")
#: Options that are about one checkpoint, by parameter: why, and what to do instead.
OF_ONE = {
    "report": "a page is about one network: leave it out, or run foldexport on that checkpoint alone",
    "bundle": "a bundle holds one network: leave it out, or run foldexport on each checkpoint alone",
    "plot": "a picture shows one network: leave it out, or run foldexport inspect on that checkpoint alone",
}


def meant(named: Sequence[Path]) -> bool:
    """Whether a command line is about several checkpoints; with a folder it is, whatever that holds."""
    return len(named) > 1 or named[0].is_dir()


def convert(context: click.Context, named: Sequence[Path], options: dict[str, Any], *, recursive: bool, jobs: int) -> NoReturn:
    """Convert every checkpoint in a process of its own, show what each came to, and exit with the code of the worst.

    Raises, before any work, UsageError for options and names that do not go together, and CheckpointError where there is no
    checkpoint at all.
    """
    from foldexport.many import find, plan, pool, result
    from foldexport.report import many as report
    from foldexport.report.terminal import Terminal

    _refuse_options(context, options)
    plan.refuse_misplaced(named)
    found = find.find(named, recursive=recursive)
    if not found.checkpoints:
        raise CheckpointError(found.problems[0][1])
    words = plan.option_words(context.meta["foldexport.argv"][1:], context.command, OF_ALL)
    reserved = context.parent.command.list_commands(context) if isinstance(context.parent.command, click.Group) else ()
    planned = plan.tasks(found.checkpoints, words, options["output"], options["formats"], reserved)
    share = pool.share(jobs, len(planned))
    lines = report.Lines(found.checkpoints, quiet=options["quiet"], debug=options["debug"])
    interrupted = False
    with ExitStack() as stack:
        ready = _ready(found, planned, options, lines, stack)
        try:
            pool.run(ready, share, lines)
        except KeyboardInterrupt:
            interrupted = True
            lines.interrupt(found.checkpoints)
    results = lines.results([path for path, _ in found.problems] + found.checkpoints)
    code = result.INTERRUPTED if interrupted else result.worst(each.code for each in results)
    record = report.document(results, code, share)
    Terminal(options["as_json"], options["quiet"]).show(lambda screen: report.console(screen, results, share), record)
    raise click.exceptions.Exit(code)


def _ready(
    found: Found, planned: Sequence[tuple[Task, Destination]], options: dict[str, Any], lines: Lines, stack: ExitStack
) -> list[Task]:
    """The tasks that can begin; of the others the lines are told why they cannot."""
    from foldexport import destination
    from foldexport.many.result import Result

    if options["output"] is not None:  # held until all are done: one that fails must not take it from the others
        stack.enter_context(destination.made(Path(options["output"])))
    stack.enter_context(lines)
    for path, reason in found.problems:
        lines.ended(Result(path, CheckpointError.exit_code, message=reason, kind=CheckpointError.__name__))
    ready = []
    for task, places in planned:
        try:
            destination.check(places, task.path, overwrite=options["overwrite"])
            ready.append(task)
        except UsageError as error:
            lines.ended(Result(task.path, error.exit_code, message=str(error), kind=type(error).__name__))
    return ready


def _refuse_options(context: click.Context, options: dict[str, Any]) -> None:
    for parameter in context.command.params:
        if parameter.name in OF_ONE and options.get(parameter.name):
            raise UsageError(f"{parameter.opts[0]}: is for one checkpoint, and several are given; {OF_ONE[parameter.name]}.")
