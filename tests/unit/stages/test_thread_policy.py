"""Threads of the model on a CPU: from the cores, from what an image costs, and from how quick they are together."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from shiwu_worker.stages.encode.tuning.thread_policy import (
    MAX_SPLIT_THREADS,
    POLL_INTERVAL_S,
    Arrangement,
    ThreadChange,
    ThreadPolicy,
    fast_below_s,
)

SLOW_S, EMBEDDED_S, QUICK_S = 0.1, 0.02, 0.003


@dataclass
class Machine:
    """Cores that come and go, and a clock; `run` is a batch that some threads work on together."""

    cores: int = 4
    now_s: float = 0.0
    is_busy: bool = False
    """Other programs use the cores: one thread takes three times as long, threads that wait for each other fifty."""
    told: list[ThreadChange] = field(default_factory=list)
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def policy(self, core_s: float, **options: object) -> ThreadPolicy:
        """A policy on this machine."""
        named: dict[str, object] = {"cores": lambda: self.cores, "clock": lambda: self.now_s, **options}
        return ThreadPolicy(core_s=core_s, on_change=self.told.append, **named)  # type: ignore[arg-type]  # its names

    def run(self, policy: ThreadPolicy, *, batches: int, work: float = 0.1) -> float:
        """Run batches that are not divided; the share of the time that the best number of threads would have saved."""
        spent_s = best_s = 0.0
        threads = policy.arrangement.threads
        for _ in range(batches):
            count = policy.next_together(work)
            took_s = self._seconds(count, work) * self.chance.lognormvariate(0, 0.1)
            self.now_s += took_s
            spent_s += took_s
            best_s += min(self._seconds(one, work) for one in range(1, threads + 1))
            policy.record(together=count, work=work, seconds=took_s)
        return 1 - best_s / spent_s

    def _seconds(self, count: int, work: float) -> float:
        return work * (0.1 + 0.9 / count) * (1 if not self.is_busy else 3 if count == 1 else 50)


@pytest.mark.parametrize(
    ("core_s", "cores", "options", "expected"),
    [
        (SLOW_S, 4, {}, Arrangement(4, splits_batches=True)),
        (SLOW_S, 1, {}, Arrangement(1, splits_batches=False)),
        (SLOW_S, MAX_SPLIT_THREADS + 1, {}, Arrangement(MAX_SPLIT_THREADS + 1, splits_batches=False)),
        (SLOW_S, 4, {"is_compiled": True}, Arrangement(4, splits_batches=False)),
        (SLOW_S, 4, {"fixed": 3}, Arrangement(3, splits_batches=True)),
        (SLOW_S, 8, {"max_threads": 4}, Arrangement(4, splits_batches=True)),
        (QUICK_S, 4, {}, Arrangement(3, splits_batches=False)),
        (QUICK_S, 2, {}, Arrangement(1, splits_batches=False)),
        (EMBEDDED_S, 2, {}, Arrangement(2, splits_batches=True)),
        (EMBEDDED_S, 4, {}, Arrangement(4, splits_batches=True)),
        (EMBEDDED_S, 8, {}, Arrangement(7, splits_batches=False)),
        (QUICK_S, 1, {}, Arrangement(1, splits_batches=False)),
        (QUICK_S, 4, {"fixed": 4}, Arrangement(4, splits_batches=False)),
    ],
)
def test_threads_follow_from_cores_and_cost(
    core_s: float, cores: int, options: dict[str, object], expected: Arrangement
) -> None:
    """A slow model takes all cores, a quick one leaves one to the loaders; what the operator said stays."""
    policy = Machine(cores).policy(core_s, **options)
    assert policy.update() == policy.arrangement == expected
    assert policy.together == expected.threads


def test_threads_follow_a_changing_number_of_cores() -> None:
    """Counted every five seconds; each change is told, and the same number again is none."""
    machine = Machine(4)
    policy = machine.policy(SLOW_S)
    for cores, threads in ((2, 2), (2, 2), (1, 1), (4, 4)):
        before = policy.arrangement.threads
        machine.cores = cores
        machine.now_s += POLL_INTERVAL_S - 1
        assert policy.update().threads == before
        machine.now_s += 1
        assert policy.update().threads == threads
    assert [(one.before.threads, one.now.threads, one.reason) for one in machine.told] == [
        (4, 2, "cores"),
        (2, 1, "cores"),
        (1, 4, "cores"),
    ]


@pytest.mark.parametrize("options", [{"fixed": 4}, {"is_compiled": True}])
def test_fixed_or_compiled_threads_stay(options: dict[str, object]) -> None:
    """Whatever becomes of the cores."""
    machine = Machine(4)
    policy = machine.policy(SLOW_S, **options)
    machine.cores = 2
    machine.now_s += POLL_INTERVAL_S
    assert policy.update().threads == 4
    machine.is_busy = True
    machine.run(policy, batches=50)
    assert policy.together == policy.next_together(1.0) == 4
    assert machine.told == []


def test_measured_cost_of_images_decides() -> None:
    """A measurement at the start that was wrong is corrected; around the border nothing swings."""
    machine = Machine(4)
    policy = machine.policy(SLOW_S)

    def cost(core_s: float) -> bool:
        for _ in range(100):
            policy.record(core_s=core_s)
        machine.now_s += POLL_INTERVAL_S
        return policy.update().splits_batches

    border_s = fast_below_s(4)
    assert cost(border_s * 0.9)
    assert not cost(border_s * 0.7)
    assert not cost(border_s * 1.1)
    assert cost(border_s * 1.4)
    assert [one.reason for one in machine.told] == ["cost_of_an_image"] * 2


@pytest.mark.parametrize("cores", [2, 4, 16])
def test_delayed_threads_are_reduced(cores: int) -> None:
    """While other programs use the cores one thread works alone, and soon afterwards all of them again."""
    machine = Machine(cores)
    policy = machine.policy(SLOW_S)
    machine.run(policy, batches=60)
    assert policy.together == cores
    for is_busy, together in ((True, 1), (False, cores)):
        machine.is_busy = is_busy
        machine.run(policy, batches=200)
        assert policy.together == together
        assert machine.run(policy, batches=400) < 0.05
    assert {one.reason for one in machine.told} == {"faster"}
    assert len(machine.told) <= 8


def test_try_without_a_result_is_forgotten() -> None:
    """Its batch failed, or was none of the jobs'."""
    machine = Machine(2)
    policy = machine.policy(SLOW_S)
    policy.record(together=2, work=0.1, seconds=0.05)
    tried = [policy.next_together(0.1) for _ in range(2)]
    while tried[-1] != 1:
        policy.record(together=2, work=0.1, seconds=0.05)
        tried.append(policy.next_together(0.1))
    for _ in range(20):
        assert policy.next_together(0.1) == 2
        policy.record(together=2, work=0.1, seconds=0.05)
    machine.now_s += 60
    assert 1 in [policy.next_together(0.1) for _ in range(3)]
