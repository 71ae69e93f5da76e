"""Python and label sets of the pages, as readers use them: the embedded model, and photographs in a real store."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from shiwu import Client
from tests.conftest import StartWorker
from tests.support.processes import ROOT
from tests.support.servers import S3Server, WorkerProcess

PHOTOS: Final = ROOT / "demo" / "photos"
KEYS: Final = {"cat.jpg": "cat.jpg", "a.jpg": "two-dogs.jpg", "b.jpg": "palace.jpg"}
"""What the pages name → a photograph."""


def blocks(page: str, language: str = "python") -> list[str]:
    """The blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def run(block: str, **names: Any) -> dict[str, Any]:
    """Run a block as `python -m asyncio` does, with these names; return all names that it has then."""
    code = compile(block, "page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    outcome = eval(code, names)  # noqa: S307 it is our own page
    if inspect.iscoroutine(outcome):
        asyncio.run(outcome)
    return names


@pytest.fixture
def worker(
    start_worker: StartWorker, redis_url: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> WorkerProcess:
    """A worker with the embedded model and the first label set of docs/labels.md; clients find its Redis."""
    for key, photo in KEYS.items():
        s3.put(key, (PHOTOS / photo).read_bytes())
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "page.yaml").write_text(blocks("docs/labels.md", "yaml")[0], encoding="utf-8")
    monkeypatch.setenv("SHIWU_REDIS_URL", redis_url)
    return start_worker(redis_url=redis_url, env=s3.env, model="", labels_dir=folder, default_labels="everyday-zh")


def test_blocks_of_the_pages_run(worker: WorkerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """They are printed with everything that they need, but for what their text says the reader has."""
    asynchronous, coalescing, _ = blocks("docs/clients.md")
    names = run(asynchronous)
    assert names["result"].best == "猫"
    assert "狗" in capsys.readouterr().out

    shown = []
    posts = [SimpleNamespace(image=f"s3://pictures/{key}") for key in ("cat.jpg", "cat.jpg", "a.jpg")]
    run(coalescing, posts=posts, show=lambda post, result: shown.append((post.image, result.id, result.best)))
    assert shown[0] == shown[1]
    assert [best for *_, best in shown] == ["猫", "猫", "狗"]

    [missing] = blocks("docs/reliability.md")
    names = run(missing)
    with Client() as client:
        jobs = [{"id": f"page-{n}", "image": "s3://pictures/cat.jpg"} for n in range(2)]
        client.enqueue(jobs[0]["image"], id=jobs[0]["id"])
        client.wait("page-0", timeout_s=30)
        # No replica confirms anything here, so the last argument is dropped.
        alone = SimpleNamespace(answer=client.answer, enqueue_many=lambda jobs, replicas: client.enqueue_many(jobs))
        assert names["enqueue_what_is_missing"](alone, jobs) == ["page-1"]


def test_first_labels_of_the_readme_know_the_cat(worker: WorkerProcess) -> None:
    """What a reader sees first is right."""
    for page in ("README.md", "README.zh-CN.md"):
        names = run(blocks(page)[0])
        assert (names["result"].status, names["result"].best) == ("tagged", "猫")


def test_label_set_of_the_page_has_bounds_that_photographs_reach(worker: WorkerProcess) -> None:
    """A cat and dogs are tagged, and a palace is not."""
    with Client() as client:
        ids = {client.enqueue(f"s3://pictures/{key}", labels="animals"): key for key in KEYS}
        best = {ids[one.id]: one.best for one in client.wait_many(list(ids), timeout_s=60).values()}
    assert best == {"cat.jpg": "猫", "a.jpg": "狗", "b.jpg": None}
