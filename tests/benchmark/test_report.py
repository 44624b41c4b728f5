"""What people see: the table, the sentences, the JSON document, the picture."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from foldexport.benchmark import plot, statistics
from foldexport.report import bench
from foldexport.report.html import evidence
from tests.benchmark.records import measurement, timing


def shown(found, width: int = 200, **more) -> str:
    stream = io.StringIO()
    bench.console(Console(file=stream, width=width, markup=False, highlight=False), found, **more)
    return stream.getvalue()


def test_the_table_has_latencies_intervals_and_what_was_not_timed():
    text = shown(timing(unavailable={"openvino": "openvino is not installed: pip install 'foldexport[openvino]'"}))
    assert "times faster (1." in text and "baseline" in text and "99 % interval" in text and "median ms" in text
    assert "openvino: openvino is not installed: pip install 'foldexport[openvino]'" in text
    assert "checked against the training graph before it was timed" in text and "TF32 off" in text and "3.56 MB" in text


def test_no_difference_is_said_in_these_words():
    made = measurement(ratio=1.0)
    assert made.entries[1].verdict == "no measurable difference" and "no measurable difference (" in shown(timing(made))
    assert measurement(ratio=1.3).entries[1].verdict.endswith("times slower")


def noisy():
    """Three processes that agree on nothing."""
    made = measurement()
    made.entries[1].ratio = statistics.ratio([(np.full(9, factor), np.ones(9)) for factor in (0.4, 1.0, 2.5)])
    return made


def test_an_interval_that_says_nothing_is_called_so_with_what_to_do():
    made = noisy()
    text, record = shown(timing(made)), bench.document(timing(made))["measurements"][0]["variants"][1]
    assert "too noisy to tell" in text and "no measurable difference" not in text
    assert "pass more than --processes 6, or time it on an idle machine" in text
    assert record["verdict"] == "too noisy to tell" and record["measurable"] is False
    axes = plot.figure(timing(made, measurement())).axes[1]
    assert sorted(each.get_text()[:9] for each in axes.texts)[1] == "too noisy" and axes.get_xlim()[1] < 5
    bars = evidence.latency(json.loads(json.dumps(bench.document(timing(made)))))["groups"][0]["rows"]
    assert bars[1]["text"] == "too noisy to tell"


def test_intervals_of_one_report_hold_together():
    found = timing(measurement(), measurement("eager"), measurement("openvino"), measurement("compile")).together(0.99)
    assert found.comparisons == 4 and all(each.level == pytest.approx(0.9975) for each in found.measurements)
    found.settings["level"] = 0.99
    text = shown(found)
    assert "99.75 % interval" in text and "4 intervals at 99.75 % each, so that all hold together with 99 %" in text
    alone = timing(measurement()).together(0.99)
    assert found.measurements[0].entries[1].ratio.low < alone.measurements[0].entries[1].ratio.low


def test_a_late_percentile_is_told_of_many_runs_only():
    assert "there were 240" in shown(timing()) and shown(timing()).count("–") >= 2


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("name", ["folded", "repvgg_cifar10_with_a_longer_name.onnx", "x" * 70 + ".onnx"], ids=len)
def test_no_name_and_no_heading_is_broken(width, name):
    made = measurement()
    made.entries[1].name = name
    text = shown(timing(made), width=width)
    table = text[text.index("median ms") :].split("\n\n")[0].splitlines()
    assert name in text and "99 % interval" in text and "times faster" in text
    assert all(len(line.rstrip()) <= width for line in table)
    assert ("left out in" in text) == (width < 101 or len(name) > 25)


def test_few_findings_are_shown_and_the_others_counted():
    made = measurement()
    made.findings = [f"finding {place}" for place in range(5)]
    text = shown(timing(made))
    assert "finding 2" in text and "finding 3" not in text and "and 2 more findings: --json" in text


def test_the_document_is_json_with_units_and_intervals():
    document = json.loads(json.dumps(bench.document(timing())))
    first = document["measurements"][0]
    unfolded, folded = first["variants"]
    assert document["ok"] and first["baseline"] == "unfolded" and unfolded["speedup"] is None
    low, high = folded["speedup"]["interval"]
    assert low < folded["speedup"]["value"] < high and folded["measurable"] is True
    assert folded["speedup"]["value"] * folded["latency_ratio"]["value"] == pytest.approx(1)
    assert set(folded["latency_ms"]) == {"median", "p90", "p99", "fastest"} and folded["file_bytes"] == 3_560_000


@pytest.mark.parametrize(
    "rows",
    [[measurement()], [measurement("eager", 0.5), measurement(ratio=1.0)],
     [measurement(batch=each, base_ms=2.0 * each) for each in (1, 8, 32)]],
    ids=["one", "runtimes", "batches"],
)  # fmt: skip
def test_the_picture_is_drawn_light_with_every_number_inside(rows, tmp_path):
    found = timing(*rows)
    made = plot.figure(found)
    made.canvas.draw()
    frame = made.bbox
    for axes in made.axes:
        for text in axes.texts:
            box = text.get_window_extent()
            assert box.x0 >= frame.x0 and box.x1 <= frame.x1, text.get_text()
    assert len(made.axes[1].texts) == len(rows) and "ms" in made.axes[0].get_xlabel()
    pixels = np.asarray(made.canvas.buffer_rgba())[..., :3]
    assert np.mean(pixels > 200) > 0.8
    plot.save(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_title_and_subtitle_say_network_machine_and_threads():
    found = timing(subject="a network with a description, which is longer than a line can be, since it goes on, and on, and on")
    assert len(plot.title(found)) <= plot.TITLE_COLUMNS and plot.title(found).endswith(": folded against unfolded")
    assert found.environment["processor"] in plot.subtitle(found) and "1 thread" in plot.subtitle(found)
    assert "input 1x3x32x32" in plot.subtitle(found)
