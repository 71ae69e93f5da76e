"""`shiwu gallery --backfill`: the results of a backfill as a page, from both formats and from a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shiwu.cli import main
from tests.support.answering import AnsweringThread
from tests.support.backfills import write_list
from tests.support.gallery_pages import ParsedPage
from tests.support.servers import S3Server


def shiwu(redis_url: str, *args: str) -> Any:
    """A command in this process."""
    return CliRunner().invoke(main, ["--redis-url", redis_url, *args])


def start(redis_url: str, folder: Path, *args: str) -> None:
    """A backfill `night` of 20 images, of which one is broken."""
    images = write_list(folder / "list.jsonl", 20, broken_every=20)
    with AnsweringThread(redis_url):
        done = shiwu(redis_url, "backfill", "start", "night", str(images), "--part-rows", "8", *args)
    assert done.exit_code == 0, done.output


def cards(page: Path) -> list[dict[str, Any]]:
    """The cards of a page."""
    return list(ParsedPage(page.read_text(encoding="utf-8")).data)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_parts_of_a_backfill_become_a_page(redis_url: str, tmp_path: Path, kind: str) -> None:
    """All of them, with tags and errors, up to the limit."""
    start(redis_url, tmp_path, "--out", str(tmp_path / "out"), "--format", kind)
    page = tmp_path / "page.html"
    made = shiwu(redis_url, "gallery", "--backfill", "night", "-o", str(page), "--no-thumbnails")
    assert made.exit_code == 0, made.output
    found = {card["ref"]: card for card in cards(page)}
    assert found.keys() == {f"s3://b/{n:05}{'-broken' * (n == 0)}.jpg" for n in range(20)}
    assert found["s3://b/00000-broken.jpg"]["code"] == "source_not_found"
    assert found["s3://b/00001.jpg"]["tags"][0][0] == "猫"
    fewer = shiwu(redis_url, "gallery", "--backfill", "night", "-o", str(page), "--no-thumbnails", "--limit", "5")
    assert (fewer.exit_code, len(cards(page))) == (0, 5)


def test_parts_in_a_bucket_become_a_page(
    redis_url: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the settings of a worker."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    start(redis_url, tmp_path, "--out", f"s3://{s3.bucket}/{tmp_path.name}/")
    page = tmp_path / "page.html"
    made = shiwu(redis_url, "gallery", "--backfill", "night", "-o", str(page), "--no-thumbnails")
    assert made.exit_code == 0, made.output
    assert len(cards(page)) == 20


def test_backfill_without_results_is_told(redis_url: str, tmp_path: Path) -> None:
    """An unknown name, no output, and results that are on another machine."""
    start(redis_url, tmp_path)
    unknown = shiwu(redis_url, "gallery", "--backfill", "day")
    assert (unknown.exit_code, "expected the name of a backfill" in unknown.output) == (2, True)
    counts = shiwu(redis_url, "gallery", "--backfill", "night")
    assert (counts.exit_code, "night only counts its answers" in counts.output) == (2, True)
    both = shiwu(redis_url, "gallery", "--backfill", "night", "--group", "g")
    assert (both.exit_code, "only one of them" in both.output) == (2, True)
