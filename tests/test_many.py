"""Several checkpoints in one command, end to end: files, exit codes, and processes that are killed."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.command import PLAIN, Result, files, foldexport, save_dirac, save_plain, tiny

SEVEN = [f"net{place}" for place in range(7)]
LAYOUTS = (".pth", ".pt", ".ckpt", ".bin", ".pth.tar", ".pth", ".pth")
STAGED = re.compile(r"\.foldexport-[0-9a-f]{8}-")
LIMIT_S = 300
TALKING = """
import sys
from foldexport.cli import main
code = main(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def command(*words: object, **options) -> subprocess.Popen:
    """``foldexport words…`` in a session of its own, as a shell starts it."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True, **options}
    return subprocess.Popen([sys.executable, "-m", "foldexport", *map(str, words)], preexec_fn=interruptible, **given)


def interruptible() -> None:
    """A shell's jobs in the background ignore SIGINT, these tests among them where they are one; what they start does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(what: Callable[[], bool], process: subprocess.Popen) -> None:
    until = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.005)


def processes_of(session: int) -> list[int]:
    """Living processes of a session; those that ended and wait to be noticed are not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def staged(folder: Path) -> bool:
    return any(STAGED.match(each.name) for each in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    return [name for name in files(folder) if Path(name).name.startswith(".")]


# ---- a folder of eight, one of them corrupt


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> tuple[Path, Result]:
    """A folder of eight checkpoints, exported two at a time: (folder, result)."""
    folder = tmp_path_factory.mktemp("eight")
    for place, (name, suffix) in enumerate(zip(SEVEN, LAYOUTS, strict=True)):
        network = tiny()
        with torch.no_grad():
            network.features.group0.block0.bn.bias.add_(place)
        save_dirac(folder / f"{name}{suffix}", network)
    whole = (folder / "net0.pth").read_bytes()
    (folder / "half.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "read.md").write_text("these are ours")
    words = [sys.executable, "-c", TALKING, folder, "--to", "ts", "--jobs", "2", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "COLUMNS": "160"})
    return folder, Result(done.returncode, done.stdout, done.stderr)


def test_seven_are_exported_and_the_corrupt_one_is_reported(eight):
    folder, result = eight
    assert result.code == 3, result.err
    written = {f"{name}.{kind}" for name in SEVEN for kind in ("torchscript.pt", "manifest.json")}
    given = {f"{name}{suffix}" for name, suffix in zip(SEVEN, LAYOUTS, strict=True)}
    assert set(files(folder)) == written | given | {"half.pth", "read.md"}


def test_one_document_with_an_entry_each(eight):
    folder, result = eight
    document = result.document
    assert not document["ok"] and document["exit_code"] == 3
    assert document["jobs"] * (document["threads"] or 1) <= os.cpu_count()
    failed, *done = document["checkpoints"]
    assert failed["path"] == str(folder / "half.pth") and failed["error"]["type"] == "CheckpointError"
    assert failed["error"]["exit_code"] == 3 and str(folder / "half.pth") in failed["error"]["message"]
    assert [Path(each["path"]).name.partition(".")[0] for each in done] == SEVEN
    for each, name in zip(done, SEVEN, strict=True):
        assert each["ok"] and each["certificate"]["ok"] and each["elapsed_s"] > 0
        assert each["files"] == [str(folder / f"{name}.torchscript.pt")]
        manifest = json.loads((folder / f"{name}.manifest.json").read_text())
        assert manifest["command"][0] == "foldexport" and manifest["command"][2:] == ["--to", "ts"]
        assert {key: each[key] for key in manifest if key != "golden"} == {k: v for k, v in manifest.items() if k != "golden"}
    digests = {each["artifacts"][0]["files"][0]["sha256"] for each in done}
    assert len(digests) == len(SEVEN)


def test_a_line_each_then_the_table(eight):
    folder, result = eight
    lines = result.err.splitlines()
    ends, table = lines[:8], "\n".join(lines[8:])
    assert sum(line.startswith("✓ ") for line in ends) == 7 and all(line.endswith(" s") for line in ends)
    (failed,) = [line for line in ends if line.startswith("✗ ")]
    assert re.search(r"half\.pth +truncated or damaged", failed)
    for words in ("architecture", "27 → 19", "DiracNet v2, CIFAR, depth 10", "✗ not read", "8 checkpoints: 7 exported, 1 failed"):
        assert words in table, table
    assert re.search(r"\d\.\d×", table) and "Traceback" not in result.err


def test_the_parent_imports_no_torch(eight):
    assert eight[1].err.splitlines()[-1] == "False"


def test_the_bytes_are_those_of_the_checkpoint_alone(eight, tmp_path):
    folder, _ = eight
    assert foldexport(folder / "net3.bin", "--to", "ts", "-o", f"{tmp_path}/", "--quiet").code == 0
    assert (tmp_path / "net3.torchscript.pt").read_bytes() == (folder / "net3.torchscript.pt").read_bytes()
    alone, among = (json.loads((each / "net3.manifest.json").read_text()) for each in (tmp_path, folder))
    for each in (alone, among):
        del each["seconds"], each["command"]
    assert alone == among


def test_what_exists_is_refused_and_our_files_are_no_checkpoints(eight):
    folder, _ = eight
    result = foldexport(folder, "--to", "ts", "--json")
    codes = [each.get("error", {"exit_code": 0})["exit_code"] for each in result.document["checkpoints"]]
    assert result.code == 3 and codes == [3, *[2] * 7]
    assert "exists already: pass --overwrite" in result.document["checkpoints"][1]["error"]["message"]


# ---- refused before any work


def test_two_that_write_the_same_file(tmp_path):
    for name in ("a/net.pth", "b/net.pt", "a/other.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_dirac(tmp_path / name)
    result = foldexport(tmp_path, "--recursive", "--to", "ts", "-o", tmp_path / "out", "--json")
    assert result.code == 2 and not result.document["ok"] and "checkpoints" not in result.document
    assert "net.pth and " in result.message and "net.pt would both write" in result.message
    assert files(tmp_path) == ["a", "a/net.pth", "a/other.pth", "b", "b/net.pt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "out.onnx"], "name a folder, such as out/"),
        (["--report", "page.html"], "--report: is for one checkpoint"),
        (["--bundle", "all"], "--bundle: is for one checkpoint"),
        (["--jobs", "0"], "--jobs"),
        (["ts"], "--to onnx,torchscript"),
        ([""], "an empty name"),
    ],
    ids=["output", "report", "bundle", "jobs", "format", "empty"],
)
def test_refused(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"x")
    result = foldexport("a.pth", "b.pth", "--to", "onnx", *words)
    assert result.code == 2 and said in result.message and files(tmp_path) == ["a.pth", "b.pth"]


def test_options_that_no_checkpoint_can_have_are_refused_once(tmp_path):
    for name in ("a.pth", "b.pth", "c.pth"):
        save_dirac(tmp_path / name)
    result = foldexport(tmp_path, "--to", "ts", "--precision", "fp8", "-o", tmp_path / "out")
    assert result.code == 2 and "fp8" in result.message and result.err.count("fp8") == 1 and result.out == ""
    assert files(tmp_path) == ["a.pth", "b.pth", "c.pth"]


def test_an_empty_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    result = foldexport(tmp_path, "--to", "onnx", "--json")
    assert result.code == 3 and "no checkpoint file in this folder" in result.message and not result.document["ok"]


# ---- quiet, a terminal


def test_quiet_names_the_failures_alone(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"junk")
    result = foldexport(tmp_path / "a.pth", tmp_path / "missing.pth", save_dirac(tmp_path / "b.pth"), "--to", "ts", "--quiet")
    assert (result.code, result.out) == (3, "")
    assert [line.split()[:2] for line in result.err.splitlines()] == [
        ["✗", "a.pth"],
        ["✗", "missing.pth"],
    ]
    assert files(tmp_path) == ["a.pth", "b.manifest.json", "b.pth", "b.torchscript.pt"]


def test_a_terminal_shows_what_is_being_done(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"junk")
    save_dirac(tmp_path / "b.pth")
    leader, follower = pty.openpty()
    process = command(tmp_path, "--to", "ts", stderr=follower, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "200"})
    os.close(follower)
    shown = b"".join(_until_closed(leader)).decode()
    assert process.wait(LIMIT_S) == 3
    for words in ("tracing the network", "0 of 2 done", "1 of 2 done", "✗", "✓"):
        assert words in shown, shown


def _until_closed(descriptor: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError:  # what Linux gives when the last writer is gone
            data = b""
        if not data:
            os.close(descriptor)
            return
        yield data


# ---- processes that end otherwise


VICTIM = f"""
import os
from pathlib import Path
{PLAIN}
class Network(Net):
    def __init__(self, marker, deed):
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            super().__init__()
            return
        print("what it said last", flush=True)
        eval(deed)
"""


@pytest.mark.parametrize(
    ("deed", "said", "number"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL while reading the checkpoint", "SIGKILL"),
        ("os.abort()", "was killed by SIGABRT", "SIGABRT"),
        ("os._exit(0)", "ended with code 0 and no result", None),
    ],
    ids=["killed", "aborted", "left"],
)
def test_a_process_that_ends_is_the_failure_of_its_checkpoint_alone(tmp_path, deed, said, number):
    checkpoint, _ = save_plain(tmp_path)
    (tmp_path / "victim.py").write_text(VICTIM)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(checkpoint.read_bytes())
    result = foldexport(
        tmp_path / "a.pth", tmp_path / "b.pth", "--to", "ts", "--input-shape", "1x3x6x6", "--json",
        "--arch", f"{tmp_path / 'victim.py'}:Network", "--arch-arg", f"marker={tmp_path / 'marker'}", "--arch-arg", f"deed={deed}",
    )  # fmt: skip
    first, second = result.document["checkpoints"]
    assert result.code == result.document["exit_code"] == 1
    assert first["error"]["exit_code"] == 1 and first["error"].get("signal") == number
    assert said in first["error"]["message"] and "what it said last" in first["error"]["message"]
    assert second["ok"] and [Path(each).name for each in second["files"]] == ["b.torchscript.pt"]
    assert "a.torchscript.pt" not in files(tmp_path) and not hidden(tmp_path)


@pytest.fixture
def three(tmp_path) -> Path:
    """Three checkpoints, to be exported to a format that takes its time."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("a.pth", "b.pth", "c.pth"):
        save_dirac(tmp_path / "in" / name)
    return tmp_path


def test_a_kill_while_it_writes_leaves_no_temporary_file(three):
    process = command(three / "in", "--to", "onnx", "-o", three / "out", "--json")
    wait_for(lambda: staged(three / "out"), process)
    os.kill(max(processes_of(process.pid)), signal.SIGKILL)  # the youngest is the one that writes
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, err
    first, *others = json.loads(out)["checkpoints"]
    assert first["error"]["signal"] == "SIGKILL" and all(each["ok"] for each in others)
    assert files(three / "out") == ["b.manifest.json", "b.onnx", "c.manifest.json", "c.onnx"]


@pytest.mark.parametrize("whom", [os.killpg, os.kill], ids=["group", "parent"])
def test_interrupt_ends_every_process_and_leaves_no_half_written_file(three, whom):
    process = command(three / "in", "--to", "onnx", "-o", three / "out", "--jobs", "2", "--json")
    wait_for(lambda: staged(three / "out"), process)
    whom(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130 and "Traceback" not in err, err
    document = json.loads(out)
    assert document["exit_code"] == 130
    done = [Path(each["path"]).stem for each in document["checkpoints"] if each["ok"]]
    assert {each["error"]["type"] for each in document["checkpoints"] if not each["ok"]} == {"Interrupted"}
    assert files(three / "out") == sorted(f"{name}.{kind}" for name in done for kind in ("manifest.json", "onnx"))
    wait_for_none(process.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_processes_end_with_their_parent(three, number):
    with tempfile.TemporaryDirectory() as folder:  # a parent that is killed cannot remove its own temporary files
        process = command(three / "in", "--to", "onnx", "-o", three / "out", env={**os.environ, "TMPDIR": folder})
        wait_for(lambda: staged(three / "out"), process)
        os.kill(process.pid, number)
        process.communicate(timeout=LIMIT_S)
        wait_for_none(process.pid)
    assert not hidden(three / "out")


def test_a_long_folder_for_temporary_files(tmp_path):
    long = tmp_path / ("long" * 30)
    long.mkdir()
    (tmp_path / "a.pth").write_bytes(b"junk")
    process = command(tmp_path / "a.pth", tmp_path / "missing.pth", "--to", "ts", env={**os.environ, "TMPDIR": str(long)})
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 3 and "2 checkpoints: 0 exported, 2 failed" in out and "Traceback" not in err, err


def wait_for_none(session: int) -> None:
    until = time.monotonic() + 60
    while processes_of(session):
        assert time.monotonic() < until, processes_of(session)
        time.sleep(0.05)
