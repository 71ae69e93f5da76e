"""How the supervisor handles each way in which a worker ends; the workers are shell commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from shiwu_worker.errors import ExitCode
from shiwu_worker.health.probe_files import ProbeFiles
from shiwu_worker.launcher.placement import Placement
from shiwu_worker.launcher.supervisor import RestartPolicy, Supervisor, WorkerProcess
from tests.support.family import lives
from tests.support.waiting import wait_until

STAY = "exec sleep 60"
NO_FILES = ProbeFiles(ready_file=None, alive_file=None)


def place(name: str, *, gpu_uuid: str | None = None, **options: Path) -> Placement:
    """A placement with only a name."""
    return Placement(name, f"shiwu@{name}", frozenset({0}), {"PLACE": name}, gpu_uuid=gpu_uuid, **options)


def launch(*scripts: str, drain_s: float = 10.0, has_files: bool = False, **limits_s: float) -> int:
    """Run one shell script for each worker until all have exited; return the exit code."""
    places = [place(f"gpu{number}") for number in range(len(scripts))]
    commands = {one.name: ["sh", "-c", script] for one, script in zip(places, scripts, strict=True)}
    limits = RestartPolicy(**{"drain_s": drain_s, "first_pause_s": 0.01, "max_crashes": 4, **limits_s})  # type: ignore[arg-type]  # floats
    return Supervisor(
        places,
        command=lambda one: commands[one.name],
        restart_policy=limits,
        probe_files=NO_FILES,
        has_files=has_files,
    ).run()


def test_worker_that_exits_with_0_is_not_restarted(tmp_path: Path) -> None:
    """When all have exited with 0, the launcher exits with 0."""
    assert launch(f"echo x >> {tmp_path}/a", f"echo x >> {tmp_path}/b; sleep 0.1") == ExitCode.OK
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["x\n", "x\n"]


def test_wrong_settings_stop_all_workers(tmp_path: Path) -> None:
    """A restarted worker would read the same settings."""
    assert launch(f"echo x >> {tmp_path}/a; exit {ExitCode.CONFIG:d}", STAY) == ExitCode.CONFIG
    assert (tmp_path / "a").read_text() == "x\n"


@pytest.mark.parametrize("end", ["exit 67", "exit 1", "kill -KILL $$", "kill -SEGV $$"])
def test_workers_that_all_keep_crashing_stop_the_launcher(end: str) -> None:
    """After restarts with growing pauses; the exit code is GAVE_UP."""
    with capture_logs() as lines:
        assert launch(end) == ExitCode.GAVE_UP
    assert [line["restart_in_s"] for line in lines if line["event"] == "worker_crashed"] == [0.01, 0.02, 0.04]
    assert [line["worker"] for line in lines if line["event"] == "restarts_exhausted"] == ["gpu0"]


def test_worker_that_keeps_crashing_is_retired(tmp_path: Path) -> None:
    """The others go on; it is tried again after a long pause, and stays if it works then."""
    heals = f"echo x >> {tmp_path}/a; [ $(wc -l < {tmp_path}/a) -gt 6 ] && exit 0; exit 67"
    stays = f"until [ $(wc -l < {tmp_path}/a) -gt 6 ]; do sleep 0.02; done"
    with capture_logs() as lines:
        assert launch(heals, stays, retired_s=0.05) == ExitCode.OK
    retired = [(line["worker"], line["workers_left"]) for line in lines if line["event"] == "worker_retired"]
    assert retired == [("gpu0", 1)] * 3, "after four crashes, and after each further try that fails"


def test_machine_with_a_retired_worker_is_not_ready(tmp_path: Path) -> None:
    """An orchestrator and its operators see that a GPU is missing."""
    places = [place(name, ready_file=tmp_path / f"r.{name}") for name in ("gpu0", "gpu1")]
    commands = {
        "gpu0": ["sh", "-c", f"touch {tmp_path}/r.gpu0; sleep 0.2; exit 67"],
        "gpu1": ["sh", "-c", f"touch {tmp_path}/r.gpu1; until [ -e {tmp_path}/retired ]; do sleep 0.02; done"],
    }
    ready = tmp_path / "r"
    supervisor = Supervisor(
        places,
        command=lambda one: commands[one.name],
        restart_policy=RestartPolicy(drain_s=10.0, first_pause_s=0.01, max_crashes=1, retired_s=0.5),
        probe_files=ProbeFiles(ready_file=ready, alive_file=None),
    )
    seen: list[bool] = []

    def note(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if line["event"] == "worker_retired":
            seen.append(ready.exists())
            supervisor._update_probe_files()  # the next round would do it
            seen.append(ready.exists())
            (tmp_path / "retired").touch()
            supervisor._shut_down(ExitCode.OK)
        return line

    with capture_logs(processors=[note]):
        assert supervisor.run() == ExitCode.OK
    assert seen[-1] is False


def test_broken_gpu_retires_its_worker_at_the_first_crash() -> None:
    """Only after an exit for the device's sake, and with the reason that the driver gives."""
    places = [place("gpu0", gpu_uuid="GPU-a"), place("gpu1", gpu_uuid="GPU-b")]
    commands = {"gpu0": ["sh", "-c", "exit 67"], "gpu1": ["sh", "-c", "sleep 0.5"]}
    asked: list[str] = []

    def fault_of(uuid: str) -> str:
        asked.append(uuid)
        return "it has to be reset"

    supervisor = Supervisor(
        places,
        command=lambda one: commands[one.name],
        restart_policy=RestartPolicy(drain_s=10.0, retired_s=0.2),
        probe_files=NO_FILES,
        fault_of=fault_of,
    )
    with capture_logs() as lines:
        supervisor.run()
    faults = [line["gpu_fault"] for line in lines if line["event"] == "worker_retired"]
    assert faults[0] == "it has to be reset"
    assert set(asked) == {"GPU-a"}
    assert not [line for line in lines if line["event"] == "worker_crashed"]


def test_worker_that_hangs_is_killed_and_its_gpu_asked(tmp_path: Path) -> None:
    """As in a call of a driver that never returns. A worker that starts has not touched its file, and is left alone."""
    places = [place(f"gpu{n}", gpu_uuid=f"GPU-{n}", alive_file=tmp_path / f"a.gpu{n}") for n in range(3)]
    until_retired = f"until [ -e {tmp_path}/retired ]; do"
    commands = {
        "gpu0": f"trap '' TERM; touch {tmp_path}/a.gpu0; {STAY}",
        "gpu1": f"{until_retired} touch {tmp_path}/a.gpu1; sleep 0.02; done",
        "gpu2": f"{until_retired} sleep 0.02; done",
    }

    def fault_of(uuid: str) -> str:
        (tmp_path / "retired").touch()
        return f"{uuid} has to be reset"

    supervisor = Supervisor(
        places,
        command=lambda one: ["sh", "-c", commands[one.name]],
        restart_policy=RestartPolicy(drain_s=10.0, hung_after_s=1.2, retired_s=60.0),
        probe_files=NO_FILES,
        fault_of=fault_of,
    )

    def end(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if line["event"] == "worker_retired":
            supervisor._shut_down(ExitCode.OK)
        return line

    with capture_logs(processors=[end]) as lines:
        assert supervisor.run() == ExitCode.OK
    assert [line["worker"] for line in lines if line["event"] == "worker_hung"] == ["gpu0"]
    [retired] = [line for line in lines if line["event"] == "worker_retired"]
    assert (retired["reason"], retired["gpu_fault"]) == ("SIGKILL", "GPU-0 has to be reset")


def test_pause_of_the_machine_counts_as_no_hang(tmp_path: Path) -> None:
    """Nor does a clock that is set: only what the launcher itself has seen pass counts, up to two seconds at a time."""
    policy = RestartPolicy(drain_s=1.0, hung_after_s=3.0)
    worker = WorkerProcess(place("gpu0", alive_file=tmp_path / "alive"), ["true"])
    (tmp_path / "alive").touch()
    assert not worker.kill_if_hung(1000.0, policy), "seen for the first time"
    assert not worker.kill_if_hung(1000.0, policy)
    os.utime(tmp_path / "alive", (1.0, 1.0))
    assert [worker.kill_if_hung(1.0, policy) for _ in range(5)] == [False, False, False, True, False]


def test_restart_pause_has_a_limit() -> None:
    """The doubling ends at the limit."""
    with capture_logs() as lines:
        assert launch("exit 1", longest_pause_s=0.015) == ExitCode.GAVE_UP
    assert [line["restart_in_s"] for line in lines if line["event"] == "worker_crashed"] == [0.01, 0.015, 0.015]


def test_no_worker_is_started_during_the_shutdown(tmp_path: Path) -> None:
    """A worker that waits for its restart is not started."""
    started_s = time.monotonic()
    dies = f"echo x >> {tmp_path}/a; exit 67"
    ends = f"until [ -s {tmp_path}/a ]; do sleep 0.02; done; sleep 0.3; exit {ExitCode.CONFIG:d}"
    assert launch(dies, ends, first_pause_s=30.0) == ExitCode.CONFIG
    assert time.monotonic() - started_s < 20
    assert (tmp_path / "a").read_text() == "x\n"


def test_stable_worker_starts_a_new_crash_count(tmp_path: Path) -> None:
    """Ten crashes, each after a long run, do not stop the launcher."""
    script = f"echo x >> {tmp_path}/a; sleep 0.05; [ $(wc -l < {tmp_path}/a) -ge 10 ] || exit 67"
    assert launch(script, stable_after_s=0.04) == ExitCode.OK
    assert launch("sleep 0.05; exit 67", stable_after_s=5.0) == ExitCode.GAVE_UP


def test_command_that_does_not_start_counts_as_crash() -> None:
    """The launcher gives up after as many tries."""
    limits = RestartPolicy(drain_s=1, first_pause_s=0.01, max_crashes=3)
    launcher = Supervisor([place("gpu0")], command=lambda _: ["/no/such"], restart_policy=limits, probe_files=NO_FILES)
    assert launcher.run() == ExitCode.GAVE_UP


@pytest.mark.parametrize("number", ["TERM", "INT", "HUP"])
def test_signal_is_passed_on_and_draining_awaited(tmp_path: Path, number: str) -> None:
    """Every worker gets SIGTERM. The exit of one without handlers counts as 0, because it holds no job."""
    drains = (
        f"trap 'sleep 0.2; echo done > {tmp_path}/a; exit 0' TERM; kill -{number} $PPID; while :; do sleep 0.02; done"
    )
    assert launch(drains, STAY) == ExitCode.OK
    assert (tmp_path / "a").read_text() == "done\n"


def test_hangup_is_passed_on_where_workers_read_files_again(tmp_path: Path) -> None:
    """It then stops neither the launcher nor a worker."""
    reads = (
        f"trap 'echo read > {tmp_path}/a; kill -TERM $PPID' HUP; trap 'exit 0' TERM; kill -HUP $PPID; "
        "while :; do sleep 0.02; done"
    )
    assert launch(reads, has_files=True) == ExitCode.OK
    assert (tmp_path / "a").read_text() == "read\n"


def test_failure_while_draining_gives_its_exit_code() -> None:
    """No worker is started, and the launcher exits with that code."""
    fails = "trap 'exit 67' TERM; kill -TERM $PPID; while :; do sleep 0.02; done"
    assert launch(fails, STAY) == ExitCode.DEVICE


@pytest.mark.parametrize("end", ["kill -SEGV $$", "kill -KILL $$"])
def test_signal_while_draining_counts_as_overdue(end: str) -> None:
    """A worker that was killed has no exit code of its own, and an exit status is never negative."""
    fails = f"trap '{end}' TERM; kill -TERM $PPID; while :; do sleep 0.02; done"
    assert launch(fails) == ExitCode.OVERDUE


def test_first_reason_to_exit_stays_the_exit_code(tmp_path: Path) -> None:
    """A worker that fails while it drains does not hide why the launcher stopped."""
    fails = f"trap 'exit {ExitCode.DEVICE:d}' TERM; touch {tmp_path}/a; while :; do sleep 0.02; done"
    stops = f"until [ -e {tmp_path}/a ]; do sleep 0.02; done; exit {ExitCode.CONFIG:d}"
    assert launch(fails, stops) == ExitCode.CONFIG


def test_worker_that_does_not_drain_is_killed() -> None:
    """After the limit and not before."""
    started_s = time.monotonic()
    assert launch("trap '' TERM; kill -TERM $PPID; exec sleep 60", drain_s=0.5) == ExitCode.OVERDUE
    assert 0.5 <= time.monotonic() - started_s < 20


def test_second_signal_reaches_the_workers(tmp_path: Path) -> None:
    """As a second SIGTERM, which makes a worker release its jobs."""
    script = (
        "n=0; trap 'n=$((n+1)); [ $n = 2 ] && exit 0; kill -INT $PPID' TERM; kill -TERM $PPID;"
        "while :; do sleep 0.02; done"
    )
    assert launch(script) == ExitCode.OK


def test_probe_files_combine_all_workers(tmp_path: Path) -> None:
    """Ready while all workers are; touched when the slowest was; files of a crashed worker are removed."""
    places = [
        place(name, ready_file=tmp_path / f"r.{name}", alive_file=tmp_path / f"a.{name}") for name in ("gpu0", "gpu1")
    ]
    (tmp_path / "r").touch()
    (tmp_path / "r.gpu0").touch()
    # gpu1 becomes ready last, then says what the launcher's own files look like, and crashes; the next one ends all.
    script = f"""cd {tmp_path}
    [ -e told ] && {{ ls > second; exit 64; }}
    touch -d @1000 a.$PLACE
    if [ $PLACE = gpu0 ]; then
        touch r.$PLACE; while [ ! -e told ] || [ -e r ]; do sleep 0.02; done; touch gone; exec sleep 60
    fi
    touch -d @2000 a.$PLACE
    while [ -e r ]; do sleep 0.02; done; touch r.$PLACE
    while [ ! -e r ]; do sleep 0.02; done
    while [ ! -e a ]; do sleep 0.02; done
    touch told; exit 67"""
    probe_files = ProbeFiles(ready_file=tmp_path / "r", alive_file=tmp_path / "a")
    limits = RestartPolicy(drain_s=5, first_pause_s=1.5)
    code = Supervisor(
        places, command=lambda _: ["sh", "-c", script], restart_policy=limits, probe_files=probe_files
    ).run()
    assert code == ExitCode.CONFIG
    assert (tmp_path / "a").stat().st_mtime == 1000
    listed = (tmp_path / "second").read_text().split()
    assert {"r.gpu0", "gone"} <= set(listed), "not ready while one of them waits for its restart"
    assert not {"r", "r.gpu1", "a.gpu1"} & set(listed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "gone", "second", "told"]


CHILD = """
import os, signal, sys, time
from shiwu_worker.celery_worker.process import drain_with_parent
if sys.argv[2] == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    # Not by print: the signal may come inside another one.
    signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"drained\\n"), sys.exit(0)))
drain_with_parent(int(sys.argv[1]), limit_s=float(sys.argv[3]))
print("up", flush=True)
while True:
    time.sleep(0.05)  # until a signal
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid()), *sys.argv[2:]], start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize(("kind", "limit_s"), [("handles", "60"), ("ignores", "0.5")])
def test_worker_drains_when_its_launcher_is_killed(kind: str, limit_s: str) -> None:
    """With SIGTERM, and SIGKILL after a limit."""
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD, kind, limit_s], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        try:
            assert parent.stdout.readline() == b"up\n"
            parent.kill()
            wait_until(lambda: not lives(pid), timeout_s=10, what="the child ends")
            assert parent.stdout.read() == (b"drained\n" if kind == "handles" else b"")
        finally:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)


def test_worker_without_a_launcher_exits() -> None:
    """The launcher exited before its worker could ask the kernel for a signal."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "1", "handles", "60"], capture_output=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"")
