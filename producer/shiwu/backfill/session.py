"""What the commands do: start, go on, pause, cancel, and tell about backfills."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

import click

from shiwu.backfill.display import failures_of, open_display
from shiwu.backfill.dry_run import dry_run
from shiwu.backfill.entries import JobMaker
from shiwu.backfill.errors import WrongState
from shiwu.backfill.feeder import answered_before
from shiwu.backfill.plan import Pace, Plan
from shiwu.backfill.runner import Phase, Runner
from shiwu.backfill.sources.base import NoSource, Source
from shiwu.backfill.sources.opening import STANDARD_INPUT, open_source
from shiwu.backfill.state import BackfillState, Saved, list_backfills
from shiwu.backfill.summary import report_of
from shiwu.backfill.targets import TEMPORARY, check_empty
from shiwu.broker.sharding import PoolOptions, open_shards
from shiwu.cli.base import Exit, end
from shiwu.client.client import Client
from shiwu.contract import moment
from shiwu.parts import Objects, WrongSource, open_target

COMMAND_TIMEOUT_S: Final = 5.0
SAME_SIGNAL_S: Final = 0.5


class Session:
    """The commands on one Redis, or on the shards of a cluster. The caller closes it."""

    def __init__(self, client: Client, url: str) -> None:
        self._client = client
        self._shards = open_shards(url, PoolOptions(timeout_s=COMMAND_TIMEOUT_S, retries=3))
        self._no_retry = open_shards(url, PoolOptions(timeout_s=COMMAND_TIMEOUT_S))
        self.redis = self._shards[0]
        """Holds the states of all backfills."""
        self._objects = Objects()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for client in (*self._shards, *self._no_retry):
            client.close()

    def saved(self, name: str) -> Saved:
        """The state of a backfill.

        Raises:
            WrongState: there is none of this name.
        """
        saved = BackfillState(self.redis, name).read()
        if saved is None:
            raise WrongState(f"expected the name of a backfill, got {name!r}; shiwu backfill list shows them")
        return saved

    def is_run(self, saved: Saved) -> bool:
        """Whether a process runs it now."""
        return saved.is_run(now_ms=self._client.server_time_ms())

    # -------------------------------------------------------------------------------- looking
    def status(self, name: str) -> dict[str, Any]:
        """Where a backfill is, as its process wrote it last."""
        saved = self.saved(name)
        totals = saved.totals
        shown: dict[str, Any] = {"backfill": name, "phase": saved.phase, "runs": self.is_run(saved)}
        if saved.wanted and saved.phase == Phase.RUNNING:
            shown["wanted"] = saved.wanted
        recorded = {**saved.counts, "answered": totals.answered, "parts": len(saved.parts)}
        live = dict(saved.live)
        live.pop("phase", None)
        if not shown["runs"]:
            for gone in ("rate", "eta_s", "backlog_s", "reason"):
                live.pop(gone, None)
        return shown | recorded | live

    def report(self, name: str) -> dict[str, Any]:
        """The counts of a backfill."""
        return report_of(name, self.saved(name))

    def all(self) -> list[dict[str, Any]]:
        """All backfills, newest first."""
        return [
            {
                "backfill": name,
                "phase": saved.phase,
                "runs": self.is_run(saved),
                "answered": saved.totals.answered,
                "failed": saved.totals.failed,
                "started_at": moment(saved.started_ms).isoformat(timespec="seconds"),
                "source": saved.plan.source,
            }
            for name, saved in list_backfills(self.redis)
        ]

    # -------------------------------------------------------------------------------- start
    def try_out(self, name: str, plan: Plan, pace: Pace) -> dict[str, Any]:
        """What a start would send."""
        maker = JobMaker(name, plan.fields)
        source = self._open_source(plan)
        try:
            ask = (lambda ids: answered_before(self._shards, ids, is_thorough=True)) if pace.is_missing_only else None
            return dry_run(plan, source, maker, answered_before=ask)
        finally:
            source.close()

    def start(self, name: str, plan: Plan, pace: Pace) -> None:
        """Start a backfill or go on with it, and run it to its end.

        Raises:
            WrongState: the name stands for another plan, or the backfill was cancelled.
            WrongSource, WrongTarget: the names of the source or of the output are wrong.
            SourceError, TargetError: the source or the output cannot be used.
        """
        state = BackfillState(self.redis, name)
        saved = state.read()
        if saved is None:
            self._check_new(plan)
            state.create(plan, pace, now_ms=self._client.server_time_ms())
        else:
            self._check(name, saved, plan)
            if saved.phase == Phase.FINISHED and not pace.is_missing_only:
                click.echo(f"{name} is finished; --missing makes another pass over the source", err=True)
                return
            if saved.phase == Phase.CANCELLED and not pace.is_missing_only:
                raise WrongState(f"{name} was cancelled; --missing sends what has no answer, another name sends all")
            has_ended = saved.phase in {Phase.FINISHED, Phase.CANCELLED}
            state.reopen(pace, is_new_pass=has_ended)
        self._run(name, pace, self._open_saved)

    def _check_new(self, plan: Plan) -> None:
        """Find mistakes in source and output before the name stands for them."""
        with closing(self._open_source(plan)) as source:
            if plan.source != STANDARD_INPUT:
                next(iter(source.entries("")), None)
        if plan.out:
            with closing(open_target(plan.out, objects=self._objects, temporary=TEMPORARY)) as target:
                check_empty(target, plan.out)

    def _check(self, name: str, saved: Saved, plan: Plan) -> None:
        if saved.plan.digest != plan.digest:
            changes = "; ".join(saved.plan.differences(plan))
            raise WrongState(f"{name} was started with another source or other options ({changes}); use another name")
        if self.is_run(saved):
            click.echo(f"shiwu: another process runs {name}; this one takes it over", err=True)

    def _open_source(self, plan: Plan) -> Source:
        source = open_source(plan.source, objects=self._objects, column=plan.column)
        if plan.newer and not source.has_times:
            source.close()
            raise WrongSource("--newer: expected a bucket or an S3 Inventory, which tell when objects changed")
        return source

    def _open_saved(self, saved: Saved) -> Source:
        return NoSource() if saved.is_source_done else self._open_source(saved.plan)

    # -------------------------------------------------------------------------------- while it runs
    def pause(self, name: str) -> None:
        """Let a backfill send nothing more until `resume`."""
        saved = self._unfinished(name)
        BackfillState(self.redis, name).want("pause")
        where = "" if self.is_run(saved) else "; no process runs it now"
        click.echo(f"{name} is paused, what was sent goes on{where}", err=True)

    def resume(self, name: str) -> None:
        """Let a paused backfill send again; run it here where no process does."""
        saved = self._unfinished(name)
        BackfillState(self.redis, name).want("")
        if self.is_run(saved):
            click.echo(f"{name} goes on", err=True)
            return
        if saved.plan.source == STANDARD_INPUT and not saved.is_source_done:
            raise WrongState(f"{name} reads standard input; give it the same list with shiwu backfill start")
        BackfillState(self.redis, name).reopen(saved.pace, is_new_pass=False)
        self._run(name, saved.pace, self._open_saved)

    def cancel(self, name: str) -> None:
        """Send nothing more, answer what waits `cancelled`, and write the results."""
        saved = self._unfinished(name)
        BackfillState(self.redis, name).want("cancel")
        if self.is_run(saved):
            click.echo(f"{name} is being cancelled by the process that runs it", err=True)
        else:
            self._run(name, saved.pace, lambda _: NoSource())

    def _unfinished(self, name: str) -> Saved:
        saved = self.saved(name)
        if saved.phase in {Phase.FINISHED, Phase.CANCELLED}:
            raise WrongState(f"expected a backfill that has not ended, {name} is {saved.phase}")
        return saved

    # -------------------------------------------------------------------------------- running
    def _run(self, name: str, pace: Pace, open_the_source: Callable[[Saved], Source]) -> None:
        with _stopping() as stop, open_display(name) as display:
            runner = Runner(
                client=self._client,
                connections=(self._shards, self._no_retry),
                name=name,
                pace=pace,
                objects=self._objects,
                open_the_source=open_the_source,
                on_progress=display,
                is_stopping=stop.is_set,
            )
            phase = runner.run()
        state = BackfillState(self.redis, name, is_stopping=stop.is_set)
        saved = state.when_available(lambda: self.saved(name))
        totals = saved.totals
        failures = failures_of(totals.by("code"))
        text = f"{totals.answered:,} answers, {totals.failed:,} without tags{f' ({failures})' if failures else ''}"
        if saved.plan.out:
            text += f", {len(saved.parts)} part{'' if len(saved.parts) == 1 else 's'} in {saved.plan.out}"
        if phase is Phase.RUNNING:
            end(f"{name} was interrupted: {text}; the same command goes on", Exit.INTERRUPTED)
        if phase is Phase.STOPPED:
            end(f"{name} was stopped because too many jobs failed: {text}; start goes on", Exit.NOT_TAGGED)
        click.echo(f"{name} is {phase}: {text}", err=True)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a later signal ends the process at once."""
    stop = threading.Event()
    first_s = 0.0

    def on_signal(number: int, _: object) -> None:
        nonlocal first_s
        if stop.is_set():
            # Programs such as `timeout` send one signal to the process and one to its group.
            if time.monotonic() - first_s > SAME_SIGNAL_S:
                raise KeyboardInterrupt
            return
        first_s = time.monotonic()
        stop.set()
        click.echo(f"shiwu: {signal.Signals(number).name}: writing what has come; again to end at once", err=True)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def plan_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request that differ from their defaults, checked.

    Raises:
        RequestError: one is invalid.
    """
    return JobMaker("x", {name: value for name, value in fields.items() if value is not None}).shared
