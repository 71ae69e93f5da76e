"""Keeps this process on its own machine: connections to other addresses fail and are remembered."""

from __future__ import annotations

import ipaddress
import re
import socket
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

_NUMERIC: Final = re.compile(r"(?:[0-9a-fx]*\.)*(?:0x[0-9a-f]+|[0-9]+)", re.IGNORECASE)
"""Every way in which the C library reads an IPv4 address: 127.1, 0x7f.1, 2130706433."""
OWN_NAMES: Final = frozenset({"localhost", "", socket.gethostname()})


class LeftMachineError(AssertionError):
    """A test tried to connect to an address that is not on loopback."""


def is_own_address(address: object) -> bool:
    """Whether a socket address stays on this machine: a path, or a host on loopback."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0]).partition("%")[0]
    try:
        found = ipaddress.ip_address(host)
        return (getattr(found, "ipv4_mapped", None) or found).is_loopback
    except ValueError:
        return host in OWN_NAMES


def needs_resolver(host: object) -> bool:
    """Whether looking this host up would ask a name server."""
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if not isinstance(name, str) or name in OWN_NAMES or ":" in name:
        return False
    return _NUMERIC.fullmatch(unicodedata.normalize("NFKC", name)) is None


@contextmanager
def only_loopback(patch: Callable[[object, str, object], None]) -> Iterator[list[str]]:
    """Guard sockets and name lookups, set by `patch(object, name, value)`, which the caller undoes.

    Connecting elsewhere raises and is added to the list that is yielded, because the code under test may
    swallow the error. Names that need a resolver are unknown, as on a machine without one.
    """
    left: list[str] = []

    def guarded(name: str) -> Callable[..., Any]:
        real = getattr(socket.socket, name)

        def call(self: socket.socket, *args: Any) -> Any:
            address = args[-1]
            if self.family in {socket.AF_INET, socket.AF_INET6} and not is_own_address(address):
                left.append(f"{name}({address!r})")
                raise LeftMachineError(f"expected an address on loopback, got {name}({address!r})")
            return real(self, *args)

        return call

    real_lookup = socket.getaddrinfo

    def lookup(host: Any, *args: Any, **options: Any) -> Any:
        if needs_resolver(host):
            raise socket.gaierror(socket.EAI_NONAME, f"no name server in tests: {host!r}")
        return real_lookup(host, *args, **options)

    for name in ("connect", "connect_ex", "sendto"):
        patch(socket.socket, name, guarded(name))
    patch(socket, "getaddrinfo", lookup)
    yield left
