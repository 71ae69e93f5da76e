"""Ids and references of events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiwu.contract.references import split_s3
from shiwu.watch.events import ObjectStored

STORED = ObjectStored(bucket="b", key="k", version="v", etag="e", sequencer="1")


def test_id_is_the_same_in_every_version() -> None:
    """Another id would enqueue an event again after an upgrade."""
    assert STORED.id == "ev.8072845131027176d0c13732be6c990bc26e461d91c29d7d8cc301f442faca0f"


@pytest.mark.parametrize("field", ["bucket", "key", "version", "sequencer"])
def test_id_differs_with_each_part(field: str) -> None:
    """Also where the parts in a row have the same text."""
    assert replace(STORED, **{field: "x"}).id != STORED.id
    assert ObjectStored(bucket="ab", key="c").id != ObjectStored(bucket="a", key="bc").id


def test_etag_counts_where_there_is_no_version() -> None:
    """A version names the content, so the ETag adds nothing to it."""
    assert replace(STORED, etag="x").id == STORED.id
    without = replace(STORED, version="")
    assert replace(without, etag="x").id != without.id


@given(st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=40))
def test_reference_has_the_version_if_asked_for(version: str) -> None:
    """Whatever characters it has."""
    named = replace(STORED, version=version)
    assert named.reference() == "s3://b/k"
    assert split_s3(named.reference(has_version=True)).version == version
    assert replace(STORED, version="").reference(has_version=True) == "s3://b/k"
