"""A tuning is taken where it was made, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from shiwu_worker.commands import tune
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.tuned import Tuned, apply_tuning
from shiwu_worker.stages.decode.image_spec import ImageSpec


def measured(seconds: dict[int, float], *, largest: int) -> SimpleNamespace:
    """A model whose batches take so long, which has measured all of them."""
    sizes = SimpleNamespace(largest=largest, seconds=lambda: seconds)
    return SimpleNamespace(sizes=sizes, measured=tuple(seconds), threads=2)


def tuned(settings: Settings, **changes: object) -> Tuned:
    """What a machine that takes 100 pictures a second in batches of 4 would find."""
    encoder = measured({1: 0.02, 4: 0.04}, largest=4)
    return tune.choose(settings, encoder, 0.002, "rev").model_copy(update=changes)


def test_a_tuning_fills_what_nobody_has_set(tmp_path: Path) -> None:
    """The file's values stand in for zeros; what the operator says stays."""
    path = tmp_path / "tune.json"
    settings = Settings(tune_file=path, loaders=7)
    assert apply_tuning(settings, lambda: "rev") == settings, "no file yet"
    path.write_text(tuned(settings, torch_threads=3).model_dump_json())
    found = apply_tuning(settings, lambda: "rev")
    assert (found.max_batch, found.torch_threads, found.loaders) == (4, 3, 7)


OTHERS = '{"key": ["other"], "max_batch": 1, "torch_threads": 1, "loaders": 1}'


@pytest.mark.parametrize("text", ["", "{}", "[1]", OTHERS])
def test_a_file_that_says_nothing_here_is_passed_over(tmp_path: Path, text: str) -> None:
    """Unreadable, or of another machine, model or version."""
    path = tmp_path / "tune.json"
    path.write_text(text)
    settings = Settings(tune_file=path)
    assert apply_tuning(settings, lambda: "rev") == settings
    path.write_text(tuned(settings).model_dump_json())
    assert apply_tuning(settings, lambda: "another model") == settings


def test_loaders_follow_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick model needs more of them, and the worker keeps a core."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    settings = Settings()
    quick = measured({64: 0.01}, largest=64)
    slow = measured({1: 0.2}, largest=1)
    assert tune.choose(settings, quick, 0.0015, "rev").loaders == 12
    assert tune.choose(settings, slow, 0.0015, "rev").loaders == 1
    assert tune.choose(settings, quick, 0.1, "rev").loaders == 15


def test_decoding_is_measured() -> None:
    """Some milliseconds of a core."""
    spec = ImageSpec(224, 224, "squash", None, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert 0.0001 < tune.decode_core_s(spec) < 0.5


def run_tune(monkeypatch: pytest.MonkeyPatch, **options: str) -> tuple[int, list[str]]:
    """`shiwu-worker --tune` of a machine that is measured already; its exit code, and what came before measuring."""
    done: list[str] = []
    encoder = measured({1: 0.02, 4: 0.04}, largest=4)
    encoder.info = SimpleNamespace(id="m", dtype="float32", device="cpu")
    for name, value in options.items():
        monkeypatch.setenv(f"SHIWU_{name.upper()}", value)
    monkeypatch.setattr(tune, "load_encoder", lambda *_, is_thorough: done.append("measured") or encoder)
    monkeypatch.setattr(tune, "decode_core_s", lambda _: 0.002)
    return tune.run_tune(), done


def test_tune_says_first_that_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And prints the settings as lines of an environment."""
    assert run_tune(monkeypatch) == (0, ["measured"])
    told = capsys.readouterr()
    assert "SHIWU_TUNE_FILE is not set: the result is printed, and no file keeps it." in told.err
    lines = told.out.splitlines()
    assert "SHIWU_MAX_BATCH=4" in lines
    assert (
        lines[-1] == "set these in the environment of the workers of this machine, or run --tune with SHIWU_TUNE_FILE"
    )


def test_tune_refuses_a_file_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A folder that is missing; where the file can be written, it is."""
    assert run_tune(monkeypatch, tune_file=str(tmp_path / "none" / "tune.json")) == (64, [])
    assert "SHIWU_TUNE_FILE: expected a file in a folder that exists" in capsys.readouterr().err
    path = tmp_path / "tune.json"
    assert run_tune(monkeypatch, tune_file=str(path)) == (0, ["measured"])
    assert Tuned.model_validate_json(path.read_bytes()).max_batch == 4
