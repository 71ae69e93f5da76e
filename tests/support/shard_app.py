"""The application of `plain_app` in one shard of a cluster: `celery -A tests.support.shard_app worker`."""

from __future__ import annotations

import os

from shiwu.celery import options
from tests.support.plain_app import URL, app

app.conf.update(options(URL, shard=int(os.environ["PLAIN_SHARD"])))
