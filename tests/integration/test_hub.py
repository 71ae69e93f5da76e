"""Checkpoints from a hub: what is downloaded, from where, and what is said when it cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import quiet_transformers, split_weights, write_2022, write_json, write_safetensors
from tests.support.hub_server import HubServer
from tests.support.processes import clean_environment

ID = "OFA-Sys/chinese-clip-tiny"
ASK = """
import json, sys
from shiwu_worker.errors import FatalError
from shiwu_worker.checkpoints.model_files import model_folder, model_revision
for model in sys.argv[1:]:
    try:
        folder = model_folder(model)
        print(json.dumps({"folder": str(folder), "revision": model_revision(folder)}))
    except FatalError as error:
        print(json.dumps({"code": int(error.exit_code), "text": str(error)}))
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the layout of December 2022, and files of other frameworks."""
    with quiet_transformers():
        folder = write_2022(tmp_path_factory.mktemp("published") / "2022")
    for name in ("flax_model.msgpack", "tf_model.h5", "README.md", ".gitattributes"):
        (folder / name).write_bytes(b"x" * 100)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"x" * 100)
    (folder / "onnx" / "config.json").write_bytes(b"{}")
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A hub without models."""
    server = HubServer().start()
    yield server
    server.stop()


class Asker:
    """Calls `model_folder` in fresh processes with one cache; they must not have loaded torch."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        self._hub = hub
        self._home = home

    def __call__(self, *models: str, **environ: str) -> list[dict[str, Any]]:
        """One answer for each model: folder and revision, or exit code and text."""
        usual = {"HF_ENDPOINT": self._hub.url, "HF_HOME": str(self._home), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", ASK, *models],
            env=clean_environment({**usual, "HF_HUB_DISABLE_TELEMETRY": "1", **environ}),
            cwd=self._home,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def ask(hub: HubServer, tmp_path: Path) -> Asker:
    """Asks about models of `hub`."""
    return Asker(hub, tmp_path)


def test_layout_of_2022_loads_by_id_then_offline(hub: HubServer, ask: Asker, published: Path) -> None:
    """Its four files are downloaded and nothing else; afterwards no hub is needed."""
    commit = hub.add(ID, published)
    (first,) = ask(ID)
    assert first["revision"] == commit
    whole = {"config.json", "preprocessor_config.json", "vocab.txt", "pytorch_model.bin"}
    assert {path.name for path in Path(first["folder"]).iterdir()} == whole
    assert hub.downloaded() == whole
    hub.asked.clear()
    again = ask(ID, f"{ID}@{commit}", f"{ID}@main")
    assert again == [first] * 3
    assert [request for request in hub.asked if "agent-harnesses" not in request] == []
    assert ask(ID, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9") == [first]


def test_safetensors_are_preferred_to_bin(hub: HubServer, ask: Asker, tmp_path: Path) -> None:
    """Both kinds hold the same weights."""
    with quiet_transformers():
        folder = write_safetensors(tmp_path / "both")
        shutil.copyfile(write_2022(tmp_path / "bin") / "pytorch_model.bin", folder / "pytorch_model.bin")
    hub.add(ID, folder)
    (found,) = ask(ID)
    assert "revision" in found, found
    assert {"model.safetensors"} == {name for name in hub.downloaded() if name.endswith((".safetensors", ".bin"))}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_parts_are_all_downloaded(hub: HubServer, ask: Asker, tmp_path: Path, kind: str) -> None:
    """The parts that the index names, and no other file with such an ending."""
    with quiet_transformers():
        whole = write_safetensors(tmp_path / "m") if kind == "safetensors" else write_2022(tmp_path / "m")
        folder = split_weights(whole, parts=3)
    (folder / f"optimizer.{kind}").write_bytes(b"x")
    hub.add(ID, folder)
    (found,) = ask(ID)
    assert "revision" in found, found
    parts = {name for name in hub.downloaded() if name.endswith(kind)}
    assert len(parts) == 3
    assert f"optimizer.{kind}" not in parts


def test_revision_may_be_a_commit_a_branch_or_a_tag(hub: HubServer, ask: Asker, tmp_path: Path) -> None:
    """`id@revision` stays what it was when the main branch moves."""
    with quiet_transformers():
        old = hub.add(ID, write_2022(tmp_path / "old"), ref="v1")
        new = hub.add(ID, write_safetensors(tmp_path / "new"))
    found = ask(ID, f"{ID}@v1", f"{ID}@{old}")
    assert [answer["revision"] for answer in found] == [new, old, old]


def test_interrupted_download_is_resumed(hub: HubServer, ask: Asker, published: Path, tmp_path: Path) -> None:
    """A connection that breaks in the middle of the weights."""
    folder = tmp_path / "large"
    shutil.copytree(published, folder)
    torch.save({"large": torch.zeros(6_000_000)}, folder / "pytorch_model.bin")
    commit = hub.add(ID, folder)
    hub.cut_after["pytorch_model.bin"] = 15_000_000
    (found,) = ask(ID)
    assert found.get("revision") == commit, found
    assert len([request for request in hub.asked if request.startswith("GET /lfs/")]) == 2


def test_half_a_model_in_the_cache_is_completed(hub: HubServer, ask: Asker, published: Path) -> None:
    """Another program, or a download that was ended, may have left some of the files."""
    hub.add(ID, published)
    (first,) = ask(ID)
    (Path(first["folder"]) / "pytorch_model.bin").resolve().unlink()
    (offline,) = ask(ID, HF_HUB_OFFLINE="1")
    assert "incomplete in the hub's cache" in offline["text"]
    hub.asked.clear()
    assert ask(ID) == [first]
    assert hub.downloaded() == {"pytorch_model.bin"}


def test_damaged_copy_error_tells_how_to_remove_it(hub: HubServer, ask: Asker, published: Path) -> None:
    """The hub's library takes a file in the cache as complete; the remedy in the error text works."""
    hub.add(ID, published)
    (first,) = ask(ID)
    weights = (Path(first["folder"]) / "pytorch_model.bin").resolve()
    weights.write_bytes(weights.read_bytes()[:-100])
    (damaged,) = ask(ID)
    assert damaged["code"] == 65
    copy = Path(first["folder"]).parent.parent
    assert f"pytorch_model.bin again. If {hub.url} has it whole, remove the copy here, {copy}," in damaged["text"]
    shutil.rmtree(copy)
    assert ask(ID) == [first]


def test_mirror_may_send_large_files_itself(hub: HubServer, ask: Asker, published: Path) -> None:
    """No redirection to another host."""
    hub.has_cdn = False
    commit = hub.add(ID, published)
    assert ask(ID)[0]["revision"] == commit


def test_token_opens_gated_models_at_the_hub_only(hub: HubServer, ask: Asker, published: Path) -> None:
    """The host of the large files does not get it."""
    hub.add(ID, published, is_gated=True)
    hub.tokens.add("hf_right")
    (refused,) = ask(ID)
    assert "accept" in refused["text"]
    assert "HF_TOKEN" in refused["text"]
    (found,) = ask(ID, HF_TOKEN="hf_right")
    assert "revision" in found, found
    assert hub.tokens_at_cdn == []


def test_unavailable_model_error_has_a_remedy(hub: HubServer, ask: Asker, published: Path) -> None:
    """Each error is one sentence, with exit code 65."""
    hub.add(ID, published)
    none, no_revision, not_an_id, url = ask("no/such", f"{ID}@v9", "a/b/c", f"https://huggingface.co/{ID}")
    assert "has no model 'no/such', or it is private" in none["text"]
    assert f"has '{ID}' but no revision 'v9'" in no_revision["text"]
    assert "expected a folder, ORG/NAME or ORG/NAME@COMMIT" in not_an_id["text"]
    assert "expected a folder, ORG/NAME or ORG/NAME@COMMIT" in url["text"]
    (offline,) = ask(ID, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set; unset it" in offline["text"]
    (away,) = ask(ID, HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in away["text"]
    assert "HF_ENDPOINT" in away["text"]
    hub.status = 500
    (broken,) = ask(ID)
    assert "500" in broken["text"]
    answers = [none, no_revision, not_an_id, url, offline, away, broken]
    assert {answer["code"] for answer in answers} == {65}
    assert all("\n" not in answer["text"] and "Traceback" not in answer["text"] for answer in answers)


def test_index_cannot_name_files_outside(hub: HubServer, ask: Asker, published: Path, tmp_path: Path) -> None:
    """Neither on the hub nor on the disk."""
    folder = tmp_path / "outside"
    shutil.copytree(published, folder)
    (folder / "pytorch_model.bin").unlink()
    index = {"metadata": {}, "weight_map": {"logit_scale": "../outside.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)
    hub.add(ID, folder)
    (found,) = ask(ID)
    assert found["code"] == 65
    assert "plain names of *.safetensors files" in found["text"]
    assert not [request for request in hub.asked if "outside" in request]


def test_adapter_brings_its_base_from_the_hub(hub: HubServer, ask: Asker, published: Path, tmp_path: Path) -> None:
    """The base is the model and the revision that adapter_config.json names."""
    base = hub.add(ID, published, ref="v1")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": ID, "revision": "v1", "peft_type": "LORA"})
    shutil.copyfile(published / "pytorch_model.bin", adapter / "adapter_model.bin")
    hub.add("me/adapter", adapter)
    found, local = ask("me/adapter", str(adapter))
    assert "revision" in found, found
    assert len(found["revision"]) == 12, "a hash of adapter and base, since no commit names both"
    assert found["revision"] == local["revision"]
    assert any(base in request for request in hub.asked)
