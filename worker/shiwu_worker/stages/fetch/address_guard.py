"""The guard of addresses: judges where a connection may go, and makes it.

It sits where a socket is made, so redirects, retries and refills of a pool all pass it: one name look-up, every answer
judged, a connection to a judged address, and the peer compared.
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

from shiwu_worker.errors import AddressRefused, UnknownHost
from shiwu_worker.policy.access_rules import AccessRules, HostList, plain_host, read_nat64
from shiwu_worker.policy.ip_ranges import IPAddress, effective_addresses, special_use

ADDRESSES_TRIED: Final = 4
LOOKUPS: Final = 16
"""Look-ups that may be under way, unless told otherwise."""
_NO_SUCH_NAME: Final = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
_LOOKS_NUMERIC: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NAME: Final = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")

Found = tuple[socket.AddressFamily, Any]
"""A family and a socket address of it, as getaddrinfo gives them."""
Resolve = Callable[[str, int], Sequence[Found]]


def ask_resolver(host: str, port: int) -> Sequence[Found]:
    """The addresses of a name, by getaddrinfo."""
    return [(family, address) for family, _, _, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)]


class Lookup:
    """Name look-ups with a time limit, which getaddrinfo has not; thread-safe."""

    def __init__(self, resolve: Resolve = ask_resolver, *, at_most: int = LOOKUPS) -> None:
        self._resolve = resolve
        self._room = threading.BoundedSemaphore(at_most)

    def __call__(self, host: str, port: int, *, timeout_s: float) -> Sequence[Found]:
        """The addresses of `host`.

        Raises:
            OSError: TimeoutError, or what the resolver says.
        """
        until_s = time.monotonic() + timeout_s
        if not self._room.acquire(timeout=max(0.0, timeout_s)):
            raise TimeoutError("too many name look-ups are under way")
        box: queue.SimpleQueue[Sequence[Found] | OSError] = queue.SimpleQueue()

        def work() -> None:
            try:
                box.put(self._resolve(host, port))
            except OSError as error:
                box.put(error)
            except UnicodeError:
                box.put(socket.gaierror(socket.EAI_NONAME, "no name that can be looked up"))
            finally:
                self._room.release()

        try:
            threading.Thread(target=work, name="look-up", daemon=True).start()
        except RuntimeError as error:  # no memory for its stack
            self._room.release()
            raise OSError(str(error)) from error
        try:
            found = box.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("no answer from the name server in time") from None
        if isinstance(found, OSError):
            raise found
        return found


class AddressGuard:
    """Judges and connects; thread-safe.

    Args:
        reach: the operator's rules.
        resolve: asked once for each connection.
        lookups: how many may be under way; a name server that never answers holds each for longer than its fetch.
        make_socket: the class of the sockets.
    """

    def __init__(
        self,
        access: AccessRules,
        *,
        resolve: Resolve = ask_resolver,
        lookups: int = LOOKUPS,
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
        self._lookup = Lookup(resolve, at_most=lookups)
        self._make_socket = make_socket

    def check_name(self, host: str, port: int) -> bool:
        """Judge a host as it is written; return whether the operator trusts it whatever its addresses are.

        Raises:
            AddressRefused: the lists, the port or the spelling forbid it.
        """
        name = plain_host(host)
        if self._deny.has(name, port):
            raise AddressRefused(f"{name}:{port} is on SHIWU_DENY_HOSTS")
        trusted = self._allow.has(name, port)
        if self._only and not (trusted or self._only.has(name, port)):
            raise AddressRefused(f"{name}:{port} is not on SHIWU_ONLY_HOSTS")
        if not trusted and port not in self._ports:
            raise AddressRefused(f"port {port} of {name} is not one of SHIWU_FETCH_PORTS")
        try:
            literal = ipaddress.ip_address(name)
        except ValueError:
            if not _NAME.fullmatch(name) or _LOOKS_NUMERIC.fullmatch(name.rpartition(".")[2]):
                raise AddressRefused(f"{name!r:.80} is neither a name nor an address in its usual spelling") from None
        else:
            self.check_address(literal, trusted=trusted)
        return trusted

    def check_address(self, address: IPAddress, *, trusted: bool = False) -> None:
        """Judge one address.

        Raises:
            AddressRefused: it is not public and nobody allowed it, or it is denied.
        """
        if address.version == 6 and address.scope_id is not None:
            raise AddressRefused(f"{address} has a zone")
        ends = effective_addresses(address, self._nat64)
        for one in (address, *ends):
            if _is_in(one, self._deny_networks):
                raise AddressRefused(f"{address} is in SHIWU_DENY_NETWORKS")
        if trusted or _is_in(address, self._allow_networks):
            return
        for one in ends:
            if (use := special_use(one)) is not None and not _is_in(one, self._allow_networks):
                raise AddressRefused(f"{address} is not public: {use}")

    def connect(self, host: str, port: int, *, timeout_s: float, deadline_s: float) -> socket.socket:
        """Open a socket to a judged address of `host`.

        Args:
            timeout_s: for each address; the socket keeps it.
            deadline_s: moment of the monotonic clock by which all of it has ended.

        Raises:
            AddressRefused: the name, or any address of it, is not allowed.
            UnknownHost: there is no such name.
            OSError: no address answered.
        """
        trusted = self.check_name(host, port)
        try:
            found = self._lookup(plain_host(host), port, timeout_s=deadline_s - time.monotonic())
        except socket.gaierror as error:
            if error.errno in _NO_SUCH_NAME:
                raise UnknownHost(f"no such name: {host}") from error
            raise
        judged = [(self._check_answer(host, one, trusted=trusted), one) for one in found]
        last: OSError = OSError(f"no address of {host} answered")
        for address, (family, where) in judged[:ADDRESSES_TRIED]:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("the time for the whole fetch is over")
            try:
                return self._open(family, where, address, timeout_s=min(timeout_s, left_s))
            except OSError as error:
                last = error
        raise last

    def connect_trusted(self, host: str, port: int, *, timeout_s: float) -> socket.socket:
        """Open a socket to a host of the configuration: a proxy.

        Raises:
            OSError: no address answered.
        """
        last: OSError = OSError(f"no address of {host}")
        for family, where in self._lookup(host, port, timeout_s=timeout_s)[:ADDRESSES_TRIED]:
            try:
                return self._open(family, where, None, timeout_s=timeout_s)
            except OSError as error:
                last = error
        raise last

    def _check_answer(self, host: str, found: Found, *, trusted: bool) -> IPAddress:
        try:
            address = ipaddress.ip_address(found[1][0])
            self.check_address(address, trusted=trusted)
        except (ValueError, TypeError, IndexError):
            raise AddressRefused(f"{host} resolves to {found[1]!r:.80}, which is no address") from None
        except AddressRefused as error:
            raise AddressRefused(f"{host}: {error}") from None
        return address

    def _open(self, family: int, where: Any, judged: IPAddress | None, *, timeout_s: float) -> socket.socket:
        sock = self._make_socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect(where)
            if judged is not None and ipaddress.ip_address(sock.getpeername()[0]) != judged:
                raise AddressRefused(f"expected the peer {judged}, got {sock.getpeername()[0]}")
        except BaseException:  # whatever ends it, the socket is closed
            sock.close()
            raise
        return sock


def _is_in(address: IPAddress, networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]) -> bool:
    return any(network.version == address.version and address in network for network in networks)
