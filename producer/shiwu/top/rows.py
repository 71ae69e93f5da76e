"""The figures of a look as the texts of tables, for the screen and for `--once`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shiwu.broker.worker_state import WorkerState
from shiwu.cli.terminal import span_text
from shiwu.contract import Lane, printable
from shiwu.top.look import BackfillLook, FailureLook, LaneLook, Letter, Look, ShardLook, StageLook, WorkerLook

SPARKS: Final = "▁▂▃▄▅▆▇█"
BAR: Final = "█"
NONE: Final = "–"
"""Stands for a figure that is not known."""
LANE_HEADINGS: Final = ("lane", "waiting", "claimed", "in/s", "out/s", "oldest", "backlog")
STAGE_HEADINGS: Final = ("stage", "p50", "p95", "share")
WORKER_HEADINGS: Final = (
    *("worker", "img/s", "batch", "jobs", "busy", "limit", "device", "memory"),
    *("loaders", "model", "labels", "version", "up"),
)
FAILURE_HEADINGS: Final = ("code", "count", "newest", "stage")
BACKFILL_HEADINGS: Final = ("backfill", "phase", "done/sent", "no tag")
SHARD_HEADINGS: Final = (
    "shard",
    *(lane.value for lane in Lane),
    "claimed",
    "delayed",
    "dead",
    "out/s",
    "node",
    "problem",
)
LETTER_HEADINGS: Final = ("id", "ended", "stage", "attempts", "worker", "image")


def number(value: float) -> str:
    """At most seven characters: `12.3`, `1,234`, `123k`, `12.3M`."""
    if value != round(value) and value < 100:
        return f"{value:.1f}"
    if value < 100_000:
        return f"{value:,.0f}"
    return f"{value / 1000:.0f}k" if value < 999_500 else f"{value / 1_000_000:.1f}M"


def size(n_bytes: float) -> str:
    """A number of bytes: `512 MB`, `12.3 GB`."""
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"


def spark(values: Sequence[int], *, width: int) -> str:
    """A line of bars for the values, the newest at the right; each column has the largest of its part."""
    if not values or width <= 0:
        return ""
    count = min(width, len(values))
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    columns = [max(part) for part in parts]
    most = max(columns)
    if most == 0:
        return SPARKS[0] * count
    # Only an empty lane has the lowest bar.
    return "".join(SPARKS[0 if value == 0 else 1 + (value * 6) // most] for value in columns)


def bar(share: float, *, width: int) -> str:
    """A bar for a share of 0 to 1."""
    return BAR * round(min(1.0, max(0.0, share)) * width)


def lane_cells(look: LaneLook) -> tuple[str, ...]:
    """The cells of a lane, without its sparkline."""
    return (
        look.lane.value,
        number(look.waiting),
        number(look.claimed),
        _known(look.in_per_s),
        _known(look.out_per_s),
        NONE if look.oldest_s is None else span_text(look.oldest_s * 1000),
        span_text(look.backlog_s * 1000) if look.waiting else NONE,
    )


def stage_cells(look: StageLook) -> tuple[str, ...]:
    """The cells of a stage, without its bar."""
    return look.stage, span_text(look.p50_ms), span_text(look.p95_ms), f"{look.share:.0%}"


def worker_cells(look: WorkerLook) -> tuple[str, ...]:
    """The cells of a worker."""
    state = look.state
    if state is None:
        return (printable(look.name), *([NONE] * (len(WORKER_HEADINGS) - 1)))
    return (
        printable(look.name),
        number(state.images_per_s),
        f"{state.batch:.0f}/{state.max_batch}",
        f"{state.in_flight}/{state.slots}",
        f"{state.device_share:.0%}",
        printable(state.limit),
        printable(state.device.removeprefix("NVIDIA ")),
        _memory(state),
        f"{state.loaders} ({state.loader_restarts} restarted)" if state.loader_restarts else str(state.loaders),
        printable(f"{state.model}@{state.revision[:12]} {state.dtype}"),
        printable(f"{state.labels} {state.labels_digest[:8]}"),
        printable(state.version),
        span_text(state.uptime_s * 1000),
    )


def failure_cells(look: FailureLook) -> tuple[str, ...]:
    """The cells of an error code."""
    return printable(look.code), number(look.count), span_text(look.newest_s * 1000), printable(look.stage)


def backfill_cells(look: BackfillLook) -> tuple[str, ...]:
    """The cells of a backfill."""
    phase = look.phase if look.is_run or look.phase != "running" else "not run"
    progress = f"{number(look.answered)}/{number(look.sent)}"
    return printable(look.name), printable(phase), progress, number(look.without_tags)


def shard_cells(look: ShardLook) -> tuple[str, ...]:
    """The cells of a shard."""
    return (
        str(look.index),
        number(look.interactive),
        number(look.bulk),
        number(look.claimed),
        number(look.delayed),
        number(look.dead),
        _known(look.answers_per_s),
        printable(look.node) or NONE,
        printable(look.problem or ""),
    )


def letter_cells(letter: Letter, *, now_ms: float) -> tuple[str, ...]:
    """The cells of a dead letter."""
    result = letter.result
    return (
        printable(letter.id),
        f"{span_text(max(0.0, now_ms - letter.died_ms))} ago",
        printable(letter.stage),
        str(result.attempts),
        printable(result.worker),
        printable(result.image.reference) if result.image is not None else "",
    )


def totals_line(look: Look) -> str:
    """What is in no lane, in one line."""
    parts = [f"delayed {number(look.delayed)}", f"quarantined {number(look.quarantined)}"]
    parts += [f"dead letters {number(look.dead)}", f"answered {number(look.answered)}"]
    if look.answers_per_s is not None:
        parts.append(f"{number(look.answers_per_s)} each second")
    return ", ".join(parts)


def problem_line(look: Look) -> str:
    """Why there are no new figures; empty where Redis answers."""
    if look.problem is None:
        return ""
    return f"Redis does not answer for {span_text(look.away_s * 1000)}: {printable(look.problem)}"


def workers_text(look: Look) -> str:
    """How many workers there are."""
    return "1 worker" if len(look.workers) == 1 else f"{len(look.workers)} workers"


def failures_heading(look: Look) -> str:
    """What the failures are counted of."""
    if look.dead_read < look.dead:
        return f"code, newest {look.dead_read}"
    return FAILURE_HEADINGS[0]


def _known(value: float | None) -> str:
    return NONE if value is None else number(value)


def _memory(state: WorkerState) -> str:
    used = size(state.memory_bytes)
    return f"{used}/{size(state.memory_total_bytes)}" if state.memory_total_bytes else used
