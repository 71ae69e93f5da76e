"""The client for programs on asyncio: `Client`, and the items of its results stream.

    from shiwu.aio import Client

    async with Client() as client:
        job_id = await client.enqueue("s3://pictures/cat.jpg", labels="six-zh")
        print((await client.wait(job_id, timeout_s=30)).best)

It has the names and the semantics of `shiwu.Client`, and needs nothing that shiwu does not install anyway.
"""

from __future__ import annotations

from shiwu.aio.client import Client
from shiwu.aio.items import StreamItem, UnreadableItem

__all__ = ["Client", "StreamItem", "UnreadableItem"]
