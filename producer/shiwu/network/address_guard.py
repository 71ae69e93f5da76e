"""The address guard: checks where a connection may go, and makes it.

It works where a socket is created, so redirects, retries and new connections of a pool all pass it. It looks a name up
once, checks every address, connects to a checked address, and compares the peer with it.
"""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from shiwu.network.address_rules import AddressRules, HostList, plain_host, read_nat64
from shiwu.network.ip_ranges import IPAddress, effective_addresses, special_use

MAX_ADDRESSES_TRIED: Final = 4
MAX_LOOKUPS: Final = 16
"""Default number of concurrent look-ups."""
_NO_SUCH_NAME: Final = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
_LOOKS_NUMERIC: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NAME: Final = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")

ResolvedAddress = tuple[socket.AddressFamily, Any]
"""An address family and a socket address, as getaddrinfo returns them."""
Resolve = Callable[[str, int], Sequence[ResolvedAddress]]


def resolve_by_system(host: str, port: int) -> Sequence[ResolvedAddress]:
    """The addresses of a name, by getaddrinfo."""
    return [(family, address) for family, _, _, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)]


class AddressRefused(Exception):
    """The address guard refused a host. The reason is for the log only."""


class UnknownHost(Exception):
    """The name does not exist. Callers see the same as for AddressRefused, or answers would reveal internal names."""


class Lookup:
    """Name look-ups with a time limit, which getaddrinfo does not have. Thread-safe."""

    def __init__(self, resolve: Resolve = resolve_by_system, *, max_lookups: int = MAX_LOOKUPS) -> None:
        self._resolve = resolve
        self._free_lookups = threading.BoundedSemaphore(max_lookups)

    def __call__(self, host: str, port: int, *, timeout_s: float) -> Sequence[ResolvedAddress]:
        """The addresses of `host`.

        Raises:
            OSError: TimeoutError, or an error of the resolver.
        """
        until_s = time.monotonic() + timeout_s
        if not self._free_lookups.acquire(timeout=max(0.0, timeout_s)):
            raise TimeoutError("too many name look-ups are under way")
        results: queue.SimpleQueue[Sequence[ResolvedAddress] | OSError] = queue.SimpleQueue()

        def work() -> None:
            try:
                results.put(self._resolve(host, port))
            except OSError as error:
                results.put(error)
            except UnicodeError:
                results.put(socket.gaierror(socket.EAI_NONAME, "no name that can be looked up"))
            finally:
                self._free_lookups.release()

        try:
            threading.Thread(target=work, name="look-up", daemon=True).start()
        except RuntimeError as error:  # no memory for its stack
            self._free_lookups.release()
            raise OSError(str(error)) from error
        try:
            result = results.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("no answer from the name server in time") from None
        if isinstance(result, OSError):
            raise result
        return result


class AddressGuard:
    """Checks addresses and connects. Thread-safe.

    Args:
        access: the operator's rules.
        resolve: name look-up, called once for each connection.
        lookups: most concurrent look-ups; without an answer a look-up can last longer than its request.
        make_socket: the class of the sockets.
    """

    def __init__(
        self,
        access: AddressRules,
        *,
        resolve: Resolve = resolve_by_system,
        lookups: int = MAX_LOOKUPS,
        make_socket: Callable[..., socket.socket] = socket.socket,
    ) -> None:
        self._allow, self._only, self._deny = (
            HostList(entries) for entries in (access.allow_hosts, access.only_hosts, access.deny_hosts)
        )
        self._allow_networks, self._deny_networks = (
            tuple(ipaddress.ip_network(entry) for entry in entries)
            for entries in (access.allow_networks, access.deny_networks)
        )
        self._nat64 = tuple(read_nat64(entry) for entry in access.nat64_prefixes)
        self._ports = frozenset(access.ports)
        self._lookup = Lookup(resolve, max_lookups=lookups)
        self._make_socket = make_socket

    def check_name(self, host: str, port: int) -> bool:
        """Check a host as it is written; returns whether the operator allows it whatever its addresses are.

        Raises:
            AddressRefused: when the lists, the port or the spelling forbid it.
        """
        name = plain_host(host)
        if self._deny.has(name, port):
            raise AddressRefused(f"{name}:{port} is on SHIWU_DENY_HOSTS")
        is_trusted = self._allow.has(name, port)
        if self._only and not (is_trusted or self._only.has(name, port)):
            raise AddressRefused(f"{name}:{port} is not on SHIWU_ONLY_HOSTS")
        if not is_trusted and port not in self._ports:
            raise AddressRefused(f"port {port} of {name} is not one of SHIWU_FETCH_PORTS")
        try:
            literal = ipaddress.ip_address(name)
        except ValueError:
            if not _NAME.fullmatch(name) or _LOOKS_NUMERIC.fullmatch(name.rpartition(".")[2]):
                raise AddressRefused(f"{name!r:.80} is neither a name nor an address in its usual spelling") from None
        else:
            self.check_address(literal, is_trusted=is_trusted)
        return is_trusted

    def check_address(self, address: IPAddress, *, is_trusted: bool = False) -> None:
        """Check one address.

        Raises:
            AddressRefused: when it is denied, or neither public nor allowed.
        """
        if address.version == 6 and address.scope_id is not None:
            raise AddressRefused(f"{address} has a zone")
        targets = effective_addresses(address, self._nat64)
        for target in (address, *targets):
            if _is_in(target, self._deny_networks):
                raise AddressRefused(f"{address} is in SHIWU_DENY_NETWORKS")
        if is_trusted or _is_in(address, self._allow_networks):
            return
        for target in targets:
            if (use := special_use(target)) is not None and not _is_in(target, self._allow_networks):
                raise AddressRefused(f"{address} is not public: {use}")

    def connect(self, host: str, port: int, *, timeout_s: float, deadline_s: float) -> socket.socket:
        """Open a socket to a checked address of `host`.

        Args:
            timeout_s: time-out of each address; the socket keeps it.
            deadline_s: time of the monotonic clock by which everything has ended.

        Raises:
            AddressRefused: when the name, or any address of it, is not allowed.
            UnknownHost: when there is no such name.
            OSError: when no address answered.
        """
        is_trusted = self.check_name(host, port)
        try:
            resolved = self._lookup(plain_host(host), port, timeout_s=deadline_s - time.monotonic())
        except socket.gaierror as error:
            if error.errno in _NO_SUCH_NAME:
                raise UnknownHost(f"no such name: {host}") from error
            raise
        checked = [(self._check_resolved(host, entry, is_trusted=is_trusted), entry) for entry in resolved]
        last_error: OSError = OSError(f"no address of {host} answered")
        for address, (family, sockaddr) in checked[:MAX_ADDRESSES_TRIED]:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("the time for the whole request is over")
            try:
                return self._open(family, sockaddr, address, timeout_s=min(timeout_s, left_s))
            except OSError as error:
                last_error = error
        raise last_error

    def connect_trusted(self, host: str, port: int, *, timeout_s: float) -> socket.socket:
        """Open a socket to a host of the configuration: a proxy.

        Raises:
            OSError: when no address answered.
        """
        last_error: OSError = OSError(f"no address of {host}")
        for family, sockaddr in self._lookup(host, port, timeout_s=timeout_s)[:MAX_ADDRESSES_TRIED]:
            try:
                return self._open(family, sockaddr, None, timeout_s=timeout_s)
            except OSError as error:
                last_error = error
        raise last_error

    def _check_resolved(self, host: str, resolved: ResolvedAddress, *, is_trusted: bool) -> IPAddress:
        try:
            address = ipaddress.ip_address(resolved[1][0])
            self.check_address(address, is_trusted=is_trusted)
        except (ValueError, TypeError, IndexError):
            raise AddressRefused(f"{host} resolves to {resolved[1]!r:.80}, which is no address") from None
        except AddressRefused as error:
            raise AddressRefused(f"{host}: {error}") from None
        return address

    def _open(self, family: int, sockaddr: Any, expected: IPAddress | None, *, timeout_s: float) -> socket.socket:
        sock = self._make_socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect(sockaddr)
            if expected is not None and ipaddress.ip_address(sock.getpeername()[0]) != expected:
                raise AddressRefused(f"expected the peer {expected}, got {sock.getpeername()[0]}")
        except BaseException:  # no failure may leave the socket open
            sock.close()
            raise
        return sock


def _is_in(address: IPAddress, networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]) -> bool:
    return any(network.version == address.version and address in network for network in networks)
