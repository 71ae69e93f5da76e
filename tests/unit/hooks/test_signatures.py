"""Signatures, verified by the package `standardwebhooks` as a receiver does."""

from __future__ import annotations

import base64
import hashlib
import time
from urllib.parse import parse_qs

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from shiwu.hooks.signatures import aliyun_form, batch_id, read_secret, read_seed, standard_headers, webhook_id

BODY = '{"type":"answer.tagged","data":{"best":"猫"}}'.encode()


def secret(number: int, *, size: int = 24) -> str:
    """A secret as receivers know it."""
    return f"whsec_{base64.b64encode(bytes([number]) * size).decode()}"


def headers(*secrets: str, now_s: float | None = None) -> dict[str, str]:
    """The headers of a delivery."""
    keys = [read_secret(text) for text in secrets]
    now_s = time.time() if now_s is None else now_s
    return standard_headers(keys, delivery_id="k%201.0", timestamp_s=int(now_s), body=BODY)


@pytest.mark.parametrize("known", [1, 2])
def test_both_secrets_of_a_rotation_verify(known: int) -> None:
    """A receiver with either of them accepts the delivery."""
    both = headers(secret(1), secret(2))
    assert Webhook(secret(known)).verify(BODY, both)["data"] == {"best": "猫"}


def test_other_secrets_bodies_and_times_are_refused() -> None:
    """A receiver notices each change of the signed parts."""
    receiver = Webhook(secret(1))
    receiver.verify(BODY, headers(secret(1)))
    wrong = [
        (BODY, headers(secret(3))),
        (BODY + b" ", headers(secret(1))),
        (BODY, headers(secret(1)) | {"webhook-id": "k%202.0"}),
        (BODY, headers(secret(1), now_s=time.time() - 600)),
    ]
    for body, sent in wrong:
        with pytest.raises(WebhookVerificationError):
            receiver.verify(body, sent)


@pytest.mark.parametrize("text", [secret(7, size=24).rstrip("="), secret(7, size=64), f"  {secret(7)}\n"])
def test_secrets_may_lack_padding_and_have_a_line_end(text: str) -> None:
    """As editors and Kubernetes write them."""
    assert set(read_secret(text)) == {7}


@pytest.mark.parametrize("text", ["", "whsec_", secret(7, size=23), secret(7, size=65), secret(7)[6:], "whsec_?!" * 9])
def test_weak_secrets_are_refused_and_not_quoted(text: str) -> None:
    """Too short, too long, without prefix, no base64."""
    with pytest.raises(ValueError, match="expected whsec_") as caught:
        read_secret(text)
    assert len(text) < 10 or text[6:] not in str(caught.value)
    with pytest.raises(ValueError, match="at least 16 characters"):
        read_seed("short")


def test_checksum_of_aliyun_covers_uid_seed_and_content() -> None:
    """SHA-256 of the three texts in this order, in hexadecimal."""
    form = parse_qs(aliyun_form(read_seed(" seed-of-16-chars \n"), uid="1234", body=BODY).decode())
    assert form["content"] == [BODY.decode()]
    assert form["checksum"] == [hashlib.sha256(b"1234seed-of-16-chars" + BODY).hexdigest()]


@pytest.mark.parametrize(
    ("job_id", "expected"), [("k1", "k1.0"), ("a b", "a%20b.0"), ("猫/\n", "%E7%8C%AB%2F%0A.0"), ("a.1", "a.1.0")]
)
def test_webhook_ids_are_safe_in_headers(job_id: str, expected: str) -> None:
    """And differ by id and generation."""
    assert webhook_id(job_id, 0) == expected
    assert webhook_id(job_id, 1) == expected[:-1] + "1"
    assert batch_id(["a.0", "b.0"]) != batch_id(["a.0", "b.1"])
