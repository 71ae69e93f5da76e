"""An asynchronous device on the CPU: work is done later, in any order that its streams and events allow.

Every operation is queued on its stream. Which queued operation is done next is drawn from a seeded generator, each time
the host does something, and until an event is reached when the host waits for it. Values and order show a missing wait:

- Values. Fresh memory holds 0xA5 and NaN, a replay of a graph destroys the outputs of the other graphs of its pool, and
  an operation reads and writes only when it is done.
- Order. Each operation knows which others are done before it in every schedule. An access to memory that another
  operation may be writing to, or a write to memory that another may be reading, raises `Race`, whatever the draw was.

A device can be lost: after `lose_after` operations one accesses illegal memory. The host is told by the next call,
whichever it is, and by every call from then on, and no operation is done any more.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shiwu_worker.stages.encode.accelerator import gather_rows

Work = Callable[[torch.Tensor], torch.Tensor]


class Race(AssertionError):
    """Two operations of which neither is certain to come first use the same memory, and one of them writes."""


@dataclass(eq=False)
class Operation:
    """Work on a stream, or on the host. `before` are the operations that are done before it in every schedule."""

    name: str
    act: Callable[[], None]
    before: frozenset[Operation]
    waits_for: tuple[Operation, ...] = ()
    is_done: bool = False

    @property
    def known(self) -> frozenset[Operation]:
        """What is done once this operation is."""
        return self.before | {self}


@dataclass
class Memory:
    """Accesses to one storage."""

    last_write: Operation | None = None
    reads: list[Operation] = field(default_factory=list)


@dataclass(eq=False)
class FakeEvent:
    """An event of the fake device."""

    device: FakeAccelerator
    operation: Operation | None = None

    def synchronize(self) -> None:
        """Do queued work until the event is reached. An event that was not recorded is reached, as in CUDA."""
        self.device.reach(self.operation)

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds between two events: always one."""
        self.device.check_lost()
        assert self.operation is None or self.operation.is_done
        assert isinstance(end, FakeEvent)
        return 1.0


class FakeGraph:
    """A graph of the fake device."""

    def __init__(self, device: FakeAccelerator, work: Work, raw: torch.Tensor, output: torch.Tensor) -> None:
        self._device, self._work, self._raw = device, work, raw
        self.output = output

    def replay(self) -> None:
        """Queue the work; it destroys what the other graphs of its pool have written."""
        others = [other for other in self._device.graph_outputs if other is not self.output]

        def act() -> None:
            for other in others:
                poison(other)
            self.output.copy_(self._work(self._raw))

        self._device.queue("replay", act, reads=[self._raw], writes=[self.output, *others])


def poison(tensor: torch.Tensor) -> None:
    """Fill with values that cannot be a result."""
    tensor.fill_(0xA5 if tensor.dtype == torch.uint8 else float("nan"))


def fill(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy now."""
    target.copy_(source)


class FakeAccelerator:
    """Implements `Accelerator`.

    Args:
        seed: of the order of operations.
        width: length of the vectors of the tower.
        eager_rate: probability that a queued operation is done each time the host queues another.
    """

    def __init__(self, *, seed: int, width: int, eager_rate: float = 0.3) -> None:
        self._random = random.Random(seed)
        self._width = width
        self._eager_rate = eager_rate
        self._streams: dict[str, list[Operation]] = {"copy": [], "compute": []}
        self._last: dict[str, Operation] = {}
        self._pending_waits: dict[str, list[Operation]] = defaultdict(list)
        self._memory: dict[int, Memory] = defaultdict(Memory)
        self._kept: list[torch.Tensor] = []
        """All tensors, so that no address is used twice."""
        self.graph_outputs: list[torch.Tensor] = []
        self._host: frozenset[Operation] = frozenset()
        self._current = "default"
        self._lock = threading.RLock()
        self.lose_after: int | None = None
        """Operations until the device is lost; None for never."""
        self.is_lost = False

    # -------------------------------------------------------------------------------- scheduling
    def queue(
        self, name: str, act: Callable[[], None], *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> Operation:
        """Queue an operation on the current stream."""
        with self._lock:
            self.check_lost()
            stream = self._current
            assert stream in self._streams, "expected the copy or the compute stream to be current"
            waits = tuple(self._pending_waits.pop(stream, ()))
            before = self._host.union(*(each.known for each in (*waits, *self._tail(stream))))
            operation = Operation(name, act, before, waits)
            self._access(operation, reads=reads, writes=writes)
            self._streams[stream].append(operation)
            self._last[stream] = operation
            while self._random.random() < self._eager_rate and self._do_one():
                pass
            return operation

    def _tail(self, stream: str) -> list[Operation]:
        return [self._last[stream]] if stream in self._last else []

    def _access(self, operation: Operation, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        for tensor in reads:
            memory = self._memory[tensor.untyped_storage().data_ptr()]
            self._check(operation, memory.last_write, "reads what it writes")
            memory.reads.append(operation)
        for tensor in writes:
            memory = self._memory[tensor.untyped_storage().data_ptr()]
            self._check(operation, memory.last_write, "writes what it writes")
            for reader in memory.reads:
                self._check(operation, reader, "writes what it reads")
            memory.last_write, memory.reads = operation, []

    def _check(self, operation: Operation, other: Operation | None, what: str) -> None:
        if other is not None and other is not operation and other not in operation.before and not self.is_lost:
            raise Race(f"{operation.name} beside {other.name}: {what}")

    def _do_one(self) -> bool:
        """Do one of the operations that may come next; False where there is none."""
        if self.is_lost:
            return False
        ready = [
            operations
            for operations in self._streams.values()
            if operations and all(each.is_done for each in operations[0].waits_for)
        ]
        if not ready:
            return False
        operation = self._random.choice(ready).pop(0)
        if self.lose_after is not None:
            self.lose_after -= 1
            self.is_lost = self.lose_after < 0
        if self.is_lost:
            return False
        with torch.inference_mode():
            operation.act()
        operation.is_done = True
        return True

    def reach(self, operation: Operation | None) -> None:
        """Do queued work until this operation is done; the host then knows all that is done before it."""
        with self._lock:
            if operation is None:
                return
            self.check_lost()
            while not operation.is_done:
                is_done = self._do_one()
                self.check_lost()
                assert is_done, "no operation can be done: a stream waits for one that was never queued"
            self._host |= operation.known

    def check_lost(self) -> None:
        """Raise what every call raises once the device is lost."""
        if self.is_lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def _on_host(self, name: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()) -> None:
        with self._lock:
            operation = Operation(name, lambda: None, self._host, is_done=True)
            self._access(operation, reads=reads, writes=writes)
            self._host |= {operation}

    # -------------------------------------------------------------------------------- Accelerator
    def event(self, *, is_timed: bool = False) -> FakeEvent:
        """Make an event."""
        return FakeEvent(self)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return poisoned memory."""
        return self.allocate(shape, dtype)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return poisoned memory."""
        self.check_lost()
        tensor = torch.empty(tuple(shape), dtype=dtype)
        poison(tensor)
        self._kept.append(tensor)
        return tensor

    def gather(self, target: torch.Tensor, pixels: NDArray[np.uint8], rows: Sequence[int] | None) -> None:
        """Write on the host."""
        self._on_host("gather", writes=[target])
        gather_rows(target.numpy(), pixels, rows)

    def read(self, source: torch.Tensor) -> NDArray[np.float32]:
        """Read on the host."""
        self._on_host("read", reads=[source])
        vectors: NDArray[np.float32] = source.numpy().copy()
        return vectors

    @contextlib.contextmanager
    def _stream(self, name: str) -> Iterator[None]:
        with self._lock:
            before, self._current = self._current, name
            try:
                yield
            finally:
                self._current = before

    def copying(self) -> contextlib.AbstractContextManager[None]:
        """Make the copy stream the current one."""
        return self._stream("copy")

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Make the compute stream the current one."""
        return self._stream("compute")

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy."""
        self.queue("copy", lambda: fill(target, source), reads=[source], writes=[target])

    def record(self, event: Any) -> None:
        """Let the event stand for the last operation of the current stream."""
        event.operation = self._last.get(self._current)

    def wait(self, event: Any) -> None:
        """Let the next operation of the current stream wait for the event; nothing where it was not recorded."""
        if event.operation is not None:
            self._pending_waits[self._current].append(event.operation)

    def run(self, work: Work, raw: torch.Tensor) -> torch.Tensor:
        """Queue a pass."""
        output = self.allocate((len(raw), self._width), torch.float32)
        self.queue("pass", lambda: fill(output, work(raw)), reads=[raw], writes=[output])
        return output

    def capture(self, work: Work, raw: torch.Tensor, *, pool: Any) -> FakeGraph:
        """Make a graph whose output shares its memory with those of all other graphs."""
        graph = FakeGraph(self, work, raw, self.allocate((len(raw), self._width), torch.float32))
        self.graph_outputs.append(graph.output)
        return graph

    def new_pool(self) -> Any:
        """Return a name: all pools of the fake are one."""
        return object()

    def synchronize(self) -> None:
        """Do all queued work."""
        with self._lock:
            while self._do_one():
                pass
            self.check_lost()
            assert not any(self._streams.values())
            self._host = self._host.union(*(each.known for each in self._last.values()))

    def release_memory(self) -> None:
        """Do nothing."""
