"""The picture of signal propagation: what it says is there, legible, and the same on every run; and `inspect --plot`."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import math
import struct
import warnings
from pathlib import Path

import pytest

from foldexport.errors import MissingDependencyError
from foldexport.propagation import LAYER, SUM, Pending, Propagation, Signal
from foldexport.report import plot
from foldexport.report.plot import Line, Panel
from tests.command import files, foldexport, save_dirac, save_plain

PACKAGE = Path(plot.__file__).resolve().parents[1]
GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def measured(count: int = 8, scale: float = 0.7, shift: float = 0.0, name: str = "layer{}.{}") -> Propagation:
    names = [name.format(place // 3 + 1, place % 3) for place in range(count)]
    training = Signal([1.0 + place for place in range(count)], [10.0**-place for place in range(count)])
    folded = Signal([2.0 + place for place in range(count)], [10.0 ** (-place - 1) for place in range(count)])
    return Propagation(SUM, names, 32, training, folded, count * [Pending(scale, shift, scale, scale)])


def drawn(found: Propagation):
    return plot.figure(plot.propagation_panels(found), found.names, plot.axis_label(found.kind), "a network")


def overlapping(boxes) -> list[tuple[int, int]]:
    """Pairs of boxes, in pixels, that share more than an edge."""
    shared = lambda a, b: min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1  # noqa: E731
    return [(i, j) for (i, a), (j, b) in itertools.combinations(enumerate(boxes), 2) if shared(a, b)]


# ---- what is on it


def test_panels_say_what_they_show():
    figure = drawn(measured(shift=0.5))
    activation, gradient, pending = figure.axes
    assert [axes.get_title(loc="left") for axes in (activation, gradient)] == ["activation variance", "gradient variance"]
    assert pending.get_title(loc="left") == "pending: value = a · stored + t (median over channels)"
    assert all(axes.get_yscale() == "log" for axes in figure.axes)
    assert pending.get_xlabel() == "output of a residual sum, by the module that adds"
    assert [text.get_text() for text in activation.get_legend().get_texts()] == ["training graph", "folded network, as stored"]
    assert [text.get_text() for text in pending.get_legend().get_texts()] == ["scale |a|", "shift |t|"]
    assert gradient.get_legend() is None  # the panel above says it
    assert [tick.get_text() for tick in pending.get_xticklabels()][:4] == ["layer1.0", "layer1.1", "layer1.2", "layer2.0"]
    assert list(gradient.lines[-1].get_ydata()) == measured().folded.gradient


def test_no_panel_without_anything_pending():
    assert len(plot.propagation_panels(measured(scale=1.0))) == 2
    assert [line.label for line in plot.propagation_panels(measured(scale=1.0, shift=2.0))[-1].lines] == ["shift |t|"]
    found = measured(scale=0.5)
    assert plot.propagation_panels(found)[-1].lines[0].spread is None
    found.pending[3] = Pending(0.5, 0.0, 0.1, 0.9)
    assert plot.propagation_panels(found)[-1].lines[0].spread[0][3] == 0.1


def test_training_graph_alone_and_networks_without_gradient():
    alone = Propagation(LAYER, ["conv"], 32, Signal([1.0], [math.nan]))
    panels = plot.propagation_panels(alone)
    assert [panel.title for panel in panels] == ["activation variance"] and len(panels[0].lines) == 1
    assert "layer" in plot.axis_label(LAYER)


def test_points_that_are_not_stored_are_gaps_and_counted():
    found = measured(4)
    found.folded.activation[1] = found.folded.gradient[1] = math.nan
    found.training.gradient[2] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = drawn(found)
    assert figure.axes[0].get_legend().get_texts()[1].get_text() == "folded network, as stored (3 of 4 points)"
    assert [math.isnan(value) for value in figure.axes[1].lines[-2].get_ydata()] == [False, False, True, False]


# ---- legible


@pytest.mark.parametrize("count", [1, 5, 36, 37, 333])
@pytest.mark.parametrize("name", ["layer{}.{}", "backbone.stages.{}.blocks.{}.residual", "x" * 40 + "{}{}"])
def test_labels_do_not_overlap(count, name):
    figure = drawn(measured(count, name=name))
    axes = figure.axes[-1]
    renderer = figure.canvas.get_renderer()
    ticks = axes.get_xticks()
    assert len(ticks) <= plot.MOST_LABELS
    assert all(len(tick.get_text()) <= plot.LONGEST_LABEL for tick in axes.get_xticklabels())
    if count > 1:  # turned labels: what counts is how far apart their lines are
        apart = (axes.transData.transform((ticks[1], 1)) - axes.transData.transform((ticks[0], 1)))[0]
        height = axes.get_xticklabels()[0].get_fontsize() * figure.dpi / 72
        assert apart * math.sin(math.radians(55)) > height
    boxes = [axes.xaxis.label.get_window_extent(renderer), *(each.get_window_extent(renderer) for each in axes.get_xticklabels())]
    assert not [pair for pair in overlapping(boxes) if 0 in pair]
    figure_box = figure.bbox
    assert all(box.x0 >= figure_box.x0 and box.y0 >= figure_box.y0 - 1 for box in boxes)


@pytest.mark.parametrize("lines", [1, 2, 4])
def test_title_legend_and_panels_do_not_overlap(lines):
    names = ["a", "b", "c"]
    panels = [Panel(title, [Line(f"a network with a name {i}", [1.0, 2.0, 30.0], i) for i in range(lines)])
              for title in ("activation variance", "gradient variance, relative to the last block")]  # fmt: skip
    figure = plot.figure(panels, names, "block", "a title of a length that networks' descriptions have, " * 2)
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle, *(axes._left_title for axes in figure.axes), figure.axes[0].get_legend()]
    boxes = [each.get_window_extent(renderer) for each in texts] + [axes.get_window_extent(renderer) for axes in figure.axes]
    assert not overlapping(boxes)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 + 1 for box in boxes)


def test_numbers_of_the_axis_do_not_overlap_and_there_are_at_least_two():
    for values in ([1.0, 1.0], [0.03, 0.9], [2e-7, 5e-6], [1e-30, 1e12], [0.0, 3.0]):
        figure = plot.figure([Panel("variance", [Line("", values)])], ["a", "b"], "block", "flat")
        axes = figure.axes[0]
        low, high = axes.get_ylim()
        ticks = [*zip(axes.get_yticks(), axes.get_yticklabels(), strict=True),
                 *zip(axes.get_yticks(minor=True), axes.get_yticklabels(minor=True), strict=True)]  # fmt: skip
        shown = [label for at, label in ticks if low <= at <= high and label.get_text()]
        assert len(shown) >= 2, values
        assert not overlapping([label.get_window_extent(figure.canvas.get_renderer()) for label in shown]), values
        assert math.log10(high / low) >= plot.FEWEST_DECADES


def test_lines_differ_without_colour():
    from matplotlib.colors import to_rgb

    for a, b in itertools.combinations(plot.STYLES, 2):
        assert a["marker"] != b["marker"] and a["linestyle"] != b["linestyle"]
    lightness = sorted(sum(w * c for w, c in zip(GREY, to_rgb(style["color"]), strict=True)) for style in plot.STYLES[:2])
    assert lightness[1] - lightness[0] > 0.2


@pytest.mark.parametrize(("value", "text"), [(1.0, "1"), (0.05, "0.05"), (2000.0, "2000"), (5e-5, r"$5\cdot 10^{-5}$"),
                                             (1e-6, "$10^{-6}$"), (1e5, "$10^{5}$")])  # fmt: skip
def test_numbers(value, text):
    assert plot._number_text(value) == text


def test_long_names_keep_their_end():
    assert plot._short("backbone.stages.2.blocks.11.add") == "…2.blocks.11.add"
    assert plot._short("features.group0.block0.conv") == "…group0.block0.conv"
    assert plot._short("layer1.0") == "layer1.0" and len(plot._short("y" * 90)) == plot.LONGEST_LABEL


def test_long_titles_are_broken_evenly():
    lines = plot._balanced("ResNet-18 without batch norm, idshort: c·(x + f(x)), c = √½, CIFAR, width 16, 10 classes").split("\n")
    assert len(lines) == 2 and min(map(len, lines)) > 25 and plot._balanced("short") == "short"


# ---- the file


def test_same_values_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plot.propagation(measured(), "a network", tmp_path / name)
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes()
    width, height = struct.unpack(">II", first[16:24])
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and width == plot.WIDTH_INCHES * plot.DPI and 900 < height < 1400


def test_missing_matplotlib_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as error:
        plot.propagation(measured(), "a network", Path("never.png"))
    assert str(error.value) == "--plot needs matplotlib, which is not installed: pip install 'foldexport[plot]'"


DRAWING = (PACKAGE / "report" / "plot.py", PACKAGE / "benchmark" / "plot.py")


def test_two_files_import_matplotlib_and_only_when_they_draw():
    importing = {path for path in PACKAGE.rglob("*.py") if "import matplotlib" in (text := path.read_text(encoding="utf-8"))
                 or "from matplotlib" in text}  # fmt: skip
    assert importing == set(DRAWING)
    for path in DRAWING:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        early = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("matplotlib" in ast.dump(node) for node in early)


# ---- inspect --plot


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_dirac(tmp_path / "small.pth")


def test_inspect_draws(checkpoint, tmp_path):
    picture = tmp_path / "new" / "small.png"
    result = foldexport("inspect", checkpoint, "--plot", picture)
    assert result.code == 0 and files(tmp_path) == ["new", "new/small.png", "small.pth"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "signal propagation" in result.out and f"7 layers, 32 samples: {picture}" in result.out
    assert "gradient variance" in result.out


def test_json_has_the_numbers(checkpoint, tmp_path):
    found = foldexport("inspect", checkpoint, "--plot", tmp_path / "a.png", "--seed", "3", "--json").document["propagation"]
    assert found["kind"] == LAYER and found["file"] == str(tmp_path / "a.png")
    assert found["names"][0] == "features.conv" and "fc" not in found["names"]
    for network in ("training", "folded"):
        assert all(value > 0 for what in ("activation", "gradient") for value in found[network][what])
    assert "propagation" not in foldexport("inspect", checkpoint, "--json").document


def test_users_network_and_data(tmp_path):
    import numpy as np

    checkpoint, arch = save_plain(tmp_path)
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype("float32"))
    words = ("inspect", checkpoint, "--arch", arch, "--data", tmp_path / "data.npz", "--plot", tmp_path / "a.png", "--json")
    found = foldexport(*words).document["propagation"]
    assert found["names"] == ["0", "3"]
    assert found["samples"] == 5


def test_a_picture_is_replaced_only_when_asked(checkpoint, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_text("mine")
    result = foldexport("inspect", checkpoint, "--plot", picture)
    assert result.code == 2 and picture.read_text() == "mine"
    assert result.message == f"--plot {picture}: exists already; pass --overwrite to replace it, or name another file."
    assert foldexport("inspect", checkpoint, "--plot", picture, "--overwrite").code == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("name", "said"), [("a.pdf", "the picture is a PNG"), ("folder.png", "it is a folder"),
                                            ("file/a.png", "no file can be put there")])  # fmt: skip
def test_places_that_cannot_be_are_refused_before_any_work(name, said, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    result = foldexport("inspect", tmp_path / "none.pth", "--plot", tmp_path / name, *(["--overwrite"] if "folder" in name else []))
    assert result.code == 2 and said in result.message and str(tmp_path / name) in result.message


def test_missing_matplotlib_ends_the_command_before_any_work(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else real(name, *more))
    result = foldexport("inspect", tmp_path / "none.pth", "--plot", tmp_path / "a.png")
    assert result.code == 5 and result.message.endswith("pip install 'foldexport[plot]'")
    assert files(tmp_path) == []


def test_overwrite_without_a_picture_is_refused(checkpoint):
    assert foldexport("inspect", checkpoint, "--overwrite").code == 2
