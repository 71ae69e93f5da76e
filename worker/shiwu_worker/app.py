"""The module that `celery -A shiwu_worker.app worker` loads; it makes `app` on first access."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery


def __getattr__(name: str) -> Celery:
    """Return `shiwu_worker.app.app`. The settings are read here, so that importing this module reads none."""
    if name == "app":
        from shiwu_worker.celery_worker.worker_app import load_app  # noqa: PLC0415 as the docstring says

        return load_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
