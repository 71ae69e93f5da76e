"""Ids of questions: what belongs to a question, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from shiwu import RequestError, job_id_for
from shiwu.client.items import question_id, request_id
from shiwu.contract import parse_request

IMAGE = "s3://b/k"
OTHERS: dict[str, Any] = {
    "image": "s3://b/other",
    "labels": "six-zh",
    "top_k": 6,
    "threshold": 0.1,
    "min_cosine": 0.1,
    "head": "sigmoid",
    "want": ["embedding"],
    "callback": "orders",
    "salt": "again",
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_question_has_another_id(name: str) -> None:
    """Each argument counts."""
    assert job_id_for(**({"image": IMAGE} | {name: OTHERS[name]})) != job_id_for(IMAGE)


def test_same_question_has_the_same_id() -> None:
    """Defaults may be written out, white space around labels and the order of `want` do not count."""
    assert job_id_for(IMAGE, top_k=5, threshold=0, want=["tags"], salt="") == job_id_for(IMAGE)
    assert job_id_for(IMAGE, labels=[" cat", "dog "]) == job_id_for(IMAGE, labels=("cat", "dog"))
    assert job_id_for(IMAGE, labels=["dog", "cat"]) != job_id_for(IMAGE, labels=["cat", "dog"])
    both = [job_id_for(IMAGE, want=want) for want in (["tags", "vector"], ["vector", "tags"])]
    assert both[0] == both[1]


def test_id_of_a_question_is_that_of_every_version() -> None:
    """Producers of several versions share questions. A request without metadata has the id of `id_from` too."""
    assert job_id_for(IMAGE) == "ref-4e5d567c9b1c6df962e6c2b6cc902cd93e33bb3e"
    assert job_id_for(IMAGE, labels=["猫", "狗"], top_k=3, salt="x") == "ref-f292d7f926a3dcd7d32a4fea455458168fe1c77c"
    request = parse_request({"image": IMAGE, "labels": "six-zh"})
    assert request_id(request) == job_id_for(IMAGE, labels="six-zh")
    asked = parse_request({"image": IMAGE, "labels": "six-zh", "metadata": {"post": 1}})
    assert question_id(asked) == request_id(request) != request_id(asked)


@pytest.mark.parametrize("wrong", [{"image": "cat.jpg"}, {"top_k": 0}, {"labels": []}, {"salt": 5}])
def test_id_of_an_invalid_question_is_refused(wrong: dict[str, Any]) -> None:
    """As `enqueue` refuses it."""
    with pytest.raises(RequestError):
        job_id_for(**({"image": IMAGE} | wrong))
