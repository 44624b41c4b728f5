"""The ledger in words, and numbers as people read them."""

from __future__ import annotations

import pytest

from foldexport.fold.ledger import Entry
from foldexport.report import ledger
from foldexport.report.terminal import words
from foldexport.report.words import size


def test_what_folded_is_grouped_by_kind():
    entries = [Entry("a.bn", "batch_norm", into="a.conv"), Entry("b.bn", "batch_norm", into="a.conv, b.conv")]
    entries += [Entry("c", "mul", into="d"), Entry("e", "div", into="d"), Entry("f", "merge by sum", into="g")]
    assert ledger.folded(entries, {"DiracConv2d": 12, "functional": 1}) == [
        "2 batch norms folded into 2 layers",
        "2 constant factors folded into 1 layer",
        "1 branch merged by sum",
        "12 DiracConv2d weights evaluated once and for all",
        "1 functional weight evaluated once and for all",
    ]


def test_what_is_kept_has_its_reason():
    entries = [Entry("a.bn", "batch_norm", into="x"), Entry("gate", "gate", "kept", "", "both depend on the input")]
    assert ledger.kept(entries) == [("gate (gate)", "both depend on the input")]


def test_a_rule_without_words_of_its_own_reads_as_it_is():
    assert ledger.name("weight_norm", 2) == "weight norm" and ledger.name("batch_norm", 2) == "batch norms"


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(0, "0 "), (999, "999 "), (999.6, "1.00 k"), (12_345, "12.3 k"), (688_000, "688 k"), (10_900_000, "10.9 M"),
     (3_644_493_824, "3.64 G"), (5e15, "5000 T")],
)  # fmt: skip
def test_sizes_have_three_digits(count, wanted):
    assert size(count) == wanted


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [("fold", "folding"), ("probe second size", "proving in float64: second size"), ("export onnx", "writing onnx"),
     ("float32 rounding", "float32 rounding"), ("verify onnx", "running onnx")],
)  # fmt: skip
def test_stages_in_words(stage, wanted):
    assert words(stage) == wanted
