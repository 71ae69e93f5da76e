"""The public surface of shiwu as plain data: everything that users, operators and other versions rely on.

`python -m tests.golden.surface` writes `surface.json`. The test compares the two, so a name that disappears or changes
is always a decision that the changelog records.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

import click
import yaml
from pydantic_core import PydanticUndefined

import shiwu
from shiwu import aio, contract, errors
from shiwu.broker.maintenance import SweepReport
from shiwu.broker.queue_stats import QueueSnapshot, QueueState
from shiwu.broker.retention import Retention
from shiwu.broker.worker_state import WorkerState
from shiwu.cli import main as shiwu_command
from shiwu.cli.base import Exit
from shiwu.contract import keys
from shiwu_worker.__main__ import main as worker_command
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.tuned import Tuned
from shiwu_worker.errors import ExitCode
from shiwu_worker.runtime.progress import LoadReport

ROOT: Final = Path(__file__).resolve().parents[2]
SURFACE: Final = Path(__file__).with_name("surface.json")
_LEVELS: Final = frozenset({"debug", "info", "warning", "error", "critical", "exception"})
_METRIC_ROW: Final = re.compile(r"^\| `(shiwu_\w+)`[^|]*\| ([^|]*) \|", re.MULTILINE)
_SPAN_NAME: Final = re.compile(r"shiwu\.(?!tag$|interactive$|bulk$|admin$)[a-z_]+(\.[a-z_0-9]+)*")


def surface() -> dict[str, Any]:
    """Every part of the public surface, ready for JSON."""
    return {
        "settings": _settings(),
        "environment": _environment(),
        "metrics": dict(_METRIC_ROW.findall((ROOT / "docs/metrics.md").read_text(encoding="utf-8"))),
        "log_events": sorted({event for path in sources() for event in log_events(path)}),
        "span_names": sorted(_span_names()),
        "redis_keys": sorted({value for value in vars(keys).values() if isinstance(value, str) and _is_key(value)}),
        "lanes": {lane.value: lane.queue for lane in contract.Lane},
        "task": contract.TASK_NAME,
        "words": {one.__name__: [each.value for each in one] for one in _vocabularies()},
        "exit_codes": {"shiwu-worker": _codes(ExitCode), "shiwu": _codes(Exit)},
        "commands": {"shiwu": _command(shiwu_command), "shiwu-worker": _command(worker_command)},
        "public_api": {name: _api(getattr(shiwu, name)) for name in sorted(shiwu.__all__)},
        "asyncio_api": {name: _api(getattr(aio, name)) for name in sorted(aio.__all__)},
        "contract_names": sorted(name for name in contract.__all__ if not name.isupper()),
        "error_names": sorted(name for name in vars(errors) if isinstance(getattr(errors, name), type)),
        "dumped_fields": {
            "shiwu:retention": _fields(Retention),
            "shiwu:queue-snapshot": _fields(QueueSnapshot),
            "shiwu:worker:": _fields(WorkerState),
            "shiwu status": _fields(QueueState),
            "shiwu sweep": _fields(SweepReport),
            "tune file": _fields(Tuned),
            "load line": _fields(LoadReport),
        },
        "helm_values": sorted(_paths(yaml.safe_load((ROOT / "helm/shiwu/values.yaml").read_text(encoding="utf-8")))),
    }


def sources() -> list[Path]:
    """The Python files of both packages."""
    return sorted(path for side in ("producer", "worker") for path in (ROOT / side).rglob("*.py"))


def _settings() -> dict[str, str]:
    """Environment name → default and limits."""
    return {
        f"SHIWU_{name.upper()}": _without_addresses(f"{_default(field)} {field.metadata}")
        for name, field in sorted(Settings.model_fields.items())
    }


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "computed"
    return repr(field.default)


def _environment() -> list[str]:
    """Every SHIWU_ name in the sources and in what deploys them."""
    folders = ("producer", "worker", "docker", "helm")
    kinds = {".py", ".yaml", ".tpl", ".Dockerfile", ".sh"}
    texts = [
        path.read_text(encoding="utf-8")
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in kinds and path.is_file()
    ]
    return sorted({name for text in texts for name in re.findall(r"\bSHIWU_[A-Z][A-Z0-9_]*[A-Z0-9]\b", text)})


def log_events(path: Path) -> Iterator[str]:
    """The first argument of each call of a logger, also where it is one of two."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _LEVELS):
            continue
        owner = node.func.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        if name.strip("_") in {"log", "logger"} and node.args:
            for part in ast.walk(node.args[0]):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def _span_names() -> Iterator[str]:
    """Names of spans and of their attributes."""
    for path in sources():
        if path.stem not in {"traces", "tracing"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _SPAN_NAME.fullmatch(node.value):
                yield node.value


def _is_key(value: str) -> bool:
    return value.startswith(("shiwu:", "celery-"))


def _vocabularies() -> list[type[Enum]]:
    return [contract.ErrorCode, contract.Status, contract.Stage, contract.Lane, contract.Cache]


def _codes(codes: type[Enum]) -> dict[str, int]:
    return {code.name: code.value for code in codes}


def _command(command: click.Command) -> dict[str, Any]:
    """Option → default and kind, and the same of each command below."""
    shown: dict[str, Any] = {
        " ".join([*param.opts, *param.secondary_opts]): f"{_kind(param.type)} default={_plain(param.default)}"
        for param in command.params
    }
    if isinstance(command, click.Group):
        shown |= {f"{name} …": _command(child) for name, child in sorted(command.commands.items())}
    return shown


def _kind(kind: click.ParamType) -> str:
    return "|".join(map(str, kind.choices)) if isinstance(kind, click.Choice) else kind.name


def _plain(value: object) -> str:
    if value is None or type(value).__name__ == "Sentinel":
        return "-"
    return str(value)


def _api(public: Any) -> Any:
    """The bases, fields and signatures of public methods of a class; the signature of a function."""
    if isinstance(public, type) and issubclass(public, Enum):
        return [each.value for each in public]
    if not isinstance(public, type):
        return _signature(public)
    methods = {
        name: _signature(inspect.getattr_static(public, name))
        for name in sorted(vars(public))
        if name == "__init__" or not name.startswith("_")
    }
    bases = [base.__name__ for base in public.__mro__ if issubclass(base, Exception)]
    return {"exceptions": bases, "fields": _fields(public), "members": methods}


def _signature(member: Any) -> str:
    function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    if not inspect.isfunction(function):
        return type(member).__name__
    return _without_addresses(str(inspect.signature(function)))


def _without_addresses(text: str) -> str:
    """Drop the memory addresses of values whose text is `<function … at 0x…>`: they differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _fields(owner: Any) -> list[str]:
    if dataclasses.is_dataclass(owner):
        return [field.name for field in dataclasses.fields(owner)]
    found = getattr(owner, "model_fields", None) or getattr(owner, "__struct_fields__", ())
    return list(found)


def _paths(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _paths(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix


def dump() -> str:
    """The surface as the text of `surface.json`."""
    return json.dumps(surface(), ensure_ascii=False, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    SURFACE.write_text(dump(), encoding="utf-8")
    sys.exit(0)
