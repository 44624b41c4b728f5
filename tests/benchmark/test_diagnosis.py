"""What is wrong with samples is said, and nothing of samples that are well."""

from __future__ import annotations

import numpy as np
import pytest

from foldexport.benchmark import diagnosis


def samples(processes=6, rounds=100):
    generator = np.random.default_rng(1)
    return [2.0 * np.exp(0.01 * generator.normal(size=rounds)) for _ in range(processes)]


def test_nothing_is_said_of_good_samples():
    assert diagnosis.findings("folded", samples()) == []


def late(each):
    return np.where(np.arange(len(each)) % 20 == 0, 5 * each, each)


def levels(each):
    return np.where(np.arange(len(each)) % 3 == 0, 1.3 * each, each)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda all_: [late(each) for each in all_], "net: 5 % of the runs took more than 1.5 times the median"),
        (lambda all_: [levels(each) for each in all_], "net: two levels, 34 % of the runs 30 % slower than the others"),
        (lambda all_: [each * (1 + 0.05 * i) for i, each in enumerate(all_)], "lie 25 % apart, later ones slower"),
        (lambda all_: [each * (2 - 0.1 * i) for i, each in enumerate(all_)], "apart, later ones faster"),
        (lambda all_: [each * (1, 1.2)[i % 2] for i, each in enumerate(all_)], "apart, in no order"),
        (lambda all_: [each * np.linspace(1, 1.3, len(each)) for each in all_], "net: latency rose by"),
        (lambda all_: [each * np.linspace(1.3, 1, len(each)) for each in all_], "net: latency fell by"),
    ],
    ids=["late", "levels", "slower", "faster", "no order", "rose", "fell"],
)
def test_what_is_wrong_is_named(spoil, said):
    assert any(said in line for line in diagnosis.findings("net", spoil(samples())))


def test_a_handful_of_runs_shows_no_levels_and_no_drift():
    assert diagnosis.two_levels(np.array([1.0, 1.0, 2.0, 2.0])) is None
    assert diagnosis.findings("net", [np.array([1.0, 1.1, 1.2])] * 3) == []


def test_clocks_and_load_are_told_where_they_matter():
    assert diagnosis.clock_findings([[3000.0, 3010.0], [2990.0, 3000.0]]) == [] == diagnosis.clock_findings([[]])
    assert diagnosis.clock_findings([[3000.0], [2000.0]]) == ["clocks between 2000 and 3000 MHz: fix them for closer intervals"]
    cool = {"sm_mhz": 1980, "held_by": []}
    assert diagnosis.gpu_findings([cool, cool]) == [] and "pip install nvidia-ml-py" in diagnosis.gpu_findings([])[0]
    said = diagnosis.gpu_findings([cool, {"sm_mhz": 1500, "held_by": ["heat"]}])
    assert said[0] == "the GPU was held down by heat in 1 of 2 processes" and "between 1500 and 1980 MHz" in said[1]
    assert diagnosis.load_findings(0.3, 2, 2) == [] == diagnosis.load_findings(None, 2, 1)
    assert "load average 3.0 on 2 cores" in diagnosis.load_findings(3.0, 2, 1)[0]


def test_more_threads_than_cores_is_said_first():
    found = diagnosis.load_findings(8.0, 2, 100)
    assert found[0] == "100 threads on 2 cores take turns, which is slower than --threads 2" and "load average 8.0" in found[1]
    assert diagnosis.load_findings(0.1, 2, 100) == found[:1] and diagnosis.load_findings(0.1, 2, 2) == []
