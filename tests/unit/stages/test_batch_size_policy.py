"""Batch sizes are learned while the worker runs: simulated devices, noise, drift, steps, bursts and full memory."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shiwu_worker.stages.encode.tuning.adaptive_choice import CREDIT_S, WASTE_SHARE
from shiwu_worker.stages.encode.tuning.batch_size_policy import (
    MAX_BATCH_S,
    MEMORY_PAUSE_S,
    REPORT_EVERY_S,
    BatchSizeChange,
    BatchSizePolicy,
    guess_costs,
    largest_useful,
)

Curve = Mapping[int, float]
SIZES = (1, 2, 4, 8, 16, 32, 64)
# Milliseconds of one batch. The first two as measured on CPUs, then a GPU, and other shapes.
CURVES: Mapping[str, Curve] = {
    "embedded": {1: 5.05, 2: 5.94, 4: 8.6, 8: 14.2, 16: 21.8, 32: 36.8, 64: 69.1},
    "vit": {1: 117, 2: 174, 4: 284, 8: 528, 16: 1120, 32: 2272, 64: 4544},
    "flat": {1: 1.5, 2: 1.5, 4: 1.6, 8: 1.8, 16: 2.2, 32: 3.2, 64: 5.5},
    "linear": {size: 5.0 * size for size in SIZES},
    "bump": {1: 10, 2: 30, 4: 50, 8: 40, 16: 80, 32: 150, 64: 200},
    "best at 8": {1: 10, 2: 18, 4: 33, 8: 60, 16: 130, 32: 280, 64: 600},
}


@dataclass
class Device:
    """A device on which batches of `curve` take their time, disturbed as asked."""

    curve: Curve
    seed: int = 0
    noise: float = 0.0
    """Standard deviation of the logarithm of each batch's time."""
    drift: float = 0.0
    """The same of what the machine's speed changes by from one batch to the next; it comes back in the long run."""
    factor: Callable[[int], float] = lambda _: 1.0
    """Batch number → how many times as long everything takes."""
    outliers: float = 0.0
    """Share of batches that take 2 to 10 times as long."""
    speed: float = 1.0
    batches: int = 0
    now_s: float = 0.0
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def run(self, size: int) -> tuple[float, float]:
        """Seconds that one batch takes, and seconds that it would take without noise."""
        self.speed = self.speed**0.99 * math.exp(self.chance.gauss(0, self.drift))
        usual_s = self.curve[size] / 1000 * self.speed * self.factor(self.batches)
        took_s = usual_s * math.exp(self.chance.gauss(0, self.noise) - self.noise**2 / 2)
        if self.chance.random() < self.outliers:
            took_s *= self.chance.uniform(2, 10)
        self.batches += 1
        self.now_s += took_s
        return took_s, usual_s


@dataclass
class Run:
    """What a policy did on a device that always had more images than it could take."""

    policy: BatchSizePolicy
    regret: float
    """Time lost after the first batches, as a share of what the best fixed size would have taken."""
    changes: int
    seconds: float
    wasted_s: float
    """By batches of another size than the one that was chosen."""


def simulate(device: Device, *, batches: int = 800, skipped: int = 200, first: int = 1) -> Run:
    """Start on this device with one measurement of its smallest batch, and run."""
    measured = {1: device.run(1)[0]} if first == 1 else {first: device.curve[first] / 1000}
    policy = BatchSizePolicy(SIZES, measured, measured_sd=0.1, clock=lambda: device.now_s)
    # The first guess is not what is tested: begin at the size that a wrong one would give.
    policy._choice.current = first
    allowed = [size for size in SIZES if size == 1 or device.curve[size] / 1000 <= MAX_BATCH_S]
    fixed_s = dict.fromkeys(allowed, 0.0)
    spent_s = wasted_s = 0.0
    changes, before = 0, policy.largest
    for number in range(batches):
        chosen, size = policy.largest, policy.take(waiting=3 * SIZES[-1])
        took_s, usual_s = device.run(size)
        policy.record(size, cost=took_s, seconds=took_s)
        scale = usual_s / device.curve[size]
        wasted_s += max(0.0, usual_s - size * device.curve[chosen] / chosen * scale)
        if number >= skipped:
            spent_s += usual_s
            for one in allowed:
                fixed_s[one] += size * device.curve[one] / one * scale
        changes += policy.largest != before
        before = policy.largest
    return Run(policy, spent_s / min(fixed_s.values()) - 1, changes, device.now_s, wasted_s)


def bursts(number: int) -> float:
    """Other programs have most of the machine while the first sixty batches run."""
    return 4.0 if number < 60 else 1.0


def steps(number: int) -> float:
    """The machine has half of its speed for a while, then twice of it."""
    return 2.0 if 250 <= number < 450 else 0.5 if 600 <= number < 700 else 1.0


DISTURBANCES: Mapping[str, Mapping[str, object]] = {
    "quiet": {"noise": 0.03},
    "noisy": {"noise": 0.15},
    "drifting": {"noise": 0.05, "drift": 0.03},
    "stepwise": {"noise": 0.05, "factor": steps},
    "busy at the start": {"noise": 0.1, "factor": bursts},
    "outliers": {"noise": 0.05, "outliers": 0.03},
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("curve", CURVES)
def test_chosen_size_is_near_the_best_and_stable(curve: str, disturbance: str) -> None:
    """After 200 batches 5 % at most are lost, of which up to 2 % are tries of other sizes."""
    runs = [simulate(make_device(curve, disturbance, seed=seed)) for seed in range(3)]
    assert sum(run.regret for run in runs) / len(runs) <= 0.05
    assert max(run.regret for run in runs) <= (0.12 if disturbance in {"noisy", "outliers"} else 0.05)
    assert max(run.changes for run in runs) <= 10


def make_device(curve: str, disturbance: str, *, seed: int) -> Device:
    """One of the devices, disturbed in one of the ways."""
    return Device(CURVES[curve], seed=seed, **DISTURBANCES[disturbance])  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize(("before", "after"), [("best at 8", "embedded"), ("linear", "flat"), ("flat", "best at 8")])
def test_changed_device_is_learned_again(before: str, after: str) -> None:
    """Its batches cost something else from the 600th on; 200 batches later the loss is 5 % at most again."""
    device = Device(CURVES[before], noise=0.03, seed=1)
    policy = simulate(device, batches=600).policy
    device.curve = CURVES[after]
    run_on(policy, device, batches=200)
    best = min(device.curve[size] / size for size in SIZES)
    assert device.curve[policy.largest] / policy.largest <= 1.05 * best


# Milliseconds of an image at each size, noise, first size, seed: after 700 batches some of them are at a bad size.
SLOW_TO_LEARN: Sequence[tuple[list[float], float, int, int]] = [
    ([1.0, 0.75, 1.0, 1.0, 0.5, 1.0, 5.0], 0.0, 2, 0),
    ([1.0, 1.0, 0.5, 0.625, 1.0, 1.0, 1.0], 0.0, 16, 376),
    ([1.0, 0.5, 2.0, 5.0, 0.2, 0.5, 5.0], 0.0, 4, 67),
    ([0.5, 1.0, 1.0, 1.0, 5.0, 1.0, 5.0], 0.08, 4, 200),
    ([1.0, 2.0, 2.0, 0.5, 1.0, 1.0, 5.0], 0.03, 32, 893),
    ([1.0, 2.0, 0.5, 1.0, 1.0, 2.0, 5.0], 0.0, 16, 720),
]


def make_curve(per_image: Sequence[float]) -> Curve:
    """Milliseconds of a batch of each size."""
    return {size: size * cost for size, cost in zip(SIZES, per_image, strict=True)}


def is_affordable(policy: BatchSizePolicy, size: int) -> bool:
    """Whether the budget for tries allows a batch of this size now."""
    choice, current = policy._choice, policy.largest
    current_s = policy.seconds()[current] / current
    return choice._waste_s(size, size * current_s) <= choice._credit_s


@settings(max_examples=40, deadline=None)
@given(
    per_image=st.lists(st.floats(0.2, 5.0), min_size=len(SIZES), max_size=len(SIZES)),
    noise=st.floats(0.0, 0.08),
    first=st.sampled_from(SIZES),
    seed=st.integers(0, 1000),
)
@example(per_image=[1.0, 0.75, 1.0, 1.0, 0.5, 1.0, 5.0], noise=0.0, first=2, seed=0)
@example(per_image=[1.0, 1.0, 0.5, 0.625, 1.0, 1.0, 1.0], noise=0.0, first=16, seed=376)
def test_bad_size_is_left_within_the_budget_of_tries(
    per_image: list[float], noise: float, first: int, seed: int
) -> None:
    """After 700 batches the size is good, or the budget for tries, which is never exceeded, allows no better one.

    Seven hundred batches may be one second of work, and one batch of a bad size wastes what 15 s of work make good.
    """
    curve = make_curve(per_image)
    run = simulate(Device(curve, noise=noise, seed=seed), first=first, batches=700)
    longest_try_s = max(curve.values()) / 1000
    assert run.wasted_s <= CREDIT_S + 1.2 * (WASTE_SHARE * run.seconds + 2 * longest_try_s)
    chosen, best = run.policy.largest, min(per_image)
    if curve[chosen] / chosen > 1.1 * best:
        better = [size for size in SIZES if curve[size] / size <= 1.1 * best]
        assert not any(is_affordable(run.policy, size) for size in better)


@pytest.mark.parametrize(("per_image", "noise", "first", "seed"), SLOW_TO_LEARN)
def test_no_device_keeps_a_worker_at_a_bad_size(per_image: list[float], noise: float, first: int, seed: int) -> None:
    """Thirty seconds of work earn back the tries that the learning takes, whatever the first ones wasted."""
    device = Device(make_curve(per_image), noise=noise, seed=seed)
    policy = simulate(device, first=first, batches=700).policy
    while device.now_s < 30:
        run_on(policy, device, batches=100)
    assert device.curve[policy.largest] / policy.largest <= 1.1 * min(per_image)


def test_debt_does_not_block_a_try_of_a_cheaper_size() -> None:
    """A batch of 64 spent what 13 s of work earn; size 16, not run yet and expected to be cheaper, is tried."""
    per_image, noise, first, seed = SLOW_TO_LEARN[0]
    run = simulate(Device(make_curve(per_image), noise=noise, seed=seed), first=first, batches=400)
    assert run.policy._choice._credit_s < 0
    assert run.policy.largest == 16


# ------------------------------------------------------------------------------------------ bounds and small print
class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Now."""
        return self.now_s


def make_policy(
    *,
    measured: Mapping[int, float] | None = None,
    clock: Clock | None = None,
    first: int | None = None,
    told: list[BatchSizeChange] | None = None,
    curve: Curve = CURVES["embedded"],
) -> BatchSizePolicy:
    """A policy that was told all of the embedded model's times."""
    told = [] if told is None else told
    measured = measured or {size: took_ms / 1000 for size, took_ms in curve.items()}
    return BatchSizePolicy(
        SIZES, measured, measured_sd=0.03, first=first, on_change=told.append, clock=clock or Clock()
    )


def run_on(policy: BatchSizePolicy, device: Device, *, batches: int, clock: Clock | None = None) -> None:
    """Run batches on a device that has always enough images."""
    for _ in range(batches):
        size = policy.take(3 * SIZES[-1])
        took_s, _ = device.run(size)
        if clock is not None:
            clock.now_s += took_s
        policy.record(size, cost=took_s, seconds=took_s)


def test_slow_size_is_left_and_used_again_later() -> None:
    """While the machine is ten times as slow no batch of 64 is made; when it is quick again one is."""
    clock, told = Clock(), list[BatchSizeChange]()
    policy = make_policy(clock=clock, told=told)
    assert policy.largest == 64
    for slowness, largest in ((20, 32), (1, 64)):
        for _ in range(150):
            size = policy.take(200)
            seconds = CURVES["embedded"][size] / 1000
            clock.now_s += seconds * slowness
            policy.record(size, cost=seconds, seconds=seconds * slowness)
        assert policy.largest == largest
        assert policy.slowest_s == pytest.approx(CURVES["embedded"][largest] / 1000 * slowness, rel=0.2)
    assert [(one.before, one.now, one.reason) for one in told] == [(64, 32, "too_long"), (32, 64, "cheaper")]
    assert told[0].images_per_s == pytest.approx(32 / (20 * 0.0368), rel=0.3)


def test_larger_size_is_tried_only_with_enough_images() -> None:
    """It waits for them a while, then for a minute it is not asked for; what waits is never held back."""
    clock = Clock()
    policy = make_policy(measured={1: 0.005}, clock=clock)
    policy._choice.current = 1
    policy._choice.allow(SIZES)
    policy._update_plan()
    for _ in range(3):
        assert policy.take(1) == 1
        clock.now_s += 0.005
        policy.record(1, cost=0.005, seconds=0.005)
    assert policy.take(3) in {1, 2}
    wanted = policy.wanted
    assert wanted > 3
    for _ in range(30):
        assert policy.take(1) == 1
        clock.now_s += 1
        policy.record(1, cost=0.005, seconds=0.005)
    assert policy.wanted in {1, 2, 4, 8, 16, 32, 64}
    policy = make_policy(measured={1: 0.005}, clock=clock)
    run_on(policy, Device(CURVES["embedded"]), batches=20)
    assert policy.largest >= 8


def test_waiting_images_are_split_by_batch_costs() -> None:
    """Twelve are quicker done as eight and four than as sixteen; so many as the largest batch holds are one batch."""
    policy = make_policy(first=8, curve=CURVES["linear"])
    assert [policy.take(waiting) for waiting in (0, 1, 3, 5, 8, 12)] == [0, 1, 2, 4, 8, 8]
    policy = make_policy(first=64, curve=CURVES["best at 8"])
    assert [policy.take(waiting) for waiting in (12, 64, 500)] == [8, 64, 64]


def test_size_without_memory_is_tried_again_later() -> None:
    """After five minutes, and where there is still none, after ten."""
    clock, told = Clock(), list[BatchSizeChange]()
    policy = make_policy(clock=clock, first=64, told=told)
    policy.lower(16)
    assert policy.largest == policy.take(200) == 16
    policy.lower(8)
    assert policy.largest == 8
    for wait_s in (MEMORY_PAUSE_S, 2 * MEMORY_PAUSE_S):
        clock.now_s += wait_s - 1
        policy.record(8, cost=0.02, seconds=0.02)
        assert policy.largest == 8
        clock.now_s += 2
        policy.record(8, cost=0.02, seconds=0.02)
        run_on(policy, Device(CURVES["embedded"]), batches=40, clock=clock)
        assert policy.largest > 8
        policy.lower(8)
    assert {one.reason for one in told} == {"out_of_memory", "cheaper"}
    policy.lower(0)
    assert policy.take(3) == 1


def test_changes_are_reported_at_a_limited_rate() -> None:
    """Two within ten seconds are one line in the log, and there and back is none."""
    clock, told = Clock(), list[BatchSizeChange]()
    policy = make_policy(clock=clock, first=64, told=told)
    policy.lower(16)
    clock.now_s += 1
    policy.lower(4)
    assert [(one.before, one.now) for one in told] == [(64, 16)]
    clock.now_s += REPORT_EVERY_S
    policy.record(4, cost=0.01, seconds=0.01)
    assert [(one.before, one.now) for one in told] == [(64, 16), (16, 4)]


def test_costs_of_other_sizes_are_estimated() -> None:
    """A batch costs something by itself, and each image; nothing that was disturbed makes an image cost nothing."""
    guessed = guess_costs(SIZES, {1: 5.0, 16: 20.0})
    assert guessed[1] == 5.0
    assert guessed[8] == pytest.approx((4 + 8) / 8)
    assert guess_costs((1, 2), {1: 4.0})[2] == pytest.approx(3.5)
    disturbed = guess_costs(SIZES, {1: 50.0, 16: 20.0})
    assert all(cost > 0 for cost in disturbed.values())
    assert min(disturbed, key=lambda size: disturbed[size]) == 64
    assert largest_useful({1: 1.2, 2: 1.02, 4: 1.0}) == 2


@pytest.mark.parametrize(("curve", "brief", "slower"), [("embedded", 16, 4), ("vit", 1, 1), ("flat", 64, 64)])
def test_brief_batches_take_a_limited_time(curve: str, brief: int, slower: int) -> None:
    """As measured now: on a machine that became twice as slow they are smaller; the smallest size always counts."""
    seconds = {size: ms / 1000 for size, ms in CURVES[curve].items()}
    policy = BatchSizePolicy(SIZES, seconds, measured_sd=0.01)
    assert policy.brief == brief
    for _ in range(60):
        policy.record(brief, cost=seconds[brief], seconds=2 * seconds[brief])
    assert policy.brief == slower
