"""`bench compare`: what it says of results that are worse, missing, or measured on a loaded machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench import compare
from bench.machine import describe, is_loaded
from bench.report import loaded_note

MACHINE = {"cpu": "c", "cores": 2, "gpus": [], "load_before": 0.1, "was_loaded": False}


def write(folder: Path, name: str, *, machine: dict[str, Any] | None = None, **values: float | None) -> None:
    """Results with these figures, of which more is better."""
    folder.mkdir(exist_ok=True)
    headlines = {key: {"value": value, "unit": "jobs/s", "better": "more"} for key, value in values.items()}
    content = {"headlines": headlines, "machine": MACHINE | (machine or {})}
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A release with two benches, and a folder for new results."""
    write(tmp_path / "released", "fetch", a=100.0, b=50.0, c=None)
    write(tmp_path / "released", "messages-scale", a=100.0)
    (tmp_path / "out").mkdir()
    return tmp_path / "released", tmp_path / "out"


@pytest.mark.parametrize(("value", "code"), [(120.0, 0), (90.0, 0), (89.0, 1), (0.0, 1)])
def test_worse_figure_gives_exit_code_1(places: tuple[Path, Path], value: float, code: int) -> None:
    """By more than a tenth. A figure that the release has not is not missed."""
    released, out = places
    write(out, "fetch", a=value, b=50.0, d=1.0)
    write(out, "messages-scale", a=100.0)
    assert compare.run(released, out) == code


def test_missing_results_give_exit_code_2(places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A whole file, one figure, a figure without a value, and a release without results; each is named."""
    released, out = places
    assert compare.run(released, out) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "run `python -m bench fetch` first" in said
    assert "run `python -m bench messages --scale` first" in said
    write(out, "messages-scale", a=100.0)
    for values in ({"a": 100.0}, {"a": 100.0, "b": None}):
        write(out, "fetch", **values)
        assert compare.run(released, out) == 2
        assert "no figure 'b'" in " ".join(capsys.readouterr().out.split())
    assert compare.run(out / "none", out) == 2


def test_result_of_a_loaded_machine_gives_exit_code_2(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures say little, also where they are good. Released results of older versions have no such mark."""
    released, out = places
    write(out, "fetch", machine={"load_before": 3.5, "was_loaded": True}, a=100.0, b=50.0)
    write(out, "messages-scale", a=100.0)
    assert compare.run(released, out) == 2
    assert "load 3.5 before" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("load", "cores", "loaded"), [(0.5, 2, False), (0.51, 2, True), (0.3, 1, True), (2.0, 8, False)]
)
def test_load_is_judged_by_core(load: float, cores: int, *, loaded: bool) -> None:
    """A quarter of a core for each core."""
    assert is_loaded(load, cores) is loaded


def test_load_before_a_run_is_in_its_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was too high, before all other notes."""
    monkeypatch.setattr("os.getloadavg", lambda: (64.0, 0.0, 0.0))
    busy = describe()
    assert (busy.load_before, busy.was_loaded) == (64.0, True)
    assert loaded_note(busy)[0].startswith("NOT A MEASUREMENT: load 64.0")
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert loaded_note(describe()) == ()
