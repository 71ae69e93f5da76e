"""What `celery -A shiwu_worker.app worker` loads: `app`, made when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery


def __getattr__(name: str) -> Celery:
    """`shiwu_worker.app.app`; the settings are read now, so that importing this module reads none."""
    if name == "app":
        from shiwu_worker.celery_worker.worker_app import load_app  # noqa: PLC0415 as the docstring says

        return load_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
