"""Fetchers that may reach servers of this machine."""

from __future__ import annotations

from shiwu.network.http_client import HttpClient
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.limits import FetchLimits, S3Options
from shiwu_worker.stages.fetch.fetcher import Fetcher


def make_fetcher(
    *,
    total_timeout_s: float = 10.0,
    access: AccessRules | None = None,
    max_redirects: int = 3,
    user_agent: str = "shiwu",
    min_bytes_per_s: int = 8192,
    min_rate_after_s: float = 5.0,
) -> Fetcher:
    """A fetcher with small limits that may reach this machine's servers."""
    limits = FetchLimits(
        max_bytes=10_000,
        total_timeout_s=total_timeout_s,
        connect_timeout_s=5.0,
        read_timeout_s=2.0,
        max_redirects=max_redirects,
        min_bytes_per_s=min_bytes_per_s,
        min_rate_after_s=min_rate_after_s,
    )
    rules = access or AccessRules(allow_hosts=("127.0.0.1",))
    web = HttpClient(rules, threads=2, connect_timeout_s=5.0, read_timeout_s=2.0, user_agent=user_agent)
    return Fetcher(s3=S3Options(None, "us-east-1"), http_client=web, access=rules, limits=limits, threads=2)
