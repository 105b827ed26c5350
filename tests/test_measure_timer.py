"""The timer, on a clock that the test owns: what it counts, what it leaves out, and that equal code is called equal."""

from __future__ import annotations

import random

import pytest

from inception_fast.measure.timer import Plan, holm, interleave, noise_floor, quantile, sign_test, summarise


class World:
    """A clock that advances only inside calls; `cost(name)` says by how much."""

    def __init__(self, cost):
        self.now, self.cost, self.log = 0.0, cost, []

    def clock(self) -> float:
        return self.now

    def call(self, name):
        def run():
            self.now += self.cost(name)
            self.log.append(name)

        return run


def test_every_runtime_is_timed_once_a_round():
    costs = {"a": 1.0, "b": 2.0, "c": 4.0}
    world = World(costs.__getitem__)
    samples = interleave({n: world.call(n) for n in costs}, Plan(seconds=1e9, least=5, most=5), clock=world.clock)
    assert samples == {name: [cost] * 5 for name, cost in costs.items()}
    assert all(world.log.count(n) == 2 + 5 * 2 for n in costs)  # warm-up, then an untimed and a timed call a round


def test_the_untimed_call_absorbs_the_cost_of_taking_turns():
    last = []

    def cost(name):
        cold = last[-1:] != [name]
        last.append(name)
        return 10.0 if cold else 1.0

    world = World(cost)
    samples = interleave({n: world.call(n) for n in "ab"}, Plan(seconds=1e9, least=8, most=8), clock=world.clock)
    assert samples == {"a": [1.0] * 8, "b": [1.0] * 8}


def test_the_order_changes_between_rounds():
    world = World(lambda name: 1.0)
    interleave({n: world.call(n) for n in "abc"}, Plan(least=20, most=20, warmup=0, settle=0), clock=world.clock)
    rounds = {tuple(world.log[i : i + 3]) for i in range(0, 60, 3)}
    assert len(rounds) >= 4 and all(sorted(r) == ["a", "b", "c"] for r in rounds)


@pytest.mark.parametrize(
    "plan, cost, rounds",
    [
        (Plan(seconds=100, least=3, most=6, settle=0), 1.0, 6),  # the most
        (Plan(seconds=0.5, least=3, most=6, settle=0), 1.0, 3),  # the least, although time is up
        (Plan(seconds=4.0, least=3, most=6, settle=0), 1.0, 4),  # the time
        (Plan(seconds=1.0, least=9, most=20, settle=0), 2.0, 3),  # the patience: six seconds
        (Plan(seconds=1.0, least=9, most=20, settle=0), 100.0, 3),  # not below three rounds
        (Plan(seconds=1.0, least=9, most=9, settle=0, patience=float("inf")), 100.0, 9),  # a number that was asked for
    ],
)
def test_how_many_rounds(plan, cost, rounds):
    world = World(lambda name: cost)
    heard = []
    samples = interleave({"a": world.call("a")}, plan, clock=world.clock, on_round=heard.append)
    assert len(samples["a"]) == rounds
    assert len(heard) == rounds and heard == sorted(heard) and heard[-1] == 1.0


def test_a_slow_minute_hits_every_runtime():
    world = World(lambda name: 5.0 if 20 < world.now < 120 else 1.0)
    samples = interleave({n: world.call(n) for n in "ab"}, Plan(seconds=1e9, least=20, most=20), clock=world.clock)
    assert samples["a"].count(5.0) >= 4 and abs(samples["a"].count(5.0) - samples["b"].count(5.0)) <= 1


def test_no_calls_and_impossible_plans():
    assert interleave({}, Plan()) == {}
    for bad in ({"least": 0}, {"least": 9, "most": 8}, {"seconds": 0}, {"warmup": -1}, {"settle": -1}):
        with pytest.raises(ValueError, match="allowed"):
            Plan(**bad)


def test_summary():
    s = summarise([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (s.median, s.iqr, s.best, s.count) == (3.0, 2.0, 1.0, 5)
    assert (summarise([2.0]).median, summarise([2.0]).iqr) == (2.0, 0.0)
    assert summarise([1.0, 2.0, 3.0, 4.0]).iqr == pytest.approx(1.5)
    assert quantile([0.0, 10.0], 0.25) == 2.5
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_one_outlier_moves_neither_median_nor_iqr_far():
    quiet = [1.0 + 0.001 * i for i in range(21)]
    disturbed = [*quiet[:-1], 50.0]
    assert summarise(disturbed).median == summarise(quiet).median
    assert summarise(disturbed).iqr == pytest.approx(summarise(quiet).iqr)


def test_sign_test():
    assert sign_test([1.0] * 10, [2.0] * 10) == pytest.approx(2 / 1024)
    assert sign_test([1.0] * 10, [1.0] * 10) == 1.0
    assert sign_test([1, 2, 1, 2], [2, 1, 2, 1]) == 1.0
    assert sign_test([2.0] * 10, [1.0] * 10) == sign_test([1.0] * 10, [2.0] * 10)
    with pytest.raises(ValueError, match="the same rounds"):
        sign_test([1.0], [1.0, 2.0])


def test_holm():
    assert holm([0.01, 0.04, 0.03], 0.05) == [True, False, False]
    assert holm([0.001, 0.02, 0.03], 0.05) == [True, True, True]
    assert holm([0.04], 0.05) == [True] and holm([]) == []


def test_the_shortest_default_run_can_establish_a_difference_from_four_peers():
    least = Plan().least
    p = sign_test([1.0] * least, [2.0] * least)
    assert holm([p, 1.0, 1.0, 1.0]) == [True, False, False, False]


def noisy(rng: random.Random, base: float) -> float:
    return base * (1 + abs(rng.gauss(0, 0.03)) + (1.5 if rng.random() < 0.05 else 0.0))


def test_equal_code_is_called_equal_and_a_tenth_is_seen():
    """A/A flags at most 5 of 100; a runtime 10 % slower, in noise of 3 % with outliers, is found nearly always."""
    false_alarms = found = 0
    for seed in range(100):
        rng = random.Random(seed)
        world = World(lambda name, rng=rng: noisy(rng, 1.1 if name == "slow" else 1.0))
        names = ("ours", "same", "slow")
        samples = interleave({n: world.call(n) for n in names}, Plan(seconds=1e9, least=25, most=25), clock=world.clock)
        same, slow = holm([sign_test(samples["ours"], samples[n]) for n in ("same", "slow")])
        false_alarms += same
        found += slow
    assert false_alarms <= 5
    assert found >= 95


def test_noise_floor_sees_drift_between_rounds():
    assert noise_floor([1.0] * 10) == 0.0
    assert noise_floor([1.0, 1.2] * 5) == pytest.approx(0.2)
    assert noise_floor([1.0]) == float("inf")
