"""Reads the settings from the environment, and reports wrong ones in one line each."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, NoReturn

import structlog
from pydantic import ValidationError
from structlog.typing import FilteringBoundLogger

from shiwu.contract import printable, without_logins
from shiwu.contract.validation_text import expectation
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode

log: FilteringBoundLogger = structlog.get_logger()
PREFIX: Final = "SHIWU_"
MIN_MISSPELT_RATIO: Final = 0.8
"""Similarity to the name of a setting (0 to 1) from which an unknown name counts as misspelt."""
MIN_HINT_RATIO: Final = 0.6
"""Similarity from which the setting is named as a hint."""
MAX_SHOWN_CHARS: Final = 80
_SERVICE_LINK: Final = re.compile(r"(.+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
"""Variables that Kubernetes adds to a pod for each Service; the name of a Service may begin with shiwu."""
_LINK_VALUE: Final = re.compile(r"(tcp|udp|sctp)://")
_NOT_SETTINGS: Final = frozenset({"SHIWU_BENCH_CACHE"})
"""Names that other parts of the project read."""


class SettingsError(ValueError):
    """The environment has wrong settings; the text has a line for each."""


@dataclass(frozen=True, slots=True)
class UnknownName:
    """A variable that begins with SHIWU_ and is not a setting."""

    name: str
    nearest: str | None
    """The setting with the most similar name; None if none is similar."""
    is_misspelt: bool
    """Whether the name is so similar that the worker refuses to start."""

    def __str__(self) -> str:
        hint = f"; did you mean {self.nearest}?" if self.nearest else "; `shiwu-worker --check --all` lists them"
        return f"{printable(self.name)} is not a setting of this version ({version('shiwu')}){hint}"


def unknown_names(environment: Mapping[str, str]) -> list[UnknownName]:
    """Return the variables that begin with SHIWU_ and are not settings, in alphabetical order.

    A name that is very similar to a setting is a misspelling, and the worker would run without that setting. Other
    names may belong to a newer version, whose chart or compose file is still in place after a roll-back.
    """
    known = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields]
    unknown = []
    for name, value in sorted(environment.items()):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in known or upper in _NOT_SETTINGS:
            continue
        if _SERVICE_LINK.fullmatch(upper.removeprefix(PREFIX)) and _is_service_link(upper, value):
            continue
        short = upper.removeprefix(PREFIX)
        near = difflib.get_close_matches(
            short, [setting.removeprefix(PREFIX) for setting in known], n=1, cutoff=MIN_HINT_RATIO
        )
        ratio = difflib.SequenceMatcher(None, near[0], short).ratio() if near else 0.0
        unknown.append(UnknownName(name, f"{PREFIX}{near[0]}" if near else None, ratio >= MIN_MISSPELT_RATIO))
    return unknown


def _is_service_link(name: str, value: str) -> bool:
    return bool(_LINK_VALUE.match(value)) or name.endswith(("_HOST", "_ADDR", "_PROTO")) or value.isdecimal()


def load_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings of this process.

    Args:
        environment: used for misspelt names and error messages; the values come from `os.environ`.

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
    """Log one warning about variables that are not settings, and remove them, so that no child process repeats it."""
    unknown = unknown_names(environment)
    if unknown:
        log.warning("unknown_settings", meaning="they have no effect", names=[str(name) for name in unknown])
    for name in unknown:
        environment.pop(name.name, None)


def load_settings_or_exit() -> Settings:
    """Return the settings of this process, or exit with code 64 if they are wrong."""
    try:
        return load_settings()
    except SettingsError as error:
        exit_with(error)


def exit_with(error: Exception) -> NoReturn:
    """Print the error on standard error, and exit with code 64."""
    print(error, file=sys.stderr)  # noqa: T201 logs are not set up yet
    sys.exit(int(ExitCode.CONFIG))


def _explain(error: ValidationError, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each wrong value: the variable, what was expected, what came, and which item of a list."""
    given = {name.upper(): value for name, value in environment.items()}
    for wrong in error.errors(include_url=False):
        field, *path = wrong["loc"]
        name = f"{PREFIX}{str(field).upper()}"
        text = expectation(wrong)
        value = wrong["input"] if path else given.get(name, wrong["input"])
        if not _is_secret(str(field)) and isinstance(value, str) and "got " not in text:
            text = f"{text}, got {_short(value)}"
        if path and isinstance(path[0], int):
            text = f"{text} (item {path[0] + 1})"
        if _LINK_VALUE.match(given.get(name, "")):
            text = f"{text}; Kubernetes sets this variable for a Service: set enableServiceLinks: false in the pod"
        yield printable(f"{name}: {text}")


def _is_secret(field: str) -> bool:
    return field not in Settings.model_fields or "Secret" in str(Settings.model_fields[field].annotation)


def _short(value: object) -> str:
    shown = repr(without_logins(value) if isinstance(value, str) else value)
    return shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:MAX_SHOWN_CHARS]}…"
