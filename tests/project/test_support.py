"""The helpers of the tests: with a faulty one, other tests would pass without reason."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from shiwu_worker.runtime.proc import stat_fields
from tests.conftest import choose_seed
from tests.support import pictures, waiting
from tests.support.loopback import LeftMachineError, is_own_address, needs_resolver, only_loopback
from tests.support.processes import ROOT, Process, ServerError, clean_environment, free_ports
from tests.support.servers import PictureServer, Reply, Valkey
from tests.support.skips import unexpected_skips
from tests.support.slowness import Slowness
from tests.support.waiting import wait_until


def test_connection_to_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.1 is reserved for documentation; the guard stops the call before a packet leaves."""
    with only_loopback(monkeypatch.setattr) as left, socket.socket() as client:
        with pytest.raises(LeftMachineError):
            client.connect(("192.0.2.1", 80))
        with pytest.raises(LeftMachineError):
            client.connect_ex(("192.0.2.1", 80))
    assert len(left) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "①②⑦.0.0.1", "::1", "localhost"])
def test_loopback_in_any_spelling_needs_no_resolver(host: str) -> None:
    """Tests of the address guard may look these up."""
    assert not needs_resolver(host)


def test_names_of_other_machines_are_unknown() -> None:
    """No test asks a name server."""
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo("example.com", 443)
    assert is_own_address("/tmp/socket")  # noqa: S108 a name, not a file
    assert not is_own_address(("example.com", 443))


def test_valkey_keeps_port_and_data_over_a_kill(valkey: Valkey) -> None:
    """SIGKILL and a new start: same URL, nothing forgotten."""
    with valkey.client() as client:
        client.set("kept", "yes")
        url = valkey.url
        valkey.kill()
        assert not valkey.is_running
        valkey.start()
        assert (valkey.url, client.get("kept")) == (url, b"yes")


def test_the_picture_server_follows_its_script(http_server: PictureServer) -> None:
    """Replies come one after the other, the last forever, and everything is counted."""
    url = http_server.serve("/a.jpg", Reply.error(503), Reply.picture(b"bytes"))
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url, timeout=5)  # noqa: S310 our own http://
    caught.value.close()
    assert caught.value.code == 503
    for _ in range(2):
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310 our own http://
            assert reply.read() == b"bytes"
    assert http_server.hits["/a.jpg"] == 3


@pytest.mark.parametrize("name", pictures.GOOD)
def test_good_pictures_decode(name: str) -> None:
    """Each maker makes what its name says."""
    with Image.open(io.BytesIO(pictures.GOOD[name](pictures.picture()))) as image:
        image.load()
        assert min(image.size) >= 512


@pytest.mark.parametrize("name", pictures.BAD)
def test_bad_pictures_do_not_decode(name: str) -> None:
    """Each is refused by Pillow at one point or another."""
    data = pictures.BAD[name](pictures.picture())
    with pytest.raises(OSError), Image.open(io.BytesIO(data)) as image:  # noqa: PT011 UnidentifiedImageError is one
        image.load()


def test_a_process_that_ends_early_shows_its_output(tmp_path: Path) -> None:
    """The error says how it ended and what it printed."""
    command = [sys.executable, "-c", "import sys; print('no model here'); sys.exit(65)"]
    with Process(command, name="early", folder=tmp_path, env=clean_environment({})) as process:
        assert process.wait(timeout_s=30) == 65
        assert "it ended with 65" in str(process.error("expected to run"))
        assert "no model here" in str(process.error("expected to run"))


def test_stop_ends_the_children_too(tmp_path: Path) -> None:
    """A child that ignores SIGTERM and its parent are both gone after stop."""
    child = "import signal as s; s.signal(s.SIGTERM, s.SIG_IGN); print('up', flush=True); s.pause()"
    parent = f"import subprocess,sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = Process([sys.executable, "-c", parent], name="parent", folder=tmp_path, env=clean_environment({})).start()
    wait_until(lambda: "up" in process.log_text(), timeout_s=30)
    assert process.stop(timeout_s=5) is not None
    wait_until(lambda: not _group_lives(process.pid), timeout_s=10)


def _group_lives(group: int) -> bool:
    """Whether any process of the group is more than a zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = stat_fields(str(stat))
        if fields and fields[2] == str(group) and fields[0] != "Z":
            return True
    return False


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition that stays false is named in the error."""
    monkeypatch.setattr(waiting, "least_s", 0.0)
    with pytest.raises(TimeoutError, match="expected the moon within"):
        wait_until(lambda: False, timeout_s=0.01, what="the moon")


def test_a_process_is_not_started_twice(tmp_path: Path) -> None:
    """Starting a running process is a mistake of the test."""
    with Process(["sleep", "60"], name="sleep", folder=tmp_path, env=clean_environment({})) as process:
        with pytest.raises(ServerError, match="expected to be stopped"):
            process.start()
        assert len(set(free_ports(5))) == 5


def test_side_by_side_the_tests_of_a_file_share_a_process(request: pytest.FixtureRequest) -> None:
    """Else each process starts every server and worker; with pytest 9.2 the groups of xdist 3.8 get lost in silence."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("not run side by side")
    assert request.node.nodeid.endswith("@test_support")


def test_ci_has_a_new_seed_for_each_run() -> None:
    """A seed that was asked for is kept; elsewhere the examples are always the same, unless one is asked for."""
    assert choose_seed(None, is_ci=False) is None
    assert len({choose_seed(None, is_ci=True) for _ in range(3)}) > 1
    assert [choose_seed("7", is_ci=is_ci) for is_ci in (True, False)] == ["7", "7"]


def test_only_listed_skips_pass_in_ci() -> None:
    """A reason that is not listed, or has too many tests, is named."""
    assert unexpected_skips({"this kernel does not allow filters of system calls": 1, "not run side by side": 1}) == []
    found = unexpected_skips({"no Docker Compose runs on this machine": 2, "not run side by side": 2})
    assert found == [
        "2 tests were skipped, at most 0 may be in CI: no Docker Compose runs on this machine",
        "2 tests were skipped, at most 1 may be in CI: not run side by side",
    ]


@pytest.mark.parametrize(("environment", "exit_code"), [({"CI": "1"}, 1), ({"CI": ""}, 0)])
def test_unexpected_skip_fails_a_run_in_ci(tmp_path: Path, environment: dict[str, str], exit_code: int) -> None:
    """On another machine it is printed."""
    test = tmp_path / "test_skipped.py"
    test.write_text("import pytest\n\ndef test_one():\n    pytest.skip('no moon')\n", encoding="utf-8")
    done = run_pytest(test, **environment)
    assert done.returncode == exit_code, done.stdout
    assert "NOT TESTED HERE: 1 because: no moon" in done.stdout


def run_pytest(test: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a file outside of the tree with the settings of `tests/conftest.py`."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-p", "no:randomly"]
    return subprocess.run(
        [*command, "--rootdir", str(test.parent), *options, str(test)],
        cwd=ROOT,
        env=clean_environment(environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


LEAVES = """
import os

def test_one():
    os.environ["LEFT_BY_A_LIBRARY"] = "1"

def test_two():
    assert "LEFT_BY_A_LIBRARY" not in os.environ
"""


def test_environment_of_a_test_ends_with_it(tmp_path: Path) -> None:
    """Otherwise workers of later tests would differ from those of a run of one file, and start slowly."""
    test = tmp_path / "test_leaves.py"
    test.write_text(LEAVES, encoding="utf-8")
    done = run_pytest(test)
    assert done.returncode == 0, done.stdout


SEEDED = """
import hypothesis
from hypothesis import given, strategies as st

@given(st.integers())
def test_numbers(number):
    with open(__file__ + ".seen", "a") as seen:
        print(number, file=seen)
"""


def test_seed_decides_the_examples(tmp_path: Path) -> None:
    """It is printed and repeats a run, also beside other processes; no run leaves a folder of hypothesis behind."""
    test, seen = tmp_path / "test_seeded.py", tmp_path / "test_seeded.py.seen"
    test.write_text(SEEDED, encoding="utf-8")

    def examples(*options: str, **environment: str) -> tuple[str, str]:
        seen.unlink(missing_ok=True)
        done = run_pytest(test, *options, **environment)
        assert done.returncode == 0, done.stdout
        [line] = [line for line in done.stdout.splitlines() if line.startswith("hypothesis: ")]
        return line, seen.read_text(encoding="utf-8")

    line, first = examples(CI="1")
    option = line.removeprefix("hypothesis: ")
    assert option.startswith("--hypothesis-seed=")
    assert examples(option, CI="") == (line, first)
    assert examples(CI="1")[1] != first
    assert not (tmp_path / ".hypothesis").exists()


def test_slowness_is_that_of_the_slow_samples() -> None:
    """One of them in ten counts, so a machine that is busy in parts of a run is found; never faster than idle."""
    with Slowness() as slowness:
        wait_until(lambda: slowness._factors, timeout_s=30)
    assert slowness.factor() >= 1.0
    slowness._factors = [1.0] * 17 + [3.0] * 3
    assert slowness.factor() == 3.0
    slowness._factors = [0.9]
    assert slowness.factor() == 1.0
