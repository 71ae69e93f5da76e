"""The pages that are made from the code are up to date, and real messages pass the JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from shiwu.contract import Answer, ErrorCode, ErrorInfo, Request, RequestError, Status, Tag, parse_request
from shiwu.schema import schemas
from shiwu_worker.commands.error_docs import page
from shiwu_worker.config.reference import settings_page

FOLDER = Path(__file__).parents[2] / "docs" / "schema"


@pytest.mark.parametrize("name", sorted(schemas()))
def test_the_schema_files_are_current(name: str) -> None:
    """`python -m shiwu.schema docs/schema` was run after the last change."""
    assert (FOLDER / name).read_text(encoding="utf-8") == schemas()[name]


def test_the_page_of_errors_is_current() -> None:
    """`make docs` was run after the last change of a table."""
    assert (FOLDER.parent / "errors.md").read_text(encoding="utf-8") == page()


def test_the_page_of_settings_is_current() -> None:
    """`make docs` was run after the last change of a setting."""
    assert (FOLDER.parent / "settings.md").read_text(encoding="utf-8") == settings_page()


def test_what_we_write_passes_the_schema() -> None:
    """A full answer, a failed one and a request."""
    schema = json.loads((FOLDER / "answer.schema.json").read_text(encoding="utf-8"))
    answers = [
        Answer(id="x", status=Status.TAGGED, tags=(Tag(label="猫", score=0.5, cosine=0.1),), metadata={"a": [1]}),
        Answer(id="x", status=Status.FAILED, error=ErrorInfo(code=ErrorCode.ENCODE_FAILED, message="m")),
    ]
    for answer in answers:
        jsonschema.validate(json.loads(answer.to_json()), schema)
    request = Request(image="s3://b/k", labels=("猫", "狗"))
    jsonschema.validate(
        json.loads(request.to_json()), json.loads((FOLDER / "request.schema.json").read_text(encoding="utf-8"))
    )


@pytest.mark.parametrize("labels", ["six-zh", "人物", "ψυχή-2.1_b", "々x", ["猫\u200d", "two words"], "x" * 64])
def test_schema_and_code_accept_the_same_labels(labels: object) -> None:
    """A producer in another language can check its messages with the schema."""
    jsonschema.validate({"image": "s3://b/k", "labels": labels}, json.loads(schemas()["request.schema.json"]))
    assert parse_request({"image": "s3://b/k", "labels": labels}).labels


REFUSED = [
    "",
    "-a",
    ".a",
    "a b",
    "a\tb",
    "a\u202eb",
    "猫，狗",
    "猫,狗",
    "a/b",
    "“a”",
    "　a",
    "x" * 65,
    ["a\nb"],
    ["a\u2028b"],
    ["a\u200bb"],
    ["a\ufeffb"],
]


@pytest.mark.parametrize("labels", REFUSED)
def test_schema_and_code_refuse_the_same_labels(labels: object) -> None:
    """Names without spaces and punctuation, labels without control characters."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"image": "s3://b/k", "labels": labels}, json.loads(schemas()["request.schema.json"]))
    with pytest.raises(RequestError):
        parse_request({"image": "s3://b/k", "labels": labels})
