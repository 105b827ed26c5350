"""The timer, on a clock that the test owns: what it counts, what it leaves out, and that equal code is called equal."""

from __future__ import annotations

import math
import random

import pytest

from inception_fast.measure.timer import (
    FLOOR,
    Plan,
    contrasts,
    holm,
    interleave,
    noise_floor,
    quantile,
    sign_test,
    summarise,
)


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


def test_threads_that_spin_are_asleep_before_the_next_runtime_is_timed():
    """A call is slow while those of the runtime before are awake, which one untimed call does not outlast."""
    world, awake = World(lambda name: 1.0), {}

    def call(name):
        def run():
            others = [until for other, until in awake.items() if other != name]
            world.now += 10.0 if any(until > world.now for until in others) else 1.0
            awake[name] = world.now + 45

        return run

    for calm, cost in ((100.0, 1.0), (0.0, 10.0)):
        plan = Plan(seconds=1e9, least=8, most=8, calm=calm)
        samples = interleave({n: call(n) for n in "ab"}, plan, clock=world.clock)
        assert samples == {"a": [cost] * 8, "b": [cost] * 8}


@pytest.mark.parametrize("warm, before", [(0.0, 2), (3.0, 2), (10.0, 6)])
def test_calls_go_on_untimed_until_the_machine_is_awake(warm, before):
    """Every core of it: the calls are slow until the clock says 10."""
    world = World(lambda name: 1.0 if world.now >= 10 else 2.0)
    samples = interleave(
        {n: world.call(n) for n in "ab"}, Plan(3, 3, 3, settle=0, warm=warm, warmup=1), clock=world.clock
    )
    assert [len(times) for times in samples.values()] == [3, 3] and len(world.log) == before + 6
    assert (samples == {"a": [1.0] * 3, "b": [1.0] * 3}) == (warm == 10.0)


def test_the_order_changes_between_rounds():
    world = World(lambda name: 1.0)
    interleave({n: world.call(n) for n in "abc"}, Plan(least=20, most=20, warmup=0, settle=0), clock=world.clock)
    rounds = [tuple(world.log[i : i + 3]) for i in range(0, 60, 3)]
    assert len(set(rounds)) >= 4 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert all(second == first[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))


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


class Machine:
    """A clock as real machines run: memory of the last moments, bursts of others' work, a slow drift, sudden levels.

    The first call of a round costs `place` more, as one does that finds another runtime's data in the caches.
    """

    def __init__(self, seed: int, bias: dict[str, float], place: float) -> None:
        self.rng, self.bias, self.place = random.Random(seed), bias, place
        self.now = self.wander = self.burst = self.level = 0.0
        self.drift, self.period = self.rng.choice([-1e-3, 0.0, 1e-3]), self.rng.choice([0.0, 0.03])
        self.calls, self.left = 0, 0

    def clock(self) -> float:
        return self.now

    def call(self, name: str):
        def run() -> None:
            rng = self.rng
            self.wander = 0.9 * self.wander + rng.gauss(0, 0.015)
            self.left = self.left - 1 if self.left else rng.randrange(1, 7) * (rng.random() < 0.05)
            self.level += rng.choice([-0.1, 0.1]) * (rng.random() < 0.01)
            slow = self.wander + 0.5 * bool(self.left) + self.level + self.drift * self.calls
            slow += self.period * math.sin(self.calls / 1.16) + abs(rng.gauss(0, 0.01))
            slow += self.place * (self.calls % len(self.bias) == 0)
            self.calls += 1
            self.now += math.exp(slow) * self.bias[name]

        return run


def contest(seed: int, bias: dict[str, float], rounds: int, place: float = 0.0) -> dict:
    machine = Machine(seed, bias, place)
    plan = Plan(seconds=1e9, least=rounds, most=rounds, warmup=0, settle=0)
    return contrasts(interleave({name: machine.call(name) for name in bias}, plan, clock=machine.clock), "ours")


@pytest.mark.parametrize("place", [0.0, 0.05], ids=["", "place"])
@pytest.mark.parametrize("peers, rounds", [(1, 9), (1, 21), (1, 50), (4, 9), (4, 50)])
def test_equal_code_is_called_equal(peers, rounds, place):
    """Of 200 runs of equal runtimes at most 5 in 100 call any of them faster or slower."""
    names = ["ours", *(f"peer {i}" for i in range(peers))]
    alarms = sum(
        any(found.established for found in contest(seed, dict.fromkeys(names, 1.0), rounds, place).values())
        for seed in range(200)
    )
    assert alarms <= 10


def test_the_order_of_the_rounds_gives_nobody_the_worse_place():
    """A place that costs a tenth moves no ratio: each runtime has it as often as the other, whatever the shuffle."""
    for rounds in (10, 22, 50):
        machine = Machine(0, {"ours": 1.0, "same": 1.0}, 0.0)
        calls = 0

        def cost(name: str) -> float:
            nonlocal calls
            calls += 1
            return 1.1 if calls % 2 else 1.0

        world = World(cost)
        plan = Plan(seconds=1e9, least=rounds, most=rounds, warmup=0, settle=0)
        samples = interleave({n: world.call(n) for n in machine.bias}, plan, clock=world.clock)
        assert samples["ours"].count(pytest.approx(1.1)) == rounds // 2


def test_copies_of_one_program_differ_by_less_than_what_is_established():
    """Memory that lies elsewhere makes a copy 1.5 % slower, round for round: still the same program."""
    quiet = {"ours": [1.0, 1.001] * 20, "copy": [1.015, 1.016] * 20, "slower": [1.03, 1.031] * 20}
    found = contrasts(quiet, "ours")
    assert found["copy"].p_value < 1e-6 and not found["copy"].established and found["copy"].noise == FLOOR
    assert found["slower"].established and found["slower"].ratio == pytest.approx(1.03, rel=1e-3)


def test_a_tenth_is_seen():
    found = [contest(seed, {"ours": 1.0, "slow": 1.1, "same": 1.0}, 50)["slow"].established for seed in range(100)]
    assert sum(found) >= 90


def test_noise_floor_sees_drift_between_rounds():
    assert noise_floor([1.0] * 10) == 0.0
    assert noise_floor([1.0, 1.2] * 5) == pytest.approx(0.2)
    assert noise_floor([1.0]) == float("inf")
