"""`shiwu-worker`: when this process is the worker, and which options are refused before the start."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner, Result

from shiwu_worker.__main__ import main
from shiwu_worker.errors import ExitCode
from shiwu_worker.runtime.nvidia import Gpu

NAMES = ("CUDA_VISIBLE_DEVICES", "SHIWU_DEVICE")


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs; a worker prints where it would run."""
    for name in [name for name in os.environ if name.startswith("SHIWU_")] + list(NAMES):
        monkeypatch.setenv(name, "")  # so that it is put back whatever is set here
        monkeypatch.delenv(name)
    gpus = [Gpu("gpu0", "GPU-a", 0, "GPU-a"), Gpu("gpu1", "GPU-b", 1, "GPU-b")]
    monkeypatch.setattr(
        "shiwu_worker.launcher.placement.find_gpus", lambda *, visible: gpus if visible is None else gpus[:1]
    )
    monkeypatch.setattr("shiwu_worker.telemetry.logs.set_up", lambda **_: None)

    def run(*, node: str, task_events: bool) -> None:
        values = [os.environ.get(name, "-") for name in NAMES]
        print(node.rpartition("-")[2], *values, task_events)  # noqa: T201 the test reads it

    monkeypatch.setattr("shiwu_worker.celery_worker.process.run", run)


def call(*args: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, args, catch_exceptions=False)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--gpus 1", "gpu1 GPU-b cuda False"),
        ("--gpus GPU-a -E", "gpu0 GPU-a cuda True"),
        ("--gpus cpu:0", "cpu0  cpu False"),
    ],
)
def test_one_chosen_gpu_runs_in_this_process(args: str, expected: str) -> None:
    """Pinned by its UUID."""
    assert call(*args.split()).output == f"{expected}\n"


def test_the_only_gpu_changes_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one GPU, or with SHIWU_DEVICE set, the process keeps its environment."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert call().output == "gpu0 0 - False\n"
    monkeypatch.setenv("SHIWU_DEVICE", "cuda:1")
    assert call().output.split()[1:] == ["0", "cuda:1", "False"]


@pytest.mark.parametrize("args", ["--gpus 2", "--gpus 0,0", "--gpus", "--per-gpu 0", "--gpus x --per-gpu 2"])
def test_wrong_option_starts_no_worker(args: str) -> None:
    """With the exit code for settings, or click's own for what is no option at all."""
    result = call(*args.split())
    assert result.exit_code in {ExitCode.CONFIG, 2}
    assert "False" not in result.output


def test_help_names_every_option_and_exit_code() -> None:
    """An operator need not look elsewhere."""
    text = call("--help").output
    for word in ("--check", "--tune", "--task-events", "--gpus", "--per-gpu", "cpu:0"):
        assert word in text
    for code in ExitCode:
        assert code is ExitCode.OK or f"{code:d} {code.name}" in text
