"""The labels behind a digest: stored by workers, limited, and shown by the client and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner

from shiwu import Client
from shiwu.broker.known_labels import MAX_REQUEST_SETS, KnownLabels, KnownLabelStore
from shiwu.cli import main
from shiwu.contract import LABELS, LABELS_OF_REQUESTS
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.outcome import CommittedJob
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.service.label_set_recorder import MAX_REMEMBERED, LabelSetRecorder
from tests.support import pictures
from tests.support.redis_parts import message
from tests.support.rule_sets import read_set
from tests.support.servers import S3Server, WorkerProcess
from tests.support.waiting import wait_until


def settled(label_set: LabelSet | None) -> CommittedJob:
    """An answered job with this label set."""
    job = Job(id="x", key="shiwu.bulk", attempt=1, raw=message("x"), moments=StageTimestamps(0.0), label_set=label_set)
    entry: Any = None
    return CommittedJob(job, entry, commit_s=0.0, is_first=True)


def test_digest_of_an_answer_gives_its_labels(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """Labels of a request, and a label set by its name with its templates."""
    reference = s3.put("known-labels", pictures.jpeg(pictures.picture("熊猫")))
    base = ["--redis-url", shared_worker.redis_url, "labels"]
    with Client(shared_worker.redis_url) as client:
        own = client.tag(reference, labels=["熊猫", "汽车"])
        named = client.tag(reference, labels="six-zh")
        assert own.labels is not None
        assert named.labels is not None
        digest = own.labels.digest
        known = wait_until(lambda: client.known_labels(digest), timeout_s=10, what="the note, which follows the answer")
        assert (known.labels, known.name, known.head) == (("熊猫", "汽车"), None, own.labels.head)
        by_name = wait_until(lambda: client.known_labels(str(named.labels and named.labels.digest)), timeout_s=10)
        assert (by_name.name, len(by_name.labels)) == ("six-zh", named.labels.count)
        assert client.known_labels("0" * 32) is None
    shown = CliRunner().invoke(main, [*base, digest])
    assert (shown.exit_code, shown.output) == (0, "熊猫\n汽车\n")
    as_json = json.loads(CliRunner().invoke(main, [*base, digest, "--json"]).output)
    assert as_json["labels"] == ["熊猫", "汽车"]
    unknown = CliRunner().invoke(main, [*base, "nothing"])
    assert unknown.exit_code == 1
    assert "expected the digest" in unknown.output


def test_label_sets_of_requests_are_limited(redis_client: redis.Redis) -> None:
    """In number and in bytes; sets with a name stay."""
    store = KnownLabelStore(redis_client)
    store.note([KnownLabels(digest="named", labels=("a",), name="own")])
    for start in range(0, MAX_REQUEST_SETS + 50, 50):
        store.note([KnownLabels(digest=f"d{n}", labels=(f"label {n}",)) for n in range(start, start + 50)])
    store.note(
        [KnownLabels(digest="d1049", labels=("label 1049",)), KnownLabels(digest="long", labels=("x" * 20_000,))]
    )
    assert redis_client.hlen(LABELS) == MAX_REQUEST_SETS + 1
    assert redis_client.llen(LABELS_OF_REQUESTS) == MAX_REQUEST_SETS
    assert store.find("named") is not None
    assert (store.find("d49"), store.find("long")) == (None, None)
    newest = store.find("d1049")
    assert newest is not None
    assert newest.labels == ("label 1049",)


def test_aliases_are_recorded(redis_client: redis.Redis, tmp_path: Path) -> None:
    """With their labels, so that a program can show tags by its own names."""
    label_set = read_set(tmp_path, labels=["猫", {"label": "狗", "aliases": ["dog", "犬"]}])
    LabelSetRecorder(KnownLabelStore(redis_client)).committed([settled(label_set)])
    found = KnownLabelStore(redis_client).find(label_set.info.digest)
    assert found is not None
    assert (found.labels, found.aliases) == (("猫", "狗"), ((), ("dog", "犬")))


def test_unreadable_label_set_is_not_known(redis_client: redis.Redis) -> None:
    """What cannot be read is not known."""
    redis_client.hset(LABELS, "odd", "not json")
    assert KnownLabelStore(redis_client).find("odd") is None


def test_label_set_is_stored_once(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for many answers with one set; after an error of Redis the worker retries an hour later."""
    store = KnownLabelStore(redis_client)
    calls: list[int] = []
    write = store.note
    monkeypatch.setattr(store, "note", lambda sets: (calls.append(len(sets)), write(sets)))
    recorder = LabelSetRecorder(store)
    first, second = LabelSet(None, ("a",)), LabelSet(None, ("b",))
    recorder.committed(
        [settled(first), settled(None), settled(first), settled(second), settled(LabelSet(None, ("a",)))]
    )
    recorder.committed([settled(second)])
    assert calls == [2]
    redis_client.delete(LABELS)
    redis_client.set(LABELS, "a text")
    recorder.committed([settled(LabelSet(None, ("c",)))])
    recorder.committed([settled(LabelSet(None, ("c",)))])
    assert calls == [2, 1]
    recorder.committed([settled(LabelSet(None, (str(n),))) for n in range(MAX_REMEMBERED + 10)])
    assert len(recorder._recorded_s) == MAX_REMEMBERED
