"""Loader processes that crash or hang: the image that causes it fails alone, the other images are answered."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from shiwu.contract import ErrorCode
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.policy.limits import S3Client, S3Options
from shiwu_worker.runtime.process import source_environment
from tests.support import bombs, pictures
from tests.support.family import children, lives
from tests.support.loader_pool import SLOTS, Pool
from tests.support.picture_server import PictureServer, Reply
from tests.support.process_memory import found_in_memory
from tests.support.stores import CLIENTS, OWN_NAMES
from tests.support.waiting import wait_until


@pytest.fixture
def good(tmp_path: Path) -> str:
    """An image in the allowed folder."""
    path = tmp_path / "good.png"
    path.write_bytes(pictures.png(pictures.picture().resize((80, 80))))
    return path.as_uri()


@pytest.fixture(params=[(1, 0), (2, 0), (1, 1), (1, 2)], ids=lambda numbers: f"{numbers[0]}-and-{numbers[1]}-spare")
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pool]:
    """A running pool."""
    made = Pool(tmp_path, processes=request.param[0], spares=request.param[1])
    made.pool.start()
    made.pool.wait_ready(30.0)
    yield made
    made.pool.close(5.0)


def test_pixels_are_written_to_the_slots_of_their_tasks(pool: Pool, good: str, tmp_path: Path) -> None:
    """A result for each ticket; pixels in the shared memory; errors are results too."""
    pool.submit(good, (tmp_path / "none.png").as_uri(), good)
    pool.wait(3)
    assert pool.pool.pixels[0].any()
    assert (pool.pool.pixels[0] == pool.pool.pixels[2]).all()
    assert not pool.pool.pixels[1].any()
    assert pool.results[1].error is not None
    assert pool.results[1].error.code.value == "source_not_found"
    result = pool.results[0]
    assert 0 < result.started_s <= result.fetched_s <= result.decoded_s
    assert (result.format, result.width, result.height) == ("PNG", 80, 80)


@pytest.mark.parametrize("victim", ["loader", "sandbox"])
def test_image_that_ends_its_loader_twice_fails_alone(
    pool: Pool, good: str, http_server: PictureServer, victim: str
) -> None:
    """The loader or its sandbox is killed whenever it holds this image; all others are answered normally."""
    crashing = http_server.serve("/crashing.png", Reply.picture(b"").late(first_pause_s=15.0))
    pool.submit(crashing, *[good] * 12)
    for hits in (1, 2):
        wait_until(partial(lambda hits: http_server.hits["/crashing.png"] >= hits, hits), timeout_s=20)
        holder = next(loader for loader in pool.pool._loaders if 0 in loader.held)
        [sandbox] = children(holder.process.pid)
        os.kill(sandbox if victim == "sandbox" else holder.process.pid, signal.SIGSEGV)
        wait_until(partial(lambda sandbox: not lives(sandbox), sandbox), timeout_s=20)
    pool.wait(13)
    assert pool.results[0].error is not None
    assert pool.results[0].error.code.value == "decoder_crashed"
    assert "SIGSEGV" in pool.results[0].error.message
    assert all(pool.results[n].error is None for n in range(1, 13))
    assert pool.pool.restarts == 2
    pool.submit(good, first_ticket=20)
    pool.wait(14)
    assert not pool.fatal


def test_image_over_the_cpu_limit_is_answered_immediately(good: str, tmp_path: Path) -> None:
    """CPU time does not depend on other work of the machine, so the image is not retried; the others are."""
    path = tmp_path / "scans.jpg"
    path.write_bytes(bombs.jpeg_scans(scans=3000))
    made = Pool(tmp_path, processes=1, cpu_s=0.5, max_scans=10_000)
    made.pool.start()
    made.pool.wait_ready(30.0)
    try:
        made.submit(path.as_uri(), *[good] * 12)
        made.wait(13)
        error = made.results[0].error
        assert error is not None
        assert error.code.value == "decoder_timeout"
        wait_until(lambda: made.pool.restarts == 1, timeout_s=10)
        assert "0.5 s of CPU" in error.message
        assert all(made.results[number].error is None for number in range(1, 13))
    finally:
        made.pool.close(5.0)


@pytest.mark.parametrize("is_filtered", [True, False])
def test_sandbox_has_no_secrets_and_no_files(
    good: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_filtered: bool
) -> None:
    """No secret in its memory or its parents' environment, no file, limits, a filter if the setting is on."""
    secret, password = "s3-secret-by-chance-7c1e", "redis-password-by-chance-90ab"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("SHIWU_REDIS_URL", f"redis://:{password}@127.0.0.1/0")
    made = Pool(tmp_path, processes=1, has_filter=is_filtered, environment=source_environment())
    made.pool.start()
    made.pool.wait_ready(30.0)
    try:
        made.submit(good)
        made.wait(1)
        [loader] = made.pool.pids
        [sandbox] = children(loader)
        for pid in (loader, sandbox):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert secret.encode() not in environment
            assert password.encode() not in environment
        assert not found_in_memory(sandbox, {password, secret})
        assert found_in_memory(loader, {password, secret}) == {secret}, "the part that fetches needs it"
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{sandbox}/status").read_text().splitlines())
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2" if is_filtered else "0")
        threads = [path.read_text() for path in Path(f"/proc/{sandbox}/task").glob("*/status")]
        assert len(threads) == 1 + 4
        assert all(("Seccomp:\t2" in thread) is is_filtered for thread in threads)
        targets = {os.readlink(fd).partition(":")[0] for fd in Path(f"/proc/{sandbox}/fd").iterdir()}
        assert targets == {"/dev/null", "socket"}
        limits = Path(f"/proc/{sandbox}/limits").read_text()
        for name in ("Max core file size", "Max file size"):
            assert re.search(rf"{name} +0 +0 ", limits)
        assert re.search(rf"Max address space +{4 * 1024**3} ", limits)
        os.kill(loader, signal.SIGKILL)
        wait_until(lambda: not lives(sandbox), timeout_s=10)
    finally:
        made.pool.close(5.0)


@pytest.mark.parametrize("client", CLIENTS)
def test_loader_reads_many_buckets_within_its_limits(
    tmp_path: Path, http_server: PictureServer, client: S3Client
) -> None:
    """With either client of the store, each with its threads and connections; a name is looked up each time."""
    data = pictures.png(pictures.picture().resize((80, 80)))
    for number in range(SLOTS):
        http_server.serve(f"/bucket-{number}/a.png", Reply.picture(data).late(first_pause_s=0.05))
    store = S3Options(f"http://localhost:{http_server.port}", "us-east-1", client)
    with Pool(tmp_path, processes=1, environment=OWN_NAMES, s3=store) as made:
        made.submit(*(f"s3://bucket-{number}/a.png" for number in range(SLOTS)))
        made.wait(SLOTS)
        assert [result.error for result in made.results.values() if result.error] == []
        assert made.pool.restarts == 0
        [pid] = made.pool.pids
        proc = Path(f"/proc/{pid}")
        names = [(task / "comm").read_text().strip() for task in (proc / "task").iterdir()]
        assert names.count("tokio-rt-worker") <= 1 + 4, "one, and look-ups"
        [max_bytes] = re.findall(r"Max address space +(\d+)", (proc / "limits").read_text())
        [peak_kb] = re.findall(r"VmPeak:\s+(\d+) kB", (proc / "status").read_text())
        assert int(peak_kb) * 1024 < int(max_bytes)
        [max_files] = re.findall(r"Max open files +(\d+)", (proc / "limits").read_text())
        assert len(list((proc / "fd").iterdir())) < int(max_files) / 2


def test_path_that_is_no_utf8_is_answered_like_others(good: str, tmp_path: Path) -> None:
    """Bytes that are no UTF-8 in a reference do not end the loader, inside the allowed folders and outside."""
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    made = Pool(tmp_path, processes=1)
    made.pool.start()
    made.pool.wait_ready(30.0)
    try:
        made.submit("file:///%ff/x.png", f"{tmp_path.as_uri()}/%ff", good)
        made.wait(3)
        outside, folder, fine = (made.results[ticket] for ticket in range(3))
        assert outside.error is not None
        assert outside.error.code is ErrorCode.SOURCE_FORBIDDEN
        assert "\\udcff" in (outside.detail or "")
        assert folder.error is not None
        assert folder.error.code is ErrorCode.SOURCE_NOT_A_FILE
        assert fine.error is None
        assert made.pool.restarts == 0
    finally:
        made.pool.close(5.0)


def test_fork_server_that_cannot_start_fails_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for the loaders ends long before its time-out."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    made = Pool(tmp_path, processes=1)
    made.pool.start()
    began_s = time.monotonic()
    with pytest.raises(FatalError) as caught:
        made.pool.wait_ready(30.0)
    assert caught.value.exit_code is ExitCode.LOADERS
    assert time.monotonic() - began_s < 20
    assert [error.exit_code for error in made.fatal] == [ExitCode.LOADERS]


def test_hanging_loader_is_restarted(good: str, tmp_path: Path) -> None:
    """Stopped processes exceed the time limit; data they held is tried again and answered."""
    made = Pool(tmp_path, processes=1, task_timeout_s=1.0)
    made.pool.start()
    made.pool.wait_ready(30.0)
    try:
        os.kill(made.pool.pids[0], signal.SIGSTOP)
        made.submit(good, good)
        made.wait(2)
        assert all(result.error is None for result in made.results.values())
        assert made.pool.restarts == 1
    finally:
        made.pool.close(5.0)


def test_image_that_lacks_memory_is_retried_alone(tmp_path: Path) -> None:
    """Four large images exceed a sandbox's memory together but not alone; one that does not fit alone is rejected."""
    made = Pool(tmp_path, processes=1, memory_bytes=1300 * 1024**2)
    images = []
    for name, side in (("a", 8000), ("b", 8000), ("c", 8000), ("d", 8000), ("much", 16_000)):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (side, side)).save(path, compress_level=1)
        images.append(path.as_uri())
    made.pool.start()
    made.pool.wait_ready(30.0)
    try:
        made.submit(*images)
        made.wait(5)
        assert [made.results[n].error for n in range(4)] == [None] * 4
        error = made.results[4].error
        assert error is not None
        assert error.code.value == "picture_too_large"
        assert made.pool.restarts == 0
    finally:
        made.pool.close(5.0)


def test_isolating_loader_finishes_its_tasks_first(good: str, tmp_path: Path, http_server: PictureServer) -> None:
    """The loader finishes its tasks before a quarantined one; if it crashes meanwhile, none of them fails."""
    made = Pool(tmp_path, processes=2)
    body = Path(good.removeprefix("file://")).read_bytes()
    slow = [http_server.serve(f"/{n}.png", Reply.picture(body).late(first_pause_s=1.5)) for n in range(5)]
    made.pool.start()
    made.pool.wait_ready(30.0)
    try:
        made.submit(*slow)
        wait_until(lambda: len(http_server.hits) == 5, timeout_s=20)
        first, second = made.pool._loaders
        assert (len(first.held), len(second.held)) == (4, 1)
        os.kill(first.process.pid, signal.SIGKILL)
        wait_until(lambda: second.is_isolated, timeout_s=20, every_s=0.001)
        os.kill(second.process.pid, signal.SIGKILL)
        made.wait(5)
        assert [made.results[n].error for n in range(5)] == [None] * 5
    finally:
        made.pool.close(5.0)


def test_close_leaves_no_process(good: str, tmp_path: Path) -> None:
    """Also while tasks run."""
    made = Pool(tmp_path, processes=2)
    made.pool.start()
    made.pool.wait_ready(30.0)
    pids = made.pool.pids
    made.submit(*[good] * 20)
    made.pool.close(5.0)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
