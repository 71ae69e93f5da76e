"""The chart's autoscaling: its arithmetic as an HPA does it, and a small backlog through real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench.autoscaler import Autoscaler, Rules
from bench.scaling_report import windows_of

from tests.support.chart import Helm, of_kind, tool
from tests.support.processes import ROOT, clean_environment


def scaler(**keda: object) -> Autoscaler:
    """By the chart: 1000 jobs a worker, 0 to 8 workers."""
    asked = {"enabled": True, "maxReplicas": 8, "cooldownS": 60, "scaleDownWindowS": 30, **keda}
    values = {"redis": {"host": "r"}, "autoscaling": {"keda": asked}}
    return Autoscaler(Rules.read(of_kind(Helm(tool("helm4")).render(values), "ScaledObject")), sync_s=15)


def test_scale_up_from_zero() -> None:
    """KEDA starts one worker, the HPA adds four at a time."""
    autoscaler = scaler()
    assert autoscaler.decide(0, now_s=0) == 0
    assert [autoscaler.decide(100_000, now_s=now_s) for now_s in (5, 10, 20, 25, 35)] == [1, 1, 5, 5, 8]


def test_claimed_jobs_keep_their_worker() -> None:
    """While one job is claimed the last worker is not ended, for any time."""
    autoscaler = scaler()
    assert {autoscaler.decide(1, now_s=float(now_s)) for now_s in range(0, 3600, 5)} == {1}
    assert autoscaler.decide(0, now_s=3600) == 1, "its cooldown has only begun"
    assert autoscaler.decide(0, now_s=3655) == 0


def test_scale_down_follows_the_highest_value_of_the_window() -> None:
    autoscaler = scaler()
    for now_s in (0, 15, 30):
        autoscaler.decide(8000, now_s=now_s)
    assert autoscaler.wanted == 8
    assert [autoscaler.decide(1000, now_s=now_s) for now_s in (45, 60, 75)] == [8, 8, 1]


def test_small_difference_changes_nothing() -> None:
    autoscaler = scaler()
    autoscaler.decide(1000, now_s=0)
    assert autoscaler.decide(1090, now_s=15) == 1
    assert autoscaler.decide(1110, now_s=30) == 2


def test_replicas_never_fall_below_the_minimum() -> None:
    autoscaler = scaler(minReplicas=2)
    assert autoscaler.decide(5, now_s=0) == 2
    assert autoscaler.decide(0, now_s=9999) == 2


def test_formula_that_is_not_a_sum_is_refused() -> None:
    values = {"redis": {"host": "r"}, "autoscaling": {"keda": {"enabled": True}}}
    scaled = of_kind(Helm(tool("helm4")).render(values), "ScaledObject")
    scaled["spec"]["advanced"]["scalingModifiers"]["formula"] = "__import__('os')"
    with pytest.raises(ValueError, match="expected a sum of"):
        Rules.read(scaled)


def test_windows_with_few_answers_join_the_last() -> None:
    took = [(0.1 * number, float(number)) for number in range(205)]
    found = windows_of(took, width_s=10)
    assert [window.answers for window in found] == [100, 105]
    assert found[0].p50_ms == 49.5


def test_backlog_scales_up_and_down(tmp_path: Path) -> None:
    """`python -m bench scaling --quick`: each job once, workers from none to three to none, interactive ones quick."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "scaling", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))["figures"]
    assert (found["lost"], found["twice"], found["most_ready"]) == (0, 0, 3)
    assert found["jobs"] > 2500
    assert (found["samples"][0]["ready"], found["samples"][-1]["ready"]) == (0, 0)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    # On a machine full of tests a stand-in may be late; the measured figures stand in docs/operations.md.
    assert sorted(window["p50_ms"] for window in found["windows"])[len(found["windows"]) // 2] < 1000
