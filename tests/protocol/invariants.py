"""What must hold after each step, by comparison of the server's state before and after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from shiwu.broker.maintenance import QUARANTINE_AFTER_DEATHS
from shiwu.contract import COUNTERS, result_key
from tests.protocol.snapshot import Snapshot, Tried, has_record, id_of, is_known

if TYPE_CHECKING:
    from tests.protocol.world import World

SENDS_MESSAGES: Final = frozenset({"enqueue"})
REQUEUES: Final = frozenset({"requeue"})
MAINTAINS: Final = frozenset({"maintain", "sweep"})
RETURNS_JOBS: Final = frozenset({"claim", "release", "drain"}) | MAINTAINS
"""Steps that put messages at the front of lanes; a claim releases those of an earlier one whose reply was lost."""
CANCELS: Final = frozenset({"cancel"})
TTL_TOLERANCE_MS: Final = 2_000
"""Keys that were written in one step; real time passes between them and the reading of their TTLs."""
MARKS_MARGIN_MS: Final = 60_000  # a hash is removed up to so long before its end
Check = Callable[[Snapshot, Snapshot, "World"], None]


def check(before: Snapshot, after: Snapshot, world: World) -> None:
    """Compare two moments.

    Raises:
        AssertionError: a promise is broken.
    """
    for raw in after.waiting - before.waiting:
        if raw not in world.sent and world.notes.name in SENDS_MESSAGES:
            world.note_sent(raw)
    for one in CHECKS:
        one(before, after, world)
    for position, job_id, _ in _new_entries(after, world):
        world.last_position = position
        world.answers[job_id] += 1


def _new_entries(after: Snapshot, world: World) -> list[tuple[tuple[int, int], str, bytes]]:
    return [entry for entry in after.stream if entry[0] > world.last_position]


def _answered(after: Snapshot, world: World) -> set[str]:
    """Ids that were answered in this step."""
    return {job_id for _, job_id, _ in _new_entries(after, world)}


# ------------------------------------------------------------------------------------- keys
def only_known_keys(_: Snapshot, after: Snapshot, __: World) -> None:
    """No key outside the contract exists."""
    assert [key for key in after.keys if not is_known(key)] == []


def indexes_agree(_: Snapshot, after: Snapshot, __: World) -> None:
    """Each record has its entry in the sorted set beside it, and the other way round."""
    assert after.claims.keys() == after.leases.keys(), "claims and leases"
    assert after.delayed.keys() == after.due.keys(), "delayed jobs and their times"
    assert after.callbacks.keys() == after.callbacks_due.keys(), "callbacks and their reservations"
    for kept, ends in ((after.pending_answers, after.pending_expiry), (after.histories, after.histories_expiry)):
        assert kept.keys() == ends.keys(), "what is kept for a time, and until when"
    assert after.dead.keys() == after.dead_answers.keys() == after.dead_times.keys(), "dead letters"


def only_counters_grow(before: Snapshot, after: Snapshot, world: World) -> None:
    """The totals never fall, except for those of bytes that are kept, and `answered` grows by the new answers."""
    if COUNTERS in before.foreign or COUNTERS in after.foreign or not after.counters:
        return
    for name, total in before.counters.items():
        assert name.endswith("_bytes") or after.counters.get(name, 0) >= total, name
    grown = after.counters.get("answered", 0) - before.counters.get("answered", 0)
    assert grown == len(_new_entries(after, world)), "the total of answers grows by one for each new answer"


# ------------------------------------------------------------------------------------- messages
def requeued_or_dropped(before: Snapshot, after: Snapshot, world: World) -> None:
    """A dead letter leaves by requeue, drop, age or number, or because its id has a newer answer."""
    for job_id in before.dead.keys() - after.dead.keys():
        raw = before.dead[job_id].partition(b"|")[2]
        if world.notes.name in REQUEUES:
            assert raw in after.waiting, f"requeue lost {job_id}"
            if raw in before.waiting:
                world.doubled.add(raw)  # a late answer left it in its lane, where a claim drops one of the two


def each_message_in_one_place(_: Snapshot, after: Snapshot, world: World) -> None:
    """A message is in one lane, delayed, quarantined or claimed, and nowhere twice."""
    raws = [raw for _, raw in after.places]
    assert all(raw in world.sent for raw in raws), "every message was sent by a client"
    if len(after.waiting) < len(raws):
        twice = {raw for raw in raws if raws.count(raw) > 1} - world.doubled
        assert not twice, [place for place, raw in after.places if raw in twice]


def none_appears_from_nowhere(before: Snapshot, after: Snapshot, world: World) -> None:
    """Only enqueue and requeue add messages."""
    for raw in after.waiting - before.waiting:
        if world.notes.name in REQUEUES:
            assert raw in {record.partition(b"|")[2] for record in before.dead.values()}
        else:
            assert world.notes.name in SENDS_MESSAGES, f"{world.sent.get(raw)} came back in {world.notes.name}"


def none_vanishes(before: Snapshot, after: Snapshot, world: World) -> None:
    """A message leaves when its id is answered, or as a copy of one that is answered or claimed."""
    answered = _answered(after, world)
    for place, raw in before.places:
        if raw in after.waiting:
            continue
        job_id = world.sent[raw]
        is_copy = job_id in before.marks or job_id in before.claims or job_id in after.claims
        if place == "claimed":
            is_copy = job_id in before.marks or (world.notes.name == "claim" and job_id in after.claims)
        if world.notes.name == "claim":
            is_copy = is_copy or any(world.sent[other] == job_id for other in after.waiting)
        assert job_id in answered or is_copy, f"{job_id} is lost: it was in {place}"


# ------------------------------------------------------------------------------------- answers
def answered_once(before: Snapshot, after: Snapshot, world: World) -> None:
    """An answer is written only for an id without a mark, and writes mark, result and stream entry together."""
    entries = _new_entries(after, world)
    answered = [job_id for _, job_id, _ in entries]
    assert len(set(answered)) == len(answered), f"answered twice in one step: {answered}"
    for _, job_id, answer in entries:
        assert job_id not in before.marks, f"{job_id} was answered again"
        assert job_id in after.marks, f"{job_id} has an answer and no mark"
        assert json.loads(answer)["id"] == job_id
        may_lack_result = any(world.sent[raw] == job_id for raw in world.without_result)
        assert job_id in after.results or may_lack_result, f"{job_id} has no result"
        if job_id in after.results:
            result = json.loads(after.results[job_id])
            assert result["task_id"] == job_id
            told = result["result"] if result["status"] == "SUCCESS" else result["result"]["answer"]
            assert may_lack_result or told == json.loads(answer), "result and stream entry differ"
    new_marks = {job_id for job_id in after.marks if before.marks.get(job_id) != after.marks[job_id]}
    assert new_marks == set(answered), "marks and stream entries differ"


def marks_stay(before: Snapshot, after: Snapshot, world: World) -> None:
    """Only a requeue removes marks before their time."""
    for job_id in before.marks.keys() - after.marks.keys():
        is_over = before.mark_ttl_ms(job_id) <= world.notes.moved_clock_ms + TTL_TOLERANCE_MS + MARKS_MARGIN_MS
        assert job_id in world.notes.requeued or world.notes.name == "spoil" or is_over, f"mark of {job_id} vanished"
        if is_over:
            world.expired.add(job_id)
    for job_id in before.results.keys() - after.results.keys():
        is_over = before.ttl_ms(result_key(job_id)) <= world.notes.moved_clock_ms + TTL_TOLERANCE_MS
        assert world.notes.name in REQUEUES or world.notes.name == "spoil" or is_over, (
            f"the result of {job_id} vanished"
        )


def marks_outlive_answers(before: Snapshot, after: Snapshot, world: World) -> None:
    """While an answer can be read, its id counts as answered."""
    for job_id in _answered(after, world):
        if before.results.get(job_id) == after.results.get(job_id):
            continue  # `already_answered` of an earlier message, and no client waits for a result of this one
        mark_ms, result_ms = after.mark_ttl_ms(job_id), after.ttl_ms(result_key(job_id))
        assert mark_ms > 0, "every mark ends"
        assert mark_ms + TTL_TOLERANCE_MS >= result_ms, f"the answer of {job_id} outlives its mark"
        if job_id in after.pending_answers:
            assert job_id in after.marks


def no_answer_without_a_message(_: Snapshot, after: Snapshot, world: World) -> None:
    """Only a cancelling client answers an id that was never enqueued."""
    unknown = _answered(after, world) - set(world.sent.values())
    assert not unknown or world.notes.name in CANCELS, f"{unknown} were answered without a message"


def revoked_now_if_known(before: Snapshot, after: Snapshot, world: World) -> None:
    """Celery's revoke answers a job that is claimed or delayed at once, and not when it is claimed again."""
    if world.notes.name == "revoke" and world.notes.is_complete and not before.foreign:
        known = world.notes.named & (before.claims.keys() | before.delayed.keys())
        assert known <= after.marks.keys(), f"{known} was not answered when it was revoked"


def current_generation_only(before: Snapshot, after: Snapshot, world: World) -> None:
    """A worker's answer counts only for the generation that it claimed."""
    answered = _answered(after, world)
    for job_id, _, generation in world.notes.committed:
        if job_id in answered:
            assert generation == before.tried.get(job_id, Tried()).generation, f"{job_id}: late answer counted"
    for job_id in answered:
        number = after.marks[job_id].partition(b"#")[2]
        assert int(number or 0) == before.tried.get(job_id, Tried()).generation, "the mark names the generation"


# ------------------------------------------------------------------------------------- claims
def claims_are_fenced(before: Snapshot, after: Snapshot, world: World) -> None:
    """A claim ends by its owner, by its answer, or by maintenance after its lease."""
    for job_id, claim in before.claims.items():
        if after.claims.get(job_id) == claim or job_id in after.marks:
            continue
        is_over = world.notes.name in MAINTAINS and before.leases[job_id] <= before.now_ms
        assert is_over or claim.token == world.notes.worker_token, f"the claim of {job_id} was taken from {claim.token}"


def leases_are_whole(before: Snapshot, after: Snapshot, world: World) -> None:
    """A new or renewed lease lasts as long as the worker asked, and no lease changes otherwise."""
    if world.notes.name == "sweep" and world.notes.is_complete:
        latest = max(after.leases.values(), default=0.0)
        assert latest <= after.now_ms + 600_000, "a lease lasts too long after the clock was set back"
    for job_id, ends in after.leases.items():
        if before.leases.get(job_id) == ends and before.claims[job_id] == after.claims[job_id]:
            continue
        asked_ms = {"claim": 60_000, "renew": 60_000, "sweep": 15_000}.get(world.notes.name, 0)
        if world.notes.name in MAINTAINS and before.leases.get(job_id, 0.0) > after.now_ms + 600_000:
            asked_ms = 600_000  # the clock was set back
        if world.notes.name in MAINTAINS and before.foreign:
            continue  # tried again after the foreign value was moved
        assert ends == after.now_ms + asked_ms, f"lease of {job_id}: {ends - after.now_ms} ms"


def claims_count_on(before: Snapshot, after: Snapshot, world: World) -> None:
    """The reply and the record of a new claim follow from the attempts before it."""
    for job in world.notes.claimed:
        tried, record = before.tried.get(job.id, Tried()), after.claims[job.id]
        assert (job.attempt, job.deaths, job.generation) == (tried.attempts + 1, tried.deaths, tried.generation)
        assert record.token == world.notes.worker_token
        assert (record.attempt, record.lane, record.raw) == (job.attempt, job.key, job.raw)
        assert job.id not in before.marks, f"{job.id} is answered and was claimed"
        assert id_of(job.raw) == job.id


def suspected_jobs_are_alone(_: Snapshot, __: Snapshot, world: World) -> None:
    """A job that two workers died with is claimed alone, by a worker that holds nothing."""
    if any(job.deaths >= QUARANTINE_AFTER_DEATHS for job in world.notes.claimed):
        assert len(world.notes.claimed) == 1, "a suspected job was claimed beside others"
        assert world.notes.claim_held == 0, "a suspected job was claimed beside others"


# ------------------------------------------------------------------------------------- counts
def attempts_are_counted(before: Snapshot, after: Snapshot, world: World) -> None:
    """Attempts and worker deaths grow by real ones only, and by each of them."""
    for job_id in {*before.tried, *after.tried, *before.claims}:
        old, new = before.tried.get(job_id, Tried()), after.tried.get(job_id, Tried())
        if job_id in after.marks:
            assert new in {old, Tried()}, f"{job_id} is answered: {old} → {new}"
            continue
        assert new == _expected_counts(job_id, old, before, after, world), f"counts of {job_id} were {old}"


def _expected_counts(job_id: str, old: Tried, before: Snapshot, after: Snapshot, world: World) -> Tried:
    notes = world.notes
    claim = before.claims.get(job_id)
    has_ended = claim is not None and after.claims.get(job_id) != claim
    if job_id in notes.requeued:
        mark = before.marks.get(job_id)
        generation = old.generation if mark is None else int(mark.partition(b"#")[2] or 0)
        return Tried(0, 0, generation + 1)
    if claim is None or not has_ended:
        return old
    if notes.name in MAINTAINS and claim.attempt:
        return Tried(claim.attempt, old.deaths + 1, old.generation)
    for released, delay_s, counts in notes.released:
        if released == job_id and counts:
            return Tried(claim.attempt, old.deaths + (delay_s <= 0), old.generation)
    return old


def quarantined_by_deaths(before: Snapshot, after: Snapshot, _: World) -> None:
    """Two worker deaths bring a job into quarantine when it returns, and fewer do not."""
    for record in set(after.quarantine) - set(before.quarantine):
        job_id = id_of(record.partition(b"|")[2])
        deaths = after.tried.get(job_id, Tried()).deaths
        assert job_id in after.marks or deaths >= QUARANTINE_AFTER_DEATHS, f"{job_id} does not belong into quarantine"
    claimed = {claim.raw for claim in before.claims.values()}
    for raws in after.lanes.values():
        for raw in raws:
            if raw in claimed:
                assert after.tried.get(id_of(raw), Tried()).deaths < QUARANTINE_AFTER_DEATHS, (
                    "it belongs into quarantine"
                )


# ------------------------------------------------------------------------------------- order
def lanes_keep_their_order(before: Snapshot, after: Snapshot, world: World) -> None:
    """New and requeued messages enter at the back, returned ones at the front; nothing else moves."""
    for key, old in before.lanes.items():
        new = after.lanes[key]
        if not world.doubled.isdisjoint(new):
            continue
        kept = [raw for raw in old if raw in set(new)]
        at = new.index(kept[0]) if kept else (len(new) if _adds_at_back(world) else 0)
        assert new[at : at + len(kept)] == kept, f"{key} changed its order"
        back, front = new[:at], new[at + len(kept) :]
        assert not back or _adds_at_back(world), f"{world.notes.name} put messages at the back of {key}"
        assert not front or world.notes.name in RETURNS_JOBS, f"{world.notes.name} put messages at the front of {key}"
        if world.notes.name == "claim" and not front:
            assert kept == old[: len(kept)], "the oldest messages are claimed first"
        if world.notes.name == "release":
            _check_release_order(front, before, world)


def _adds_at_back(world: World) -> bool:
    return world.notes.name in SENDS_MESSAGES | REQUEUES


def _check_release_order(front: Sequence[bytes], before: Snapshot, world: World) -> None:
    order = [before.claims[job_id].raw for job_id, _, _ in world.notes.released if job_id in before.claims]
    assert list(front) == [raw for raw in order if raw in set(front)], "the last one of the call comes first"


def delays_are_kept(before: Snapshot, after: Snapshot, world: World) -> None:
    """A delayed job is due after its delay, and does not return before."""
    for job_id, due_ms in after.due.items():
        if before.due.get(job_id) == due_ms:
            continue
        delays = [delay_s for released, delay_s, _ in world.notes.released if released == job_id]
        if before.foreign and delays != [d for d in delays if d > 0]:
            continue  # its lane had a wrong type
        if world.notes.name in MAINTAINS | {"claim", "drain"} and before.foreign:
            continue
        assert delays, f"{job_id} was delayed in {world.notes.name}"
        assert due_ms == after.now_ms + delays[-1] * 1000
    for job_id, due_ms in before.due.items():
        if job_id not in after.due and job_id not in after.marks:
            assert world.notes.name in MAINTAINS, f"{world.notes.name} returned {job_id}"
            assert due_ms <= before.now_ms, f"{job_id} returned too early"


# ------------------------------------------------------------------------------------- callbacks
def callbacks_are_kept(before: Snapshot, after: Snapshot, world: World) -> None:
    """Callbacks leave after they were sent, and none is overwritten while the id counts as answered."""
    for member, record in before.callbacks.items():
        is_new_job = member.partition(b"\xff")[0].decode() in world.expired
        if after.callbacks.get(member) != record and not (is_new_job and member in after.callbacks):
            assert (member, record) in world.sends, f"callbacks of {member!r} were lost"


def callbacks_follow_answers(before: Snapshot, after: Snapshot, world: World) -> None:
    """The step that answers a message with callbacks stores them, or the answer for when the message is found."""
    for job_id in _answered(after, world):
        answered = set(_answered_messages(job_id, before, after, world))
        if any(world.sent[raw] == job_id for raw in world.doubled):
            continue
        if not answered:
            assert job_id in after.pending_answers, f"{job_id}: no answer waits for its message"
        elif answered <= world.with_callbacks:
            is_new_job = job_id in world.expired  # its answer may be the same, byte by byte
            stored = [
                record
                for member, record in after.callbacks.items()
                if is_new_job or before.callbacks.get(member) != record
            ]
            assert any(record.endswith(raw) for record in stored for raw in answered), f"callbacks of {job_id} missing"
    for job_id in before.pending_answers.keys() - after.pending_answers.keys():
        dropped = {raw for _, raw in before.places if world.sent[raw] == job_id} - after.waiting
        if dropped and job_id in before.marks:
            assert has_record(before, after, job_id), f"callbacks of {job_id} were not kept when it was dropped"


def pending_answers_find_messages(before: Snapshot, after: Snapshot, world: World) -> None:
    """A message that is dropped because its id is answered gets the answer that waits for it."""
    for job_id in before.pending_answers:
        dropped = {raw for _, raw in before.places if world.sent[raw] == job_id} - after.waiting
        if dropped & world.with_callbacks and job_id in before.marks:
            assert has_record(before, after, job_id), f"{job_id} was dropped without its callbacks"


def _answered_messages(job_id: str, before: Snapshot, after: Snapshot, world: World) -> Iterator[bytes]:
    """The messages that the answer of an id is about: those that left with it."""
    yield from (raw for committed, raw, _ in world.notes.committed if committed == job_id)
    yield from (raw for _, raw in before.places if world.sent[raw] == job_id and raw not in after.waiting)


CHECKS: Final[Sequence[Check]] = (
    only_known_keys,
    indexes_agree,
    only_counters_grow,
    requeued_or_dropped,
    each_message_in_one_place,
    none_appears_from_nowhere,
    none_vanishes,
    answered_once,
    marks_stay,
    marks_outlive_answers,
    no_answer_without_a_message,
    revoked_now_if_known,
    current_generation_only,
    claims_are_fenced,
    leases_are_whole,
    claims_count_on,
    suspected_jobs_are_alone,
    attempts_are_counted,
    quarantined_by_deaths,
    lanes_keep_their_order,
    delays_are_kept,
    callbacks_are_kept,
    callbacks_follow_answers,
    pending_answers_find_messages,
)
