"""`shiwu-worker --check`: tries Redis, the label files, S3, GPUs and the model, and prints the settings."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click
import redis
from botocore.exceptions import BotoCoreError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shiwu.broker.migration import check_names
from shiwu.broker.redis_errors import explain
from shiwu.broker.sharding import keep_shard_count
from shiwu.broker.stray_lanes import find_stray_lanes
from shiwu.contract import LEASES, WarningCode, printable
from shiwu_worker.checkpoints.model_files import model_folder
from shiwu_worker.commands.console import make_console
from shiwu_worker.commands.gpu_check import check_gpus
from shiwu_worker.commands.s3_check import check_s3
from shiwu_worker.config.errors import SettingsError, exit_with, load_settings, unknown_names
from shiwu_worker.config.reference import all_settings, changed_settings, value_text
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.service.factories import connect, connect_shards, memory_warnings
from shiwu_worker.service.labels import encode_default_labels, load_label_bank, read_label_sets
from shiwu_worker.service.model import load_encoder
from shiwu_worker.stages.decode.image_spec import read_image_spec
from shiwu_worker.stages.fetch.s3.base import StoreError

if TYPE_CHECKING:
    from shiwu.contract import ModelInfo
    from shiwu_worker.jobs.label_set import LabelSet

MIN_REDIS_VERSION: Final = (6, 2)
EXPECTED_ERRORS: Final = (FatalError, redis.RedisError, BotoCoreError, StoreError, OSError, ValueError)
"""Errors of a check whose cause is outside the worker."""
_STYLES: Final = {"ok": "green", "warning": "yellow", "failed": "red"}


@dataclass(frozen=True, slots=True)
class Report:
    """Result of a check: a text, and warnings about problems with which the worker can still run."""

    text: str
    warnings: tuple[str, ...] = ()


def run_checks(*, show_all: bool, check_callbacks: Callable[[Settings], str]) -> int:
    """Print a line for each check, then the settings; return the exit code that a worker would have.

    Args:
        show_all: print every setting by topic, with unit and default; otherwise only the changed ones.
        check_callbacks: tries Celery's connections; this package does not import Celery.
    """
    console = make_console()
    try:
        settings = load_settings()
    except SettingsError as error:
        exit_with(error)
    warnings = [str(unknown) for unknown in unknown_names(os.environ)]
    warnings += [
        f"SHIWU_ALLOW_FOLDERS: {path} is not a folder on this machine"
        for path in settings.allow_folders
        if not os.path.isdir(path)
    ]
    checks: list[tuple[str, Callable[[Settings], Report | str]]] = [
        ("settings", lambda _: Report(f"{len(changed_settings(settings))} differ from their defaults", (*warnings,))),
        ("redis", _check_redis),
        ("callbacks", check_callbacks),
        ("labels", _check_labels),
        ("s3", _check_s3),
        ("gpus", lambda _: Report(*check_gpus(settings))),
        ("model", _check_model),
    ]
    codes = [_run(name, check, settings, console) for name, check in checks]
    if show_all:
        _print_all(settings, console)
    else:
        _print_changed(settings, console)
    return next((code for code in codes if code), 0)


def _run(name: str, check: Callable[[Settings], Report | str], settings: Settings, console: Console) -> int:
    """Run one check, print its report, and return the exit code of its failure or 0."""
    if sys.stderr.isatty():
        click.echo(f"checking {name} …", err=True)
    try:
        with redirect_stdout(sys.stderr):
            result = check(settings)
    except EXPECTED_ERRORS as error:
        _print_line(console, "failed", name, _error_text(error))
        return int(error.exit_code if isinstance(error, FatalError) else ExitCode.CONFIG)
    except Exception as error:  # noqa: BLE001 border: the other checks must still run
        traceback.print_exc()
        _print_line(console, "failed", name, f"{type(error).__name__}: {error} (a defect of shiwu: please report it)")
        return int(ExitCode.INTERNAL)
    report = result if isinstance(result, Report) else Report(result)
    _print_line(console, "ok", name, report.text)
    for warning in report.warnings:
        _print_line(console, "warning", name, warning)
    return 0


def _error_text(error: Exception) -> str:
    if isinstance(error, redis.RedisError):
        return explain(error)
    return str(error) if isinstance(error, FatalError) else f"{type(error).__name__}: {error}"


def _print_line(console: Console, level: str, name: str, text: str) -> None:
    console.print(Text(f"{level:<8}", style=_STYLES[level]), Text(f"{name}: {printable(text)}"), soft_wrap=True)


def _print_changed(settings: Settings, console: Console) -> None:
    changed = changed_settings(settings)
    title = "Settings that differ from their defaults" if changed else "All settings have their defaults"
    console.print(f"\n{title} (--check --all prints all):")
    for setting in changed:
        value = printable(value_text(getattr(settings, setting.field)))
        console.print(f"  {setting.name}={value}  (default: {setting.default})", soft_wrap=True)


def _print_all(settings: Settings, console: Console) -> None:
    changed = {setting.field for setting in changed_settings(settings)}
    topic = ""
    table = Table()
    for setting in all_settings():
        if setting.topic != topic:
            if topic:
                console.print(table)
            topic = setting.topic
            table = Table("", "setting", "value", "unit or values", "default", "what it is", title=f"\n{topic}")
            table.title_justify = "left"
        mark, style = ("*", "bold") if setting.field in changed else ("", "")
        value = printable(value_text(getattr(settings, setting.field)))
        table.add_row(mark, setting.name, value, setting.unit, setting.default, setting.description, style=style)
    console.print(table)
    console.print("* differs from its default")


def _check_redis(settings: Settings) -> Report:
    """Check that Redis answers, is new enough, accepts writes, does not evict keys, and needs no `shiwu migrate`."""
    if settings.redis_address.shards:
        return _check_cluster(settings)
    with connect(settings, connections=2) as client:
        client.ping()
        check_names(client)
        stray = [
            f"{lane} and no worker reads them: a client's global_keyprefix, sep, priority_steps or database differs"
            for lane in find_stray_lanes(client).found
        ]
        try:
            info: Any = client.info("everything")
        except redis.ResponseError as error:
            text = f"answers at {value_text(settings.redis_url)}"
            note = f"version and memory settings are not known, because INFO is refused ({error})"
            return Report(text, (note, *stray))
    product = "Valkey" if "valkey_version" in info else "Redis"
    number = str(info.get("valkey_version") or info.get("redis_version"))
    if tuple(int(part) for part in str(info.get("redis_version", "0.0")).split(".")[:2]) < MIN_REDIS_VERSION:
        raise FatalError(ExitCode.CONFIG, f"expected Redis 6.2 or newer, or Valkey, got {product} {number}")
    if info.get("role", "master") != "master":
        raise FatalError(
            ExitCode.CONFIG, "expected a primary that accepts writes, got a replica; use its primary's URL"
        )
    policy = str(info.get("maxmemory_policy", "unknown"))
    if policy.startswith("allkeys"):
        raise FatalError(
            ExitCode.CONFIG,
            f"expected maxmemory-policy noeviction, got {policy}: it deletes waiting jobs when the memory is full",
        )
    return Report(
        f"{product} {number} at {value_text(settings.redis_url)}, maxmemory-policy {policy}, "
        f"maxmemory {info.get('maxmemory_human', 'unknown') if info.get('maxmemory') else 'unlimited'}",
        (*memory_warnings(settings, info), *_redis_warnings(info), *stray),
    )


def _check_cluster(settings: Settings) -> Report:
    """Check that the number of shards is that of the cluster, and that each shard runs scripts and accepts writes."""
    clients = connect_shards(settings, connections=2)
    try:
        keep_shard_count(clients[0], shards=len(clients))
        for client in clients:
            check_names(client)
            # Nothing is removed; a replica, a slot without a node and a user without rights refuse it.
            client.eval("return redis.call('ZREM', KEYS[1], '')", 1, LEASES)
        text = f"{len(clients)} shards answer at {value_text(settings.redis_url)}"
        try:
            info: Any = clients[0].info("everything")
        except redis.ResponseError as error:
            return Report(text, (f"memory settings are not known, because INFO is refused ({error})",))
    finally:
        for client in clients:
            client.close()
    return Report(text, (*memory_warnings(settings, info), *_redis_warnings(info)))


def _redis_warnings(info: dict[str, Any]) -> list[str]:
    warnings = []
    if not info.get("aof_enabled"):
        warnings.append(
            "the append-only file is off: jobs and answers since the last snapshot are lost when the server crashes; "
            "set appendonly yes"
        )
    return warnings


def _check_labels(settings: Settings) -> str:
    sets = read_label_sets(settings)
    default = sets[settings.default_labels]
    return (
        f"{len(sets)} label sets ({', '.join(sorted(sets)):.200}); default {default.name} ({len(default.words)} words)"
    )


def _check_s3(settings: Settings) -> Report:
    return Report(*check_s3(settings))


def check_calibrations(sets: Mapping[str, LabelSet], model: ModelInfo) -> None:
    """Check that the limits of these sets were chosen for this model, or written by hand.

    Raises:
        FatalError: with ExitCode.CONFIG and the code calibration_stale in its text.
    """
    stale = sorted(name for name, each in sets.items() if each.calibrated_for not in {None, model.revision})
    if stale:
        others = ", ".join(f"{name} for {sets[name].calibrated_for}" for name in stale)
        text = f"expected limits of label sets for revision {model.revision} of the model, got {others}"
        raise FatalError(
            ExitCode.CONFIG,
            f"{WarningCode.CALIBRATION_STALE}: {text}; `shiwu-worker labels calibrate` chooses new ones",
        )


def _check_model(settings: Settings) -> str:
    sets = read_label_sets(settings)
    folder = model_folder(settings.model)
    spec = read_image_spec(folder)
    encoder = load_encoder(settings, folder, spec)
    bank = load_label_bank(settings, encoder, sets)
    encode_default_labels(bank)
    info = encoder.info
    check_calibrations(sets, info)
    return (
        f"{info.id} ({info.revision}) in {info.dtype} on {info.device}, {spec.width}×{spec.height}, "
        f"batches of {', '.join(map(str, encoder.batch_sizes))}"
    )
