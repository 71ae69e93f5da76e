"""Signs the body of a delivery: Standard Webhooks (symmetric, `v1`), or the checksum of Aliyun's content moderation."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote, urlencode

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 no secret
MIN_SECRET_BYTES: Final = 24
MAX_SECRET_BYTES: Final = 64
MIN_SEED_CHARS: Final = 16


def read_secret(text: str) -> bytes:
    """The key behind `whsec_<base64>`, with or without its padding.

    Raises:
        ValueError: it has another form or length. The text does not quote it.
    """
    encoded = text.strip().removeprefix(SECRET_PREFIX)
    expected = f"expected {SECRET_PREFIX} and {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes in base64"
    if not text.strip().startswith(SECRET_PREFIX):
        raise ValueError(f"{expected}, got a text without {SECRET_PREFIX}")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except binascii.Error:
        raise ValueError(f"{expected}, got no base64") from None
    if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise ValueError(f"{expected}, got {len(key)} bytes")
    return key


def read_seed(text: str) -> bytes:
    """The seed of Aliyun's checksum.

    Raises:
        ValueError: it is too short. The text does not quote it.
    """
    seed = text.strip()
    if len(seed) < MIN_SEED_CHARS:
        raise ValueError(f"expected a seed of at least {MIN_SEED_CHARS} characters, got {len(seed)}")
    return seed.encode()


def webhook_id(job_id: str, generation: int) -> str:
    """The id of the delivery of one answer: the same at every try, and safe in a header.

    Letters, digits, `-`, `_`, `.` and `~` of the job id stay; other bytes are percent-encoded.
    """
    return f"{quote(job_id, safe='')}.{generation}"


def batch_id(ids: Sequence[str]) -> str:
    """The id of the delivery of several answers: a digest of theirs."""
    return f"batch-{hashlib.sha256(chr(10).join(ids).encode()).hexdigest()[:40]}"


def standard_headers(keys: Sequence[bytes], *, delivery_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks; the signature has one part for each key.

    Args:
        timestamp_s: when this try is made, in seconds since 1970.
    """
    signed = f"{delivery_id}.{timestamp_s}.".encode() + body
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in keys)
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
    }


def aliyun_form(seed: bytes, *, uid: str, body: bytes) -> bytes:
    """The form fields `checksum`, the SHA-256 of uid, seed and content in hexadecimal, and `content`."""
    checksum = hashlib.sha256(uid.encode() + seed + body).hexdigest()
    return urlencode({"checksum": checksum, "content": body}).encode()
