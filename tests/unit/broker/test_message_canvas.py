"""The callbacks of a message, as they were sent."""

from __future__ import annotations

from typing import Any

import pytest

from shiwu.broker.message_reader import MAX_GROUP, read_canvas, read_message
from shiwu.contract import ErrorCode, RequestError
from tests.support.messages import canvas_message


@pytest.mark.parametrize(
    ("embed", "parts"),
    [
        ({}, ()),
        ({"callbacks": [], "errbacks": None, "chain": [], "chord": None}, ()),
        ({"callbacks": [{"task": "a"}], "errbacks": None, "chain": [], "chord": None}, ("callbacks",)),
        (
            {
                "callbacks": [{"task": "a"}],
                "errbacks": [{"task": "b"}],
                "chain": [{"task": "c"}],
                "chord": {"task": "d"},
            },
            ("callbacks", "errbacks", "chain", "chord"),
        ),
    ],
)
def test_parts_of_a_canvas_are_named(embed: dict[str, Any], parts: tuple[str, ...]) -> None:
    """Those that hold something; a job without them is not checked for callbacks."""
    assert set(read_message(canvas_message(embed)).canvas) == set(parts)


def test_canvas_is_read_as_it_was_sent() -> None:
    """All parts, and where the job stands in its group; what is missing is empty."""
    a, b, c, d = ({"task": name} for name in "abcd")
    embed = {"callbacks": [a], "errbacks": [b], "chain": [c, a], "chord": d}
    canvas = read_canvas(canvas_message(embed, group="g", group_index=0, root_id="r"))
    assert (canvas.callbacks, canvas.errbacks, canvas.chain, canvas.chord) == ((a,), (b,), (c, a), d)
    assert (canvas.group, canvas.group_index, canvas.root_id) == ("g", 0, "r")
    empty = read_canvas(canvas_message({"callbacks": None}))
    assert (empty.callbacks, empty.errbacks, empty.chain, empty.chord) == ((), (), (), None)
    assert read_canvas(canvas_message(embed, group_index=-1)).group_index is None


@pytest.mark.parametrize(
    ("embed", "headers", "text"),
    [
        ({"callbacks": {"task": "a"}}, {}, "callbacks, errbacks and chain as lists of signatures"),
        ({"chain": ["a"]}, {}, "callbacks, errbacks and chain as lists of signatures"),
        ({"chord": [{"task": "a"}]}, {}, "expected chord as a signature"),
        ({}, {"group": "g" * 256}, "group and root_id as texts of at most 255 bytes"),
        ({}, {"root_id": "猫" * 86}, "group and root_id as texts of at most 255 bytes"),
        ({}, {"root_id": 5}, "group and root_id as texts of at most 255 bytes"),
    ],
)
def test_canvas_that_is_none_is_refused(embed: dict[str, Any], headers: dict[str, Any], text: str) -> None:
    """With what is wrong."""
    with pytest.raises(RequestError, match=text) as caught:
        read_canvas(canvas_message(embed, **headers))
    assert caught.value.code is ErrorCode.MALFORMED_MESSAGE


@pytest.mark.parametrize("index", [0, 5, MAX_GROUP - 1, MAX_GROUP, -1, True, "5", 1.0, None])
def test_index_in_a_group_is_a_whole_number(index: Any) -> None:
    """Within bounds; anything else counts as none."""
    is_index = type(index) is int and 0 <= index < 2**31
    found = read_canvas(canvas_message({}, group_index=index)).group_index
    assert found == (index if is_index else None)
    assert not isinstance(found, bool)


def test_names_of_a_canvas_may_have_255_bytes() -> None:
    """As the ids of jobs."""
    canvas = read_canvas(canvas_message({}, group="g" * 255, root_id="猫" * 85))
    assert (canvas.group, canvas.root_id) == ("g" * 255, "猫" * 85)
