"""Warm-up and rounds, with a clock that the callables turn."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from foldexport.benchmark.measure import FEWEST_ROUNDS, MOST_ROUNDS, PATIENCE, measure, one_round, steady


class Bench:
    """A clock and callables that take as long as they are told; ``order`` is who ran."""

    def __init__(self, *seconds):
        self.now, self.order, self.calls = 0.0, [], [0] * len(seconds)
        self.runs = [lambda place=place, each=each: self.run(place, each) for place, each in enumerate(seconds)]

    def run(self, place, seconds):
        self.now += seconds(self.calls[place]) if callable(seconds) else seconds
        self.calls[place] += 1
        self.order.append(place)

    def clock(self):
        return self.now


def test_every_variant_runs_once_in_every_round_in_an_order_drawn_anew():
    bench = Bench(0.02, 0.03)
    found = measure(bench.runs, seconds=1.0, rounds=40, clock=bench.clock)
    assert found.latencies_s.shape == (40, 2) and np.allclose(found.latencies_s, [0.02, 0.03])
    last = np.array(bench.order[-80:]).reshape(40, 2)
    assert set(map(tuple, last)) == {(0, 1), (1, 0)} and np.all(last.sum(axis=1) == 1)


def test_fast_networks_run_once_untimed_before_each_timed_run():
    bench = Bench(0.001, 0.002)
    measure(bench.runs, seconds=0.2, rounds=10, clock=bench.clock)
    assert all(a == b for a, b in zip(bench.order[-40::2], bench.order[-39::2], strict=True))


def test_the_warm_up_goes_on_until_latencies_are_steady():
    bench = Bench(lambda call: 0.02 * (1 + 2 * 0.8**call))
    found = measure(bench.runs, seconds=30.0, rounds=5, clock=bench.clock)
    assert found.steady and found.warmup_rounds > 10 and np.allclose(found.latencies_s, 0.02, rtol=0.02)


def test_a_warm_up_that_never_gets_steady_ends_and_says_so():
    bench = Bench(lambda call: 0.02 * 1.1 ** (call // 3))
    found = measure(bench.runs, seconds=1.0, rounds=5, clock=bench.clock)
    assert not found.steady and len(found.latencies_s) == 5


def test_the_time_asked_for_is_about_what_it_takes():
    bench = Bench(0.004, 0.006)
    found = measure(bench.runs, seconds=2.0, clock=bench.clock)
    assert bench.now == pytest.approx(2.0, rel=0.1) and found.steady


def test_slow_networks_have_their_fewest_rounds():
    bench = Bench(3.0, 4.0)
    found = measure(bench.runs, seconds=1.0, clock=bench.clock)
    assert len(found.latencies_s) == FEWEST_ROUNDS and found.warmup_rounds <= 4


def test_very_fast_networks_have_their_most_rounds():
    bench = Bench(1e-5)
    assert len(measure(bench.runs, seconds=60.0, clock=bench.clock).latencies_s) == MOST_ROUNDS


def test_disturbed_rounds_are_marked_and_given_more_time():
    bench = Bench(0.02, 0.02)
    counts = iter(range(10**6))
    found = measure(bench.runs, seconds=0.6, clock=bench.clock, interruptions=lambda: next(counts))
    assert found.disturbed.all() and bench.now == pytest.approx(0.6 * PATIENCE, rel=0.35)
    assert not measure(bench.runs, seconds=0.6, clock=bench.clock).disturbed.any()


def test_garbage_is_collected_again_after_an_error():
    with pytest.raises(ZeroDivisionError):
        measure([lambda: 1 / 0], seconds=1.0)
    assert gc.isenabled()


def test_a_round_is_seconds_per_variant():
    bench = Bench(1.0, 2.0, 3.0)
    taken, disturbed = one_round(bench.runs, np.random.default_rng(0), clock=bench.clock)
    assert taken.tolist() == [1.0, 2.0, 3.0] and not disturbed.any()


def test_steady_is_two_percent_of_every_variant():
    before = np.array([1.0, 2.0])
    assert steady(before * 1.01, before) and not steady(before * [1.0, 1.05], before)
