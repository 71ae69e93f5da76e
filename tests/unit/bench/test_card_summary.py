"""What the summary of the GPU stages says of figures that meet a floor, miss it, or are not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.card import summary
from bench.card.floors import FAULTS, floors
from bench.card.plan import STAGES

OK = {"status": "ok", "exit_code": 0, "seconds": 1.0}


def encode(best: float, one_ms: float, *, dtype: str = "float16") -> dict[str, Any]:
    """A result of `bench encode`."""
    sizes = [
        {"size": 1, "batch_ms": one_ms, "per_second": 900.0},
        {"size": 128, "batch_ms": 10.0, "per_second": best},
    ]
    way = {"dtype": dtype, "mode": "graphs", "rungs": sizes, "matrix_share": [0.05, 0.6]}
    return OK | {"figures": {"encode": {"headlines": {}, "figures": {"ways": [way]}}}}


def service(rate: float) -> dict[str, Any]:
    """A result of `bench service` with 12 loaders."""
    content = {
        "figures": {"rows": [{"per_second": rate}]},
        "settings": {"pictures": {"worker_settings": ["max_batch=256", "loaders=12"]}},
        "headlines": {"shiwu": {"name": "shiwu", "value": rate, "unit": "pictures/s"}},
    }
    return OK | {"figures": {"service": content}}


def figures(**measures: Any) -> dict[str, Any]:
    """A result of a step of `bench.card`."""
    return OK | {"figures": {"figures": measures}}


def good() -> dict[str, dict[str, Any]]:
    """Results with which all floors are met."""
    played = {"schedules": {"schedules": 20_000}, "schedules of large batches": {"schedules": 300}}
    decoding = {"12 processes, images/s": 9_000.0, "16 processes, images/s": 11_000.0}
    steps = {
        "vit-b-16": encode(12_000.0, 1.0),
        "http": service(8_100.0),
        "decoding": figures(**decoding),
        "race": figures(**played),
    }
    return steps | {name: dict(OK) for name in FAULTS}


def write(folder: Path, steps: dict[str, Any], *, stage: str = "floors", tiny: bool = False) -> Path:
    """The file of a stage."""
    folder.mkdir(exist_ok=True)
    text = json.dumps({"stage": stage, "tiny": tiny, "steps": steps})
    (folder / f"card-{stage}.json").write_text(text, encoding="utf-8")
    return folder


def test_good_figures_meet_all_floors() -> None:
    """The floors themselves included; the ceiling of decoding is that of the loaders, not of all cores."""
    assert {floor.outcome for floor in floors(good())} == {"met"}


@pytest.mark.parametrize(
    ("name", "step", "outcome"),
    [
        ("vit-b-16", encode(11_999.0, 1.0), "MISSED"),
        ("vit-b-16", encode(12_000.0, 1.01), "MISSED"),
        ("vit-b-16", encode(12_000.0, 1.0, dtype="float32"), "not shown"),
        ("http", service(8_099.0), "MISSED"),
        ("http", {"status": "timed out", "exit_code": None, "figures": {}}, "not shown"),
        ("decoding", figures(**{"12 processes, images/s": {"error": "x"}}), "not shown"),
        ("race", figures(schedules={"schedules": 19_999}), "not shown"),
        ("race", figures(schedules={"error": "AssertionError: other bits"}), "MISSED"),
        ("assert", {"status": "failed", "exit_code": 1}, "MISSED"),
        ("assert", {"status": "timed out", "exit_code": None}, "MISSED"),
        ("assert", {"status": "skipped", "exit_code": 0}, "not shown"),
        ("assert", {"status": "failed", "reason": "no time was left in the stage"}, "not shown"),
    ],
)
def test_figure_below_its_floor_is_missed(name: str, step: dict[str, Any], outcome: str) -> None:
    """And one that was not measured is not shown, which is no success."""
    assert outcome in {floor.outcome for floor in floors(good() | {name: step})}


def test_nothing_is_shown_without_results() -> None:
    """Of each floor."""
    assert {floor.outcome for floor in floors({})} == {"not shown"}


def test_floors_speak_of_steps_that_exist() -> None:
    """A step that was renamed would never be shown."""
    names = {step.name for steps in STAGES.values() for step in steps}
    assert names >= {"facts", "variants", *good(), *summary.MODELS, *summary.RELEASED.values()}


def test_result_that_passed_is_kept_over_a_later_failure(tmp_path: Path) -> None:
    """A stage that was run again on another day may have broken off."""
    failed = {"http": {"status": "failed", "exit_code": 1}, "race": {"status": "failed", "exit_code": 1}}
    folders = [write(tmp_path / "a", {"http": service(1.0)}), write(tmp_path / "b", failed)]
    steps, is_rehearsal = summary.read(folders)
    assert (steps["http"]["status"], steps["race"]["status"], is_rehearsal) == ("ok", "failed", False)


def test_page_has_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tables; and the benchmarks' own results are kept."""
    variants = {"graphs": {"start_s": 9.0, "images/s": {"1": 950.0}, "cosine to FP32, worst": 0.99999}}
    facts = {
        "machine": {"gpus": ["NVIDIA H200"], "cpu": "c", "cores": 16},
        "versions": {"python": "3.12"},
        "torch": {"version": "2.11"},
    }
    more = {"facts": figures(**facts), "variants": figures(**variants), "jpeg": {"status": "timed out"}}
    write(tmp_path, good() | more)
    target = tmp_path / "kept"
    monkeypatch.setattr(sys, "argv", ["summary", str(tmp_path), "--released", str(target)])
    assert summary.main() == 0
    text = capsys.readouterr().out
    for expected in (
        "NVIDIA H200; c, 16 cores",
        "| 12,000 |",
        "1: 950",
        "- jpeg: timed out",
        "| http | shiwu | 8,100 ",
    ):
        assert expected in text
    assert sorted(path.name for path in target.iterdir()) == ["encode.json", "service.json"]


def test_rehearsal_is_never_released(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures are those of a small model on a CPU."""
    write(tmp_path, good(), tiny=True)
    monkeypatch.setattr(sys, "argv", ["summary", str(tmp_path), "--released", str(tmp_path / "kept")])
    assert summary.main() == 2
    assert "A REHEARSAL" in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()


def test_missed_floor_gives_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is not shown."""
    write(tmp_path, {name: step for name, step in good().items() if name != "race"})
    monkeypatch.setattr(sys, "argv", ["summary", str(tmp_path)])
    assert summary.main() == 1
