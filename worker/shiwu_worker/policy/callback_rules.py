"""Rules of the operator for callbacks: which tasks and queues a message may name. Checked before the image is fetched.

Signatures are read as untrusted data, never as Celery objects. Every task that a signature leads to must be allowed,
also those that a callback passes on to other workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from shiwu.broker.message_reader import Canvas
from shiwu.contract import RESULT_PREFIX, TASK_NAME, ErrorCode, Lane, RequestError

BUILT_IN: Final = "celery."
"""Prefix of Celery's own tasks; `celery.map` calls any task by name. Only patterns with this prefix match them."""
MAX_TASKS: Final = 100
MAX_DEPTH: Final = 10
MAX_NAME_CHARS: Final = 255
STRUCTURES: Final = {"chain": ("tasks",), "group": ("tasks",), "chord": ("header", "body")}
"""Kinds of signatures whose inner tasks are checked and sent; `celery.chain` and similar tasks are never sent."""
INNER: Final = ("link", "link_error", "chain", "chord")
"""Options that contain signatures."""
ROUTING_OPTIONS: Final = frozenset(
    {"exchange", "exchange_type", "routing_key", "router", "connection", "producer", "publisher", "declare"}
    | {"retry_policy", "route_name", "type", "task", "app", "tasks", "args", "kwargs", "options", "subtask_type"}
)
"""Options that would bypass the check of the queue, or that Celery reads differently from this module."""
PROTOCOL_HEADERS: Final = frozenset(
    {"lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id"}
    | {"parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers"}
    | {"stamps", "compression"}
)
"""Headers that Celery writes. The option `headers` would overwrite them, including the name of the task."""
_LANES: Final = frozenset(key for lane in Lane for key in lane.keys)
_RESERVED_PREFIXES: Final = ("shiwu.", "shiwu:", RESULT_PREFIX, "celery-taskset-meta-", "_kombu.", "unacked")
"""Prefixes of keys that no pattern matches, because they are not queues or belong to shiwu."""


@dataclass(frozen=True, slots=True)
class CallbackRules:
    """What the operator allows.

    Args:
        tasks: names or patterns (`reports.*`) of tasks.
        queues: names or patterns of queues; `shiwu.tag` may also use the lanes.
        max_tasks: largest number of tasks that one message may lead to.
    """

    tasks: tuple[str, ...] = (TASK_NAME,)
    queues: tuple[str, ...] = ("celery",)
    max_tasks: int = MAX_TASKS

    def check(self, canvas: Canvas) -> None:
        """Check the callbacks of a message.

        Raises:
            RequestError: callback_refused for a task or queue that is not allowed; unsupported_canvas for too many
                tasks, too deep nesting or an unsupported kind; malformed_message for a value that is no signature.
        """
        chord = () if canvas.chord is None else (canvas.chord,)
        self._check_all([*canvas.callbacks, *canvas.errbacks, *canvas.chain, *chord])

    def check_sent(self, name: object, options: Mapping[str, Any]) -> None:
        """Check one message before it is sent, with the callbacks in its options; raises as `check` does."""
        _check_form(options)
        self._check_task(name, options.get("queue"))
        self._check_all(_inner_signatures(options))

    def _check_all(self, signatures: Iterable[object]) -> None:
        pending = [(signature, 1) for signature in signatures]
        count = 0
        while pending:
            signature, depth = pending.pop()
            count += 1
            if count > self.max_tasks or depth > MAX_DEPTH:
                raise _unsupported(
                    f"expected callbacks of at most {self.max_tasks} tasks (SHIWU_CALLBACK_MOST), nested at most "
                    f"{MAX_DEPTH} deep"
                )
            pending += [(inner, depth + 1) for inner in self._check_one(signature)]

    def _check_one(self, signature: object) -> list[object]:
        """Check one signature, and return the signatures that it contains."""
        if not isinstance(signature, Mapping) or not isinstance(signature.get("task"), str):
            raise _malformed("expected callbacks as signatures with a task's name")
        options, kwargs = signature.get("options") or {}, signature.get("kwargs") or {}
        kind = signature.get("subtask_type")
        if not isinstance(options, Mapping) or not isinstance(kwargs, Mapping):
            raise _malformed("expected a signature's options and kwargs as mappings")
        if routing := sorted(ROUTING_OPTIONS & options.keys()):
            raise _unsupported(f"expected callbacks that name a queue at most, got the option {routing[0]!r}")
        _check_form(options)
        inner = _inner_signatures(options)
        if not kind:
            self._check_task(signature["task"], options.get("queue"))
        elif isinstance(kind, str) and kind in STRUCTURES:
            self._check_queue(options.get("queue"), is_lane_allowed=True)
            for part in STRUCTURES[kind]:
                inner += _listed(kwargs.get(part), part)
        else:
            raise _unsupported(f"expected tasks, chains, groups and chords as callbacks, got {kind!r:.80}")
        return inner

    def _check_task(self, name: object, queue: object) -> None:
        if not isinstance(name, str) or not self.allows_task(name):
            raise RequestError(
                ErrorCode.CALLBACK_REFUSED,
                "expected callbacks of tasks that the worker's operator allows in SHIWU_CALLBACK_TASKS, "
                f"got {name!r:.300}",
            )
        self._check_queue(queue, is_lane_allowed=name == TASK_NAME)

    def _check_queue(self, queue: object, *, is_lane_allowed: bool) -> None:
        if queue is None or (is_lane_allowed and isinstance(queue, str) and queue in _LANES):
            return
        if not isinstance(queue, str) or not self.allows_queue(queue):
            raise RequestError(
                ErrorCode.CALLBACK_REFUSED,
                "expected callbacks to queues that the worker's operator allows in SHIWU_CALLBACK_QUEUES, "
                f"got {queue!r:.300}",
            )

    def allows_task(self, name: str) -> bool:
        """Return whether a callback may call this task."""
        patterns = self.tasks
        if name.startswith(BUILT_IN):
            patterns = tuple(pattern for pattern in patterns if pattern.startswith(BUILT_IN))
        return _is_name(name) and any(fnmatchcase(name, pattern) for pattern in patterns)

    def allows_queue(self, name: str) -> bool:
        """Return whether a callback may be sent to this queue."""
        if not _is_name(name) or name.startswith(_RESERVED_PREFIXES):
            return False
        return any(fnmatchcase(name, pattern) for pattern in self.queues)


def _check_form(options: Mapping[str, Any]) -> None:
    serializer = options.get("serializer")
    if serializer is not None and serializer != "json":
        raise _unsupported(f"expected callbacks as JSON, got the serializer {serializer!r:.80}")
    headers = options.get("headers") or {}
    if not isinstance(headers, Mapping) or PROTOCOL_HEADERS & headers.keys():
        raise _unsupported("expected callbacks without headers of Celery's own names")


def _inner_signatures(options: Mapping[str, Any]) -> list[object]:
    """Return the signatures in the options of a task."""
    return [signature for name in INNER for signature in _listed(options.get(name), name)]


def _listed(value: object, name: str) -> list[object]:
    """Return one signature or several as a list; Celery accepts both."""
    if not value:
        return []
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(value)
    raise _malformed(f"expected {name} as a signature or a list of them")


def _is_name(name: str) -> bool:
    return len(name) <= MAX_NAME_CHARS and name.isprintable()


def _unsupported(message: str) -> RequestError:
    return RequestError(ErrorCode.UNSUPPORTED_CANVAS, message)


def _malformed(message: str) -> RequestError:
    return RequestError(ErrorCode.MALFORMED_MESSAGE, message)
