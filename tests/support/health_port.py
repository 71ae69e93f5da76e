"""Asks a worker's HTTP port."""

from __future__ import annotations

import http.client

from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import LOOPBACK


def probe(port: int, path: str) -> tuple[int, str]:
    """Return status and body; 0 where no server listens."""
    client = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read().decode()
    except OSError:
        return 0, ""
    finally:
        client.close()


def samples(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """/metrics: name and sorted labels → value."""
    text = probe(port, "/metrics")[1]
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family_of_samples in text_string_to_metric_families(text)
        for one in family_of_samples.samples
    }


def value(port: int, name: str, **labels: str) -> float | None:
    """One sample; None where there is none."""
    return samples(port).get((name, tuple(sorted(labels.items()))))
