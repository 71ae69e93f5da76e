"""Which tasks and queues a message's callbacks may name: the operator's word, judged before a picture costs anything.

Signatures are read as a stranger's data, never as Celery's objects: every task that any of them leads to must be
allowed, also those that the callbacks carry on to other workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from shiwu.broker.message_reader import Canvas
from shiwu.contract import RESULT_PREFIX, TASK_NAME, ErrorCode, Lane, RequestError

BUILT_IN: Final = "celery."
"""Celery's own tasks: `celery.map` calls any other by name. A pattern means them only where it begins so itself."""
MAX_TASKS: Final = 100
MAX_DEPTH: Final = 10
MAX_NAME_CHARS: Final = 255
STRUCTURES: Final = {"chain": ("tasks",), "group": ("tasks",), "chord": ("header", "body")}
"""Kinds of signatures that are taken apart here and sent as the tasks in them, never as `celery.chain` and its like."""
INNER: Final = ("link", "link_error", "chain", "chord")
"""Options that hold signatures."""
STEERING: Final = frozenset(
    {"exchange", "exchange_type", "routing_key", "router", "connection", "producer", "publisher", "declare"}
    | {"retry_policy", "route_name", "type", "task", "app", "tasks", "args", "kwargs", "options", "subtask_type"}
)
"""Options that would lead a message past its queue, or a signature past its reader."""
PROTOCOL: Final = frozenset(
    {"lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id"}
    | {"parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers"}
    | {"stamps", "compression"}
)
"""Headers that Celery writes. Its option `headers` overwrites them: the name of the task too."""
_LANES: Final = frozenset(key for lane in Lane for key in lane.keys)
_OURS: Final = ("shiwu.", "shiwu:", RESULT_PREFIX, "celery-taskset-meta-", "_kombu.", "unacked")
"""Beginnings of keys that no pattern opens: what lies there is no queue, or is ours."""


@dataclass(frozen=True, slots=True)
class CallbackRules:
    """What the operator allows.

    Args:
        tasks: names or patterns (`reports.*`) of tasks.
        queues: names or patterns of queues, beside the lanes for `shiwu.tag` itself.
        max_tasks: tasks that one message may lead to.
    """

    tasks: tuple[str, ...] = (TASK_NAME,)
    queues: tuple[str, ...] = ("celery",)
    max_tasks: int = MAX_TASKS

    def check(self, canvas: Canvas) -> None:
        """Judge the callbacks of a message.

        Raises:
            RequestError: callback_refused for a task or queue that is not allowed, unsupported_canvas for what is too
                much, too deep or of a kind that is not sent from here, malformed_message for what is no signature.
        """
        chord = () if canvas.chord is None else (canvas.chord,)
        self._check_all([*canvas.callbacks, *canvas.errbacks, *canvas.chain, *chord])

    def check_sent(self, name: object, options: Mapping[str, Any]) -> None:
        """Judge one message on its way out, with what it carries on; raises as `check`."""
        _check_form(options)
        self._check_task(name, options.get("queue"))
        self._check_all(_carried(options))

    def _check_all(self, signatures: Iterable[object]) -> None:
        waiting = [(one, 1) for one in signatures]
        seen = 0
        while waiting:
            one, depth = waiting.pop()
            seen += 1
            if seen > self.max_tasks or depth > MAX_DEPTH:
                raise _unsupported(
                    f"expected callbacks of at most {self.max_tasks} tasks (SHIWU_CALLBACK_MOST), nested at most "
                    f"{MAX_DEPTH} deep"
                )
            waiting += [(inner, depth + 1) for inner in self._check_one(one)]

    def _check_one(self, one: object) -> list[object]:
        """Judge a signature without what it holds; gives that."""
        if not isinstance(one, Mapping) or not isinstance(one.get("task"), str):
            raise _malformed("expected callbacks as signatures with a task's name")
        options, kwargs, kind = one.get("options") or {}, one.get("kwargs") or {}, one.get("subtask_type")
        if not isinstance(options, Mapping) or not isinstance(kwargs, Mapping):
            raise _malformed("expected a signature's options and kwargs as mappings")
        if steering := sorted(STEERING & options.keys()):
            raise _unsupported(f"expected callbacks that name a queue at most, got the option {steering[0]!r}")
        _check_form(options)
        inner = _carried(options)
        if not kind:
            self._check_task(one["task"], options.get("queue"))
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
        """Whether a callback may call this task."""
        patterns = self.tasks
        if name.startswith(BUILT_IN):
            patterns = tuple(one for one in patterns if one.startswith(BUILT_IN))
        return _is_name(name) and any(fnmatchcase(name, one) for one in patterns)

    def allows_queue(self, name: str) -> bool:
        """Whether a callback may go to this queue."""
        return _is_name(name) and not name.startswith(_OURS) and any(fnmatchcase(name, one) for one in self.queues)


def _check_form(options: Mapping[str, Any]) -> None:
    serializer = options.get("serializer")
    if serializer is not None and serializer != "json":
        raise _unsupported(f"expected callbacks as JSON, got the serializer {serializer!r:.80}")
    headers = options.get("headers") or {}
    if not isinstance(headers, Mapping) or PROTOCOL & headers.keys():
        raise _unsupported("expected callbacks without headers of Celery's own names")


def _carried(options: Mapping[str, Any]) -> list[object]:
    """The signatures among a task's options."""
    return [one for name in INNER for one in _listed(options.get(name), name)]


def _listed(value: object, name: str) -> list[object]:
    """One signature or several, as Celery takes them."""
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
