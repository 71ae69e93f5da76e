"""A stock Celery application over a cluster, in one of its shards. It needs Celery and shiwu.

    pip install '.[celery]'                                             # in a clone of shiwu
    export SHOP_REDIS_URL='cluster://127.0.0.1:7000/?shards=16'         # the URL of the workers of shiwu
    python celery_shard.py s3://pictures/cat.jpg

`redis://` and `sentinel://` work too. Then shard 0 is the only one.
"""

from __future__ import annotations

import json
import os
import sys

from celery import Celery

from shiwu.celery import options

app = Celery("shop")
app.conf.update(
    options(
        os.environ.get("SHOP_REDIS_URL", "redis://127.0.0.1:6379/0"),
        shard=int(os.environ.get("SHOP_SHARD", "0")),
    )
)
# Without this, a call without `queue` goes to the workers of this application.
app.conf.task_routes = {"shiwu.tag": {"queue": "shiwu.bulk"}}


def main() -> None:
    """Print the tags of an image, as JSON."""
    job = app.send_task("shiwu.tag", kwargs={"image": sys.argv[1], "top_k": 3}, queue="shiwu.interactive", expires=600)
    print(json.dumps(job.get(timeout=60)["tags"], ensure_ascii=False))


if __name__ == "__main__":
    main()
