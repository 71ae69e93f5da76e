"""What the launcher is told about the time that its workers need to end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shiwu_worker.config.settings import Settings
from shiwu_worker.launcher import start as module
from shiwu_worker.launcher.placement import Placement
from shiwu_worker.launcher.start import start_workers
from shiwu_worker.launcher.supervisor import RestartPolicy


@pytest.mark.parametrize(("redis_timeout_s", "after_grace_s"), [(5.0, 18.0), (20.0, 48.0), (0.5, 9.0)])
def test_workers_have_time_to_release_their_jobs(
    monkeypatch: pytest.MonkeyPatch, redis_timeout_s: float, after_grace_s: float
) -> None:
    """Two time-outs of Redis, 5 s for loaders and 3 s for traces, as the chart has it."""
    placements = [Placement(name, f"shiwu@{name}", frozenset({0}), {}) for name in ("cpu0", "cpu1")]
    monkeypatch.setattr(module, "plan_placements", lambda *_, **__: placements)
    made: list[tuple[list[str], RestartPolicy]] = []

    def supervisor(given: list[Placement], *, command: Any, restart_policy: RestartPolicy, **_: Any) -> Any:
        made.append((command(given[0]), restart_policy))
        return SimpleNamespace(run=lambda: 7)

    monkeypatch.setattr(module, "Supervisor", supervisor)
    settings = Settings(grace_s=30.0, redis_timeout_s=redis_timeout_s)
    code = start_workers(
        settings, gpus="cpu:0,cpu:1", per_gpu=1, run=pytest.fail, command=lambda **about: [str(about["drain_s"])]
    )
    assert code == 7
    [(command, policy)] = made
    assert (policy.drain_s, policy.after_grace_s) == (30.0 + after_grace_s, after_grace_s)
    assert command == [str(policy.drain_s)], "also where the launcher is killed"
