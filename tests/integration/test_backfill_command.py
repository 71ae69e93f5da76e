"""`shiwu backfill` as a process: what it prints, its exit codes, and what it writes to a bucket."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.answering import AnsweringThread
from tests.support.backfills import BackfillProcess, references_of, rows_of, write_list
from tests.support.processes import ROOT, run_module
from tests.support.servers import S3Server, Valkey
from tests.support.waiting import wait_until


def shiwu(url: str, *args: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `shiwu backfill ARGS…`."""
    words = ["shiwu.cli", "--redis-url", url, "backfill", *args]
    done = run_module(*words, timeout_s=60, stdin=stdin, **(env or {}))
    return done.returncode, done.stdout, done.stderr


def test_commands_tell_about_a_backfill(redis_url: str, tmp_path: Path) -> None:
    """From the dry run over the start to the report."""
    images = str(write_list(tmp_path / "list.jsonl", 30, broken_every=10))
    out = str(tmp_path / "out")
    code, told, _ = shiwu(redis_url, "start", "night", images, "--dry-run", "--suffix", ".jpg")
    assert code == 0
    assert json.loads(told)["to_send"] == 30
    (tmp_path / "odd.jsonl").write_text('{"image": "no reference"}\n[]\n')
    _, told, _ = shiwu(redis_url, "start", "night", str(tmp_path / "odd.jsonl"), "--dry-run")
    example, of_a_line = json.loads(told)["refused_examples"]
    assert example.startswith("…: image: expected s3://")
    assert of_a_line.startswith("line 2: expected an object")
    assert shiwu(redis_url, "list") == (0, shiwu(redis_url, "list")[1], "")
    with AnsweringThread(redis_url):
        code, told, said = shiwu(redis_url, "start", "night", images, "--out", out, "--labels", "six-zh")
    assert (code, told) == (0, "")
    assert said.endswith(f"night is finished: 30 answers, 3 without tags (3 source_not_found), 1 part in {out}\n")
    status = json.loads(shiwu(redis_url, "status", "night", "--json")[1])
    assert (status["phase"], status["runs"], status["answered"]) == ("finished", False, 30)
    assert "runs: no\n" in shiwu(redis_url, "status", "night")[1]
    report = json.loads(shiwu(redis_url, "report", "night", "--json")[1])
    assert report["request"] == {"labels": "six-zh"}
    assert report["by_status"] == {"tagged": 27, "rejected": 3}
    assert "source_not_found: 3" in shiwu(redis_url, "report", "night")[1]
    [listed] = shiwu(redis_url, "list", "--json")[1].splitlines()
    assert json.loads(listed)["backfill"] == "night"
    code, _, said = shiwu(redis_url, "start", "night", images, "--out", out, "--labels", "six-zh")
    assert code == 0
    assert "is finished; --missing" in said


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["start", "night", "LIST", "--top-k", "3"], 2, "options (--out OUT, now not given; --top-k not given, now 3)"),
        (["start", "other", "LIST", "--out", "OUT"], 2, "expected an output without results"),
        (["start", "other", "LIST", "--newer", "3d"], 2, "--newer: expected a bucket"),
        (["start", "other", "/none.csv"], 2, "there is no file"),
        (["start", "other", "/"], 2, "a folder is at '/'"),
        (["start", "other", "LIST", "--rate", "much"], 2, "expected a rate such as"),
        (["start", "other", "LIST", "--window", "8-9"], 2, "expected hours and a time zone"),
        (["start", "other", "LIST", "--labels", "a cat"], 2, "for a single label use"),
        (["start", "other", "LIST", "--top-k", "0"], 2, "top_k"),
        (["start", "a:b", "LIST"], 2, "expected 1 to 64 letters"),
        (["pause", "night"], 2, "expected a backfill that has not ended"),
        (["status", "unknown"], 2, "expected the name of a backfill"),
        (["report", "unknown"], 2, "expected the name of a backfill"),
        (["start", "other", "s3:///a/"], 2, "expected s3://bucket/"),
        (["start", "other", "s3://b/odd"], 2, "expected a prefix that ends with a slash"),
        (["start", "other", "LIST", "--out", "LIST/x"], 4, "expected a folder to write to at"),
        (["start", "other", "BROKEN"], 4, "expected a Parquet file"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else None,
)
def test_wrong_use_is_refused_in_words(redis_url: str, tmp_path: Path, args: list[str], code: int, text: str) -> None:
    """One line, and nothing is sent."""
    images = str(write_list(tmp_path / "list.jsonl", 3))
    with AnsweringThread(redis_url):
        shiwu(redis_url, "start", "night", images, "--out", str(tmp_path / "out"))
    (tmp_path / "broken.parquet").write_bytes(b"no Parquet")
    places = {"LIST": images, "LIST/x": f"{images}/x", "OUT": str(tmp_path / "out")}
    places["BROKEN"] = str(tmp_path / "broken.parquet")
    found, _, said = shiwu(redis_url, *[places.get(arg, arg) for arg in args])
    assert (found, text.replace("OUT", places["OUT"]) in " ".join(said.replace("│", "").split())) == (code, True), said


def test_mistyped_bucket_does_not_take_the_name(s3: S3Server, redis_url: str, redis_client: redis.Redis) -> None:
    """The corrected command starts under the same name."""
    s3.put("typed/a.jpg", b"x")
    code, _, said = shiwu(redis_url, "start", "night", "s3://no-such-bucket/typed/", env=s3.env)
    assert code == 4, said
    assert redis_client.keys("shiwu:backfill*") == []
    with AnsweringThread(redis_url):
        assert shiwu(redis_url, "start", "night", f"s3://{s3.bucket}/typed/", env=s3.env)[0] == 0


def test_missing_library_is_named(redis_url: str, tmp_path: Path) -> None:
    """One line with what to install, where only the core is installed."""
    code = "import sys; sys.modules['boto3'] = None; from shiwu.cli import main; main()"
    args = ["--redis-url", redis_url, "backfill", "start", "night", "s3://photos/a/"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.decode() == "shiwu: backfill needs boto3: run `pip install '.[backfill]'` in a clone of shiwu\n"


def test_standard_input_goes_on_with_the_same_list(redis_url: str, tmp_path: Path, redis_client: redis.Redis) -> None:
    lines = b"".join(b"s3://b/%d.jpg\n" % number for number in range(40))
    args = ("start", "night", "-", "--out", str(tmp_path / "out"))
    with AnsweringThread(redis_url):
        assert shiwu(redis_url, *args, stdin=lines)[0] == 0
        assert shiwu(redis_url, *args, "--missing", stdin=lines + b"s3://b/40.jpg\n")[0] == 0
    assert len(references_of(tmp_path / "out")) == 41
    assert shiwu(redis_url, "resume", "night")[0] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_interrupted_backfill_writes_what_has_come(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path, number: int
) -> None:
    """The signal comes twice, as from `timeout`; the same command goes on, and so does `resume`."""
    images = str(write_list(tmp_path / "list.jsonl", 200))
    args = ["start", "night", images, "--out", str(tmp_path / "out"), "--rate", "100"]
    with AnsweringThread(redis_url):
        with BackfillProcess(*args, redis_url=redis_url, folder=tmp_path) as run:
            wait_until(lambda: int(redis_client.hget("shiwu:backfill:night", "sent") or 0) > 30, timeout_s=30)
            run.signal(number)
            run.signal(number)
            assert run.wait(timeout_s=20) == 130, run.log_tail()
        assert "night was interrupted" in run.log_text()
        written = list((tmp_path / "out").glob("part-*"))
        assert len(written) == 1
        assert shiwu(redis_url, "resume", "night")[0] == 0
    assert len(references_of(tmp_path / "out")) == 200


def test_lost_redis_is_waited_for(valkey: Valkey, tmp_path: Path) -> None:
    """Killed and started again while jobs are sent: nothing is lost."""
    images = str(write_list(tmp_path / "list.jsonl", 300))
    args = ["start", "night", images, "--out", str(tmp_path / "out"), "--rate", "200"]
    with BackfillProcess(*args, redis_url=valkey.url, folder=tmp_path) as run:
        with valkey.client() as client:
            wait_until(lambda: int(client.hget("shiwu:backfill:night", "sent") or 0) > 50, timeout_s=30)
        valkey.kill()
        wait_until(lambda: "trying again" in run.log_text(), timeout_s=20)
        valkey.start()
        with AnsweringThread(valkey.url):
            assert run.wait(timeout_s=60) == 0, run.log_tail()
    assert set(references_of(tmp_path / "out").values()) == {1}
    assert len(rows_of(tmp_path / "out")) == 300


def test_results_in_a_bucket_have_manifest_and_summary(s3: S3Server, redis_url: str, tmp_path: Path) -> None:
    """Parts in Parquet below a prefix; no temporary object is left."""
    images = str(write_list(tmp_path / "list.jsonl", 50))
    args = ["start", "night", images, "--out", f"s3://{s3.bucket}/results/night", "--format", "parquet"]
    with AnsweringThread(redis_url):
        code, _, said = shiwu(redis_url, *args, "--part-rows", "20", env=s3.env)
    assert code == 0, said
    for found in s3.client.list_objects_v2(Bucket=s3.bucket, Prefix="results/night/")["Contents"]:
        path = tmp_path / "copy" / found["Key"].rpartition("/")[2]
        path.parent.mkdir(exist_ok=True)
        s3.client.download_file(s3.bucket, found["Key"], str(path))
    assert len(references_of(tmp_path / "copy")) == 50


def test_progress_is_a_json_line_without_a_terminal(redis_url: str, tmp_path: Path) -> None:
    """One every ten seconds; here the clock of the display runs faster."""
    images = str(write_list(tmp_path / "list.jsonl", 60))
    code = "from shiwu.backfill import display; display.LINE_EVERY_S = 0.5; from shiwu.cli import main; main()"
    args = ["--redis-url", redis_url, "backfill", "start", "night", images, "--rate", "30"]
    with AnsweringThread(redis_url):
        done = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, timeout=60, check=True, cwd=ROOT
        )
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) >= 1
    assert {"backfill", "answered", "rate", "eta_s", "by_code", "unanswered", "reason"} <= lines[0].keys()
