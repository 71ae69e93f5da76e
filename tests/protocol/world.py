"""A small world around one server: ids, workers, a client and a sweep, all made of the product's own classes.

A step is one call of the product, as one of them makes it. After each step, and within a step before another one
interrupts it, the server's state is compared with the state before by `invariants.check`.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import redis
from celery import Celery

from shiwu.broker.answers import AnswerStore
from shiwu.broker.maintenance import Maintenance
from shiwu.broker.message_writer import build_message
from shiwu.broker.retention import Retention
from shiwu.broker.steps import run
from shiwu.client.sender import Sender, SendOptions
from shiwu.contract import Lane, Request
from shiwu_worker.celery_worker.callbacks import CallbackSender
from shiwu_worker.celery_worker.revoke import Revoker
from shiwu_worker.jobs.job import Claimed
from shiwu_worker.policy.callback_rules import CallbackRules
from shiwu_worker.policy.limits import LeaseOptions
from shiwu_worker.stages.claim.lease_queue import LeaseQueue
from tests.protocol import invariants, snapshot
from tests.protocol.simulated_redis import Fault, SimulatedRedis
from tests.protocol.snapshot import Snapshot
from tests.support.redis_parts import DeadLetters

IDS: Final = ("a", "b", "c")
UNSENT_ID: Final = "never-sent"
"""An id that is cancelled, revoked and requeued, and never enqueued."""
WORKERS: Final = 2
LEASE_S: Final = 60.0
RESERVED_S: Final = 30.0
"""How long callbacks are reserved."""
OF_WORKERS: Final = Retention(result_ttl_s=3600, done_ttl_s=600, dead_length=2, dead_age_s=20_000, stream_length=6)
"""The marks' time is set shorter than that of answers, so that the store has to lengthen it."""
OF_CLIENTS: Final = Retention(result_ttl_s=1800, done_ttl_s=7200, dead_length=2, dead_age_s=20_000, stream_length=6)
REQUEST: Final = Request(image="s3://pictures/cat.jpg")
RULES: Final = CallbackRules(tasks=("*",))
_APP: Final = Celery("explorer", set_as_current=False)


class SenderCrashed(BaseException):
    """The process of a sender ends; no code of the product catches this."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps with their arguments, which can be printed and run again."""

    steps: tuple[tuple[str, tuple[Any, ...]], ...]

    def __str__(self) -> str:
        return "".join(f"\n  {name}{args!r}" for name, args in self.steps)


@dataclass(slots=True)
class Notes:
    """What the current step did, as its caller saw it."""

    name: str = ""
    worker_token: str = ""
    claimed: Sequence[Claimed] = ()
    claim_held: int = 0
    """How many jobs the worker held when it claimed."""
    committed: list[tuple[str, bytes, int]] = field(default_factory=list)
    """Id, message and generation of what a worker commits."""
    released: list[tuple[str, float, bool]] = field(default_factory=list)
    """Id, delay and whether it counts, in the order of the call."""
    requeued: list[str] = field(default_factory=list)
    named: frozenset[str] = frozenset()
    """Ids that the call names."""
    moved_clock_ms: int = 0
    is_complete: bool = False
    """The call ended without an error."""


class RecordingSender(CallbackSender):
    """A sender of callbacks that notes what it sends."""

    def __init__(self, world: World, client: SimulatedRedis) -> None:
        super().__init__(_APP, client, rules=RULES, retry_after_s=RESERVED_S)
        self._hold_after_s = 0.0  # renews its reservation before each send, as one does whose server is slow
        self._world = world
        self._take, self._hold = self._watched(self._take, every=2), self._watched(self._hold, every=1)

    def send_chunk(self, members: Sequence[bytes]) -> int:
        """Send callbacks of these answers, or those that others left."""
        return self._send_chunk(members)

    def _watched(self, script: Any, *, every: int) -> Callable[..., Any]:
        """The script, with a check that no reservation of another sender is replaced before its end.

        Args:
            every: fields of the reply for each member.
        """

        def reserve(*, keys: Sequence[str], args: Sequence[Any]) -> Any:
            found = snapshot.take(self._world.client).callbacks_due
            reply = script(keys=keys, args=args)
            for member in reply[1::every]:
                is_own = every == 1 and found[member] == float(args[0])
                is_of_commit = found[member] % 1 == 0
                assert is_own or is_of_commit or found[member] <= self._world.client.now_ms, (
                    f"callbacks of {member!r} were reserved by another sender"
                )
            return reply

        return reserve

    def _send_and_drop(self, member: bytes, record: bytes) -> None:
        self._world.sending(member, record)
        super()._send_and_drop(member, record)

    def _send(self, job_id: str, record: bytes) -> None:
        """Celery sends nothing here."""


class Worker:
    """One run of a worker process, as far as it speaks to Redis."""

    def __init__(self, world: World, name: str) -> None:
        client = world.client
        self.token = name
        options = LeaseOptions(lease_s=LEASE_S, bulk_share=0.3)
        self.queue = LeaseQueue(client, options, token=name, worker=name, result_ttl_s=OF_WORKERS.result_ttl_s)
        self.store = AnswerStore(client, token=name, retention=lambda: OF_WORKERS, callbacks_reserved_s=RESERVED_S)
        self.maintenance = Maintenance(client, self.store, name=name, token=name, retention=lambda: OF_WORKERS)
        self.revoker = Revoker(client, self.store)
        self.sender = RecordingSender(world, client)
        self.jobs: list[Claimed] = []
        """What it believes to hold."""
        self.answered: list[Claimed] = []
        """What it committed, the newest last."""
        self.members: list[bytes] = []
        """Callbacks of its answers that it has not sent."""

    @property
    def held(self) -> list[str]:
        """Ids of what it believes to hold."""
        return [job.id for job in self.jobs]


class World:
    """Everything that takes part in one schedule."""

    def __init__(self, client: SimulatedRedis) -> None:
        client.begin()
        self.client = client
        self._numbers = itertools.count()
        self.workers = [self.new_worker() for _ in range(WORKERS)]
        self.store = AnswerStore(client, token="client", retention=lambda: OF_CLIENTS)
        self.letters = DeadLetters(client)
        self.sweeper = Maintenance(client, self.store, token="sweep", retention=lambda: OF_CLIENTS)
        self.sent: dict[bytes, str] = {}
        """Every message that was enqueued, with its id."""
        self.with_callbacks: set[bytes] = set()
        self.without_result: set[bytes] = set()
        self.last_position = (0, 0)
        """The newest entry of the stream that was checked."""
        self.answers = dict.fromkeys((*IDS, UNSENT_ID), 0)
        """How many answers each id got."""
        self.sends: list[tuple[bytes, bytes]] = []
        """Member and record of all callbacks that were sent."""
        self.interrupted: tuple[bytes, bytes] = (b"", b"")
        """What was being sent when the last interruption happened."""
        self.may_send_again: set[tuple[bytes, bytes]] = set()
        """Records whose sender crashed, or was slower than its reservation."""
        self.expired: set[str] = set()
        """Ids whose mark has expired, so that a message with such an id is a new job."""
        self.doubled: set[bytes] = set()
        """Messages that may be in a lane twice."""
        self.set_back_ms = 0
        """How far the clock was set back in all."""
        self.done = 0
        """How many steps did something."""
        self.notes = Notes()
        self.interruption: Callable[[], None] | None = None
        """Happens at the next sending of callbacks."""
        self.before = snapshot.take(client)

    def new_worker(self) -> Worker:
        """The next run of a worker, with a token of its own."""
        return Worker(self, f"w{next(self._numbers)}")

    # -------------------------------------------------------------------------------- steps
    def perform(self, name: str, call: Callable[[World], object], fault: Fault = "", *, of: str = "") -> None:
        """Do one step and check what it did.

        Args:
            fault: happens to the first call of a script, or of the script `of`.

        Raises:
            AssertionError: a promise is broken.
        """
        self.done += 1
        outer, self.notes = self.notes, Notes(name)
        self.client.faults = {of: fault}
        try:
            call(self)
            self.notes.is_complete = True
        except redis.ConnectionError:
            pass
        except redis.ResponseError as error:
            if not self.before.foreign:
                raise AssertionError(f"{name} was refused although every key has its type") from error
        self.client.faults = {}
        self.checkpoint()
        self.notes = outer

    def checkpoint(self) -> None:
        """Check what the current step did until now."""
        after = snapshot.take(self.client)
        invariants.check(self.before, after, self)
        self.before = after

    def again_if_failed(self, call: Callable[[], Any]) -> Any:
        """Call the product, and once more where the caller was told that it failed."""
        try:
            return call()
        except redis.ConnectionError:
            return call()

    # -------------------------------------------------------------------------------- messages
    def enqueue(self, job_id: str, kind: str, lane: Lane) -> None:
        """Send a message; the kind says what it asks for."""
        if kind in {"callbacks", "callbacks_expires", "no_result"}:
            expires_ms = self.client.now_ms + 40_000 if kind == "callbacks_expires" else None
            raw = build_message(
                REQUEST, job_id=job_id, lane=lane, ignore_result=kind == "no_result", expires_ms=expires_ms
            )
            if kind != "no_result":
                raw = _with_callbacks(raw)
            self.client.lpush(lane.queue, raw)
        else:
            options = SendOptions(
                lane=lane,
                expires_s=40.0 if kind == "expires" else None,
                answer_by_s=40.0 if kind == "answer_by" else None,
                countdown_s=25.0 if kind == "countdown" else None,
                priority=9 if kind == "urgent" else 0,
            )
            steps = Sender(max_waiting=1000, timeout_s=5.0).send_steps([(REQUEST, job_id)], options)
            run(self.client, steps)

    def note_sent(self, raw: bytes) -> None:
        """A message appeared in a lane."""
        message = json.loads(raw)
        self.sent[raw] = message["headers"]["id"]
        if message["headers"]["ignore_result"]:
            self.without_result.add(raw)
        if b"callback.task" in base64.b64decode(message["body"]):
            self.with_callbacks.add(raw)

    # -------------------------------------------------------------------------------- callbacks
    def sending(self, member: bytes, record: bytes) -> None:
        """A sender sends callbacks now; the next interruption happens meanwhile."""
        sent = (member, record)
        is_new_job = member.partition(b"\xff")[0].decode() in self.expired
        if sent in self.sends and sent not in self.may_send_again and not is_new_job:
            raise AssertionError(f"the callbacks of {member!r} were sent twice, and no sender crashed")
        self.sends.append(sent)
        interruption, self.interruption = self.interruption, None
        if interruption is not None:
            self.checkpoint()
            self.interrupted = sent
            interruption()


def _with_callbacks(raw: bytes) -> bytes:
    """The same message with a link and an errback."""
    message = json.loads(raw)
    args, kwargs, embed = json.loads(base64.b64decode(message["body"]))
    task: dict[str, Any] = {"task": "callback.task", "args": [], "kwargs": {}, "options": {}, "subtask_type": None}
    embed |= {"callbacks": [task], "errbacks": [task]}
    message["body"] = base64.b64encode(json.dumps([args, kwargs, embed]).encode()).decode()
    return json.dumps(message).encode()


def settled(now: Snapshot) -> bool:
    """Whether nothing waits any more."""
    return not (now.places or now.leases or now.due or now.callbacks or now.callbacks_due or now.tried)
