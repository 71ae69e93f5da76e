"""The stages and their steps. Imports the standard library only, because it runs before wheels are installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CALL_S: Final = 600
"""Longest stage: what one call on a lent machine may take."""
INSTALL_S: Final = 40
"""Time for installing wheels and for ending the last step, which is part of the call."""
LEASE_S: Final = 1800
"""All stages together, on a machine that is lent for half an hour."""
LEASE_OVERHEAD_S: Final = 200
"""Of it, for the start of the machine and copying to and from it."""
CORES: Final = len(os.sched_getaffinity(0))
LOADERS: Final = max(1, CORES * 3 // 4)
"""Loaders of the service; the other cores are for the worker, its server and the senders."""
PICTOGRAM: Final = "tests/support/pictogram_zh"


@dataclass(frozen=True, slots=True)
class Step:
    """One process.

    Args:
        command: gets whether it is a rehearsal, and a folder; all JSON files that the process leaves in the folder are
            the figures of the step.
        limit_s: the process is ended after this time.
        expected_s: how long it takes, as estimated for an H200 beside 16 cores.
        is_needed: whether the stage ends if this step fails; one that takes too long may have shown enough.
    """

    name: str
    command: Callable[[bool, Path], list[str]]
    limit_s: int
    expected_s: int = 0
    is_needed: bool = False


def own(name: str, limit_s: int, expected_s: int, *, module: str = "", is_needed: bool = False) -> Step:
    """A step of this package: the function `measures` of a module."""

    def command(tiny: bool, folder: Path) -> list[str]:
        chosen = [sys.executable, "-m", "bench.card.step", module or f"bench.card.{name}", str(folder)]
        return [*chosen, "--tiny"] if tiny else chosen

    return Step(name, command, limit_s, expected_s, is_needed)


def python(name: str, limit_s: int, expected_s: int, full: str, tiny: str) -> Step:
    """A step that is a Python program: its arguments, and those of a rehearsal. FOLDER stands for the folder."""

    def command(is_tiny: bool, folder: Path) -> list[str]:
        words = (tiny if is_tiny else full).split()
        return [sys.executable, *(word.replace("FOLDER", str(folder)) for word in words)]

    return Step(name, command, limit_s, expected_s)


def encode(name: str, limit_s: int, expected_s: int, model: str, sizes: str) -> Step:
    """The model loop of `bench encode` for one model."""
    full = f"-m bench encode --model {model} --dtypes float16 --modes eager,graphs --rungs {sizes} --seconds 1"
    tiny = f"-m bench encode --model {PICTOGRAM} --quick --device cpu --modes eager --rungs 1,2 --seconds 0.05"
    return python(name, limit_s, expected_s, f"{full} --out FOLDER", f"{tiny} --threads 1 --out FOLDER")


def service(
    name: str, limit_s: int, expected_s: int, options: str, *, kind: str = "service", tiny_options: str = ""
) -> Step:
    """The service of this worker alone, without peers."""
    full = f"-m bench {kind} --model vit-b-16 --no-peers {options} --out FOLDER"
    source = "http" if "http" in options else "file"
    tiny = f"-m bench {kind} --model {PICTOGRAM} --no-peers --quick --source {source} {tiny_options} --out FOLDER"
    return python(name, limit_s, expected_s, full, tiny)


ALL_SIZES: Final = "1,8,16,32,64,96,128,192,256,384,512"
LARGE_SIZES: Final = "1,8,32,64,128,256"
GPU_TESTS: Final = "-m pytest tests/gpu -W default -p no:randomly -p no:cacheprovider -v"
QUICK_SERVICE: Final = "--rounds 1 --seconds 0.5"
STAGES: Final[dict[str, tuple[Step, ...]]] = {
    # What a release promises of a GPU, and next what decides how it is set up: a lent machine may be taken away.
    "floors": (
        own("contact", 60, 20, is_needed=True),
        own("facts", 20, 8),
        encode("vit-b-16", 130, 85, "vit-b-16", ALL_SIZES),
        service(
            "http",
            170,
            130,
            f"--source http --rounds 3 --seconds 5 --set max_batch=256 --set loaders={LOADERS}",
            tiny_options=QUICK_SERVICE,
        ),
        own("decoding", 30, 18),
        own("race", 150, 95),
    ),
    "faults": (
        own("item", 70, 30, module="bench.card.worker_item"),
        own("assert", 80, 55, module="bench.card.worker_assert"),
        own("memory", 110, 75, module="bench.card.worker_memory"),
        own("sigterm", 70, 50, module="bench.card.worker_sigterm"),
        python("tests", 230, 150, f"{GPU_TESTS} -m gpu", f"{GPU_TESTS} -k fake-tiny-siglip"),
    ),
    "tuning": (
        own("variants", 190, 150),
        service(
            "file",
            200,
            165,
            f"--source file --rounds 2 --seconds 4 --set max_batch=256 --set loaders={LOADERS} --beside max_batch=64",
            tiny_options=QUICK_SERVICE,
        ),
        service(
            "latency",
            170,
            120,
            "--source http --fewest 300 --seconds 5 --longest-s 10",
            kind="latency",
            tiny_options="--fewest 20 --longest-s 1 --seconds 0.5",
        ),
    ),
    "probes": (
        own("ceilings", 50, 25),
        own("profile", 40, 20),
        own("threads", 50, 30),
        encode("vit-l-14", 110, 80, "vit-l-14", LARGE_SIZES),
        encode("siglip", 90, 60, "siglip-so400m", LARGE_SIZES),
        python("tune", 50, 30, "-m shiwu_worker --tune", "-m shiwu_worker --tune"),
        own("jpeg", 45, 35),
        own("fp8", 35, 20),
        own("zero_copy", 20, 15),
        own("memcheck", 70, 60),
    ),
}
"""In the order in which they are run."""
