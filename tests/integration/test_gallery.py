"""`shiwu gallery` with a real Redis, real answers and real thumbnails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.cli import main
from shiwu.cli.base import Exit
from shiwu.contract import RESULT_STREAM, Answer, Lane
from tests.support import pictures
from tests.support.gallery_pages import ParsedPage, rejected, tagged
from tests.support.processes import clean_environment
from tests.support.redis_parts import make_lease_queue, message
from tests.support.servers import S3Server, WorkerProcess

WITHOUT_JINJA = """
import sys
sys.modules["jinja2"] = None
from shiwu.cli import main
from shiwu.cli.base import Exit
main(["gallery", "--jsonl", sys.argv[1]])
"""


def call(redis_url: str, *args: str, **options: Any) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, ["--redis-url", redis_url, "gallery", *args], **options)


def commit(client: redis.Redis, *answers: Answer) -> None:
    """Answer jobs as a worker does."""
    store = AnswerStore(client, token="w")
    for answer in answers:
        client.rpush(Lane.BULK.queue, message(answer.id, Lane.BULK))
        [claimed] = make_lease_queue(client, "w").claim(1).jobs
        record = claimed.key.encode() + b"|" + claimed.raw
        store.write([AnswerEntry(answer=answer, id=answer.id, message=record, is_dead=False)])


def cards(path: Path) -> dict[str, dict[str, Any]]:
    """The cards of a page by id."""
    return {card["id"]: card for card in ParsedPage(path.read_text(encoding="utf-8")).data}


def lines(*answers: Answer) -> bytes:
    """JSON lines."""
    return b"".join(answer.to_json() + b"\n" for answer in answers)


def test_answers_of_a_worker_become_a_page(
    shared_worker: WorkerProcess, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `shiwu tag --json` through a pipe: tags, an error, and a thumbnail from S3 by the sandbox."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    good = s3.put("gallery/good.jpg", pictures.jpeg(pictures.picture("熊猫")))
    url = shared_worker.redis_url
    tagged_ = CliRunner().invoke(main, ["--redis-url", url, "tag", "--json", good, f"{good}.none"])
    page = tmp_path / "page.html"
    made = call(url, "--jsonl", "-", "-o", str(page), input=tagged_.stdout)
    assert made.exit_code == 0, made.output
    assert made.stdout == f"{page}\n"
    by_reference = {card["ref"]: card for card in cards(page).values()}
    assert by_reference[good]["webp"].startswith("UklGR")
    assert by_reference[good]["changed"] is False
    assert len(by_reference[good]["tags"]) == 5
    assert by_reference[f"{good}.none"]["code"] == "source_not_found"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_second_answers_are_matched_by_id_or_reference(redis_url: str, tmp_path: Path) -> None:
    """Of two for one image the last counts; those of other images are left out."""
    page, other = tmp_path / "page.html", tmp_path / "other.jsonl"
    first = lines(tagged("a"), tagged("b", reference="s3://images/b.jpg"), tagged("c"))
    seconds = (
        tagged("x", reference="s3://images/b.jpg", tags={"鸟": 0.5}),
        tagged("a", tags={"狗": 0.5}),
        tagged("y", reference="s3://images/b.jpg", tags={"熊": 0.5}),
        tagged("z"),
    )
    other.write_bytes(lines(*seconds))
    options = ("--jsonl", "-", "-o", str(page), "--no-thumbnails", "--compare", str(other))
    assert call(redis_url, *options, input=first).exit_code == 0
    found = {job_id: card.get("other", {}).get("tags") for job_id, card in cards(page).items()}
    assert found == {"a": [["狗", 0.5, 0.3]], "b": [["熊", 0.5, 0.3]], "c": None}
    other.write_bytes(lines(tagged("z")))
    refused = call(redis_url, *options, input=first)
    assert refused.exit_code == Exit.USAGE
    assert "--compare: expected answers with an id or a reference" in refused.stderr


def test_ids_without_an_answer_are_counted(redis_client: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    """The page with the other answers is written, and the exit code shows the failure."""
    commit(redis_client, tagged("a"), rejected("b"))
    page = tmp_path / "page.html"
    made = call(redis_url, "a", "b", "c", "-o", str(page), "--no-thumbnails")
    assert made.exit_code == 3
    assert "1 of 3 ids have no answer" in made.output
    assert cards(page).keys() == {"a", "b"}
    assert "they were not asked for" in page.read_text(encoding="utf-8")


def test_a_group_reads_each_answer_once(redis_client: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    """What is on a page is acknowledged; what was over the limit comes next."""
    commit(redis_client, *(tagged(f"job-{n}") for n in range(5)))
    page = tmp_path / "page.html"
    args = ("--group", "album", "-o", str(page), "--no-thumbnails")
    first = call(redis_url, *args, "--limit", "3")
    assert first.exit_code == 0, first.output
    assert "the first 3 images" in first.stderr
    assert cards(page).keys() == {"job-0", "job-1", "job-2"}
    assert call(redis_url, *args).exit_code == 0
    assert cards(page).keys() == {"job-3", "job-4"}
    pending: Any = redis_client.xpending(RESULT_STREAM, "album")
    assert pending["pending"] == 0
    empty = call(redis_url, *args)
    assert (empty.exit_code, "got none" in empty.output) == (1, True)


def test_the_last_answer_of_an_id_counts(redis_url: str, tmp_path: Path) -> None:
    """A stream may deliver an answer twice; blank lines and a byte-order mark are no answers."""
    page = tmp_path / "page.html"
    text = b"\xef\xbb\xbf" + lines(rejected("a")) + b"\n" + lines(tagged("b"), tagged("a"))
    made = call(redis_url, "--jsonl", "-", "-o", str(page), "--no-thumbnails", input=text)
    assert made.exit_code == 0, made.output
    assert [(card["id"], card["status"]) for card in cards(page).values()] == [("a", "tagged"), ("b", "tagged")]


@pytest.mark.parametrize(
    ("args", "text", "expected"),
    [
        ((), b"", "only one of them"),
        (("a", "--group", "b"), b"", "only one of them"),
        (("--jsonl", "-"), b'{"id": 5}\n', "--jsonl: line 1: expected an answer as JSON"),
        (("--jsonl", "-"), lines(tagged("a")) + b"nonsense\n", "--jsonl: line 2: expected an answer as JSON"),
    ],
    ids=["nothing", "two-inputs", "no-answer", "no-json"],
)
def test_wrong_usage_gives_one_line(redis_url: str, args: tuple[str, ...], text: bytes, expected: str) -> None:
    """And no page is written."""
    made = call(redis_url, *args, input=text)
    assert made.exit_code == 2
    assert expected in made.output


def test_page_that_cannot_be_written_gives_one_line(redis_url: str) -> None:
    """Its exit code is that of every output that cannot be written."""
    args = ("--jsonl", "-", "-o", "/no/such/folder/x.html", "--no-thumbnails")
    made = call(redis_url, *args, input=lines(tagged("a")))
    assert made.exit_code == 74
    assert "output_failed" in made.output
    assert "No such file" in made.output


def test_missing_thumbnails_do_not_stop_the_page(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With wrong worker settings, both the page and standard error name the reason."""
    monkeypatch.setenv("SHIWU_MAX_BYTES", "many")
    page = tmp_path / "page.html"
    made = call(redis_url, "--jsonl", "-", "-o", str(page), input=lines(tagged("a")))
    assert made.exit_code == 0, made.output
    assert "some thumbnails are missing: SHIWU_MAX_BYTES" in made.stderr
    assert "SHIWU_MAX_BYTES" in page.read_text(encoding="utf-8")


def test_without_jinja_the_command_says_what_to_install(tmp_path: Path) -> None:
    """One line, and no traceback."""
    source = tmp_path / "answers.jsonl"
    source.write_bytes(lines(tagged("a")))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JINJA, str(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=clean_environment({}),
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "shiwu: gallery needs jinja2: run `pip install '.[gallery]'` in a clone of shiwu"
    ]
