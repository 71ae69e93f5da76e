"""The Celery task that feeds LitServe: `celery -A bench.litserve_app:app worker --pool=threads …`."""

from __future__ import annotations

import os
from typing import Any, Final

import urllib3

from bench.celery_app import TASK, make_app
from bench.sources import fetch

URL: Final = os.environ["BENCH_LITSERVE_URL"]
# The server closes a connection that is idle for some seconds, as during the turns of other systems.
RETRY: Final = urllib3.Retry(connect=0, read=3, status=0, redirect=0, allowed_methods=None)
pool: Final = urllib3.PoolManager(maxsize=int(os.environ["BENCH_CONCURRENCY"]), retries=RETRY, timeout=600)
app = make_app("litserve")


@app.task(name=TASK, shared=False)  # type: ignore[untyped-decorator]  # celery has no types
def tag(image: str) -> dict[str, Any]:
    """Fetch the image, post it, and return the answer."""
    headers = {"Content-Type": "application/octet-stream"}
    answer = pool.request("POST", f"{URL}/predict", body=fetch(image), headers=headers)
    if answer.status != 200:
        raise RuntimeError(f"LitServe answered {answer.status}: {answer.data[:200]!r}")
    found: dict[str, Any] = answer.json()
    return found
