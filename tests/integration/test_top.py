"""The screen of `shiwu top` at 80x24, over a real Valkey."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from textual.pilot import Pilot
from textual.widgets import DataTable

from shiwu import Client
from shiwu.broker.connection import connect
from shiwu.contract import DEAD, ErrorCode, Lane
from shiwu.top.app import TopApp
from shiwu.top.reader import LookReader
from tests.support import top_states
from tests.support.servers import Valkey
from tests.support.terminals import LEAVE_FULL_SCREEN, Terminal
from tests.support.top_screens import run_screen, screen_text, wait_for, wait_screen

EVERY_S = 0.2


class Parts:
    """A client of an operator, and apps that look at its server."""

    def __init__(self, url: str, redis_client: redis.Redis) -> None:
        self.url = url
        self.redis = redis_client
        self.client = Client(url)
        self._connection = connect(url, timeout_s=1)

    def app(self, *, is_read_only: bool = False) -> TopApp:
        """A new one."""
        requeue = None if is_read_only else self.client.requeue
        return TopApp(LookReader(self._connection), requeue, where="127.0.0.1:6379/0", every_s=EVERY_S)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        self._connection.close()


@pytest.fixture
def parts(redis_url: str, redis_client: redis.Redis) -> Iterator[Parts]:
    """A busy service."""
    made = Parts(redis_url, redis_client)
    top_states.fill(redis_client, redis_url)
    yield made
    made.close()


def test_all_parts_fit_on_80x24(parts: Parts) -> None:
    """Each with its figures; ages are left out, as they pass."""

    async def steps(pilot: Pilot[None]) -> None:
        shown = await wait_screen(pilot, "gpu-host-0", "source_unavailable", "night", "q Quit")
        lines = shown.splitlines()
        assert (len(lines), max(map(len, lines))) == (24, 80)
        assert lines[0] == " shiwu top  127.0.0.1:6379/0  2 workers  812 images/s"
        assert lines[1] == "1 lane         waiting  claimed     in/s    out/s   oldest  backlog last 5 min"
        assert lines[2].startswith("interactive          3        0        –        –")
        assert lines[3].startswith("bulk                40        0        –        –")
        assert lines[4] == "delayed 0, quarantined 0, dead letters 5, answered 65"
        assert lines[5] == "2 stage        p50      p95  share of the time of 60 tagged answers"
        assert lines[11] == "encode       50 ms    50 ms    50% " + "█" * 22
        assert lines[13] == "3 worker         img/s   batch      jobs busy    limit device             memory"
        assert lines[14] == "gpu-host-0         812 118/128   431/512  97%   device L4         3.2 GB/23.0 GB"
        assert lines[18] == "4 code               count  newest stage 5 backfill  phase      done/sent no tag"
        assert re.fullmatch(
            r"source_unavailable       3 +[\d.]+ m?s fetch night       running      700/800      0", lines[19]
        )
        assert lines[23] == " ⏎ Letters  r Requeue  / Filter  0 All parts  q Quit"

    run_screen(parts.app(), steps)


def test_figures_change_while_it_runs(parts: Parts) -> None:
    """A new worker, new answers: at the next looks."""

    async def steps(pilot: Pilot[None]) -> None:
        app: Any = pilot.app
        await wait_screen(pilot, "60 tagged answers")
        top_states.add_answers(parts.redis, 7, lane=Lane.INTERACTIVE, first=100)
        await wait_screen(pilot, "67 tagged answers")
        top_states.add_worker(parts.redis, "newcomer", top_states.GPU_WORKER)
        app._reader.list_soon()
        await wait_screen(pilot, "newcomer", "3 workers  1,625 images/s")

    run_screen(parts.app(), steps)


def test_enter_lists_the_letters_of_the_code(parts: Parts) -> None:
    """The error of the one under the cursor is shown; Escape goes back."""

    async def steps(pilot: Pilot[None]) -> None:
        await wait_screen(pilot, "source_not_found")
        await pilot.press("down", "enter")
        shown = await wait_screen(pilot, "2 dead letters with source_not_found", "the source of gone1 did not answer")
        assert "slow" not in shown
        assert "Filter" not in shown
        await pilot.press("down")
        await wait_screen(pilot, "the source of gone0 did not answer", top_states.IMAGE)
        await pilot.press("escape")
        await wait_screen(pilot, "1 lane")

    run_screen(parts.app(), steps)


def test_requeue_asks_first_and_n_changes_nothing(parts: Parts) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await wait_screen(pilot, "source_unavailable")
        await pilot.press("r")
        await wait_screen(pilot, "Requeue 3 jobs with source_unavailable?")
        await pilot.press("enter", "r", "x")
        await wait_screen(pilot, "Requeue 3 jobs with source_unavailable?")
        await pilot.press("n")
        await wait_screen(pilot, "1 lane")

    run_screen(parts.app(), steps)
    assert parts.redis.zcard(DEAD) == 5


def test_requeue_puts_the_jobs_of_a_code_into_their_lane(parts: Parts) -> None:
    """Those of the other code stay dead."""

    async def steps(pilot: Pilot[None]) -> None:
        await wait_screen(pilot, "source_unavailable")
        await pilot.press("r")
        await wait_screen(pilot, "Requeue 3 jobs")
        await pilot.press("y")
        await wait_screen(pilot, "requeued 3 of 3")
        await wait_without(pilot, "source_unavailable")

    run_screen(parts.app(), steps)
    assert {letter.id for letter in parts.client.dead_letters()} == {"gone0", "gone1"}
    assert parts.client.queue_state().waiting[Lane.BULK] == 43


async def wait_without(pilot: Pilot[None], text: str) -> None:
    """Wait until the screen does not show the text any more."""
    app: Any = pilot.app
    deadline_s = time.monotonic() + 15
    while text in screen_text(app):
        await pilot.pause(0.02)
        assert time.monotonic() < deadline_s, screen_text(app)


def test_requeue_of_one_letter_from_its_list(parts: Parts) -> None:
    """The list gets shorter, and the cursor stays in it."""

    async def steps(pilot: Pilot[None]) -> None:
        await wait_screen(pilot, "source_unavailable")
        await pilot.press("enter", "down", "r")
        await wait_screen(pilot, "Requeue the job slow1 (source_unavailable)?")
        await pilot.press("y")
        await wait_screen(pilot, "2 dead letters with source_unavailable")

    run_screen(parts.app(), steps)
    assert sorted(letter.id for letter in parts.client.dead_letters()) == ["gone0", "gone1", "slow0", "slow2"]


def test_letters_that_are_gone_are_counted(parts: Parts) -> None:
    """Another operator dropped one meanwhile."""

    async def steps(pilot: Pilot[None]) -> None:
        await wait_screen(pilot, "source_unavailable")
        parts.client.drop(["slow1"])
        await pilot.press("r", "y")
        await wait_screen(pilot, "requeued 2 of 3")

    run_screen(parts.app(), steps)


def test_read_only_offers_no_requeue(parts: Parts) -> None:
    """Neither of a code nor of a letter."""

    async def steps(pilot: Pilot[None]) -> None:
        app: Any = pilot.app
        shown = await wait_screen(pilot, "source_unavailable", "Letters")
        assert "Requeue" not in shown
        await pilot.press("r", "y")
        assert "Requeue" not in screen_text(app)
        await pilot.press("enter")
        shown = await wait_screen(pilot, "3 dead letters", "Back")
        assert "Requeue" not in shown
        await pilot.press("r", "y")
        await wait_screen(pilot, "3 dead letters", "Back")

    run_screen(parts.app(is_read_only=True), steps)
    assert parts.redis.zcard(DEAD) == 5


def test_number_shows_one_part_and_again_all(parts: Parts) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        app: Any = pilot.app
        headings = {"1": "1 lane", "2": "2 stage", "3": "3 worker", "4": "4 code", "5": "5 backfill"}
        await wait_screen(pilot, *headings.values())
        for key, heading in headings.items():
            await pilot.press(key)
            shown = await wait_screen(pilot, heading)
            assert [other for other in headings.values() if other in shown] == [heading]
            await pilot.press(key)
            await wait_screen(pilot, *headings.values())
        await pilot.press("3", "0")
        await wait_screen(pilot, *headings.values())
        assert app.query_one("#failures").has_focus

    run_screen(parts.app(), steps)


def test_slash_filters_rows_and_escape_ends_it(parts: Parts) -> None:
    """Workers, codes and backfills with the text."""

    async def steps(pilot: Pilot[None]) -> None:
        app: Any = pilot.app
        await wait_screen(pilot, "source_unavailable", "gpu-host-1", "night")
        await pilot.press("slash", *"NOT_F")
        shown = await wait_screen(pilot, "source_not_found", "filter: not_f")
        assert not any(text in shown for text in ("source_unavailable", "gpu-host", "night"))
        await pilot.press("enter")
        assert app.query_one("#failures").has_focus
        await wait_screen(pilot, "source_not_found", "q Quit")
        await pilot.press("escape")
        await wait_screen(pilot, "source_unavailable", "gpu-host-1", "night")

    run_screen(parts.app(), steps)


def test_cursor_stays_on_its_code_when_rows_move(parts: Parts) -> None:
    """A code with more letters comes above it."""

    async def steps(pilot: Pilot[None]) -> None:
        app: Any = pilot.app
        await wait_screen(pilot, "source_not_found")
        await pilot.press("down")
        top_states.add_dead(parts.redis, "new", 9, code=ErrorCode.SOURCE_FORBIDDEN)
        app._reader.list_soon()
        await wait_screen(pilot, "source_forbidden")
        await wait_for(pilot, lambda: app.query_one("#failures", DataTable).cursor_row == 2)
        await pilot.press("enter")
        await wait_screen(pilot, "2 dead letters with source_not_found")

    run_screen(parts.app(), steps)


def test_service_without_anything_is_shown(redis_url: str, redis_client: redis.Redis) -> None:
    """Keys of empty tables do nothing."""
    made = Parts(redis_url, redis_client)

    async def steps(pilot: Pilot[None]) -> None:
        await wait_screen(pilot, "0 workers", "no tagged answer yet", "bulk")
        await pilot.press("r", "enter", "down", "5")
        await wait_screen(pilot, "5 backfill")
        await pilot.press("3", "2", "1", "4", "0")
        shown = await wait_screen(pilot, "1 lane", "2 stage", "3 worker", "4 code")
        assert "5 backfill" not in shown

    run_screen(made.app(), steps)
    made.close()


def test_stopped_redis_is_told_until_it_is_back(valkey: Valkey) -> None:
    """The figures stay meanwhile, and a requeue says why it failed."""
    with valkey.client() as client:
        top_states.fill(client, valkey.url)
        made = Parts(valkey.url, client)

        async def steps(pilot: Pilot[None]) -> None:
            await wait_screen(pilot, "source_unavailable")
            await asyncio.to_thread(valkey.kill)
            shown = await wait_screen(pilot, "Redis does not answer for")
            assert "source_unavailable" in shown
            await pilot.press("r", "y")
            await wait_screen(pilot, "not requeued")
            await asyncio.to_thread(valkey.start)
            await wait_screen(pilot, "shiwu top  127.0.0.1:6379/0", "answered 65")

        run_screen(made.app(), steps)
        made.close()


@pytest.mark.parametrize("has_color", [True, False], ids=["colour", "no-colour"])
def test_command_runs_in_a_terminal(parts: Parts, has_color: bool) -> None:
    """A process in a terminal of 80x24 shows the lanes, and ends with q. NO_COLOR leaves only shades of grey."""
    args = [sys.executable, "-m", "shiwu.cli", "--redis-url", parts.url, "top", "--read-only"]
    with Terminal(args, env={} if has_color else {"NO_COLOR": "1"}) as terminal:
        terminal.wait_for("source_unavailable")
        terminal.press("q")
        assert terminal.wait_end() == 0
        assert LEAVE_FULL_SCREEN in terminal.output
        shown = bytes(terminal.output)
    colours = {tuple(map(int, each)) for each in re.findall(rb"[34]8;2;(\d+);(\d+);(\d+)", shown)}
    assert any(max(colour) - min(colour) > 8 for colour in colours) == has_color


@pytest.mark.parametrize("width", [80, 130], ids=["narrow", "wide"])
def test_long_names_keep_what_tells_them_apart(parts: Parts, width: int) -> None:
    """Names of pods differ at their ends; a wide terminal shows all of them."""
    name = "shiwu-worker-7d9f8c6b5-x2x4z"
    top_states.add_worker(parts.redis, name, top_states.GPU_WORKER)

    async def steps(pilot: Pilot[None]) -> None:
        shown = await wait_screen(pilot, name if width == 130 else "…9f8c6b5-x2x4z")
        assert "3.2 GB/23.0 GB" in shown

    run_screen(parts.app(), steps, size=(width, 24))


def test_screen_is_drawn_for_a_new_size(parts: Parts) -> None:
    """A wider terminal shows more of a worker; a very small one shows what fits."""

    async def steps(pilot: Pilot[None]) -> None:
        shown = await wait_screen(pilot, "gpu-host-0")
        assert "bfloat16" not in shown
        await pilot.resize_terminal(240, 40)
        await wait_screen(pilot, "bfloat16", "everyday-zh 3ea8fe1f")
        await pilot.resize_terminal(20, 6)
        await wait_screen(pilot, "1 lane")
        await pilot.resize_terminal(80, 24)
        await wait_screen(pilot, "source_unavailable", "q Quit")

    run_screen(parts.app(), steps)
