"""Runs the steps of a stage, each with a time limit, and writes what they found after each of them.

Imports the standard library only, because it runs before wheels are installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.card.plan import Step

ROOT: Final = Path(__file__).resolve().parents[2]
SITE: Final = ROOT / "build" / "card-site"
END_S: Final = {signal.SIGINT: 6.0, signal.SIGTERM: 4.0}
"""Time for a process to end after each signal. After the first one pytest prints which tests have failed until then."""
LAST_S: Final = 3.0
"""Time for a process to end after SIGKILL."""
MAX_LOG_CHARACTERS: Final = 1_000_000
"""Of one step: logs are brought back from a lent machine, in files of a limited size."""
BUSY_SAMPLE_S: Final = 0.5
REHEARSAL_FACTOR: Final = 4
"""A rehearsal may take so many times the limits: it runs on a CPU, often on a busy one."""
PR_SET_CHILD_SUBREAPER: Final = 36
TAIL_CHARACTERS: Final = 6_000
LOAD_BEFORE: Final = "BENCH_LOAD_BEFORE"
"""Environment variable with the load by other programs, which `bench.machine` reads."""
PASSED: Final = frozenset({"ok", "skipped"})


def install(wheels: Path, site: Path = SITE) -> None:
    """Install wheels into a folder of their own, unless a call before this one did.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    if site.is_dir():
        return
    unfinished = site.with_name(f"{site.name}.unfinished")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--upgrade", "--target", str(unfinished)]
    subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    _add_metadata(unfinished)
    unfinished.rename(site)


def _add_metadata(site: Path) -> None:
    """Name the project's version as an installation does: a worker asks for it. Its code is that of this tree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")


def environment(*, tiny: bool, site: Path = SITE) -> dict[str, str]:
    """The environment of the steps: the installed wheels and this tree, by absolute paths."""
    # A rehearsal must not use a GPU that others measure on.
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if tiny else {}
    paths = [site, ROOT, ROOT / "producer", ROOT / "worker"]
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([inherited] if inherited else [])]),
        "PATH": os.pathsep.join([str(site / "bin"), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        **own,
    }


def run_stage(
    name: str, steps: Sequence[Step], *, tiny: bool, out: Path, stage_s: float, is_resumed: bool = False
) -> bool:
    """Run the steps, write `card-NAME.json` and `card-NAME.log` into `out`, and return whether all passed.

    The JSON is written anew after each step, so that it holds what was found if the stage is killed. Steps of the stage
    that are not run now keep their results.

    Args:
        is_resumed: leave out steps that have passed before.
    """
    out.mkdir(parents=True, exist_ok=True)
    result = out / f"card-{name}.json"
    factor = REHEARSAL_FACTOR if tiny else 1
    ends_s = time.monotonic() + stage_s * factor
    found = results_of(result, tiny=tiny)
    passed = {step for step, each in found.items() if each["status"] in PASSED} if is_resumed else set()
    left = [step for step in steps if step.name not in passed]
    found = {step: each for step, each in found.items() if step not in {one.name for one in left}}
    load = str(round(busy_cores(), 2))
    ended_by = ""
    with (out / f"card-{name}.log").open("a", encoding="utf-8") as log:
        for step in left:
            left_s = ends_s - time.monotonic() - sum(END_S.values()) - LAST_S
            if ended_by:
                found[step.name] = {"status": "failed", "reason": f"not run, because {ended_by} failed"}
            elif left_s <= 1:
                found[step.name] = {"status": "failed", "reason": "no time was left in the stage"}
            else:
                limit_s = min(step.limit_s * factor, left_s)
                found[step.name] = run_step(step, tiny=tiny, limit_s=limit_s, log_to=log, load=load)
            status = found[step.name]
            if step.is_needed and status["status"] == "failed":
                ended_by = step.name
            print(f"{name} {step.name}: {status['status']}, {status.get('seconds', 0)} s", flush=True)
            text = json.dumps({"stage": name, "tiny": tiny, "steps": found}, indent=1, ensure_ascii=False)
            unfinished = result.with_suffix(".unfinished")
            unfinished.write_text(text + "\n", encoding="utf-8")
            unfinished.replace(result)
    return all(found[step.name]["status"] in PASSED for step in left)


def results_of(path: Path, *, tiny: bool) -> dict[str, Any]:
    """The steps of an earlier run of a stage; none where that was a rehearsal and this is not, or the other way."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(content["steps"]) if content["tiny"] == tiny else {}


def busy_cores() -> float:
    """Cores that other programs keep busy now. The load average would count the steps before this one too."""

    def spent() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    all_before, idle_before = spent()
    time.sleep(BUSY_SAMPLE_S)  # the sample itself
    all_after, idle_after = spent()
    total = max(1, all_after - all_before)
    return (total - (idle_after - idle_before)) / total * (os.cpu_count() or 1)


def run_step(step: Step, *, tiny: bool, limit_s: float, log_to: Any = None, load: str = "") -> dict[str, Any]:
    """Run one step and return its status, seconds, figures and the end of its output."""
    env = environment(tiny=tiny) | ({LOAD_BEFORE: load} if load else {})
    with tempfile.TemporaryDirectory(prefix="card-") as name, tempfile.TemporaryFile("w+", errors="replace") as output:
        folder = Path(name)
        began_s = time.monotonic()
        with _process(step.command(tiny, folder), output, env) as process:
            try:
                exit_code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                exit_code = None
        seconds = round(time.monotonic() - began_s, 1)
        output.seek(0)
        text = output.read()
        if log_to is not None:
            log_to.write(f"=== {step.name}\n{_shortened(text)}\n")
            log_to.flush()
        found: dict[str, Any] = {
            "status": "timed out" if exit_code is None else "failed" if exit_code else "ok",
            "exit_code": exit_code,
            "seconds": seconds,
            "limit_s": round(limit_s, 1),
            "figures": _figures(folder),
            "output_tail": text[-TAIL_CHARACTERS:],
        }
    reason = _skipped(found["figures"])
    return found | {"status": "skipped", "reason": reason} if reason and not exit_code else found


def _shortened(text: str) -> str:
    """The beginning and the end of a text that is too long."""
    half = MAX_LOG_CHARACTERS // 2
    return text if len(text) <= MAX_LOG_CHARACTERS else f"{text[:half]}\n…\n{text[-half:]}"


def _figures(folder: Path) -> Mapping[str, Any]:
    """All JSON files of a step: name → content."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found[path.stem] = "not written to its end"
    return found


def _skipped(figures: Mapping[str, Any]) -> str | None:
    """Why a step measured nothing; None where it measured something."""
    measures = figures.get("figures")
    if not isinstance(measures, dict) or not measures:
        return None
    reasons = [value for value in measures.values() if isinstance(value, str) and value.startswith("skipped: ")]
    return reasons[0].removeprefix("skipped: ") if len(reasons) == len(measures) else None


def adopt_descendants() -> None:
    """Become the parent of processes whose parent ends, so that those of a killed step are found and end too."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextlib.contextmanager
def _process(command: Sequence[str], output: Any, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process; at the end all that it started is killed, also in sessions of their own."""
    before = _descendants(os.getpid())
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        family = _descendants(process.pid)
        for number, seconds in END_S.items():
            if process.poll() is None:
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
        # Those that were started meanwhile have this process as their parent, if it adopts them.
        for pid in (family | _descendants(os.getpid())) - before - {process.pid}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a hung GPU never ends
            process.wait(LAST_S)


def _descendants(pid: int) -> set[int]:
    """All processes below this one."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
    found: set[int] = set()
    left = {pid}
    while left:
        left = {child for child, parent in parents.items() if parent in left} - found
        found |= left
    return found
