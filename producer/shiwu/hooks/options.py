"""Reads what several commands of webhooks take from the environment: address rules, and the schedule of tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from shiwu.cli.params import span_s
from shiwu.contract import printable
from shiwu.network.address_rules import HTTP_PORTS, AddressRules, check_proxy, read_host, read_nat64, read_network

DEFAULT_SCHEDULE: Final = "0s,5s,5m,30m,2h,5h,10h"
MAX_TRIES: Final = 50
MAX_SCHEDULE_S: Final = 30 * 86_400


class OptionsError(ValueError):
    """A variable of the environment is wrong; the text names it."""


def read_schedule(text: str) -> tuple[float, ...]:
    """The pauses before each try, in seconds, as `0s,5s,5m,2h`.

    Raises:
        ValueError: a pause has another form, there are too many, or they take longer than 30 days.
    """
    pauses = []
    for part in text.split(","):
        if (pause_s := span_s(part.strip())) is None:
            raise ValueError(f"expected pauses as {DEFAULT_SCHEDULE}, got {part.strip()!r:.40}")
        pauses.append(pause_s)
    if len(pauses) > MAX_TRIES or sum(pauses) > MAX_SCHEDULE_S:
        raise ValueError(f"expected at most {MAX_TRIES} pauses of 30 days in all, got {len(pauses)}")
    return tuple(pauses)


def read_rules(environment: Mapping[str, str]) -> AddressRules:
    """The address rules, from the variables that workers read too.

    Raises:
        OptionsError: a variable has a wrong value.
    """
    read = _Reader(environment)
    ports = read.parts("SHIWU_FETCH_PORTS", _read_port)
    proxy_url = environment.get("SHIWU_PROXY_URL", "").strip() or None
    if proxy_url is not None:
        try:
            check_proxy(proxy_url)
        except ValueError as error:
            raise OptionsError(f"SHIWU_PROXY_URL: {error}") from None
    return AddressRules(
        allow_hosts=read.parts("SHIWU_ALLOW_HOSTS", read_host),
        only_hosts=read.parts("SHIWU_ONLY_HOSTS", read_host),
        deny_hosts=read.parts("SHIWU_DENY_HOSTS", read_host),
        allow_networks=read.parts("SHIWU_ALLOW_NETWORKS", read_network),
        deny_networks=read.parts("SHIWU_DENY_NETWORKS", read_network),
        nat64_prefixes=read.parts("SHIWU_NAT64_PREFIXES", read_nat64),
        ports=HTTP_PORTS if not ports else tuple(int(port) for port in ports if port.lower() != "none"),
        proxy_url=proxy_url,
    )


class _Reader:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def parts(self, name: str, check: Callable[[str], Any]) -> tuple[str, ...]:
        """The parts of a list, each of which `check` can parse."""
        found = tuple(part.strip() for part in self._environment.get(name, "").split(",") if part.strip())
        for part in found:
            try:
                check(part)
            except ValueError as error:
                raise OptionsError(f"{name}: {printable(str(error))}") from None
        return found


def _read_port(text: str) -> None:
    if text.lower() != "none" and not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ValueError(f"expected ports from 1 to 65535, or none, got {text!r:.40}")
