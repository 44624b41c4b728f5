"""What people see: the table, the sentences, the JSON document, the picture."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from foldexport.benchmark import plot
from foldexport.report import bench
from tests.benchmark.records import measurement, timing


def shown(found, **more) -> str:
    stream = io.StringIO()
    bench.console(Console(file=stream, width=200, markup=False, highlight=False), found, **more)
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
