"""Common parts of `service` and `latency`: options, and the place in which they run."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.servers import Valkey

from bench.checkpoints import NAMES, checkpoint
from bench.machine import describe
from bench.photos import SIZE_NAMES, SIZES, SizeName, jpeg_files
from bench.picture_systems import LitServeSettings, Place, System, has_litserve, litserve_settings, other_shiwu, systems
from bench.sources import SOURCE_NAMES, Source, SourceName, open_source
from shiwu.contract import Lane

DIFFERENT: Final[dict[SizeName, int]] = {"512": 64, "2mp": 24, "12mp": 8}
"""Number of different images, used in turn."""
NO_LITSERVE: Final = "LitServe is not installed: pip install '.[worker,dev,bench]'"


@dataclass(frozen=True, slots=True)
class PictureOptions:
    """How it is run."""

    quick: bool
    model: str
    source: SourceName
    size: SizeName
    seconds: float
    """Duration of one measurement."""
    worker_settings: tuple[str, ...]
    """NAME=VALUE settings of shiwu's worker; the rest are its defaults."""
    beside: tuple[str, ...]
    """NAME=VALUE settings of a second worker of shiwu that is compared with the first; empty: no second worker."""
    litserve: LitServeSettings
    has_peers: bool

    @property
    def worker_env(self) -> dict[str, str]:
        """The worker's settings as environment variables."""
        return _environment(self.worker_settings)

    @property
    def systems(self) -> tuple[System, ...]:
        """The systems that are compared."""
        shiwu, *peers = systems(self.litserve, shiwu_settings=", ".join(self.worker_settings) or "its defaults")
        other = [other_shiwu(" ".join(self.beside), _environment(self.beside))] if self.beside else []
        return (shiwu, *other, *(peers if self.has_peers else []))


def _environment(settings: Sequence[str]) -> dict[str, str]:
    pairs = (text.partition("=") for text in settings)
    return {f"SHIWU_{name.upper()}": value for name, _, value in pairs}


def add_options(parser: argparse.ArgumentParser, *, model: str) -> None:
    """The common options."""
    parser.add_argument("--model", default=model, help=f"{', '.join(NAMES)}, or a folder; default %(default)s")
    parser.add_argument("--source", choices=SOURCE_NAMES, default="s3", help="where pictures lie; default %(default)s")
    parser.add_argument("--size", choices=SIZE_NAMES, default="512", help="of the JPEGs; default %(default)s")
    parser.add_argument("--seconds", type=float, help="duration of one measurement")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of shiwu's worker")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="compare a second worker of shiwu with this setting",
    )
    parser.add_argument("--no-peers", action="store_true", help="shiwu alone")
    parser.add_argument("--litserve-batch", type=int, help="its max_batch_size; default 8, on a GPU 64")
    parser.add_argument("--litserve-workers", type=int, help="its processes on the device; default 1, on a GPU 2")
    parser.add_argument("--litserve-threads", type=int, help="of torch in each; default: the cores, shared")
    parser.add_argument("--litserve-timeout-s", type=float, help="its batch_timeout; default 0.005")


def read_options(asked: argparse.Namespace, *, seconds: float) -> PictureOptions:
    """Read the options from the command line."""
    is_gpu = bool(describe().gpus)
    return PictureOptions(
        quick=asked.quick,
        model=asked.model,
        source=asked.source,
        size=asked.size,
        seconds=asked.seconds or (2.0 if asked.quick else seconds),
        worker_settings=tuple(asked.set),
        beside=tuple(asked.beside),
        litserve=litserve_settings(
            is_gpu=is_gpu,
            max_batch=asked.litserve_batch,
            workers=asked.litserve_workers,
            threads=asked.litserve_threads,
            batch_timeout_s=asked.litserve_timeout_s,
        ),
        has_peers=not asked.no_peers,
    )


@contextmanager
def open_place(options: PictureOptions, lane: Lane) -> Iterator[Place]:
    """Open a Valkey, a source with images, and the model's files."""
    model = checkpoint(options.model)
    files = jpeg_files(options.size, count=4 if options.quick else DIFFERENT[options.size])
    with (
        tempfile.TemporaryDirectory(prefix="shiwu-bench-") as name,
        Valkey(folder=Path(name) / "valkey") as server,
        server.client(socket_timeout=60) as client,
        open_source(options.source, files, folder=Path(name)) as source,
    ):
        yield Place(
            url=server.url,
            client=client,
            folder=Path(name),
            source=source,
            checkpoint=model,
            lane=lane,
            dtype="float32",
            worker_env=options.worker_env,
        )


def notes(options: PictureOptions, source: Source) -> tuple[str, ...]:
    """Return what a reader has to know about the figures."""
    width, height = SIZES[options.size]
    pictures = (
        f"{len(source.references)} JPEGs of {width} × {height}, {source.bytes_mean / 1000:,.0f} kB, from {source.name}"
    )
    lines = [f"{pictures}; every answer was counted by id"]
    lines += [f"{system.name} ({system.versions}): {system.settings}" for system in options.systems]
    return (*lines, *(() if has_litserve() or not options.has_peers else (NO_LITSERVE,)))
