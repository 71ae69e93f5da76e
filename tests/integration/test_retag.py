"""`shiwu-worker retag`: the tags of a new job without its image, from vectors that a real worker made."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.retag import run

from shiwu.contract import Answer
from shiwu_worker.checkpoints.model_files import EMBEDDED
from tests.conftest import StartWorker
from tests.support.ask import ask
from tests.support.processes import ROOT, run_module
from tests.support.servers import S3Server
from tests.support.vector_parts import made_vectors, write_part

OLD = "name: animals-zh\nlabels: [大熊猫, 狗, 椅子, 鳄鱼]\n"
NEW = """
name: things-zh
min_cosine: 0.02
templates: ["{}", "一张{}的照片"]
labels: [大熊猫, 汽车, 金刚鹦鹉, 虎斑猫, 狗, 船, 宫殿, 椅子, 鳄鱼]
"""
Command = Callable[..., subprocess.CompletedProcess[str]]
PHOTOS = ("cat.jpg", "panda.jpg", "macaw.webp", "palace.jpg", "crocodile.jpg")


def retag(vectors: Path | str, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user runs it."""
    return run_module("shiwu_worker", "retag", "--vectors", str(vectors), *args, timeout_s=170, **settings)


def retag_in_one(vectors: Path | str, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The same without a process of its own for the text tower, which takes most of the time."""
    words = ("tests.support.one_process_retag", "--vectors", str(vectors))
    return run_module(*words, *args, timeout_s=170, **settings)


def kept(answers: list[Answer], path: Path) -> Path:
    """A part with the vectors of answers."""
    vectors = np.stack([np.frombuffer(base64.b64decode(answer.vector or ""), "<f2") for answer in answers])
    model = answers[0].model
    assert model is not None
    return write_part(path, vectors, model=model.id, revision=model.revision)


def comparable(answer: Answer) -> dict[str, Any]:
    """What depends on vector and labels, as JSON."""
    return {
        name: value for name, value in json.loads(answer.to_json()).items() if name in {"tags", "labels", "warnings"}
    }


def nearly(answer: Answer) -> dict[str, Any]:
    """The same with numbers that may differ by 2e-6, because some CPUs round label vectors by the size of the batch."""
    expected = comparable(answer)
    for tag in expected["tags"]:
        tag.update({name: pytest.approx(tag[name], abs=2e-6) for name in ("score", "cosine")})
    return expected


def test_retagged_answers_equal_those_of_new_jobs(
    redis_url: str, s3: S3Server, start_worker: StartWorker, tmp_path: Path
) -> None:
    """Tags, label set and warnings, with least cosines, templates, top_k and threshold."""
    sets = tmp_path / "sets"
    sets.mkdir()
    (sets / "new.yaml").write_text(NEW, encoding="utf-8")
    start_worker(redis_url=redis_url, env=s3.env, model="", labels_dir=str(sets), default_labels="things-zh")
    references = [s3.put(f"retag/{name}", (ROOT / "demo" / "photos" / name).read_bytes()) for name in PHOTOS]
    wants: dict[str, Any] = {"want": ("tags", "vector"), "top_k": 4, "threshold": 0.01}
    old = [ask(redis_url, each, f"old-{n}", labels=("a", "b"), **wants) for n, each in enumerate(references)]
    fresh = [ask(redis_url, each, f"new-{n}", labels="things-zh", **wants) for n, each in enumerate(references)]
    assert [answer.vector for answer in old] == [answer.vector for answer in fresh]
    part = kept(old, tmp_path / "part.parquet")
    options = ["--labels", str(sets / "new.yaml"), "--top-k", "4", "--threshold", "0.01", "--out", "-"]
    done = retag(part, *options)
    assert done.returncode == 0, done.stderr
    found = [Answer.from_json(line.encode()) for line in done.stdout.splitlines()]
    assert [comparable(answer) for answer in found] == [nearly(answer) for answer in fresh]
    assert {len(answer.tags or ()) for answer in found} != {4}
    assert [answer.model and answer.model.revision for answer in found] == [old[0].model and old[0].model.revision] * 5


def test_diff_shows_gains_and_losses_with_examples(embedded_part: Path, tmp_path: Path) -> None:
    """On standard output by label, and as answers for the gallery."""
    for name, text in (("old.yaml", OLD), ("new.yaml", NEW)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    args = ["--labels", str(tmp_path / "new.yaml"), "--diff", str(tmp_path / "old.yaml"), "--top-k", "1"]
    examples = tmp_path / "examples.jsonl"
    out = tmp_path / "answers.jsonl"
    done = retag_in_one(embedded_part, *args, "--min-cosine", "-1", "--out", str(out), "--examples-out", str(examples))
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 50
    lines = done.stdout.splitlines()
    counts = dict(line.split(": ") for line in lines if not line.startswith("  "))
    assert sum(int(text.split("gained ")[1].split(",")[0]) for text in counts.values()) > 0
    assert any(line.startswith("  - 0.") for line in lines)
    answers = [Answer.from_json(line.encode()) for line in examples.read_text().splitlines()]
    assert all(answer.metadata for answer in answers)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == []


@pytest.fixture
def embedded_part(tmp_path: Path) -> Path:
    """Made vectors of the embedded model."""
    from shiwu_worker.checkpoints.model_files import model_folder, model_revision  # noqa: PLC0415 used here only

    revision = model_revision(model_folder(None))
    return write_part(tmp_path / "part.parquet", made_vectors(50, 320), model=EMBEDDED, revision=revision)


@pytest.mark.parametrize(
    ("command", "args", "text"),
    [
        (retag_in_one, ["--labels", "no-such-set"], "expected a YAML file of labels, or one of everyday-zh"),
        (retag, ["--labels", "missing.yaml"], "missing.yaml"),
        (retag_in_one, ["--labels", "six-zh", "--top-k", "0"], "top_k"),
        (retag_in_one, ["--labels", "six-zh", "--head", "sigmoid"], "sigmoid, which needs a bias"),
    ],
)
def test_wrong_options_are_refused(embedded_part: Path, command: Command, args: list[str], text: str) -> None:
    """With the exit code of a wrong setting, and no answers; one error is of the text tower's process."""
    done = command(embedded_part, *args, "--out", "-")
    assert (done.returncode, done.stdout) == (64, "")
    assert text in done.stderr


def test_wrong_setting_ends_with_its_own_error(embedded_part: Path) -> None:
    """Once, and with the exit code of a worker."""
    done = retag(embedded_part, "--labels", "six-zh", "--out", "-", SHIWU_LABEL_CACHE_MB="many")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.count("SHIWU_LABEL_CACHE_MB") == 1


def test_vectors_of_another_revision_are_refused(embedded_part: Path, tmp_path: Path) -> None:
    """Nothing is written; the option leaves them out."""
    folder = tmp_path / "both"
    folder.mkdir()
    embedded_part.rename(folder / "a.parquet")
    write_part(folder / "b.parquet", made_vectors(3, 320), model=EMBEDDED, revision="older")
    out = tmp_path / "answers.jsonl"
    done = retag_in_one(folder, "--labels", "six-zh", "--out", str(out))
    assert done.returncode == 64
    assert f"got 3 of {EMBEDDED} older" in done.stderr
    assert not out.exists()
    done = retag_in_one(folder, "--labels", "six-zh", "--out", str(out), "--skip-other-models")
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 50


@pytest.mark.timeout(400)
def test_vectors_and_answers_may_be_in_a_bucket(embedded_part: Path, s3: S3Server) -> None:
    """With the settings of a worker; the answers are those of the same part on the disk."""
    s3.put("to-retag/2026/part.parquet", embedded_part.read_bytes())
    args = ["--labels", "six-zh", "--out"]
    done = retag_in_one(f"s3://{s3.bucket}/to-retag", *args, f"s3://{s3.bucket}/retagged.jsonl", **s3.env)
    assert done.returncode == 0, done.stderr
    body = s3.new_client().get_object(Bucket=s3.bucket, Key="retagged.jsonl")["Body"].read()
    assert body.decode() == retag_in_one(embedded_part, *args, "-").stdout
    done = retag_in_one(f"s3://{s3.bucket}/none/", *args, "-", **s3.env)
    assert (done.returncode, "expected parts of vectors" in done.stderr) == (64, True)


@pytest.mark.long
def test_memory_does_not_depend_on_the_number_of_vectors(tmp_path: Path) -> None:
    """40,000 vectors and 1,000 labels take 300 MB at most, and with the text tower's process 600 MB."""
    spent = run(tmp_path, vectors=40_000, labels=1000)
    assert spent.code == 0, spent.errors
    assert spent.peak_mb < 300
    assert spent.all_peak_mb < 600
