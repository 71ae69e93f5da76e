"""The command `shiwu`: tag images, enqueue jobs, read answers, show queues, requeue dead letters, sweep."""

from __future__ import annotations

from shiwu.cli import ask, dead, explain, gallery, inspect, labels, migrate, shards, sweep
from shiwu.cli.base import main

__all__ = ["ask", "dead", "explain", "gallery", "inspect", "labels", "main", "migrate", "shards", "sweep"]
