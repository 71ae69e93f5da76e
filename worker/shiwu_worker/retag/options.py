"""What `shiwu-worker retag` was asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from shiwu.contract import Head, Request, parse_request


@dataclass(frozen=True, kw_only=True)
class RetagOptions:
    """`top_k`, `threshold`, `min_cosine` and `head` are as in a request."""

    vectors: str
    """A folder, a file or s3://bucket/prefix/."""
    labels: str
    """A YAML file, or the name of a label set that a worker would know."""
    out: str
    """A file of JSON lines, also s3://bucket/key, or - for standard output."""
    model: str | None = None
    diff: str | None = None
    examples_out: str | None = None
    top_k: int = 5
    threshold: float = 0.0
    min_cosine: float | None = None
    head: Head | None = None
    is_skipping: bool = False
    """Leave out vectors of other models; otherwise they are an error."""


def request_of(options: RetagOptions) -> Request:
    """The request of a new job with these options.

    Raises:
        RequestError: an option is out of its bounds.
    """
    fields = {"top_k": options.top_k, "threshold": options.threshold, "min_cosine": options.min_cosine}
    return parse_request({"image": "s3://any/image", **fields})  # no image is read
