"""A real worker with full lanes: which jobs go first, which are too late, and ten thousand jobs of crashed workers."""

from __future__ import annotations

import time
from typing import Any, Final

from shiwu import Client, Status
from shiwu.broker.message_writer import build_message
from shiwu.contract import COUNTERS, RESULT_STREAM, Answer, Lane, Request, Stage
from tests.faults.conftest import BATCH, BULK_SHARE, LEASE_S, Fleet
from tests.support import drill, pictures
from tests.support.picture_server import PictureServer, Reply
from tests.support.redis_parts import make_lease_queue
from tests.support.servers import WorkerProcess
from tests.support.waiting import wait_until

FLOOD: Final = 900
ASKED: Final = 12
IN_HAND: Final = 2 * BATCH + 8
"""Pictures that a worker of the fleet holds: the batch in flight, the next one, and what is being loaded."""
DEAD: Final = 10_000
CHUNK_SIZE: Final = 1000


def answers(fleet: Fleet) -> list[Answer]:
    """The results stream, in its order."""
    entries: Any = fleet.client.xrange(RESULT_STREAM)
    return [Answer.from_json(fields[b"answer"]) for _, fields in entries]


def ask_one_by_one(fleet: Fleet, client: Client, name: str) -> tuple[list[int], list[float]]:
    """Interactive jobs, each after the answer of the one before: how many overtook each one, and their times in ms."""
    overtaken, times_ms = [], []
    for number in range(ASKED):
        job_id = client.enqueue(fleet.images[number % len(fleet.images)], id=f"{name}-{number}", lane=Lane.INTERACTIVE)
        before = int(fleet.client.xlen(RESULT_STREAM))
        times_ms.append(client.wait(job_id, timeout_s=30).timing.total)
        # The answer may be there before its id is known here.
        overtaken.append(max(0, [answer.id for answer in answers(fleet)].index(job_id) - before))
    return overtaken, sorted(times_ms)


def test_a_flood_of_bulk_holds_no_interactive_job_up(fleet: Fleet, near: WorkerProcess) -> None:
    """An interactive job waits for what the worker has in hand, and never for the lane behind it."""
    with Client(fleet.url) as client:
        _, calm_ms = ask_one_by_one(fleet, client, "calm")
        began_s = time.monotonic()
        flood = fleet.send(FLOOD, prefix="flood", lanes=(Lane.BULK,))
        wait_until(lambda: drill.answered(fleet.client) > ASKED + BATCH, timeout_s=10)
        overtaken, busy_ms = ask_one_by_one(fleet, client, "busy")
        left = fleet.client.llen(Lane.BULK.queue)
    assert left > 100, "the flood ended before the last interactive job was asked"
    assert max(overtaken) <= 3 * IN_HAND, overtaken
    fleet.counted([*flood, *(f"{name}-{number}" for name in ("calm", "busy") for number in range(ASKED))])
    batch_ms = (time.monotonic() - began_s) * 1000 * BATCH / FLOOD
    assert busy_ms[-2] <= calm_ms[-2] + 3 * IN_HAND / BATCH * batch_ms, (calm_ms, busy_ms, batch_ms)


def test_bulk_moves_while_interactive_jobs_never_end(fleet: Fleet, near: WorkerProcess) -> None:
    """With a backlog in both lanes bulk gets about its share."""
    fleet.rest(near)
    ids = fleet.send(300, prefix="i", lanes=(Lane.INTERACTIVE,)) + fleet.send(300, prefix="b", lanes=(Lane.BULK,))
    fleet.wake(near)
    fleet.counted(ids)
    order = [answer.lane for answer in answers(fleet)]
    # Until the interactive lane is nearly empty; after that the rest is bulk's.
    share = order[:250].count(Lane.BULK) / 250
    assert BULK_SHARE / 3 <= share <= BULK_SHARE * 2


def test_who_is_too_late_costs_no_fetch_and_no_batch(
    fleet: Fleet, near: WorkerProcess, http_server: PictureServer
) -> None:
    """A deadline that passed in the lane is seen at the claim, one that passed in the fetch before the encoder."""
    good = Reply.picture(pictures.png(pictures.picture().resize((64, 64))), content_type="image/png")
    slow, never = http_server.serve("/slow.png", good.late(first_pause_s=1.0)), http_server.serve("/never.png", good)
    fleet.rest(near)
    with Client(fleet.url) as client:
        ids = [client.enqueue(never, id="lane", expires_s=0.05), client.enqueue(slow, id="fetch", expires_s=0.7)]
        ids += [client.enqueue(slow, id="patient", expires_s=60), client.enqueue(fleet.images[0], id="other")]
        sent_ms = client.server_time_ms()
        wait_until(lambda: client.server_time_ms() > sent_ms + 100, timeout_s=5)
        fleet.wake(near)
        found = client.wait_many(ids, timeout_s=20)
    statuses = {job_id: answer.status for job_id, answer in found.items()}
    late = Status.EXPIRED
    assert statuses == {"lane": late, "fetch": late, "patient": Status.TAGGED, "other": Status.TAGGED}
    stages = [answer.error and answer.error.stage for answer in found.values()][:2]
    assert stages == [Stage.CLAIM, Stage.BATCH]
    assert found["fetch"].timing.encode == 0.0
    assert found["fetch"].timing.fetch > 900
    assert http_server.hits == {"/slow.png": 2}
    fleet.counted(ids)


def test_ten_thousand_leases_of_the_dead(fleet: Fleet, near: WorkerProcess) -> None:
    """They are taken back in portions soon after their leases end, while the living goes on with its own work."""
    fleet.rest(near)
    # Their time is over, so that each costs its answer and no picture.
    raws = [
        build_message(Request(image=fleet.images[0]), job_id=f"dead-{n}", lane=Lane.BULK, sent_ms=1.0, expires_ms=2.0)
        for n in range(DEAD)
    ]
    dead = make_lease_queue(fleet.client, "dead", lease_s=LEASE_S)
    for start in range(0, DEAD, CHUNK_SIZE):
        fleet.client.lpush(Lane.BULK.queue, *raws[start : start + CHUNK_SIZE])
        # One claim takes a limited part of them by size.
        claimed = 0
        while claimed < CHUNK_SIZE:
            jobs = dead.claim(CHUNK_SIZE - claimed).jobs
            assert jobs
            claimed += len(jobs)
    ids = fleet.send(200, prefix="living", lanes=(Lane.INTERACTIVE,))
    fleet.wake(near)
    wait_until(lambda: int(fleet.client.hget(COUNTERS, "reaped") or 0) == DEAD, timeout_s=LEASE_S + 2)
    result = fleet.counted([*ids, *(f"dead-{n}" for n in range(DEAD))])
    assert result.statuses == {"tagged": 200, "expired": DEAD}
    assert result.attempts == {1: 200, 2: DEAD}
    assert near.is_running
