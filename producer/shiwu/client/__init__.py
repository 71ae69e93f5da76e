"""The client for producers and consumers: `Client`, and the types that it returns.

`shiwu.client.Client` is a public name and is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shiwu.client.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from shiwu.client.client import Client  # noqa: PLC0415 `import shiwu.client.arguments` stays light

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
