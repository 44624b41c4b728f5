"""``--report FILE.html``: beside the other files, with them or not at all, and refused before any work."""

from __future__ import annotations

import json

import pytest

from foldexport import pipeline
from foldexport.errors import EquivalenceError
from foldexport.report import precision
from tests.benchmark.records import timing
from tests.command import files, foldexport, save_dirac, save_plain
from tests.report import pages


@pytest.fixture
def checkpoint(tmp_path):
    return save_dirac(tmp_path / "small.pth")


def test_a_conversion_leaves_a_page_with_its_files_digests(tmp_path, checkpoint):
    done = foldexport(checkpoint, "--to", "ts", "-o", tmp_path / "out", "--report", tmp_path / "pages" / "small.html", "--json")
    assert done.code == 0, done.err
    assert done.document["report"] == str(tmp_path / "pages" / "small.html")
    page = pages.read((tmp_path / "pages" / "small.html").read_text(encoding="utf-8"))
    record = json.loads((tmp_path / "out" / "small.manifest.json").read_text())
    digests = {tag.text for tag in page.of_class("digest")}
    assert digests == {record["checkpoint"]["sha256"], *(each["sha256"] for each in record["artifacts"][0]["files"])}
    assert "foldexport verify small.manifest.json" in page.text and "torchscript" in page.text
    assert str(tmp_path) not in page.text
    assert "small.html" in done.err


def test_the_page_is_the_same_again(tmp_path, checkpoint):
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert foldexport("inspect", checkpoint, "--report", tmp_path / name / "net.html", "--quiet").code == 0
        made.append((tmp_path / name / "net.html").read_bytes())
    assert made[0] == made[1]


def test_inspect_says_where_the_page_is(tmp_path, checkpoint):
    done = foldexport("inspect", checkpoint, "--report", tmp_path / "net.html")
    assert done.code == 0 and str(tmp_path / "net.html") in done.out
    assert files(tmp_path) == ["net.html", "small.pth"]


def test_what_a_type_of_fewer_digits_cost(tmp_path, checkpoint):
    done = foldexport(checkpoint, "--to", "ts", "--precision", "fp16", "-o", tmp_path / "out", "--report", tmp_path / "half.html")
    assert done.code == 0, done.err
    text = pages.read((tmp_path / "half.html").read_text(encoding="utf-8")).text
    assert "In fp16" in text and "layers in float16" in text and "fp16 noise of the unfolded network" in text


def test_what_int8_cost():
    quality = {"sqnr_db": 31.5, "agreement": 0.99, "accuracy_before": 0.84, "accuracy_after": 0.835, "samples": 200,
               "calibration_samples": 256, "equalised_groups": 67, "proved_values": 53, "drop_points": 0.5}  # fmt: skip
    other = {**quality, "equalised_groups": 0}
    found = precision.said({"precision": "int8", "quality": quality, "other_quality": other, "notes": ["few"]})
    cost = "SQNR 31.5 dB, accuracy 84.00% → 83.50% (drop 0.50 points), top-1 agreement 99.00% of 200"
    equalised = "67 channels equalised, 53 values proved equal"
    assert found.parts == [cost, "calibrated on 256 samples", equalised] and found.notes == ["few"]
    assert found.other.startswith("without equalised ranges: SQNR")
    assert precision.said({"precision": "fp32", "half_io": False}) is None


def test_without_a_fold_it_shows_the_training_graph(tmp_path):
    checkpoint, arch = save_plain(tmp_path)
    more = ("--arch", arch, "--input-shape", "1x3x8x8", "--no-fold", "--report", tmp_path / "net.html")
    assert foldexport(checkpoint, "--to", "ts", *more).code == 0
    assert "Not folded" in pages.read((tmp_path / "net.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("name", "said"),
    [("net.htm", "ends with .html"), ("net", "ends with .html"), ("there.html", "exists already; pass --overwrite"),
     ("folder.html", "it is a folder"), ("there.html/net.html", "no file can be put there")],
)  # fmt: skip
@pytest.mark.parametrize("command", ["convert", "inspect", "bench"])
def test_a_bad_name_is_refused_before_any_work(tmp_path, monkeypatch, command, name, said):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "there.html").write_text("mine")
    monkeypatch.setattr(pipeline, "study", lambda *_: pytest.fail("worked before it refused"))
    words = {"convert": ["--to", "ts"], "inspect": [], "bench": []}[command]
    first = [] if command == "convert" else [command]
    more = ["--overwrite"] if name == "folder.html" else []
    checkpoint = save_dirac(tmp_path / "small.pth")
    before = files(tmp_path)
    done = foldexport(*first, checkpoint, *words, "--report", tmp_path / name, *more)
    assert done.code == 2 and said in done.message and "--report" in done.message
    assert (tmp_path / "there.html").read_text() == "mine" and files(tmp_path) == before


def test_the_checkpoint_is_never_replaced(tmp_path):
    checkpoint = save_dirac(tmp_path / "small.html")
    before = checkpoint.read_bytes()
    for words in ((checkpoint, "--to", "ts"), ("inspect", checkpoint)):
        done = foldexport(*words, "--report", checkpoint, "--overwrite")
        assert done.code == 2 and "what the command reads" in done.message
    assert checkpoint.read_bytes() == before


def test_an_old_page_is_replaced_when_asked(tmp_path, checkpoint):
    (tmp_path / "net.html").write_text("old")
    assert foldexport("inspect", checkpoint, "--report", tmp_path / "net.html", "--overwrite").code == 0
    assert "<h1>" in (tmp_path / "net.html").read_text(encoding="utf-8")


def test_a_proof_that_fails_leaves_no_page(tmp_path, checkpoint, monkeypatch):
    def wrong(*_):
        raise EquivalenceError("planted")

    monkeypatch.setattr(pipeline, "require", wrong)
    done = foldexport(checkpoint, "--to", "ts", "--report", tmp_path / "more" / "net.html")
    assert done.code == 4 and files(tmp_path) == ["small.pth"]


def test_a_benchmark_s_json_makes_a_page(tmp_path):
    from foldexport.report import bench

    bench.save(bench.document(timing()), tmp_path / "bench.html", command=["foldexport", "bench", "net.pth"])
    page = pages.read((tmp_path / "bench.html").read_text(encoding="utf-8"))
    assert len(page.of_class("bar-row")) == 2 and "times faster" in page.text and "foldexport bench net.pth" in page.text


def test_several_checkpoints_have_no_one_page(tmp_path, checkpoint):
    other = save_dirac(tmp_path / "other.pth")
    done = foldexport(checkpoint, other, "--to", "ts", "-o", tmp_path / "out", "--report", tmp_path / "net.html")
    assert done.code == 2 and "--report" in done.message
