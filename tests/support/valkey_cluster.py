"""A Valkey Cluster as real processes on loopback: primaries, replicas, slots that move."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shiwu.broker.sharding import cluster_shard
from tests.support.processes import LOOPBACK, free_ports, undone_by
from tests.support.redis_server import RedisServer, valkey_binary
from tests.support.waiting import wait_until

SLOTS: Final = 16_384
FAILOVER_MS: Final = 1_000
"""After so long without a reply of a node its replica takes over. A busy machine may need longer to reply."""
NO_FAILOVER_MS: Final = 5_000
"""The same time where there is no replica, so that no busy node counts as failed."""
PAUSE_MS: Final = 10_000
"""How long a primary that is to be killed takes no writes, until its replica has caught up."""
CONFIG: Final = {
    "cluster-enabled": "yes",
    "cluster-require-full-coverage": "no",
    "repl-diskless-sync-delay": "0",
    "cluster-allow-replica-migration": "no",
}


class ValkeyCluster:
    """Nodes of one cluster, of which the first `primaries` have all slots; `url` is what a client is given.

    Args:
        shards: each primary has an equal number of this many shards; 0: of the slots.
        login: user and password for what this object asks the nodes, and for replicas.
    """

    def __init__(
        self,
        *,
        folder: Path,
        primaries: int = 3,
        replicas: int = 0,
        config: dict[str, str] | None = None,
        shards: int = 0,
        login: tuple[str, str] | None = None,
    ):
        self._folder = folder
        self._primaries = primaries
        self._shards = shards
        self._login: dict[str, str] = {} if login is None else {"username": login[0], "password": login[1]}
        self._stack = ExitStack()
        options = CONFIG | {"cluster-node-timeout": str(FAILOVER_MS if replicas else NO_FAILOVER_MS)} | (config or {})
        if login is not None:
            options |= {"primaryuser": login[0], "primaryauth": login[1]}
        self._servers = [
            RedisServer(folder=folder / f"node-{index}", binary=valkey_binary(), config=options)
            for index in range(primaries + replicas)
        ]

    def __enter__(self) -> Self:
        with undone_by(self._stack.close):
            for server in self._servers:
                # By default the bus has the number of the port plus 10,000, which may be none.
                server.config["cluster-port"] = str(free_ports(1)[0])
                server.start()
                self._stack.callback(server.stop)
            self._give_slots()
            self._join()
            self._attach_replicas()
            self.wait_complete()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            if server.is_running:
                server.resume()
        self._stack.close()

    @property
    def ports(self) -> list[int]:
        """The ports of all nodes, those of the first primaries first."""
        return [server.port for server in self._servers]

    @property
    def seeds(self) -> str:
        """The nodes as a URL names them."""
        return ",".join(f"{LOOPBACK}:{port}" for port in self.ports)

    def url(self, *, shards: int = 16) -> str:
        """Where clients ask."""
        return f"cluster://{self.seeds}/?shards={shards}"

    def ask(self, port: int, *command: Any) -> Any:
        """One command to one node, tried once."""
        options: dict[str, Any] = {"socket_timeout": 5, "socket_connect_timeout": 5, "retry": Retry(NoBackoff(), 0)}
        with redis.Redis(host=LOOPBACK, port=port, **(options | self._login)) as client:
            return client.execute_command(*command)

    def server(self, port: int) -> RedisServer:
        """The process of a node: kill, pause, resume, start it."""
        return next(server for server in self._servers if server.port == port)

    def owner(self, slot: int, *, seen_by: int = 0) -> int:
        """The port of the primary that has the slot, as a node sees it, by default the first that answers; else 0."""
        for server in self._servers:
            if server.is_running and seen_by in {0, server.port}:
                for first, last, primary, *_ in self._slots(server.port):
                    if first <= slot <= last:
                        return int(primary[1])
                return 0
        return 0

    def nodes_of(self, slot: int) -> list[int]:
        """The ports of the primary that has the slot and of its replicas."""
        asked = next(server.port for server in self._servers if server.is_running)
        for first, last, *nodes in self._slots(asked):
            if first <= slot <= last:
                return [int(node[1]) for node in nodes]
        return []

    def wait_complete(self, *, timeout_s: float = 60.0) -> None:
        """Wait until all nodes know all slots, and every replica follows its primary."""
        wait_until(self._is_complete, timeout_s=timeout_s, every_s=0.05, what="all nodes know all slots and replicas")

    def wait_caught_up(self, slot: int) -> tuple[int, int]:
        """Wait until the replica of a slot has all that its primary had acknowledged; the ports of both."""
        primary, replica = self.nodes_of(slot)
        written = int(self.ask(primary, "ROLE")[1])
        wait_until(lambda: int(self.ask(replica, "ROLE")[4]) >= written, timeout_s=30, what="the replica catches up")
        return primary, replica

    def kill_primary(self, slot: int) -> int:
        """Kill the primary of a slot once its replica has all that it has acknowledged; its port."""
        self.ask(self.owner(slot), "CLIENT", "PAUSE", PAUSE_MS, "WRITE")
        primary, _ = self.wait_caught_up(slot)
        self.server(primary).kill()
        return primary

    def cut_off_replica(self, slot: int) -> int:
        """Let the replica of a slot lose all that its primary acknowledges from now on; its port."""
        primary, replica = self.wait_caught_up(slot)
        self.ask(replica, "CONFIG", "SET", "primaryauth", "wrong")
        self.ask(replica, "CLIENT", "KILL", "TYPE", "master")
        wait_until(lambda: not self.ask(primary, "ROLE")[2], timeout_s=30, what="the primary has lost its replica")
        return replica

    def wait_failed_over(self, slot: int, *, dead: int) -> None:
        """Wait until all nodes that run know another primary of the slot than the dead one."""

        def is_done() -> bool:
            running = [server.port for server in self._servers if server.is_running]
            return all(self.owner(slot, seen_by=port) not in {0, dead} for port in running)

        wait_until(is_done, timeout_s=60, what=f"a replica takes over from {dead}")

    def other_than(self, port: int) -> int:
        """Another primary."""
        return min(self.primaries() - {port})

    def node_id(self, port: int) -> str:
        """The name of a node in the cluster."""
        return str(self.ask(port, "CLUSTER", "MYID").decode())

    def keys(self) -> set[bytes]:
        """The keys on all primaries."""
        return {key for port in self.primaries() for key in self.ask(port, "KEYS", "*")}

    def flush(self) -> None:
        """Delete all data."""
        for port in self.primaries():
            self.ask(port, "FLUSHALL")

    def primaries(self) -> set[int]:
        """The ports of the nodes that have slots."""
        asked = next(server.port for server in self._servers if server.is_running)
        return {int(row[2][1]) for row in self._slots(asked)}

    def move_atomically(self, slot: int, *, to: int) -> None:
        """Move a slot in one step, as Valkey 9 does, and wait until all nodes know it."""
        source = self.owner(slot)
        self.ask(source, "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", self.node_id(to))
        self._wait_for_owner(slot, port=to)

    def begin_move(self, slot: int, *, to: int) -> int:
        """Begin to move a slot key by key, as Redis and older versions of Valkey do; the port it is moved from."""
        source = self.owner(slot)
        self.ask(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.node_id(source))
        self.ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.node_id(to))
        return source

    def move_keys(self, slot: int, *, source: int, to: int, most: int = 100) -> int:
        """Move some keys of a slot; how many."""
        keys = self.ask(source, "CLUSTER", "GETKEYSINSLOT", slot, most)
        if keys:
            self.ask(source, "MIGRATE", LOOPBACK, to, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def end_move(self, slot: int, *, source: int, to: int) -> None:
        """Give the slot to its new node."""
        while self.move_keys(slot, source=source, to=to):
            pass
        for port in (to, source):
            self.ask(port, "CLUSTER", "SETSLOT", slot, "NODE", self.node_id(to))
        self._wait_for_owner(slot, port=to)

    def _wait_for_owner(self, slot: int, *, port: int) -> None:
        def is_known() -> bool:
            return all(self.owner(slot, seen_by=each) == port for each in self.primaries())

        wait_until(is_known, timeout_s=30, what=f"all nodes know that {port} has slot {slot}")

    def _slots(self, port: int) -> list[Any]:
        return list(self.ask(port, "CLUSTER", "SLOTS"))

    def _join(self) -> None:
        first, *others = self._servers
        for server in others:
            self.ask(first.port, "CLUSTER", "MEET", LOOPBACK, server.port, server.config["cluster-port"])
        wait_until(self._all_met, timeout_s=30, every_s=0.05, what="all nodes know each other")

    def _all_met(self) -> bool:
        texts = [self.ask(port, "CLUSTER", "NODES").decode() for port in self.ports]
        return all(len(text.splitlines()) == len(self.ports) and "handshake" not in text for text in texts)

    def _give_slots(self) -> None:
        ends = [SLOTS * (index + 1) // self._primaries for index in range(self._primaries)]
        if self._shards:
            slots = sorted(cluster_shard(index).slot or 0 for index in range(self._shards))
            ends = [slots[len(slots) * (index + 1) // self._primaries - 1] + 1 for index in range(self._primaries)]
            ends[-1] = SLOTS
        for index, port in enumerate(self.ports[: self._primaries]):
            self.ask(port, "CLUSTER", "ADDSLOTSRANGE", ends[index - 1] if index else 0, ends[index] - 1)
            self.ask(port, "CLUSTER", "SET-CONFIG-EPOCH", index + 1)

    def _attach_replicas(self) -> None:
        for index, port in enumerate(self.ports[self._primaries :]):
            of = self.ports[index % self._primaries]
            self.ask(port, "CLUSTER", "REPLICATE", self.node_id(of))

    def _is_complete(self) -> bool:
        try:
            states = [self.ask(port, "CLUSTER", "INFO") for port in self.ports]
            rows = [self._slots(port) for port in self.ports]
            roles = [self.ask(port, "ROLE") for port in self.ports]
        except redis.RedisError:
            return False
        wanted = len(self.ports) - self._primaries
        replicas = [role for role in roles if role[0] == b"slave"]
        return (
            all(b"cluster_state:ok" in state for state in states)
            and all(sum(last - first + 1 for first, last, *_ in each) == SLOTS for each in rows)
            and all(len({node[1] for row in each for node in row[3:]}) == wanted for each in rows)
            and len(replicas) == wanted
            and all(role[3] == b"connected" for role in replicas)
        )
