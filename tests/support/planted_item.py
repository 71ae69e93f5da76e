"""An image tower that reads a number back to the host, as `.item()` in a model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def with_item(eager_tower: Callable[[Any], Callable[..., Any]]) -> Callable[[Any], Callable[..., Any]]:
    """`DeviceModel.eager_tower`, whose towers read a number back in each pass and give the same vectors."""

    def planted(self: Any) -> Callable[..., Any]:
        tower = eager_tower(self)

        def run(raw: Any) -> Any:
            return tower(raw) * (1.0 + 0.0 * raw.sum().item())

        return run

    return planted
