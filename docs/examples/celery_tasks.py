"""A Celery application whose tasks have images tagged. It needs Celery, and nothing of shiwu.

    pip install 'celery[redis]'
    export SHOP_REDIS_URL=redis://127.0.0.1:6379/0    # the Redis of the workers of shiwu
    celery -A celery_tasks worker -Q celery           # without -Q it could take the jobs of shiwu

The workers of shiwu must allow what follows a job: SHIWU_CALLBACK_TASKS=shop.save_tags,shop.note_failure
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.utils.log import get_task_logger

URL = os.environ.get("SHOP_REDIS_URL", "redis://127.0.0.1:6379/0")
log = get_task_logger(__name__)
app = Celery("shop", broker=URL, backend=URL)
# Without this, a call without `queue` goes to the workers of this application.
app.conf.task_routes = {"shiwu.tag": {"queue": "shiwu.bulk"}}


@app.task(name="shop.publish")
def publish(product: str, image: str) -> str:
    """Have the image of a product tagged; return the job id. It does not wait: `save_tags` gets the answer."""
    job = app.send_task(
        "shiwu.tag",
        kwargs={"image": image, "top_k": 3},
        queue="shiwu.interactive",
        expires=600,
        link=save_tags.s(product=product),
        link_error=note_failure.s(product=product),
    )
    return str(job.id)


@app.task(name="shop.save_tags")
def save_tags(answer: dict[str, Any], *, product: str) -> None:
    """Store the tags of a product."""
    log.info("%s is tagged %s", product, ", ".join(tag["label"] for tag in answer["tags"]))


@app.task(name="shop.note_failure")
def note_failure(*error: Any, product: str) -> None:
    """Store that a product has no tags; the arguments are those that Celery gives to an errback."""
    log.warning("%s has no tags: %s", product, error)
