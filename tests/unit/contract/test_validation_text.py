"""What pydantic refuses is explained as shiwu's own errors are: what was expected, and what came."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from shiwu.contract import Request, RequestError, parse_request
from shiwu.contract.validation_text import expected_and_got

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 0}, "top_k: expected at least 1, got 0"),
    ({"top_k": 1001}, "top_k: expected at most 1000, got 1001"),
    ({"top_k": "many"}, "top_k: expected a whole number, got 'many'"),
    ({"top_k": 1.5}, "top_k: expected a whole number, got 1.5"),
    ({"threshold": 7}, "threshold: expected at most 1, got 7"),
    ({"threshold": "nan"}, "threshold: expected at least 0, got 'nan'"),
    ({"threshold": [1]}, "threshold: expected a number, got a list"),
    ({"min_cosine": -3}, "min_cosine: expected at least -1, got -3"),
    ({"head": "z"}, "head: expected 'softmax' or 'sigmoid', got 'z'"),
    ({"want": []}, "want: expected at least 1 item, got none"),
    ({"want": "x" * 200}, f"want: expected a list, got '{'x' * 79}…"),
    ({"image": 5}, "image: expected a text, got 5"),
    ({"image": None}, "image: expected a text, got nothing"),
    ({"image": {}}, "image: expected a text, got a mapping"),
    ({"want": ["tag"]}, "want: expected 'tags', 'embedding' or 'vector', got 'tag'"),
    ({"labels": []}, "(expected at least 1 item, got none)"),
    ({"labels": ["a", 5]}, "(label 2: expected a text, got 5)"),
    ({"labels": ["\udc80"]}, "(label 1: expected text that UTF-8 can write, got '\\udc80')"),
    ({"labels": ["x" * 101]}, "(label 1: expected a text of at most 100 characters, got 'xxx"),
]


@pytest.mark.parametrize(("fields", "text"), REFUSED, ids=[str(fields)[:40] for fields, _ in REFUSED])
def test_refused_request_says_what_was_expected_and_what_came(fields: dict[str, Any], text: str) -> None:
    """Whatever the field and the kind of the fault."""
    with pytest.raises(RequestError) as caught:
        parse_request({"image": "s3://b/k"} | fields)
    assert text in str(caught.value)


def test_missing_field_is_named() -> None:
    """There is no value to show."""
    with pytest.raises(RequestError, match=r"^image: expected a value, there is none$"):
        parse_request({})


def test_other_faults_of_pydantic_get_the_same_form() -> None:
    """A kind of fault that the table does not list."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(bytes).validate_python(5)
    assert expected_and_got(caught.value.errors()[0]) == "expected a valid bytes, got 5"
    with pytest.raises(ValidationError) as caught:
        Request.model_validate([])
    assert "expected" in expected_and_got(caught.value.errors()[0])
