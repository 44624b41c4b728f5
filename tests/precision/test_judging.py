"""int8 is judged on every output, by labels only where they fit, and by no more than the samples can tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import foldexport
from foldexport import samples
from foldexport.errors import EquivalenceError, UsageError
from foldexport.precision import int8
from foldexport.precision.judging import cautions
from foldexport.precision.quality import Quality, paired_interval, wilson_low
from tests.command import files, save_dirac
from tests.command import foldexport as command

COUNT, CLASSES = 200, 10
RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((COUNT, CLASSES)).astype(np.float32)
GIVEN = [np.arange(COUNT, dtype=np.float32)]


def judged(wanted: list[np.ndarray], found: list[np.ndarray], labels=None, **more) -> Quality:
    """A network whose outputs on sample i are row i of ``wanted``, and a file that gives ``found``."""

    def rows(arrays, part):
        return [each[np.asarray(part).astype(int)] for each in arrays]

    given = int8.Samples(GIVEN, GIVEN, labels, **more)
    return int8.judge(lambda part: rows(found, part), lambda part: list(map(torch.as_tensor, rows(wanted, part[0]))), given, (0, 0))


def destroyed() -> np.ndarray:
    return np.random.default_rng(7).standard_normal(SCORES.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("labels", "certain"),
    [(np.arange(COUNT) % CLASSES, False), (np.zeros(COUNT, int), False), (np.full(COUNT, 3), True), (None, False)],
    ids=["another numbering", "one class", "another class by its name", "none"],
)
def test_a_destroyed_file_fails_with_labels_that_do_not_fit(labels, certain):
    """Planted: outputs that have nothing to do with the network's, where float32 is at chance and cannot lose accuracy."""
    found = judged([SCORES], [destroyed()], labels, certain=certain)
    assert found.drop_points is None and bool(found.doubt) == (labels is not None)
    with pytest.raises(EquivalenceError, match="the largest class differs on"):
        int8.require_quality(found, None)
    with pytest.raises(UsageError, match="--max-drop: is about accuracy, and (labels do not fit|--data has no labels)"):
        int8.require_quality(found, 5.0)


def test_labels_that_fit_judge_and_agreement_is_wanted_too():
    truth = SCORES.argmax(1)
    labels = np.where(np.arange(COUNT) % 2, truth, (truth + 1) % CLASSES)  # float32 is right on half
    swapped = np.eye(CLASSES, dtype=np.float32)[np.where(np.arange(COUNT) % 2, (truth + 1) % CLASSES, labels)]
    found = judged([SCORES], [swapped], labels)  # planted: right on the other half, so nothing is lost and nothing is the same
    assert found.drop_points == 0 and found.agreement == 0 and not found.doubt
    with pytest.raises(EquivalenceError, match="differs on 100.0% .* 53.0% allowed"):
        int8.require_quality(found, 1.0)
    int8.require_quality(judged([SCORES], [SCORES], labels), 0.0)


def test_the_worst_output_decides():
    boxes, classes = RNG.standard_normal((COUNT, 4, 3)).astype(np.float32), RNG.integers(0, 6, (COUNT, 5, 5))
    other = classes.copy()
    other[:, 0, 0] += 1  # 4 %
    good = [SCORES, boxes * 1.01, classes]
    int8.require_quality(judged([SCORES, boxes, classes], good), None)
    for place, wrong, said in (
        (1, boxes * 1.2, "output 'output 1': .*20 dB wanted"),
        (1, np.full_like(boxes, np.nan), "20 dB wanted"),
        (2, other, "output 'output 2': 4.0% of the integers differ"),
        (0, destroyed(), "output 'output 0': the largest class differs"),
    ):
        found = judged([SCORES, boxes, classes], [*good[:place], wrong, *good[place + 1 :]])
        assert found.closeness_db == min(each.closeness_db for each in found.outputs) == found.outputs[place].closeness_db
        with pytest.raises(EquivalenceError, match=said):
            int8.require_quality(found, None)
        assert Quality.from_dict(found.to_dict()) == found


def test_a_network_of_class_numbers_is_judged_by_the_share_that_is_equal():
    classes = RNG.integers(0, 6, (COUNT, 10, 10))
    found = judged([classes], [np.where(RNG.random(classes.shape) < 0.01, 0, classes)])
    int8.require_quality(found, None)
    assert found.sqnr_db is None and 0.98 < found.agreement < 1 and "equal 99." in str(found)
    wrong = judged([classes], [np.where(RNG.random(classes.shape) < 0.03, 0, classes)])  # planted
    with pytest.raises(EquivalenceError, match="of the integers differ"):
        int8.require_quality(wrong, None)


def test_intervals_of_the_literature():
    """Wilson's of 8 of 10 at 95 %; Agresti & Min's by its own formula; what grows with samples narrows."""
    assert wilson_low(8, 10, 1.959964) == pytest.approx(0.4902, abs=1e-4) and wilson_low(0, 0) == 0
    low, high = paired_interval(0, 0, 32)
    assert low == -high and high == pytest.approx(1.959964 / 34, rel=1e-6)
    widths = [np.subtract(*paired_interval(n // 20, n // 40, n)[::-1]) for n in (40, 400, 4000)]
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


@pytest.mark.parametrize("count", [32, 100, 1000])
def test_a_faultless_file_is_seldom_refused_and_a_bad_one_is_named(count):
    """True drop 0.3 points: refused in at most 3 % of draws, 30 % by the measured drop alone. Planted: a true drop of 10 points."""
    rng = np.random.default_rng(count)
    for lose, gain, refused in ((0.0055, 0.0025, (0.0, 0.03)), (0.11, 0.01, (0.2 if count < 100 else 0.7, 1.0))):
        lost, gained = rng.binomial(count, lose, 4000), rng.binomial(count, gain, 4000)
        share = np.mean([100 * paired_interval(int(a), int(b), count)[0] > 1.0 for a, b in zip(lost, gained)])
        assert refused[0] <= share <= refused[1], share


def test_what_few_samples_cannot_tell_is_said():
    base = {"sqnr_db": 30.0, "agreement": 0.96, "samples": 50, "calibration_samples": 50, "equalised_groups": 0, "proved_values": 0}
    found = Quality(**base, accuracy_before=0.8, accuracy_after=0.76, lost=2, gained=0, shared=True)
    int8.require_quality(found, 1.0)
    drop, few, shared = cautions(found, 1.0)
    assert "falls by 4.00 points on these samples, 1 allowed" in drop
    assert "50 samples only" in few and "calibrated judged too" in shared
    many = Quality(**{**base, "samples": 5000}, accuracy_before=0.8, accuracy_after=0.799, lost=10, gained=5)
    assert cautions(many, 1.0) == []


def test_sorted_samples_keep_all_of_their_classes(tmp_path):
    """Planted in the data: sorted by class, more than are taken."""
    labels = np.repeat(np.arange(10), 1000)
    np.savez(tmp_path / "x.npz", x=labels[:, None].astype(np.float32), labels=labels)
    arrays, found = samples.labelled(tmp_path / "x.npz", {}, 500)
    parts = int8.split(arrays, found.values)
    assert (arrays[0][:, 0] == found.values).all() and set(parts.labels) == set(range(10)) == set(parts.calibration[0][:, 0])
    assert set(samples.load(tmp_path / "x.npz", {})[0][:, 0]) == set(range(10))
    whole = int8.split([labels[:, None]], labels)
    assert set(whole.labels) == set(range(10)) and len(whole.labels) == int8.JUDGED_SAMPLES


class TwoOutputs(nn.Module):
    """Scores, and a map whose channels share their step with others that are 3000 times larger."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scores = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.boxes, self.wide = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            self.wide.weight.mul_(3000)
            self.wide.bias.mul_(3000)

    def forward(self, x):
        found = self.body(x).relu()
        maps = torch.cat([self.boxes(found), self.wide(found)], 1)
        return {"scores": self.scores(found.mean((2, 3))), "boxes": maps[:, :4] * 1.0}


def test_a_second_output_that_is_lost_leaves_no_file(tmp_path):
    torch.manual_seed(0)
    found = foldexport.fold(TwoOutputs().eval(), torch.randn(2, 3, 8, 8))
    data = np.random.default_rng(0).standard_normal((128, 3, 8, 8)).astype(np.float32)
    with pytest.raises(EquivalenceError, match="output 'boxes': .*20 dB wanted"):
        foldexport.export(found, "onnx", tmp_path / "net.onnx", precision="int8", data=data)
    assert files(tmp_path) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_values_that_are_not_finite_are_found(precision, tmp_path):
    array = np.zeros((4, 3, 32, 32), np.float32)
    array[2, 1, 5, 7], array[3, 0, 0, 0] = np.nan, np.inf
    np.savez(tmp_path / "nan.npz", x=array)
    checkpoint = save_dirac(tmp_path / "dirac.pth")
    words = ("--to", "onnx", "-o", tmp_path / "out", "--precision", precision, "--data", tmp_path / "nan.npz")
    done = command(checkpoint, *words)
    wanted = "nan.npz: input 'x' has 2 values that are not finite in float32, the first at index (2, 1, 5, 7)"
    assert done.code == 2 and wanted in done.message, done.message
