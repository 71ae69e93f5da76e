"""What a GPU must show: each floor, what was found, and whether that meets it.

Imports the standard library only, because it runs where no wheels are installed too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from bench.card.plan import LOADERS

Steps = Mapping[str, Mapping[str, Any]]
"""Name of a step → its result, of all stages."""
Outcome = Literal["met", "MISSED", "not shown"]
MIN_IMAGES_PER_S: Final = 12_000.0
MAX_MS: Final = 1.0
MIN_SHARE: Final = 0.9
MIN_SCHEDULES: Final = 20_000
FAULTS: Final = {
    "item": "a planted .item(): no graphs, and all answers",
    "assert": "a lost GPU: exit code 67, jobs released",
    "memory": "too little memory, at the start and later",
    "sigterm": "SIGTERM under load: jobs released",
    "tests": "make gpu",
}


@dataclass(frozen=True, slots=True)
class Floor:
    """One floor."""

    name: str
    wanted: str
    found: str
    outcome: Outcome


def at(found: Any, *keys: str) -> Any:
    """The value under these keys; None where one is missing."""
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def ways_of(steps: Steps, name: str) -> list[Mapping[str, Any]]:
    """The ways of running a model that a step of `bench encode` has measured, in FP16."""
    ways = at(steps.get(name), "figures", "encode", "figures", "ways") or []
    return [way for way in ways if way["dtype"] == "float16"]


def service_rate(steps: Steps, name: str) -> float | None:
    """Images a second of a step of `bench service`."""
    rows = at(steps.get(name), "figures", "service", "figures", "rows")
    return float(rows[0]["per_second"]) if rows else None


def decode_ceiling(steps: Steps, loaders: int) -> float | None:
    """Images a second that so many processes decode, which do nothing else."""
    found = at(steps.get("decoding"), "figures", "figures", f"{loaders} processes, images/s")
    return float(found) if isinstance(found, int | float) else None


def floors(steps: Steps) -> Iterator[Floor]:
    """All floors, compared with the results of all stages."""
    sizes = [size for way in ways_of(steps, "vit-b-16") for size in way["rungs"]]
    best = max((float(size["per_second"]) for size in sizes), default=None)
    one_ms = min((float(size["batch_ms"]) for size in sizes if size["size"] == 1), default=None)
    yield _floor(
        "ViT-B/16, FP16, the model alone at its best batch size",
        f"≥ {MIN_IMAGES_PER_S:,.0f} images/s",
        None if best is None else f"{best:,.0f} images/s",
        is_met=best is not None and best >= MIN_IMAGES_PER_S,
    )
    yield _floor(
        "ViT-B/16, FP16, one image",
        f"≤ {MAX_MS:g} ms",
        None if one_ms is None else f"{one_ms:.3f} ms",
        is_met=one_ms is not None and one_ms <= MAX_MS,
    )
    yield _service(steps, best)
    yield _schedules(steps)
    for name, about in FAULTS.items():
        yield _fault(steps, name, about)


def _floor(name: str, wanted: str, found: str | None, *, is_met: bool) -> Floor:
    if found is None:
        return Floor(name, wanted, "–", "not shown")
    return Floor(name, wanted, found, "met" if is_met else "MISSED")


def _service(steps: Steps, best: float | None) -> Floor:
    rate, ceiling = service_rate(steps, "http"), decode_ceiling(steps, _loaders(steps))
    name = f"the service from HTTP ÷ the lower of model alone and decoding of its {_loaders(steps)} loaders"
    if rate is None or ceiling is None or best is None:
        return _floor(name, f"≥ {MIN_SHARE:g}", None, is_met=False)
    share = rate / min(best, ceiling)
    found = f"{share:.2f} ({rate:,.0f} of {best:,.0f} and {ceiling:,.0f} images/s)"
    return _floor(name, f"≥ {MIN_SHARE:g}", found, is_met=share >= MIN_SHARE)


def _loaders(steps: Steps) -> int:
    """Loaders of the service's step, by its settings."""
    settings = at(steps.get("http"), "figures", "service", "settings", "pictures", "worker_settings") or []
    found = [text.partition("=")[2] for text in settings if text.startswith("loaders=")]
    return int(found[0]) if found else LOADERS


def _schedules(steps: Steps) -> Floor:
    name, wanted = "random schedules, equal to a serial run bit by bit", f"{MIN_SCHEDULES:,}"
    played = at(steps.get("race"), "figures", "figures", "schedules")
    large = at(steps.get("race"), "figures", "figures", "schedules of large batches")
    if played is None:
        return _floor(name, wanted, None, is_met=False)
    errors = [str(each["error"]) for each in (played, large) if at(each, "error")]
    if errors:
        return Floor(name, wanted, errors[0][:200], "MISSED")
    count = int(played["schedules"])
    found = f"{count:,}, and {at(large, 'schedules') or 0:,} of large batches"
    # All that were played are equal: with too few, nothing is refuted and not enough is shown.
    return Floor(name, wanted, found, "met" if count >= MIN_SCHEDULES else "not shown")


def _fault(steps: Steps, name: str, about: str) -> Floor:
    status = at(steps.get(name), "status")
    if status is None or status == "skipped" or (at(steps.get(name), "exit_code") is None and status == "failed"):
        return _floor(about, "passes", None, is_met=False)
    return _floor(about, "passes", str(status), is_met=status == "ok")
