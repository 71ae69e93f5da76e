"""The test bench itself: a guard with a hole or a server that forgets would make other tests lie."""

from __future__ import annotations

import io
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from tests.support import pictures
from tests.support.loopback import LeftMachineError, is_own_address, needs_resolver, only_loopback
from tests.support.processes import Process, ServerError, clean_environment, free_ports
from tests.support.servers import PictureServer, Reply, Valkey
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
    """Replies come one after the other, the last for ever, and everything is counted."""
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


def test_a_process_that_ends_early_shows_its_last_words(tmp_path: Path) -> None:
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
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[2] == str(group) and fields[0] != "Z":
            return True
    return False


def test_waiting_has_an_end() -> None:
    """A condition that stays false is named in the error."""
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
