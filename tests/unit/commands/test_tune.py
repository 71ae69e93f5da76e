"""The result of --tune applies to the machine, model and versions that it was measured with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from shiwu_worker.commands import tune
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.tuned import Tuned, apply_tuning
from shiwu_worker.launcher.placement import plan_placements
from shiwu_worker.stages.decode.image_spec import ImageSpec
from tests.support.fake_nvml import FakeGpu, FakeNvml


def measured(seconds: dict[int, float], *, largest: int) -> SimpleNamespace:
    """A model whose batches of all sizes take these times."""
    policy = SimpleNamespace(largest=largest, seconds=lambda: seconds)
    return SimpleNamespace(size_policy=policy, timed_sizes=tuple(seconds), threads=2)


def tuned(settings: Settings, **changes: object) -> Tuned:
    """The result of a machine that encodes 100 images a second in batches of 4."""
    encoder = measured({1: 0.02, 4: 0.04}, largest=4)
    return tune.choose(settings, encoder, 0.002, "rev").model_copy(update=changes)


def test_tune_file_replaces_unset_settings(tmp_path: Path) -> None:
    """Values of the file replace zeros; those of the operator stay."""
    path = tmp_path / "tune.json"
    settings = Settings(tune_file=path, loaders=7)
    assert apply_tuning(settings, lambda: "rev") == settings, "no file yet"
    path.write_text(tuned(settings, torch_threads=3).model_dump_json())
    found = apply_tuning(settings, lambda: "rev")
    assert (found.max_batch, found.torch_threads, found.loaders) == (4, 3, 7)


@pytest.mark.parametrize("name", ["none", "x" * 300, "a_file/tune.json"])
def test_tune_file_that_cannot_be_there_changes_nothing(tmp_path: Path, name: str) -> None:
    """A worker starts without it, whatever the system says of its path."""
    (tmp_path / "a_file").touch()
    settings = Settings(tune_file=tmp_path / name)
    assert apply_tuning(settings, lambda: pytest.fail("expected no file")) == settings


OTHER_MACHINE = '{"key": ["other"], "max_batch": 1, "torch_threads": 1, "loaders": 1}'


@pytest.mark.parametrize("text", ["", "{}", "[1]", OTHER_MACHINE])
def test_tune_file_of_another_machine_is_ignored(tmp_path: Path, text: str) -> None:
    """Unreadable, or of another machine, model or version."""
    path = tmp_path / "tune.json"
    path.write_text(text)
    settings = Settings(tune_file=path)
    assert apply_tuning(settings, lambda: "rev") == settings
    path.write_text(tuned(settings).model_dump_json())
    assert apply_tuning(settings, lambda: "another model") == settings


def test_tune_file_is_valid_in_a_new_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host name and another GPU of the same model; a newer driver or another model needs a new measurement."""
    nvml = FakeNvml(gpus=[FakeGpu("GPU-a")])
    nvml.install(monkeypatch)
    path = tmp_path / "tune.json"
    settings = Settings(tune_file=path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    path.write_text(tuned(settings).model_dump_json())
    monkeypatch.setattr("socket.gethostname", lambda: "another-pod")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    nvml.gpus = [FakeGpu("GPU-b")]
    assert apply_tuning(settings, lambda: "rev").max_batch == 4
    nvml.gpus = [FakeGpu("GPU-c", instances=["MIG-c1"])]
    assert apply_tuning(settings, lambda: "rev") == settings
    nvml.gpus = []
    assert apply_tuning(settings, lambda: "rev") == settings


def test_tune_file_is_valid_for_workers_of_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured with `auto`; the launcher chooses the GPU and says `cuda`."""
    nvml = FakeNvml(gpus=[FakeGpu("GPU-a"), FakeGpu("GPU-b")])
    nvml.install(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = tmp_path / "tune.json"
    path.write_text(tuned(Settings(tune_file=path)).model_dump_json())
    for placement in plan_placements(Settings(tune_file=path), asked="all", per_gpu=1):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", placement.environment["CUDA_VISIBLE_DEVICES"])
        launched = Settings.model_validate({"tune_file": path, "device": placement.environment["SHIWU_DEVICE"]})
        assert apply_tuning(launched, lambda: "rev").max_batch == 4
    on_a_cpu = Settings(tune_file=path, device="cpu")
    assert apply_tuning(on_a_cpu, lambda: "rev") == on_a_cpu


def test_tuned_loaders_follow_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast model needs more loaders, and one core is left for the worker."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    settings = Settings()
    quick = measured({64: 0.01}, largest=64)
    slow = measured({1: 0.2}, largest=1)
    assert tune.choose(settings, quick, 0.0015, "rev").loaders == 12
    assert tune.choose(settings, slow, 0.0015, "rev").loaders == 1
    assert tune.choose(settings, quick, 0.1, "rev").loaders == 15


def test_decode_time_is_measured() -> None:
    """A JPEG takes some milliseconds of a core."""
    spec = ImageSpec(224, 224, "squash", None, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert 0.0001 < tune.decode_core_s(spec) < 0.5


def run_tune(monkeypatch: pytest.MonkeyPatch, **options: str) -> tuple[int, list[str]]:
    """Run `shiwu-worker --tune` with a model that is measured already; return the exit code and the calls."""
    done: list[str] = []
    encoder = measured({1: 0.02, 4: 0.04}, largest=4)
    encoder.info = SimpleNamespace(id="m", dtype="float32", device="cpu")
    for name, value in options.items():
        monkeypatch.setenv(f"SHIWU_{name.upper()}", value)
    monkeypatch.setattr(tune, "load_encoder", lambda *_, is_thorough: done.append("measured") or encoder)
    monkeypatch.setattr(tune, "decode_core_s", lambda _: 0.002)
    return tune.run_tune(), done


def test_tune_without_a_file_says_so_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the settings as lines of an environment file."""
    assert run_tune(monkeypatch) == (0, ["measured"])
    output = capsys.readouterr()
    assert "SHIWU_TUNE_FILE is not set: the result is only printed." in output.err
    lines = output.out.splitlines()
    assert "SHIWU_MAX_BATCH=4" in lines
    assert (
        lines[-1] == "set these in the environment of the workers of this machine, or run --tune with SHIWU_TUNE_FILE"
    )


def test_tune_refuses_a_file_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Because its folder is missing. A file that can be written is written."""
    assert run_tune(monkeypatch, tune_file=str(tmp_path / "none" / "tune.json")) == (64, [])
    assert "SHIWU_TUNE_FILE: expected a file in a folder that exists" in capsys.readouterr().err
    path = tmp_path / "tune.json"
    assert run_tune(monkeypatch, tune_file=str(path)) == (0, ["measured"])
    assert Tuned.model_validate_json(path.read_bytes()).max_batch == 4
