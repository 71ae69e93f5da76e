"""Real `shiwu-hooks` processes, their files, and answers for them."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self

import redis

from shiwu.broker.answers import AnswerEntry
from shiwu.contract import RESULT_STREAM, Answer, Lane, Status, Tag
from shiwu.hooks.endpoints import Endpoints
from shiwu.hooks.process import HooksOptions
from shiwu.network.address_rules import AddressRules
from tests.support.processes import LOOPBACK, Process, clean_environment
from tests.support.redis_parts import make_answer_store
from tests.support.waiting import wait_until

SECRET: Final = f"whsec_{base64.b64encode(bytes(range(32))).decode()}"
OLD_SECRET: Final = f"whsec_{base64.b64encode(bytes(range(32, 64))).decode()}"
SEED: Final = "seed-of-some-characters"


def write_endpoints(folder: Path, endpoints: Iterable[Mapping[str, Any]], **more: Any) -> Path:
    """A file of endpoints with its secrets; each endpoint has the current one unless it says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("secret", SECRET), ("old", OLD_SECRET), ("seed", SEED)):
        (folder / name).write_text(f"{text}\n")
    path = folder / "endpoints.yaml"
    # JSON is YAML.
    path.write_text(json.dumps({"endpoints": [{"secret_file": "secret"} | dict(each) for each in endpoints]} | more))
    return path


class HooksProcess(Process):
    """A real `shiwu-hooks` that may reach loopback, with short times; `settings` are names of SHIWU_HOOKS_…."""

    def __init__(
        self,
        *,
        redis_url: str,
        file: Path,
        name: str = "hooks",
        args: str = "",
        env: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        asked = {"timeout_s": 2, "lease_s": 4, "schedule": "0s,0.2s,0.2s,0.2s", **settings}
        own = {
            "SHIWU_REDIS_URL": redis_url,
            "SHIWU_HOOKS_FILE": str(file),
            "SHIWU_HOOKS_CONSUMER": name,
            "SHIWU_ALLOW_HOSTS": LOOPBACK,
            **{f"SHIWU_HOOKS_{key.upper()}": str(value) for key, value in asked.items()},
        }
        command = [sys.executable, "-m", "shiwu.hooks", *args.split()]
        super().__init__(command, name=name, folder=file.parent, env=clean_environment(own | dict(env or {})))

    def wait_started(self) -> Self:
        """Wait until it reads the stream."""
        wait_until(lambda: self.events("started") or not self.is_running, timeout_s=30, what="shiwu-hooks starts")
        if not self.is_running:
            raise self.error("expected to go on running")
        return self

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The lines of its log, all or those of one event."""
        lines = [line for line in self.log_text().splitlines() if line.startswith("{") and line.endswith("}")]
        events: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [event for event in events if name in {None, event["event"]}]


def answer(job_id: str, **fields: Any) -> Answer:
    """An answer with these fields."""
    tags = (Tag(label="猫", score=0.9, cosine=0.3),)
    return Answer(**({"id": job_id, "status": Status.TAGGED, "tags": tags, "lane": Lane.BULK} | fields))


def commit(client: redis.Redis, *answers: Answer) -> None:
    """Let answers end their jobs as a worker does."""
    make_answer_store(client, "w").write([AnswerEntry(id=each.id, answer=each) for each in answers])


def unread(client: redis.Redis, group: str = "hooks") -> int:
    """Entries of the stream that the group has not read, or not acknowledged."""
    [info] = [found for found in client.xinfo_groups(RESULT_STREAM) if found["name"] == group.encode()]
    newer: Any = client.xrange(RESULT_STREAM, min=f"({info['last-delivered-id'].decode()}")
    return int(info["pending"]) + len(newer)


def hooks_options() -> HooksOptions:
    """Options with which a test looks at the queue."""
    return HooksOptions(
        redis_url="", endpoints=Endpoints((), None), rules=AddressRules(), schedule_s=(0.0,), max_dead=10_000
    )


StartHooks = Callable[..., HooksProcess]
"""The fixture `start_hooks`: starts a process with endpoints and settings."""
