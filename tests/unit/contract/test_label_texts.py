"""The text of `invalid_labels` names the label that is wrong, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from shiwu.contract import MAX_INLINE_LABELS, MAX_LABEL_CHARS, ErrorCode, RequestError, parse_request
from shiwu.contract.request import labels_error


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (["a", "b", "b"], "expected every label once, got 'b' again"),
        (["fine", "a\nb"], "in 'a\\nb'"),
        ("no such name!", "got 'no such name!': a name has 1 to 64 letters"),
        (["a", ""], "(label 2: "),
        (["a", "b", "x" * (MAX_LABEL_CHARS + 1)], "(label 3: "),
        (["a", 5], "(label 2: "),
        ([], f"list of 1 to {MAX_INLINE_LABELS} different labels of 1 to {MAX_LABEL_CHARS} characters ("),
        (5, f"list of 1 to {MAX_INLINE_LABELS} different labels"),
    ],
)
def test_text_names_the_wrong_label(labels: Any, text: str) -> None:
    """Whether the labels are a list, a name, or neither; also beside another invalid field."""
    for others in ({}, {"top_k": "x"}, {"metadata": "x" * 100_000}):
        with pytest.raises(RequestError) as caught:
            parse_request({"image": "s3://b/k", "labels": labels, **others})
        assert caught.value.code is ErrorCode.INVALID_LABELS
        assert text in str(caught.value)


def test_most_labels_of_most_characters_are_allowed() -> None:
    """The bounds belong to what is allowed."""
    words = [f"{number:0{MAX_LABEL_CHARS}d}" for number in range(MAX_INLINE_LABELS)]
    assert labels_error(words) is None
    assert parse_request({"image": "s3://b/k", "labels": words}).labels == tuple(words)
    with pytest.raises(RequestError):
        parse_request({"image": "s3://b/k", "labels": [*words, "one more"]})
