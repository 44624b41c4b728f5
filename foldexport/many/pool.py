"""The processes: one per checkpoint, so many at a time, each with its share of the cores.

A process that is killed, or kills itself, is the failure of its checkpoint and of no other. Where the system can fork, the
processes are forked from a server that has imported PyTorch and the exporters once and has done nothing with them.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from foldexport import artifact, threads
from foldexport.benchmark import environment
from foldexport.errors import MissingDependencyError, UsageError
from foldexport.many import result
from foldexport.many.plan import Task
from foldexport.many.result import Result
from foldexport.many.worker import Job, work

PRELOADED = ("foldexport.cli", "foldexport.pipeline", "foldexport.exporters.onnx.exporter")
STARTING = "starting"
PATIENCE_S = 10.0  # for a process that was asked to end: what it is in the middle of may be native code
TICK_S = 0.2


class Watcher(Protocol):
    """Who is told how the work goes."""

    def began(self, path: Path) -> None: ...
    def stage(self, path: Path, text: str) -> None: ...
    def ended(self, found: Result) -> None: ...


@dataclass(frozen=True)
class Share:
    """How many processes there are at a time, and the threads of each; 0 where it has the machine to itself."""

    jobs: int
    threads: int = 0


def share(jobs: int, count: int) -> Share:
    """Of ``jobs`` asked for, as many as there are checkpoints and cores: ``jobs · threads ≤ cores``."""
    cores = environment.cores()
    jobs = min(jobs, count, cores)
    return Share(jobs, threads.divided(cores, jobs)) if jobs > 1 else Share(1)


@dataclass(eq=False)
class Running:
    """A process at work. reply: how it ended, by its own account."""

    task: Task
    job: Job
    process: BaseProcess
    connection: Connection
    began_s: float
    stage: str = STARTING
    document: dict[str, Any] | None = None
    reply: dict[str, Any] | None = None
    closed: bool = False

    @property
    def sources(self) -> list[Any]:
        return [self.process.sentinel] if self.closed else [self.connection, self.process.sentinel]


def run(tasks: Sequence[Task], share: Share, watcher: Watcher) -> None:
    """Run every task and tell the watcher of every end.

    The first goes alone until it has begun to read: what the command line as a whole is refused for (an option, a missing
    package) is refused once. Raises UsageError and MissingDependencyError for that. Whatever else ends this function early,
    KeyboardInterrupt for one, ends the processes too, with no temporary file left.
    """
    if not tasks:
        return
    waiting = deque(tasks)
    running: dict[Path, Running] = {}
    context, begun = _context(), False
    with tempfile.TemporaryDirectory(prefix="foldexport-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < (share.jobs if begun else 1):
                    watcher.began(waiting[0].path)
                    running[waiting[0].path] = _start(context, waiting[0], share.threads, folder)
                    waiting.popleft()
                for path in _listen(running, watcher):
                    each = running.pop(path)
                    found = _finish(each)
                    if not begun and each.stage == STARTING:
                        _refuse(found)
                    begun = True
                    watcher.ended(found)
                begun = begun or any(each.stage != STARTING for each in running.values())
        finally:
            _stop(list(running.values()))


def _context() -> Any:
    """Where processes come from. Forking after import is safe on Linux alone: elsewhere system libraries forbid it."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    if threading.current_thread() is not threading.main_thread():
        return context
    # Ctrl-C reaches the server and its children too: they start with it ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    except OSError:  # a socket's path has room for about a hundred characters, and a folder for temporary files may be longer
        return multiprocessing.get_context("spawn")
    finally:
        signal.signal(signal.SIGINT, before)
    return context


def _start(context: Any, task: Task, count: int, folder: str) -> Running:
    own = tempfile.mkdtemp(dir=folder)
    job = Job(task.words, count, own, secrets.token_hex(4))
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(job, writer), name=f"foldexport {task.path.name}")
    began_s = time.perf_counter()
    process.start()
    writer.close()
    return Running(task, job, process, reader, began_s)


def _listen(running: dict[Path, Running], watcher: Watcher) -> list[Path]:
    """Wait for news; those that have ended."""
    sources = {source: each for each in running.values() for source in each.sources}
    ready = multiprocessing.connection.wait(list(sources), timeout=TICK_S)
    for each in {id(sources[source]): sources[source] for source in ready}.values():
        before = each.stage
        _read(each)
        if each.stage != before:
            watcher.stage(each.task.path, each.stage)
    return [path for path, each in running.items() if not each.process.is_alive()]


def _read(each: Running) -> None:
    """Everything that has arrived from one process."""
    try:
        while not each.closed and each.connection.poll(0):
            kind, value = json.loads(each.connection.recv_bytes())
            if kind == "here":  # the seconds of the first should not hold the server's imports
                each.began_s = time.perf_counter()
            elif kind == "stage":
                each.stage = str(value)
            elif kind == "document":
                each.document = value
            else:
                each.reply = value
    except (EOFError, OSError, ValueError):  # it ended, in the middle of a message perhaps
        each.closed = True


def _finish(each: Running) -> Result:
    """What a process that has ended came to; what it left behind is removed."""
    _read(each)
    each.process.join()
    elapsed_s = time.perf_counter() - each.began_s
    printed = _printed(each.job)
    reply, path = each.reply, each.task.path
    if reply is None or (reply["code"] == 0 and each.document is None):
        found = result.ended(path, each.process.exitcode, each.stage, elapsed_s, printed)
    else:
        document = each.document or {} if reply["code"] == 0 else {}
        found = Result(path, reply["code"], elapsed_s, document, reply["message"], reply["kind"], printed=printed)
    _sweep(each)
    return found


def _refuse(found: Result) -> None:
    """Raise what the first process was refused for before it read its checkpoint, unless that is about this checkpoint."""
    refusals = {error.__name__: error for error in (UsageError, MissingDependencyError)}
    if found.kind in refusals and found.path.name not in found.message:
        raise refusals[found.kind](found.message)


def _stop(running: Sequence[Running]) -> None:
    """Ask every process to end, wait, kill those that do not, and remove what they left. A second Ctrl-C does not wait."""
    for each in running:
        each.process.terminate()
    until_s = time.monotonic() + PATIENCE_S
    try:
        for each in running:
            each.process.join(max(0.0, until_s - time.monotonic()))
    finally:
        for each in running:
            if each.process.is_alive():
                each.process.kill()
            each.process.join()
            _sweep(each)


def _sweep(each: Running) -> None:
    """Remove the temporary files of a process that did not come to do it."""
    each.connection.close()
    for left in each.task.folder.glob(f"{artifact.staging_prefix}{each.job.mark}-*"):
        shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(each.job.folder, ignore_errors=True)


def _printed(job: Job) -> str:
    try:
        return Path(job.log).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
