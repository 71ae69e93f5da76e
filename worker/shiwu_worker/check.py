"""`shiwu-worker --check`: the effective settings, and a try of Redis, S3, the label sets and the model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import boto3
import redis
from botocore.exceptions import BotoCoreError
from kombu.exceptions import OperationalError
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from shiwu.redis_errors import explain
from shiwu_worker.callback_app import make_callback_app
from shiwu_worker.config import Settings, shown
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.image_spec import read_image_spec
from shiwu_worker.model_parts import open_encoder
from shiwu_worker.models import model_folder
from shiwu_worker.object_store import S3Limits, S3Options, StoreError, StoreRefused
from shiwu_worker.parts import connect, open_labels, read_label_sets
from shiwu_worker.stores import new_store


def run_checks() -> int:
    """Print settings and checks; return 0 when a worker with these settings can work."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        settings = Settings()
    except ValidationError as error:
        for wrong in error.errors(include_url=False, include_input=False):
            console.print(f"SHIWU_{'_'.join(str(part) for part in wrong['loc']).upper()}: {wrong['msg']}", markup=False)
        return int(ExitCode.CONFIG)
    table = Table("setting", "value", "what it is", title="Effective settings", title_justify="left")
    values = shown(settings)
    for name, field in Settings.model_fields.items():
        marked = "" if name not in settings.model_fields_set else "bold"
        table.add_row(f"SHIWU_{name.upper()}", values[name], field.description, style=marked)
    console.print(table)
    checks: list[tuple[str, Callable[[Settings], str]]] = [
        ("redis", _check_redis),
        ("callbacks", _check_callbacks),
        ("s3", _check_s3),
        ("model and labels", _check_model),
    ]
    failed = 0
    for name, check in checks:
        try:
            with redirect_stdout(sys.stderr):
                text = check(settings)
        except (FatalError, redis.RedisError, BotoCoreError, StoreError, OSError, ValueError) as error:
            failed += 1
            console.print(f"[red]failed[/red]  {name}: ", end="")
            console.print(_told(error), markup=False)
        else:
            console.print(f"[green]ok[/green]      {name}: {text}")
    return int(ExitCode.CONFIG) if failed else 0


def _told(error: Exception) -> str:
    return explain(error) if isinstance(error, redis.RedisError) else f"{type(error).__name__}: {error}"


def _check_redis(settings: Settings) -> str:
    with connect(settings) as client:
        info: Any = client.info("server")
        version = str(info.get("valkey_version") or info["redis_version"])
        if tuple(int(part) for part in str(info["redis_version"]).split(".")[:2]) < (6, 2):
            raise FatalError(ExitCode.CONFIG, f"expected Redis 6.2 or newer, or Valkey, got {version}")
        policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "?")
        note = "" if policy == "noeviction" else f"; maxmemory-policy {policy} can lose jobs: expected noeviction"
        return f"version {version}{note}"


def _check_callbacks(settings: Settings) -> str:
    """Celery's own connections to the same Redis: those that send callbacks and keep their results."""
    app = make_callback_app(settings)
    try:
        with (
            app.connection_for_write() as connection,
            connection.channel() as channel,
            channel.conn_or_acquire() as one,
        ):
            one.ping()
        app.backend.client.ping()
    except OperationalError as error:
        raise error.__cause__ or error from None
    finally:
        app.close()
    return "Celery reaches the same Redis, for callbacks and their results"


def _check_s3(settings: Settings) -> str:
    session = boto3.session.Session()
    credentials = session.get_credentials()
    if credentials is None:
        return "no credentials: s3:// references will be answered source_credentials"
    if settings.s3_endpoint_url is None:
        return f"credentials by {credentials.method}; AWS is not asked, since no bucket is known here"
    store = new_store(
        S3Options(settings.s3_endpoint_url, settings.s3_region, settings.s3_client),
        S3Limits(threads=1, connect_timeout_s=settings.connect_timeout_s, read_timeout_s=5, total_timeout_s=5),
    )
    try:
        with store.open("shiwu-check", "shiwu-check", version=None):
            pass
    except StoreRefused as error:
        if error.status not in {403, 404}:
            raise
    return f"{settings.s3_endpoint_url} answers {settings.s3_client}; credentials by {credentials.method}"


def _check_model(settings: Settings) -> str:
    folder = model_folder(settings.model)
    spec = read_image_spec(folder)
    encoder = open_encoder(settings, folder, spec)
    bank = open_labels(settings, encoder, read_label_sets(settings))
    default = bank.resolve(None)
    bank.encoded(default)
    info = encoder.info
    return (
        f"{info.id} ({info.revision}) in {info.dtype} on {info.device}, {spec.width}×{spec.height}, "
        f"batches of {', '.join(map(str, encoder.rungs))}; default labels {default.name} ({len(default.words)} words)"
    )
