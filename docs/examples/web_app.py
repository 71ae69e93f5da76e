"""A web application that takes an upload, has it tagged, and answers with the tags.

    pip install fastapi uvicorn boto3 .    # in a clone of shiwu
    export SHIWU_REDIS_URL=redis://127.0.0.1:6379/0 SHOP_BUCKET=pictures    # and the usual variables of AWS
    uvicorn web_app:app

    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/images?wait_s=10'

The image goes to S3 under the digest of its bytes, so the same upload again is the same question, and is answered once.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import boto3
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse

from shiwu import QueueFull, Status, TagResult, WaitTimeout
from shiwu.aio import Client

MAX_BYTES = 20 * 1024 * 1024
STATUS_CODES: dict[str, int] = {Status.TAGGED: 200, Status.REJECTED: 422}
"""Status of an answer → HTTP status; any other one may be tried again later."""


class Shop:
    """What the application holds while it runs: one client for all requests, and the store of the uploads."""

    def __init__(self, client: Client) -> None:
        limits = Config(connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 2})
        self.client = client
        self.bucket = os.environ["SHOP_BUCKET"]
        self._store: Any = boto3.client("s3", endpoint_url=os.environ.get("SHOP_S3_ENDPOINT_URL"), config=limits)

    async def keep(self, image: bytes) -> str:
        """Store an image under the digest of its bytes; return its reference. boto3 blocks, so a thread calls it."""
        key = f"uploads/{hashlib.sha256(image).hexdigest()}"
        await asyncio.to_thread(self._store.put_object, Bucket=self.bucket, Key=key, Body=image)
        return f"s3://{self.bucket}/{key}"

    async def answer(self, job_id: str, *, wait_s: float) -> Response:
        """The answer of a job as JSON, or 202 with its id while there is none."""
        try:
            result: TagResult = await self.client.wait(job_id, timeout_s=wait_s)
        except WaitTimeout:
            return JSONResponse({"id": job_id}, status_code=202, headers={"Location": f"/images/{job_id}"})
        code = STATUS_CODES.get(result.status, 503)
        return Response(result.to_json(), status_code=code, media_type="application/json")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Open the client once: its connections serve all requests of this process."""
    async with Client() as client:
        app.state.shop = Shop(client)
        yield


async def shop_of(request: Request) -> Shop:
    """The shop of the application."""
    shop: Shop = request.app.state.shop
    return shop


app = FastAPI(lifespan=lifespan)
TheShop = Annotated[Shop, Depends(shop_of)]
WaitSeconds = Annotated[float, Query(ge=0, le=30)]


@app.post("/images")
async def tag_upload(request: Request, shop: TheShop, wait_s: WaitSeconds = 10.0) -> Response:
    """Store the image in the body, enqueue it, and wait for its answer."""
    reference = await shop.keep(await read_body(request))
    job_id = await shop.client.enqueue(reference, coalesce=True)
    return await shop.answer(job_id, wait_s=wait_s)


@app.get("/images/{job_id}")
async def read_answer(job_id: str, shop: TheShop, wait_s: WaitSeconds = 0.0) -> Response:
    """The answer of an earlier upload."""
    return await shop.answer(job_id, wait_s=wait_s)


@app.exception_handler(QueueFull)
@app.exception_handler(redis.RedisError)
@app.exception_handler(BotoCoreError)
@app.exception_handler(ClientError)
async def try_later(_: Request, error: Exception) -> Response:
    """The lane is full, or Redis or S3 is unavailable: the caller may send the same request again."""
    return JSONResponse({"error": type(error).__name__}, status_code=503, headers={"Retry-After": "5"})


async def read_body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        HTTPException: it is empty, or larger than MAX_BYTES.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"expected an image of at most {MAX_BYTES} bytes")
    if not body:
        raise HTTPException(400, "expected an image in the body, got none")
    return bytes(body)
