"""The interval of a ratio: how often it holds the truth, over many benchmarks of a machine whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from foldexport.benchmark import statistics
from tests.benchmark.simulated import Machine, autocorrelated, pairs

MACHINES = {
    "independent runs": Machine(),
    "runs that follow each other": Machine(memory=0.9),
    "layouts": Machine(layout=0.02),
    "drift": Machine(drift=0.3),
    "late runs": Machine(late=0.15),
    "everything": Machine(noise=0.04, memory=0.8, layout=0.01, drift=0.2, late=0.1),
}
BENCHMARKS = 100


def intervals(ratio: float, machine: Machine, seed: int, level: float = 0.99) -> list[statistics.Ratio]:
    generator = np.random.default_rng(seed)
    return [statistics.ratio(pairs(ratio, machine, generator), level) for _ in range(BENCHMARKS)]


@pytest.mark.parametrize("name", MACHINES)
def test_a_network_against_itself_shows_no_difference(name):
    found = intervals(1.0, MACHINES[name], seed=1)
    assert sum(each.measurable for each in found) <= 0.03 * BENCHMARKS


@pytest.mark.parametrize("name", MACHINES)
def test_a_tenth_is_found_and_its_size_is_in_the_interval(name):
    found = intervals(1.1, MACHINES[name], seed=2)
    assert sum(each.low <= 1.1 <= each.high for each in found) >= 0.97 * BENCHMARKS
    assert sum(each.measurable and each.value > 1 for each in found) >= 0.95 * BENCHMARKS


def test_runs_taken_as_independent_would_find_differences_that_are_not_there():
    """What the processes are for: the usual bootstrap over runs is fooled by layouts."""
    generator, wrong = np.random.default_rng(3), 0
    for _ in range(BENCHMARKS):
        logs = np.concatenate([np.log(a / b) for a, b in pairs(1.0, MACHINES["layouts"], generator)])
        drawn = np.median(logs[generator.integers(0, len(logs), (200, len(logs)))], axis=1)
        low, high = np.quantile(drawn, [0.005, 0.995])
        wrong += not low <= 0 <= high
    assert wrong > 0.15 * BENCHMARKS


def test_block_resampling_sees_what_independent_resampling_misses():
    generator = np.random.default_rng(4)
    series = [autocorrelated(1.0, 0.9, 400, generator) for _ in range(300)]
    truth = np.std([np.median(each) for each in series])
    blocks = np.mean([statistics.median_error(each, generator) for each in series[:60]])
    shuffled = np.mean([statistics.median_error(generator.permutation(each), generator) for each in series[:60]])
    assert shuffled < 0.5 * truth and 0.65 * truth < blocks < 1.2 * truth


def test_one_process_has_an_interval_of_its_rounds():
    generator = np.random.default_rng(5)
    found = statistics.ratio(pairs(1.1, Machine(), generator, processes=1))
    assert found.between == 0 and found.low < 1.1 < found.high and found.processes == 1


def test_processes_that_agree_by_luck_do_not_claim_more_than_their_rounds_do():
    values = np.exp(0.2 * np.random.default_rng(6).normal(size=50))
    found = statistics.ratio([(values, np.ones(50))] * 4)
    assert found.between < 1e-12 and found.high / found.low > 1.02


def test_the_same_numbers_give_the_same_interval_and_a_level_its_width():
    drawn = pairs(1.05, MACHINES["everything"], np.random.default_rng(7))
    assert statistics.ratio(drawn) == statistics.ratio(drawn)
    narrow, wide = statistics.ratio(drawn, 0.9), statistics.ratio(drawn, 0.999)
    assert wide.low < narrow.low < narrow.value == wide.value < narrow.high < wide.high


def test_a_network_against_the_very_same_numbers_is_exactly_equal():
    values = np.random.default_rng(8).lognormal(size=30)
    found = statistics.ratio([(values, values)] * 3)
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0) and not found.measurable


@pytest.mark.parametrize("given", [[], [(np.ones(0), np.ones(0))], [(np.ones(3), np.ones(2))]], ids=["none", "empty", "unequal"])
def test_what_is_no_measurement_is_refused(given):
    with pytest.raises(ValueError, match="as many latencies"):
        statistics.ratio(given)


@pytest.mark.parametrize(
    ("level", "freedom", "quantile"),
    [(0.99, 1, 63.657), (0.99, 5, 4.032), (0.95, 2, 4.303), (0.95, 9, 2.262), (0.99, 30, 2.750), (0.9, 4, 2.132)],
)
def test_student_is_the_table_of_the_textbooks(level, freedom, quantile):
    assert statistics.student(level, freedom) == pytest.approx(quantile, abs=6e-4)


def test_quantiles_are_of_all_runs_and_the_hundredth_needs_five_hundred():
    values = np.arange(1, 501) / 10
    found = statistics.latency(values)
    assert (found.median_ms, found.fastest_ms, found.runs) == (pytest.approx(25.05), 0.1, 500)
    assert found.p90_ms == pytest.approx(45.01) and found.p99_ms == pytest.approx(49.501)
    assert statistics.latency(values[:499]).p99_ms is None


def test_an_interval_at_another_level_is_that_of_the_same_samples():
    drawn = pairs(1.05, MACHINES["everything"], np.random.default_rng(7))
    for level in (0.9, 0.9975):
        wanted, found = statistics.ratio(drawn, level), statistics.ratio(drawn).at(level)
        assert (found.low, found.high, found.level) == (pytest.approx(wanted.low), pytest.approx(wanted.high), level)


def test_several_comparisons_of_one_report_find_nothing_together():
    """Forty networks against themselves: at 99 % each, a report of them would often claim a difference."""
    generator, level = np.random.default_rng(10), statistics.together(0.9, 40)
    assert level == pytest.approx(1 - 0.1 / 40) and statistics.together(0.99, 1) == 0.99
    reports = [[statistics.ratio(pairs(1.0, MACHINES["layouts"], generator), 0.9) for _ in range(40)] for _ in range(10)]
    assert sum(any(each.measurable for each in report) for report in reports) > 5
    assert sum(any(each.at(level).measurable for each in report) for report in reports) <= 3


def test_an_interval_that_says_nothing_is_noisy_and_one_that_leaves_out_1_is_not():
    spread = [(np.full(9, factor), np.ones(9)) for factor in (0.4, 1.0, 2.5)]
    assert statistics.ratio(spread).noisy and not statistics.ratio(spread).measurable
    slower = statistics.ratio([(np.full(9, factor), np.ones(9)) for factor in (90.0, 100.0, 140.0)])
    assert slower.high > 2 * slower.low and slower.measurable and not slower.noisy
    assert not statistics.ratio(pairs(1.0, MACHINES["layouts"], np.random.default_rng(1))).noisy


def test_disturbed_rounds_are_left_out_while_enough_others_are_left():
    latencies = np.array([[1.0, 1.1], [9.0, 1.1], [1.0, 9.0], [1.0, 1.1], [1.0, 1.1], [1.0, 1.1], [1.0, 1.1]])
    disturbed = latencies > 5
    assert np.array_equal(statistics.undisturbed(latencies, disturbed), latencies[[0, 3, 4, 5, 6]])
    assert np.array_equal(statistics.undisturbed(latencies[:6], disturbed[:6]), latencies[:6])


def test_a_faster_variant_is_below_one():
    found = statistics.ratio(pairs(0.5, replace(MACHINES["layouts"], noise=0.01), np.random.default_rng(9)))
    assert found.measurable and math.isclose(found.value, 0.5, rel_tol=0.05)
