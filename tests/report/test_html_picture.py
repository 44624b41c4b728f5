"""Blocks, links and coordinates of the picture, from plain values and from small folds."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from foldexport.report.html import charts, drawing, kinds
from foldexport.report.html.blocks import LARGE, blocks, groups
from foldexport.report.html.drawing import ABOVE, BELOW
from tests.report import pages
from tests.statistics import randomise


def operators(*words: str) -> list[dict]:
    """``"layer1.0.conv1 conv"`` …: a chain of operators by module and kind; ``/2`` behind it halves the image from there on."""
    made, size = [], 64
    for place, word in enumerate(words):
        module, kind, *halves = word.split()
        size //= 2 if halves else 1
        made.append({
            "name": f"op{place}", "kind": kind, "module": module if module != "-" else "", "type": "Kind", "detail": "",
            "shape": [8, size, size], "reads": [f"op{place - 1}"] if place else ["x"], "entries": [], "became": [], "how": "stays",
        })  # fmt: skip
    return made


def labels(*words: str) -> list[tuple[str, int]]:
    return [(block.label, len(block.before)) for block in blocks(operators(*words), [])]


def residual(name: str) -> list[str]:
    return [f"{name}.conv conv", f"{name}.bn batch_norm", f"{name} add", f"{name}.relu relu"]


# ---- blocks


def test_blocks_are_the_user_s_modules():
    stem, head = ["conv1 conv", "bn1 batch_norm", "relu relu"], ["pool avg_pool", "fc linear"]
    found = labels(*stem, *residual("layer1.0"), *residual("layer1.1"), *residual("layer2.0"), *head)
    assert found == [("conv1 … relu", 3), ("layer1.0", 4), ("layer1.1", 4), ("layer2.0", 4), ("pool … fc", 2)]


def test_plain_functions_stand_in_their_module():
    stage = ["stage.0.conv conv", "stage.0 relu", "stage.0 add"]
    assert labels("first conv", "- relu", *stage) == [("the network: first", 2), ("stage.0", 3)]
    assert labels(*stage, "- relu", "a conv", "b linear") == [("stage.0", 3), ("the network: a … b", 3)]
    assert labels("- conv2d", "- relu") == [("the network", 2)]


def test_a_long_flat_network_is_cut_behind_its_pools():
    stage = ["conv", "batch_norm", "relu"] * 4
    words, place = [], 0
    for _ in range(4):
        for kind in stage:
            words.append(f"features.{place} {kind}")
            place += 1
        words.append(f"features.{place} max_pool /2")
        place += 1
    assert len(words) > LARGE
    assert [count for _, count in labels(*words)] == [13] * 4


def test_every_operator_is_in_one_block_in_order():
    words = [line for stage in range(3) for block in range(4) for line in residual(f"l{stage}.{block}")]
    found = blocks(operators(*words), [])
    assert [place for block in found for place in block.before] == list(range(len(words)))


def test_neighbours_of_one_structure_are_one_group_and_others_are_not():
    before = operators(*residual("l.0"), *residual("l.1"), *residual("l.2"))
    assert [len(found) for found in groups(blocks(before, []), before, [])] == [3]
    before[9]["how"] = "kept"  # a batch norm of the last block
    assert [len(found) for found in groups(blocks(before, []), before, [])] == [2, 1]
    before[0]["detail"] = "7×7"
    assert [len(found) for found in groups(blocks(before, []), before, [])] == [1, 1, 1]


# ---- links


class Branches(nn.Module):
    """RepVGG's block (Ding et al. 2021): three branches that fold into one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dense_bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.point, self.point_bn = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.own_bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.dense_bn(self.dense(x)) + self.point_bn(self.point(x)) + self.own_bn(x))


def test_branches_lead_to_the_convolution_that_they_became():
    network = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Branches()), 0)
    found = pages.facts(pages.study(network, torch.randn(1, 3, 8, 8)))["graph"]
    assert [each["kind"] for each in found["after"]] == ["conv", "relu", "conv", "relu"]
    became = {each["module"]: (each["how"], each["became"]) for each in found["before"] if each["kind"] != "add"}
    for name in ("dense", "dense_bn", "point", "point_bn", "own_bn"):
        assert became[f"2.{name}"] == ("folded", [2]), name
    assert became["0"] == ("stays", [0])
    assert [row["layer"] for row in found["weights"]] == ["0", "2.dense"]


def test_a_convolution_that_changed_places_stays_itself():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.AvgPool2d(2))
    found = pages.facts(pages.study(randomise(network, 0), torch.randn(1, 3, 10, 10)))["graph"]
    assert [each["kind"] for each in found["after"]] == ["conv", "relu", "avg_pool", "conv"]
    assert [(each["how"], each["became"]) for each in found["before"]] == [("stays", [place]) for place in (0, 1, 3, 2)]


# ---- coordinates


def numbers(path: str) -> list[float]:
    return [float(each) for each in re.findall(r"-?\d*\.?\d+", path)]


def test_ribbons_share_the_height_of_the_row_that_they_reach():
    made = drawing.ribbons([(0, 0, "conv", "stays"), (1, 0, "norm", "folded")], (2, 1))
    heights = [re.search(r" 100 (\S+?)V(\S+?)C", each.path).groups() for each in made]
    top, middle = (float(value) for value in heights[0])
    again, bottom = (float(value) for value in heights[1])
    assert middle == again and bottom - top == drawing.TALL


@pytest.mark.parametrize(("end", "beyond"), [(ABOVE, -11), (BELOW, 2 * drawing.ROW + 11)])
def test_a_ribbon_to_another_block_points_out_of_its_own(end, beyond):
    (made,) = drawing.ribbons([(1, end, "norm", "folded")], (2, 2))
    assert beyond in numbers(made.path) and made.right == end


def test_skip_connections_that_overlap_run_in_lanes():
    lanes = [re.search(r"Q(\S+) ", each.path)[1] for each in drawing.skips([(0, 3, False), (1, 4, False), (4, 6, False)], 8)]
    assert len(lanes) == 3 and len(set(lanes)) == 2


def test_the_strip_has_a_bar_for_each_operator_and_no_room_for_arcs_that_are_none():
    before = [("conv", "stays", [0]), ("norm", "folded", [0]), ("act", "stays", [1])]
    made = drawing.strip(before, ["conv", "act"], ([[], [0], [1]], [[], [0]]))
    assert made.width == 3 and sum(path.count("M") for path, _, _ in made.bars) == 5 and not made.arcs
    assert sum(path.count("M") for path, _, _ in made.ribbons) == 3
    skipping = drawing.strip(before, ["conv", "act"], ([[], [0], [0, 1]], [[], [0]]))
    assert len(skipping.arcs) == 1 and float(skipping.height) > float(made.height)


def test_a_concatenation_of_everything_has_few_arcs():
    reads = [list(range(place)) for place in range(50)]
    made = drawing.strip([("join", "stays", [])] * 50, [], (reads, []))
    assert made.arcs[0].count("M") <= drawing.MOST_ARCS * 50


def test_a_chart_leaves_out_what_a_logarithm_cannot_hold():
    made = charts.chart("x", ["a", "b", "c"], [charts.Line("", [1.0, None, 100.0], "now")])
    assert made["lines"][0]["dots"].count("M") == 2 and made["lines"][0]["path"].count("M") == 2  # a gap between them
    assert made["lines"][0]["texts"] == ["1", "–", "100"]
    assert charts.chart("x", ["a"], [charts.Line("", [0.0], "now")]) is None


def test_bars_end_at_their_value_on_a_logarithmic_axis():
    made = charts.bars([{"value": 1.0}, {"value": 1e9}, {"value": 0.0}, {"value": None}], 0.1, 10.0, [(8.0, "limit")])
    assert [row["share"] for row in made["rows"]] == ["50", "100", "0", None]
    assert float(made["marks"][0]["at"]) == pytest.approx(95.2, abs=0.1)
    assert [tick["text"] for tick in made["ticks"]] == ["0.1", "1", "10"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, "0.25"), (30.0, "30"), (4.12e-5, "4.1e-5"), (1e-9, "1e-9"), (0.0, "0"), (None, "–"), (2e12, "2e12")]
)
def test_numbers(value, text):
    assert charts.number(value) == text


def test_arithmetic_with_a_constant_is_not_a_sum():
    assert kinds.family("add", 2) == "join" and kinds.family("add", 1) == "scalar"
    assert (
        kinds.chip("mul", 1) == "× constant" and kinds.chip("mul", 2) == "×" and kinds.chip("native_dropout", 1) == "native dropout"
    )
