"""The stages and their steps. Imports the standard library only, because it runs before wheels are installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CALL_S: Final = 600
"""Longest stage: what one call on a lent machine may take."""
INSTALL_S: Final = 40
"""Time for installing wheels, which is part of the call."""
PICTOGRAM: Final = "tests/support/pictogram_zh"


@dataclass(frozen=True, slots=True)
class Step:
    """One process.

    Args:
        command: gets whether it is a rehearsal, and a folder; all JSON files that the process leaves in the folder are
            the figures of the step.
        limit_s: the process is killed after this time.
    """

    name: str
    command: Callable[[bool, Path], list[str]]
    limit_s: int


def own(name: str, limit_s: int, *, module: str = "") -> Step:
    """A step of this package: the function `measures` of a module."""

    def command(tiny: bool, folder: Path) -> list[str]:
        chosen = [sys.executable, "-m", "bench.card.step", module or f"bench.card.{name}", str(folder)]
        return [*chosen, "--tiny"] if tiny else chosen

    return Step(name, command, limit_s)


def python(name: str, limit_s: int, full: str, tiny: str) -> Step:
    """A step that is a Python program: its arguments, and those of a rehearsal. FOLDER stands for the folder."""

    def command(is_tiny: bool, folder: Path) -> list[str]:
        words = (tiny if is_tiny else full).split()
        return [sys.executable, *(word.replace("FOLDER", str(folder)) for word in words)]

    return Step(name, command, limit_s)


def encode(name: str, limit_s: int, model: str, sizes: str) -> Step:
    """The model loop of `bench encode` for one model."""
    full = f"-m bench encode --model {model} --dtypes float16 --modes eager,graphs --rungs {sizes} --seconds 1"
    tiny = f"-m bench encode --model {PICTOGRAM} --quick --device cpu --modes eager --rungs 1,2 --seconds 0.05"
    return python(name, limit_s, f"{full} --out FOLDER", f"{tiny} --threads 1 --out FOLDER")


def service(name: str, limit_s: int, options: str, *, kind: str = "service", tiny_options: str = "") -> Step:
    """The service of this worker alone, without peers."""
    full = f"-m bench {kind} --model vit-b-16 --no-peers {options} --out FOLDER"
    source = "http" if "http" in options else "file"
    tiny = f"-m bench {kind} --model {PICTOGRAM} --no-peers --quick --source {source} {tiny_options} --out FOLDER"
    return python(name, limit_s, full, tiny)


ALL_SIZES: Final = "1,2,4,8,16,32,48,64,96,128,192,256,384,512"
LARGE_SIZES: Final = "1,8,32,64,128,256"
GPU_TESTS: Final = "-m pytest tests/gpu -W default -p no:randomly -p no:cacheprovider -q"
STAGES: Final[dict[str, tuple[Step, ...]]] = {
    "facts": (
        own("facts", 30),
        own("ceilings", 70),
        python("tests", 240, f"{GPU_TESTS} -m gpu", f"{GPU_TESTS} -k fake-tiny-siglip"),
        python("tune", 120, "-m shiwu_worker --tune", "-m shiwu_worker --tune"),
    ),
    "model": (
        encode("vit-b-16", 120, "vit-b-16", ALL_SIZES),
        encode("vit-l-14", 90, "vit-l-14", ALL_SIZES),
        encode("siglip", 60, "siglip-so400m", LARGE_SIZES),
        own("profile", 40),
        own("variants", 240),
    ),
    "faults": (
        own("race", 150),
        own("memcheck", 70),
        own("item", 50, module="bench.card.worker_item"),
        own("assert", 90, module="bench.card.worker_assert"),
        own("memory", 120, module="bench.card.worker_memory"),
        own("sigterm", 80, module="bench.card.worker_sigterm"),
    ),
    "service": (
        service(
            "http",
            160,
            "--source http --rounds 3 --seconds 6 --set max_batch=256 --set loaders=12",
            tiny_options="--rounds 1 --seconds 0.5",
        ),
        service(
            "file",
            160,
            "--source file --rounds 3 --seconds 6 --set max_batch=256 --set loaders=13 --beside max_batch=64",
            tiny_options="--rounds 1 --seconds 0.5",
        ),
        own("threads", 80),
        service(
            "latency",
            120,
            "--source http --fewest 300 --longest-s 20",
            kind="latency",
            tiny_options="--fewest 20 --longest-s 1 --seconds 0.5",
        ),
    ),
    "probes": (own("jpeg", 80), own("fp8", 90), own("zero_copy", 60)),
}
