"""Which buckets the rules of an operator allow."""

from __future__ import annotations

import pytest

from shiwu_worker.policy.access_rules import SPECIAL_BUCKETS, AccessRules, allows_bucket, is_special_bucket


@pytest.mark.parametrize("suffix", SPECIAL_BUCKETS)
def test_suffix_that_aws_reserves_is_special(suffix: str) -> None:
    """In any case of letters, and only at the end."""
    assert is_special_bucket(f"images{suffix}") is True
    assert is_special_bucket(f"IMAGES{suffix.upper()}") is True
    assert is_special_bucket(f"images{suffix}x") is False


@pytest.mark.parametrize(
    ("allowed", "bucket", "is_allowed"),
    [
        ((), "images", True),
        ((), "images--x-s3", False),
        (("images*",), "images-2026", True),
        (("images*",), "images--x-s3", False),
        (("images--x-s3",), "images--x-s3", True),
        (("*--x-s3",), "images--x-s3", True),
    ],
)
def test_special_bucket_needs_an_entry_for_it(allowed: tuple[str, ...], bucket: str, *, is_allowed: bool) -> None:
    """One that ends with such a suffix itself; other buckets need none where none is listed."""
    assert allows_bucket(AccessRules(allow_buckets=allowed), bucket) is is_allowed
