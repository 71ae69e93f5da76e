"""The asyncio client has the methods of the blocking one, with the same arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from shiwu import Client, aio

ITERATING = {"enqueue_many", "as_answered", "results", "dead_letters"}


def methods() -> Iterator[str]:
    """The public methods of the blocking client."""
    yield from (name for name, value in vars(Client).items() if not name.startswith("_") and callable(value))


@pytest.mark.parametrize("name", [name for name in methods() if name != "close"])
def test_method_has_the_arguments_of_the_blocking_client(name: str) -> None:
    """Names, kinds, defaults and order; it is a coroutine, or gives an asynchronous iterator."""
    theirs, ours = getattr(Client, name), getattr(aio.Client, name)
    found, expected = (
        [(each.name, each.kind, each.default) for each in inspect.signature(method).parameters.values()]
        for method in (ours, theirs)
    )
    assert found == expected
    assert inspect.iscoroutinefunction(ours) is (name not in ITERATING)


def test_constructor_has_the_arguments_of_the_blocking_client() -> None:
    """And `aclose` stands for `close`."""
    found, expected = (
        [(each.name, each.default) for each in inspect.signature(client).parameters.values()]
        for client in (aio.Client, Client)
    )
    assert found == expected
    public = {name for name in vars(aio.Client) if not name.startswith("_")}
    assert public == {*methods(), "aclose"} - {"close"}
