"""Every drill in its short form, in CI with a seed that nobody has seen: the promise must hold."""

from __future__ import annotations

import os
import random
from dataclasses import asdict, replace

import pytest
from drill.__main__ import held_by, main, run
from drill.catalogue import DRILLS

from shiwu.contract import CLAIMS, DELAYED_MESSAGES, WORKERS
from tests.support.servers import Valkey

FIXED = 20261123
FRESH = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**6)
"""Of this run; all its processes must name their tests alike."""
SOME = ("kill",)
"""What `make test` runs of them, beside other tests of the same promises; `make test-long` runs the rest."""
BUSY_S = 10.0
"""What a recovery may take beyond the promise here, where other tests have the cores; `make drill` holds it exactly."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, FRESH if os.environ.get("CI") else FIXED, marks=[] if name in SOME else [pytest.mark.long])
        for name in DRILLS
    ],
    ids=str,
)
def test_the_promise_holds(name: str, seed: int) -> None:
    """Enqueued = answered, each once, in time; the seed stands in the test's name."""
    outcome = run(DRILLS[name], seed=seed, short=True)
    assert replace(outcome, late=0).is_kept, f"seed {seed}: {asdict(outcome)}"
    assert outcome.recovery_max_s <= outcome.promised_s + BUSY_S, f"seed {seed}: {asdict(outcome)}"


def test_a_redis_with_jobs_is_refused(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Staging with work in it: the drill says what it found, and touches nothing."""
    with valkey.client() as client:
        assert held_by(valkey.url) == {}
        client.lpush("shiwu.bulk", "a", "b")
        client.hset(CLAIMS, "job", "token|1|shiwu.bulk|x")
        client.hset(DELAYED_MESSAGES, "other", "shiwu.bulk|x")
        client.zadd(WORKERS, {"theirs": client.time()[0] * 1000})
        monkeypatch.setattr("sys.argv", ["drill", "kill", "--redis-url", valkey.url])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert f"it holds shiwu.bulk 2, {CLAIMS} 1, {DELAYED_MESSAGES} 1, {WORKERS} 1" in capsys.readouterr().err
        assert client.dbsize() == 4
