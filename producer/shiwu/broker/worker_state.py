"""What each worker tells of itself once a second, under a key that expires: for `shiwu top`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import redis

from shiwu.contract import WORKER_STATE

TTL_MS: Final = 10_000
"""A worker that ended or hangs is not shown for longer."""


class WorkerState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One worker at one moment. Rates and shares are those of the last seconds.

    Every field has a default, because workers of other versions may lack it.
    """

    version: str = ""
    uptime_s: float = 0.0
    images_per_s: float = 0.0
    batch: float = 0.0
    """Mean number of images in a batch; 0 where none was encoded."""
    max_batch: int = 0
    """The largest batch that the worker makes now."""
    limit: str = ""
    """What limits the throughput: arrivals, device, decode, network or messages."""
    device_share: float = 0.0
    """Share of the time in which the device encoded, 0 to 1."""
    in_flight: int = 0
    """Jobs between claim and commit."""
    slots: int = 0
    """Images whose pixels there is room for."""
    loaders: int = 0
    loader_restarts: int = 0
    device: str = ""
    memory_bytes: int = 0
    """On a GPU what the process has reserved of its memory; on a CPU the resident memory of the process."""
    memory_total_bytes: int = 0
    """Memory of the GPU; 0 on a CPU."""
    model: str = ""
    revision: str = ""
    dtype: str = ""
    labels: str = ""
    """Name of the default label set."""
    labels_digest: str = ""


def write_worker_state(client: redis.Redis, name: str, state: WorkerState) -> None:
    """Store the state of the worker `name`; one command, which also replaces a value of a wrong type."""
    client.set(f"{WORKER_STATE}{name}", msgspec.json.encode(state), px=TTL_MS)


def read_worker_states(client: redis.Redis, names: Sequence[str]) -> dict[str, WorkerState]:
    """The states of these workers; a worker that has none, or one that this version cannot read, is left out."""
    if not names:
        return {}
    found: dict[str, WorkerState] = {}
    raws: Any = client.mget([f"{WORKER_STATE}{name}" for name in names])
    for name, raw in zip(names, raws, strict=True):
        with contextlib.suppress(msgspec.MsgspecError):
            if raw is not None:
                found[name] = _DECODER.decode(raw)
    return found


_DECODER: Final[msgspec.json.Decoder[WorkerState]] = msgspec.json.Decoder(WorkerState)
