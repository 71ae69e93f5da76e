"""Output of `shiwu` to a terminal or a pipe, with a real Redis and, where answers are needed, a real worker."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from shiwu import Client, RequestError
from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.cli import ask, main
from shiwu.contract import WORKERS, Answer, ErrorCode, ErrorInfo, ImageInfo, Lane, Stage, Status
from tests.support import pictures
from tests.support.processes import clean_environment
from tests.support.redis_parts import make_lease_queue, message
from tests.support.servers import S3Server, WorkerProcess

SHIWU = [sys.executable, "-m", "shiwu.cli"]
ODD = "s3://pictures/[red]x[/red][/nope]:cat:\u202egpj.exe"


def call(redis_url: str, *args: str, **options: Any) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, ["--redis-url", redis_url, *args], **options)


def add_dead_letter(client: redis.Redis, job_id: str, *, reference: str, text: str, worker: str = "w") -> None:
    """Reject one job, so that its message is a dead letter."""
    client.rpush(Lane.BULK.queue, message(job_id, Lane.BULK))
    [claimed] = make_lease_queue(client, "w").claim(1).jobs
    error = ErrorInfo(code=ErrorCode.SOURCE_NOT_FOUND, message=text, stage=Stage.FETCH)
    image = ImageInfo(reference=reference)
    answer = Answer(id=job_id, status=Status.REJECTED, image=image, error=error, worker=worker)
    record = claimed.key.encode() + b"|" + claimed.raw
    AnswerStore(client, token="w").write([AnswerEntry(answer=answer, id=claimed.id, message=record, is_dead=True)])


def test_tag_shows_reasons_and_hints(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """Below each row without tags; markup and emoji codes of a reference are shown, not obeyed."""
    s3.put("cli/broken.jpg", b"no image")
    odd = ODD.replace("\u202e", "")
    found = call(shared_worker.redis_url, "tag", odd, "s3://pictures/cli/broken.jpg")
    assert found.exit_code == 1, found.output
    lines = [line.rstrip() for line in found.output.splitlines()]
    assert lines[1].startswith(r"s3://pictures/[red]x[/red][/nope]:cat:gpj.exe  source_not_found ")
    assert lines[2].startswith("    S3 answered NoSuchKey")
    assert lines[3].startswith("    hint: Correct the reference")
    assert " not_a_picture " in lines[4]


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--labels", "two words"], 2, "for a single label use --label 'two words'"),
        (["--labels", "猫"], 1, "--labels WORD,"),
        (["--label", "猫", "--labels", "six-zh"], 2, "expected --labels or --label, got both"),
        (["--labels", "熊猫,"], 0, "熊猫 1.000"),
        (["--label", "熊猫", "--label", "汽车"], 0, "熊猫 "),
        (["--label", "奶牛", "--label", "熊猫", "--threshold", "1"], 0, "no tag reached the threshold of 1; the best"),
        (["--label", "奶牛", "--threshold", "2"], 2, "threshold"),
    ],
)
def test_tag_reads_labels_and_thresholds(
    shared_worker: WorkerProcess, s3: S3Server, args: list[str], code: int, text: str
) -> None:
    """A single label works, or the error shows the right form; a threshold without tags names the best label."""
    good = s3.put("cli/panda.jpg", pictures.jpeg(pictures.picture("熊猫")))
    found = call(shared_worker.redis_url, "tag", good, *args)
    assert found.exit_code == code, found.output
    assert text in found.output


def test_tag_json_applies_the_threshold(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """What is printed as JSON is the answer as it was asked for."""
    good = s3.put("cli/panda.jpg", pictures.jpeg(pictures.picture("熊猫")))
    found = call(
        shared_worker.redis_url, "tag", good, "--label", "奶牛", "--label", "熊猫", "--threshold", "1", "--json"
    )
    assert '"tags":[]' in found.output


def test_tag_wants_what_is_named(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """Only what is named comes, and the table has no tags without an error."""
    good = s3.put("cli/panda.jpg", pictures.jpeg(pictures.picture("熊猫")))
    found = call(shared_worker.redis_url, "tag", good, "--want", "vector", "--json")
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert ("tags" in answer, len(answer["vector"]) % 4) == (False, 0)
    shown = call(shared_worker.redis_url, "tag", good, "--want", "vector")
    assert (shown.exit_code, "no tag reached" in shown.output) == (0, False)


@pytest.mark.parametrize(("has_worker", "is_told"), [(False, True), (True, False)])
def test_tag_without_a_worker_says_so(
    redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, has_worker: bool, is_told: bool
) -> None:
    """On standard error, long before the time is over; the exit code stays the one of a time-out."""
    monkeypatch.setattr(ask, "WORKER_CHECK_AFTER_S", 0.1)
    if has_worker:
        redis_client.zadd(WORKERS, {"w": time.time() * 1000})
    found = call(redis_url, "tag", "s3://b/k", "--timeout", "0.3")
    assert found.exit_code == 3
    assert ("no worker has been seen for 10 s" in found.stderr) is is_told
    with Client(redis_url) as client:
        [job_id] = re.findall(r"`shiwu explain (\S+)`", found.stderr)
        assert client.explain(job_id).image == "s3://b/k"
    assert "no answer yet" in found.stdout


def test_dead_list_shows_unusual_dead_letters(redis_url: str, redis_client: redis.Redis) -> None:
    """Other people's text in every column."""
    add_dead_letter(redis_client, "j1", reference=ODD, text="no \x1b[2J such [/b] key", worker="[/w]")
    found = call(redis_url, "dead", "list")
    assert found.exit_code == 0, found.output
    assert r"s3://pictures/[red]x[/red][/nope]:cat:\u202egpj.exe" in found.output
    assert r"no \u001b[2J such [/b] key" in found.output
    assert "hint: Correct the ref" in found.output
    assert "[/w]" in found.output


def on_a_terminal(args: list[str], *, columns: int) -> str:
    """What the command writes to a terminal of this width."""
    master, slave = pty.openpty()
    with os.fdopen(master, "rb", buffering=0) as read:
        env = clean_environment({"NO_COLOR": "1", "TERM": "xterm", "COLUMNS": str(columns)})
        with subprocess.Popen([*SHIWU, *args], stdin=slave, stdout=slave, stderr=slave, env=env) as process:
            os.close(slave)
            found = b""
            while True:
                try:
                    part = read.read(4096)
                except OSError:  # Linux reports a closed other side so
                    break
                if not part:
                    break
                found += part
            assert process.wait(20) == 0, found
    return found.decode()


def test_narrow_terminal_gets_fewer_columns(redis_url: str, redis_client: redis.Redis) -> None:
    """Whole ids, fewer columns, no colour where NO_COLOR is set, and JSON without raw controls."""
    job_id = "0b791c43-1e3c-4e64-8cb6-2d8ac3c07d14"
    add_dead_letter(redis_client, job_id, reference="s3://b/" + "long" * 20 + "\x9b31m", text="gone")
    shown = on_a_terminal(["--redis-url", redis_url, "dead", "list"], columns=80)
    assert set(re.findall(r"\x1b\[[0-9;]*m", shown)) <= {"\x1b[1m", "\x1b[0m"}, "bold is no colour"
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert lines[1].startswith(f"{job_id}  source_not_found  s3://b/long")
    assert all(len(line) <= 80 for line in lines)
    shown = on_a_terminal(["--redis-url", redis_url, "dead", "list", "--json"], columns=80)
    assert r"\u009b31m" in shown
    assert "\x9b" not in shown


def _run(args: list[str], *, redis_url: str, **options: Any) -> subprocess.Popen[bytes]:
    env = clean_environment({"SHIWU_REDIS_URL": redis_url} | options.pop("env", {}))
    return subprocess.Popen([*SHIWU, *args], env=env, stderr=subprocess.PIPE, **options)


def test_ctrl_c_while_waiting_prints_no_traceback(
    redis_url: str, redis_client: redis.Redis, wait_until: Callable[..., Any]
) -> None:
    """With the code that shells use, which is not the one of an image without tags."""
    with _run(["tag", "s3://b/k"], redis_url=redis_url, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: redis_client.llen(Lane.INTERACTIVE.queue), timeout_s=20)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.decode().splitlines() == ["shiwu: interrupted; what was enqueued goes on"]


def test_closed_pipe_prints_no_traceback(redis_url: str, redis_client: redis.Redis) -> None:
    """As `shiwu dead list | head -1` closes it."""
    for number in range(3):
        add_dead_letter(redis_client, f"j{number}", reference="s3://b/k", text="x" * 50_000)
    read, write = os.pipe()
    os.close(read)
    for args in (["dead", "list"], ["dead", "list", "--json"]):
        with _run(args, redis_url=redis_url, stdout=write) as process:
            _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (141, b"")
    os.close(write)


def test_other_encodings_and_closed_streams_work(redis_url: str, redis_client: redis.Redis) -> None:
    """A locale that cannot write Chinese, and standard output or input that is closed."""
    add_dead_letter(redis_client, "j1", reference="s3://b/熊猫", text="没有")
    options: dict[str, Any] = {"redis_url": redis_url, "env": {"PYTHONIOENCODING": "ascii"}}
    with _run(["dead", "list"], stdout=subprocess.PIPE, **options) as process:
        shown, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, b"")
    assert rb"s3://b/\u718a\u732b" in shown
    for shell, code, text in (("dead list >&-", 0, b""), ("status >&-", 0, b""), ("enqueue - <&-", 2, b"it is closed")):
        command = ["sh", "-c", f"{' '.join(SHIWU)} --redis-url {redis_url} {shell}"]
        done = subprocess.run(command, env=clean_environment({}), capture_output=True, check=False, timeout=30)
        assert done.returncode == code, done.stderr
        assert text in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["tag", "s3://b/k", "--timeout", "nan"],
        ["tag", "s3://b/k", "--timeout", "inf"],
        ["tag", "s3://b/k", "--timeout", "-1"],
        ["enqueue", "s3://b/k", "--expires", "soon"],
        ["sweep", "--every", "0"],
        ["sweep", "--once", "--tell-every", "nan"],
        ["dead", "list", "--limit", "0"],
        ["dead", "drop", "--all", "--limit", "-1"],
        ["tag", "s3://b/k", "--threshold", "nan"],
        ["tag", "s3://b/k", "--labels", ""],
    ],
    ids=" ".join,
)
def test_meaningless_number_is_refused(redis_url: str, redis_client: redis.Redis, args: list[str]) -> None:
    """Instead of a wait without end, a busy loop, or an option without effect."""
    found = call(redis_url, *args)
    assert found.exit_code == 2, found.output
    assert args[-2].removeprefix("--").replace("-every", "") in found.output.replace("_", "-")
    assert "Traceback" not in found.output
    assert redis_client.llen(Lane.INTERACTIVE.queue) == 0


def test_timeout_of_nan_seconds_is_refused(redis_url: str) -> None:
    """It would never be over."""
    with Client(redis_url) as client, pytest.raises(RequestError, match="timeout_s"):
        client.wait("x", timeout_s=float("nan"))


def test_requeue_names_ids_without_a_dead_letter(redis_url: str, redis_client: redis.Redis) -> None:
    """On standard error, with exit code 1; the others are sent again."""
    add_dead_letter(redis_client, "j1", reference="s3://b/k", text="gone")
    found = call(redis_url, "dead", "requeue", "j1", "typo")
    assert (found.exit_code, found.stdout) == (1, "j1\n")
    assert "1 of 2 ids have no dead letter, first typo" in found.stderr


@pytest.mark.parametrize(
    ("args", "given", "text"),
    [
        (["-"], b"s3://b/1\n\xe9\n", "line 2: expected UTF-8"),
        (["s3://b/1", "--from-file", "-"], b"", "only one of them"),
        ([], b"", "only one of them"),
    ],
)
def test_enqueue_refuses_options_without_effect(redis_url: str, args: list[str], given: bytes, text: str) -> None:
    """References beside a file, and lines that are no UTF-8, with the line's number."""
    found = call(redis_url, "enqueue", *args, input=given)
    assert found.exit_code == 2
    assert text in found.output


@pytest.mark.parametrize(
    ("given", "args", "text"),
    [
        (b"# list\n\nno reference\n", [], "shiwu: invalid_reference: line 3: image: expected s3://"),
        (b"s3://b/1\nid\ts3://b/2\n" + b"x" * 300 + b"\ts3://b/3\n", [], "shiwu: invalid_id: line 3: "),
        (b"s3://b/1\n", ["--top-k", "0"], "shiwu: invalid_request: top_k: "),
    ],
    ids=["reference", "id", "all-lines"],
)
def test_enqueue_names_the_line_of_an_error(redis_url: str, given: bytes, args: list[str], text: str) -> None:
    """As in the file, with the empty lines; an option that is wrong for all lines names none."""
    found = call(redis_url, "enqueue", "-", *args, input=given)
    assert (found.exit_code, found.stdout) == (2, "")
    assert text in found.stderr


def test_enqueue_names_lines_of_later_portions(redis_url: str, redis_client: redis.Redis) -> None:
    """Those before were sent; their ids are printed."""
    found = call(
        redis_url, "enqueue", "--limit", "3", "-", input=b"# list\ns3://b/1\ns3://b/2\ns3://b/3\n\ns3://b/4\nx\n"
    )
    assert (found.exit_code, len(found.stdout.split())) == (2, 3)
    assert "line 7: image: expected" in found.stderr
    assert redis_client.llen(Lane.BULK.queue) == 3


def test_enqueue_reads_a_list_with_a_bom(redis_url: str, redis_client: redis.Redis) -> None:
    """As editors on Windows save it."""
    found = call(redis_url, "enqueue", "-", input=b"\xef\xbb\xbfs3://b/1\r\n# mine\r\n\r\ns3://b/2\r\n")
    assert found.exit_code == 0, found.output
    assert redis_client.llen(Lane.BULK.queue) == 2


def test_status_shows_unusual_worker_names(redis_url: str, redis_client: redis.Redis) -> None:
    """Markup and controls in a name, which another program may have written, are shown and not obeyed."""
    redis_client.zadd(WORKERS, {"[/red]w\x1b[2J": time.time() * 1000})
    found = call(redis_url, "status")
    assert found.exit_code == 0, found.output
    assert r"[/red]w\u001b[2J" in found.output


@pytest.mark.parametrize(
    ("module", "args"),
    [
        ("shiwu.cli", ["status"]),
        ("shiwu.cli", ["dead", "list", "--json"]),
        ("shiwu.cli", ["--help"]),
        ("shiwu.hooks", ["--help"]),
        ("shiwu_worker", ["--size"]),
        ("shiwu_worker", ["labels", "--help"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_full_disk_ends_a_command_with_one_line(
    redis_url: str, redis_client: redis.Redis, module: str, args: list[str]
) -> None:
    """And with its exit code, whether the command, Rich or click writes."""
    add_dead_letter(redis_client, "j1", reference="s3://b/k", text="gone")
    env = clean_environment({"SHIWU_REDIS_URL": redis_url})
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-m", module, *args]
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    [line] = done.stderr.decode().splitlines()
    assert "output_failed: expected a standard output that can be written, got: No space left on device" in line
    assert done.returncode == 74


def test_answers_that_cannot_be_printed_are_not_acknowledged(redis_url: str, redis_client: redis.Redis) -> None:
    """With standard output closed, or on a full disk: the group gets them again."""
    add_dead_letter(redis_client, "j1", reference="s3://b/k", text="gone")
    for redirection, code in ((">&-", 2), (">/dev/full", 74)):
        command = ["sh", "-c", f"{' '.join(SHIWU)} --redis-url {redis_url} results --consumer c1 {redirection}"]
        done = subprocess.run(command, env=clean_environment({}), capture_output=True, check=False, timeout=30)
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
    again = call(redis_url, "results", "--consumer", "c1")
    assert [json.loads(line)["id"] for line in again.output.splitlines()] == ["j1"]


def test_dead_letters_are_found_by_the_stage_that_answers_name(redis_url: str, redis_client: redis.Redis) -> None:
    """In lower case; upper case, which was the only form, stays."""
    add_dead_letter(redis_client, "j1", reference="s3://b/k", text="gone")
    for stage, count in (("fetch", 1), ("FETCH", 1), ("decode", 0)):
        found = call(redis_url, "dead", "list", "--json", "--stage", stage)
        assert (found.exit_code, len(found.output.splitlines())) == (0, count), found.output


def test_answers_after_a_closed_pipe_come_immediately(redis_url: str, redis_client: redis.Redis) -> None:
    """As after `shiwu results | head -1`: the next call does not wait for the answer that was not printed."""
    for number in range(3):
        add_dead_letter(redis_client, f"j{number}", reference="s3://b/k", text="gone")
    read, write = os.pipe()
    os.close(read)
    with _run(["results"], redis_url=redis_url, stdout=write) as process:
        _, errors = process.communicate(timeout=20)
    os.close(write)
    assert (process.returncode, errors) == (141, b"")
    again = call(redis_url, "results")
    assert sorted(json.loads(line)["id"] for line in again.stdout.splitlines()) == ["j0", "j1", "j2"]
    assert "waiting for answers" not in again.stderr
