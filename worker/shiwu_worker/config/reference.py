"""Reference of all settings by topic, with unit, default and description.

`python -m shiwu_worker.config.reference docs/settings.md` writes the page. `shiwu-worker --check --all` prints the
settings with the values of this machine.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from shiwu.contract import without_logins
from shiwu_worker.config.errors import PREFIX
from shiwu_worker.config.settings import Settings

TOPICS: Final[Mapping[str, str]] = {
    "redis_url": "Redis and the worker's name",
    "model": "Model",
    "labels_dir": "Labels",
    "max_batch": "Batches",
    "lease_s": "Leases, retries and the end of a worker",
    "result_ttl_s": "Answers and dead letters",
    "revoke": "Cancelling and callbacks",
    "loaders": "Loader processes and their sandbox",
    "fetch_timeout_s": "Fetching",
    "max_bytes": "Limits on images",
    "s3_endpoint_url": "S3",
    "allow_hosts": "What may be fetched",
    "http_host": "Probes, metrics and logs",
}
"""First setting of each topic; the settings after it in its class belong to the same topic."""
_UNIT_OF_SUFFIX: Final = {"s": "seconds", "ms": "milliseconds", "mb": "MiB", "bytes": "bytes", "pixels": "pixels"}
_UNITS: Final[Mapping[str, str]] = {
    "max_side": "pixels",
    "bulk_share": "share of 1",
    "interactive_reserve": "share of 1",
    "shadow_share": "share of 1",
    "min_rate_kb_s": "KiB/s",
    "answer_tags_kb": "KiB",
    "http_port": "port",
    "fetch_ports": "ports",
}
_SIGNS: Final = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
_DEFAULTS: Final[Mapping[str, str]] = {"worker_name": "host name and process id"}
"""Texts for defaults that depend on the machine."""


@dataclass(frozen=True, slots=True)
class SettingInfo:
    """One row of the reference."""

    field: str
    name: str
    """The environment variable."""
    topic: str
    unit: str
    """Unit and bounds, or the allowed words."""
    default: str
    description: str


def all_settings() -> list[SettingInfo]:
    """Every setting, in the order of the topics."""
    topic, found = "", []
    for field, info in Settings.model_fields.items():
        topic = TOPICS.get(field, topic)
        setting = SettingInfo(
            field=field,
            name=f"{PREFIX}{field.upper()}",
            topic=topic,
            unit=_unit(field, info),
            default=_default(field, info),
            description=info.description or "",
        )
        found.append(setting)
    # Fields of a base class come first in `model_fields`.
    places = {name: place for place, name in enumerate(TOPICS.values())}
    return sorted(found, key=lambda setting: places[setting.topic])


def value_text(value: object) -> str:
    """Return a value in the form of its environment variable, without user names and passwords."""
    if isinstance(value, SecretStr):
        value = re.sub(r"\?.*", "", without_logins(value.get_secret_value()))
    if value is None or value in ((), {}):
        return "unset" if value is None else "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ",".join(f"{code}={':'.join(f'{number:g}' for number in numbers)}" for code, numbers in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return without_logins(str(value))


def changed_settings(settings: Settings) -> list[SettingInfo]:
    """Return the settings that differ from their defaults."""
    return [
        setting
        for setting in all_settings()
        if setting.field in settings.model_fields_set
        and getattr(settings, setting.field) != Settings.model_fields[setting.field].get_default()
    ]


def settings_page() -> str:
    """Return the text of `docs/settings.md`."""
    lines = [
        "# Settings",
        "",
        "Every setting of `shiwu-worker` is an environment variable. Lists are separated by commas. A variable that is",
        "empty counts as not set; an empty `SHIWU_REDIS_URL` is refused. An unknown name that resembles a setting ends",
        "the worker with exit code 64. Other unknown names that begin with `SHIWU_` are reported in one warning at the",
        "start, so that a newer chart can be used with an older worker.",
        "",
        "`shiwu-worker --check` tries Redis, the label files, S3, GPUs and the model with these settings, and prints",
        "those that differ from their defaults; `shiwu-worker --check --all` prints all. The client reads",
        "`SHIWU_REDIS_URL` only. So does `shiwu`, and some of its commands read more; `--help` names them.",
        "",
        "This page is written by `make docs` from the settings in `worker/shiwu_worker/config`.",
    ]
    topic = ""
    for setting in all_settings():
        if setting.topic != topic:
            topic = setting.topic
            lines += ["", f"## {topic}", "", "| setting | unit or values | default | what it is |", "|---|---|---|---|"]
        is_value = setting.default not in {"unset", "empty", *_DEFAULTS.values()}
        cells = (
            f"`{setting.name}`",
            setting.unit,
            f"`{setting.default}`" if is_value else setting.default,
            setting.description,
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _unit(field: str, info: FieldInfo) -> str:
    """Return the unit with its bounds, or the allowed words."""
    if info.annotation is bool:
        return "true or false"
    if get_origin(info.annotation) is Literal:
        return ", ".join(map(str, get_args(info.annotation)))
    unit = _UNITS.get(field) or _UNIT_OF_SUFFIX.get(field.rpartition("_")[2])
    if not unit and info.annotation in {int, float}:
        unit = "count"
    bounds: dict[str, Any] = {}
    for rule in info.metadata:
        bounds |= {sign: getattr(rule, sign) for sign in ("gt", "ge", "lt", "le") if hasattr(rule, sign)}
    limits = [f"{_SIGNS[sign]} {value_text(bound)}" for sign, bound in bounds.items()]
    return ", ".join(filter(None, [unit, *limits]))


def _default(field: str, info: FieldInfo) -> str:
    if field in _DEFAULTS:
        return _DEFAULTS[field]
    value = info.get_default()
    return "required" if value is PydanticUndefined else value_text(value)


if __name__ == "__main__":
    [_, path] = sys.argv
    Path(path).write_text(settings_page(), encoding="utf-8")
