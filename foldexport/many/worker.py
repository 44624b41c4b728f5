"""One process: the command line of one checkpoint, with its stages and its result sent to the process that started it."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from foldexport import threads


@dataclass(frozen=True)
class Job:
    """What a process is to do.

    words: its command line.     threads: that it may use, 0 for any.     folder: for what it prints and for temporary files.
    mark: in the names of the temporary folders beside its files, so that they can be told from others' when it is killed.
    """

    words: list[str]
    threads: int
    folder: str
    mark: str

    @property
    def log(self) -> str:
        return os.path.join(self.folder, "printed")


class Relay:
    """Stands where the command has its `Terminal`: what would be shown is sent instead."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, kind: str, value: Any) -> None:
        """As JSON, not pickled: a checkpoint may have brought code into this process."""
        self._connection.send_bytes(json.dumps([kind, value]).encode())

    @contextmanager
    def working(self) -> Iterator[Callable[[str], None]]:
        from foldexport.report.terminal import Terminal, words

        with Terminal(False, quiet=True).working():
            yield lambda stage: self.send("stage", words(stage))

    def show(self, render: Callable[..., None], document: Mapping[str, Any]) -> None:
        self.send("document", document)

    def complain(self, error: Exception) -> None:
        print(error, file=sys.stderr)


def work(job: Job, connection: Connection) -> None:
    """The main function of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to every process; the parent decides, with SIGTERM
    with open(job.log, "wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    _end_with_parent()
    tempfile.tempdir = os.environ["TMPDIR"] = job.folder
    if job.threads:
        threads.limit(job.threads)
    from foldexport import artifact, cli

    artifact.staging_prefix += f"{job.mark}-"
    relay = Relay(connection)
    relay.send("here", "")
    ending = cli.run(job.words, relay)
    if ending.error is not None:
        traceback.print_exception(ending.error)
    relay.send("ending", {"code": ending.code, "message": ending.message or "", "kind": ending.kind})
    connection.close()


def _end_with_parent() -> None:
    """End, cleaning up, when the process that asked for this one is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
