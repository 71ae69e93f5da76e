"""Configures a stock Celery application for Redis, also for one shard of a cluster. Needs Celery.

Other packages import from here. On a cluster Celery loads `transport` and `backend` by the names that `options` gives.
"""

from shiwu.celery.config import celery_url, options

__all__ = ["celery_url", "options"]
