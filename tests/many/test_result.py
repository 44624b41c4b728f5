"""The exit code of several, and what is said of a process that ended without a result."""

from __future__ import annotations

import signal
from itertools import permutations
from pathlib import Path

import pytest

from foldexport import errors, threads
from foldexport.many import pool, result
from foldexport.many.result import WORST_FIRST, Result, worst


def test_every_exit_code_has_its_place():
    raised = {each.exit_code for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)}
    assert raised | {0} == set(WORST_FIRST)


def test_the_worst_whatever_the_order():
    for codes in permutations((0, 2, 5, 3)):
        assert worst(codes) == 3
    assert [worst(codes) for codes in ((), (0, 0), (4, 1), (6, 3), (2, 0), (143, 0))] == [0, 0, 1, 6, 2, 1]


@pytest.mark.parametrize(
    ("code", "name"),
    [(-9, "SIGKILL"), (-11, "SIGSEGV"), (128 + signal.SIGTERM, "SIGTERM"), (-60, "signal 60")],
)
def test_a_killed_process(code, name):
    found = result.ended(Path("net.pth"), code, "folding", 1.5, "first\n\n  last words \n\n")
    assert found.code == 1 and found.signal == name and found.to_dict()["error"]["signal"] == name
    assert found.message.startswith("net.pth: ")
    for words in (f"was killed by {name}", "while folding", "(last words)"):
        assert words in found.reason
    assert ("--jobs" in found.reason) == (name == "SIGKILL")


def test_a_process_that_left():
    found = result.ended(Path("net.pth"), 7, "starting", 0.1)
    assert "ended with code 7 and no result while starting" in found.reason and "signal" not in found.to_dict()["error"]


def test_an_entry_of_the_document():
    done = Result(Path("a/net.pth"), 0, 1.23456, {"ok": True, "files": []})
    assert done.to_dict() == {"ok": True, "path": "a/net.pth", "elapsed_s": 1.235, "files": []}
    failed = Result(Path("b.pth"), 3, 0.1, message="b.pth: empty\nCopy it again.", kind="CheckpointError")
    assert failed.reason == "empty Copy it again."
    error = {"type": "CheckpointError", "message": failed.message, "exit_code": 3}
    assert failed.to_dict() == {"ok": False, "path": "b.pth", "elapsed_s": 0.1, "error": error}


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("jobs", [1, 2, 5, 100])
def test_jobs_times_threads_is_at_most_the_cores(monkeypatch, cores, jobs):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("foldexport.benchmark.environment.cores", lambda: cores)
    share = pool.share(jobs, 50)
    assert share.jobs == min(jobs, 50, cores) and share.jobs * share.threads <= cores
    assert (share.threads == 0) == (share.jobs == 1)


def test_threads_that_the_user_asked_for_are_the_most(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [threads.divided(16, jobs) for jobs in (1, 2, 4, 8)] == [3, 3, 3, 2]
