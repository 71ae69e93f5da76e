"""Where a model is found, and what it is called."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.models import model_folder, model_name, model_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import sys
from shiwu_worker.models import model_folder
from shiwu_worker.errors import FatalError
try:
    print(model_folder(sys.argv[1]))
except FatalError as error:
    print(int(error.exit_code), error)
assert "torch" not in sys.modules
"""


def asked(model: str, cache: Path, **environ: str) -> str:
    """What `model_folder` answers in a fresh process with this hub cache; it must not have loaded torch."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, model],
        env={**os.environ, "HF_HUB_CACHE": str(cache), **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def cached(cache: Path, *names: str) -> Path:
    """A hub cache that holds these files of the model `some/model`; returns the snapshot."""
    model = cache / "models--some--model"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT, encoding="ascii")
    for name in names:
        (snapshot / name).write_bytes(b"{}")
    return snapshot


def test_the_embedded_model() -> None:
    """Without a setting it is the package's own, named and with the digest that sha256sum prints."""
    folder = model_folder(None)
    assert model_name(None) == "pictogram-zh"
    whole = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert model_revision(folder) == whole[:12]
    present = {path.name for path in folder.iterdir()}
    assert {"config.json", "preprocessor_config.json", "tokenizer.json", "words.json", "MODEL_CARD.md"} <= present


def test_a_folder(tmp_path: Path) -> None:
    """A folder is taken as it is and called by its own name, whatever way it was written."""
    mine = tmp_path / "mine"
    mine.mkdir()
    assert model_folder(str(mine)) == mine
    assert model_name(f"{mine}/") == model_name(str(mine / ".." / "mine")) == "mine"
    assert model_name("some/model") == "some/model"


@pytest.mark.parametrize("missing", ["/no/such/folder", "./none", "~/none"])
def test_a_missing_folder_is_named(missing: str) -> None:
    """What looks like a path is never asked of a hub."""
    with pytest.raises(FatalError, match="no such folder") as caught:
        model_folder(missing)
    assert caught.value.exit_code is ExitCode.MODEL


def test_revisions(tmp_path: Path) -> None:
    """A snapshot's commit; else a digest that every file of the weights changes and no other file does."""
    snapshot = tmp_path / COMMIT
    snapshot.mkdir()
    assert model_revision(snapshot) == COMMIT
    first = tmp_path / "model-00001-of-00002.safetensors"
    first.write_bytes(b"one")
    alone = model_revision(tmp_path)
    assert alone == hashlib.sha256(b"one").hexdigest()[:12]
    (tmp_path / "config.json").write_text("{}", encoding="ascii")
    assert model_revision(tmp_path) == alone
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_bytes(b"two")
    both = model_revision(tmp_path)
    second.write_bytes(b"three")
    assert len({alone, both, model_revision(tmp_path)}) == 3


def test_a_cached_hub_model_needs_no_hub(tmp_path: Path) -> None:
    """A worker with its model in the cache starts without a network."""
    snapshot = cached(tmp_path, "config.json", "model.safetensors")
    assert asked("some/model", tmp_path, HF_HUB_OFFLINE="1") == str(snapshot)


def test_a_cache_without_weights_is_not_a_model(tmp_path: Path) -> None:
    """A config that another program left in the cache does not pass for the model, also where no hub can be reached."""
    cached(tmp_path, "config.json")
    answer = asked("some/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert answer.startswith(str(int(ExitCode.MODEL)))
    assert "no *.safetensors" in answer


@pytest.mark.parametrize("model", ["some/model", "not an id at all"])
def test_a_hub_that_cant_help_is_told_of(tmp_path: Path, model: str) -> None:
    """No network, or no valid id: an exit code with a name, and the setting to change."""
    answer = asked(model, tmp_path, HF_HUB_OFFLINE="1")
    assert answer.startswith(f"{int(ExitCode.MODEL)} SHIWU_MODEL: expected a folder or a hub id")
