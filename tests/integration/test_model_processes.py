"""Real processes with real checkpoints: a model by its hub id tags images, and a broken one is refused with code 65."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from shiwu.contract import Answer, Status
from shiwu_worker.errors import ExitCode
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.ask import ask
from tests.support.checkpoints import VOCABULARY, quiet_transformers, write_2022
from tests.support.hub_server import HubServer
from tests.support.processes import run_module
from tests.support.servers import PictureServer, Reply

ID = "OFA-Sys/chinese-clip-tiny"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A hub with one model in the layout of 2022."""
    with quiet_transformers():
        folder = write_2022(tmp_path / "published")
    server = HubServer().start()
    server.add(ID, folder)
    yield server
    server.stop()


def test_model_by_hub_id_tags_images(
    hub: HubServer, redis_url: str, start_worker: StartWorker, http_server: PictureServer, tmp_path: Path
) -> None:
    """The command of the README, through a mirror: answers name the id and the commit."""
    commit = hub.models[ID].refs["main"]
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    worker = start_worker(redis_url=redis_url, model=f"{ID}@{commit}", env=env)
    url = http_server.serve("/panda.png", Reply.picture(pictures.png(pictures.picture("熊猫"))))
    answer: Answer = ask(redis_url, url, "by-id")
    assert answer.status is Status.TAGGED
    assert answer.model is not None
    assert (answer.model.id, answer.model.revision) == (ID, commit)
    downloaded = [json.loads(line) for line in worker.log_text().splitlines() if '"model_downloaded"' in line]
    assert [(line["model"], line["revision"]) for line in downloaded] == [(ID, commit)]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that can be seen to be wrong by their files, by their tokenizer, and by the default labels."""
    top = tmp_path_factory.mktemp("broken")
    with quiet_transformers():
        whole = write_2022(top / "whole")
    folders = {name: top / name for name in ("cut weights", "cut vocabulary", "vocabulary of another language")}
    for folder in folders.values():
        shutil.copytree(whole, folder)
    weights = folders["cut weights"] / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folders["cut vocabulary"] / "vocab.txt").write_text("\n".join(VOCABULARY[:60]) + "\n", encoding="utf-8")
    other = [
        word if not "一" <= word[0] <= "龥" else f"[unused{1000 + number}]" for number, word in enumerate(VOCABULARY)
    ]
    text = "\n".join(other) + "\n"
    (folders["vocabulary of another language"] / "vocab.txt").write_text(text, encoding="utf-8")
    return folders


SAID = {
    "cut weights": "pytorch_model.bin: expected a file of torch.save",
    "cut vocabulary": "expected the vocabulary of 127 tokens that the model has, got",
    "vocabulary of another language": "SHIWU_DEFAULT_LABELS everyday-zh: the model cannot read",
}


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("", "cut weights"),
        ("", "vocabulary of another language"),
        ("--check", "cut vocabulary"),
        ("--tune", "cut weights"),
    ],
)
def test_broken_model_ends_with_65_and_its_file(
    broken: dict[str, Path], redis_url: str, redis_client: redis.Redis, option: str, name: str
) -> None:
    """One line that names the file, no traceback, and nothing has been claimed."""
    redis_client.lpush("shiwu.interactive", "waits")
    env = {"SHIWU_MODEL": str(broken[name]), "SHIWU_REDIS_URL": redis_url, "SHIWU_LOADERS": "1", "SHIWU_MAX_BATCH": "1"}
    done = run_module("shiwu_worker", *option.split(), timeout_s=120, **env)
    output = done.stdout + done.stderr
    assert done.returncode == ExitCode.MODEL, output
    assert SAID[name] in output
    assert "Traceback" not in output
    assert redis_client.llen("shiwu.interactive") == 1
