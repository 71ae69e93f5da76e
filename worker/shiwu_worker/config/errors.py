"""Reads the settings from the environment, and says in plain lines what is wrong with them."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, NoReturn

import structlog
from pydantic import ValidationError

from shiwu.contract import printable
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode

log: Any = structlog.get_logger()
PREFIX: Final = "SHIWU_"
MISSPELT: Final = 0.8
"""From this likeness to the name of a setting on (of 1) an unknown name counts as a misspelling of it."""
LIKE: Final = 0.6
"""From this likeness on the setting is named as a hint."""
LONGEST_SHOWN: Final = 80
_SERVICE_LINK: Final = re.compile(r"(.+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
"""What Kubernetes adds to the environment of a pod for each Service; one may be called shiwu-something."""
_LINK_VALUE: Final = re.compile(r"(tcp|udp|sctp)://")
_NOT_SETTINGS: Final = frozenset({"SHIWU_BENCH_CACHE"})
"""Names that other parts of the project read."""


class SettingsError(ValueError):
    """The environment holds settings that cannot work; the text has a line for each."""


@dataclass(frozen=True, slots=True)
class UnknownName:
    """A variable that looks like a setting and is none."""

    name: str
    nearest: str | None
    """The setting that was probably meant."""
    is_misspelt: bool
    """Whether it is so like that setting that the worker does not start."""

    def __str__(self) -> str:
        hint = f"; did you mean {self.nearest}?" if self.nearest else "; `shiwu-worker --check --all` lists them"
        return f"{printable(self.name)} is not a setting of this version ({version('shiwu')}){hint}"


def unknown_names(environment: Mapping[str, str]) -> list[UnknownName]:
    """The variables that begin with SHIWU_ and are no settings, in alphabetical order.

    One that is very like a setting is a misspelling, and the worker would run without what the operator asked for. Any
    other may belong to a newer version, whose chart or compose file this version meets during a roll-back.
    """
    known = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields]
    found = []
    for name, value in sorted(environment.items()):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in known or upper in _NOT_SETTINGS:
            continue
        if _SERVICE_LINK.fullmatch(upper.removeprefix(PREFIX)) and _is_service_link(upper, value):
            continue
        short = upper.removeprefix(PREFIX)
        near = difflib.get_close_matches(short, [one.removeprefix(PREFIX) for one in known], n=1, cutoff=LIKE)
        likeness = difflib.SequenceMatcher(None, near[0], short).ratio() if near else 0.0
        found.append(UnknownName(name, f"{PREFIX}{near[0]}" if near else None, likeness >= MISSPELT))
    return found


def _is_service_link(name: str, value: str) -> bool:
    return bool(_LINK_VALUE.match(value)) or name.endswith(("_HOST", "_ADDR", "_PROTO")) or value.isdecimal()


def load_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this process.

    Args:
        environment: looked up for misspelt names and for the text of error messages; values come from `os.environ`.

    Raises:
        SettingsError: a value or a name is wrong.
    """
    lines = [str(unknown) for unknown in unknown_names(environment) if unknown.is_misspelt]
    try:
        settings = Settings()
    except ValidationError as error:
        raise SettingsError("\n".join([*_explain(error, environment), *lines])) from None
    if lines:
        raise SettingsError("\n".join(lines))
    return settings


def report_unknown_names(environment: MutableMapping[str, str] = os.environ) -> None:
    """Log one warning about variables that are no settings, and remove them, so that no child process repeats it."""
    unknown = unknown_names(environment)
    if unknown:
        log.warning("unknown_settings", meaning="they have no effect", names=[str(one) for one in unknown])
    for one in unknown:
        environment.pop(one.name, None)


def load_settings_or_exit() -> Settings:
    """The settings of this process; wrong ones end it with the exit code for settings, before there is a log."""
    try:
        return load_settings()
    except SettingsError as error:
        exit_with(error)


def exit_with(error: Exception) -> NoReturn:
    """End the process with the exit code for settings, and say why on standard error."""
    print(error, file=sys.stderr)  # noqa: T201 there is no log yet
    sys.exit(int(ExitCode.CONFIG))


def _explain(error: ValidationError, environment: Mapping[str, str]) -> Iterator[str]:
    """One line for each value that is wrong: the variable, what was expected, what came, and which item of a list."""
    given = {name.upper(): value for name, value in environment.items()}
    for wrong in error.errors(include_url=False):
        field, *path = wrong["loc"]
        name = f"{PREFIX}{str(field).upper()}"
        text = wrong["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        came = wrong["input"] if path else given.get(name, wrong["input"])
        if not _is_secret(str(field)) and isinstance(came, str) and "got " not in text:
            text = f"{text}, got {_short(came)}"
        if path and isinstance(path[0], int):
            text = f"{text} (item {path[0] + 1})"
        if _LINK_VALUE.match(given.get(name, "")):
            text = f"{text}; Kubernetes sets this variable for a Service: set enableServiceLinks: false in the pod"
        yield printable(f"{name}: {text}")


def _is_secret(field: str) -> bool:
    return field not in Settings.model_fields or "Secret" in str(Settings.model_fields[field].annotation)


def _short(value: Any) -> str:
    shown = repr(re.sub(r"//[^/]*@", "//…@", value) if isinstance(value, str) else value)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}…"
