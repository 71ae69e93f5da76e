"""Where a model is found, what it is called, and which revision an answer names."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiwu_worker.checkpoints import model_files as models
from shiwu_worker.checkpoints.checkpoint_files import WrongCheckpoint, read_checkpoint
from shiwu_worker.checkpoints.model_files import content_revision, model_folder, model_name, model_revision
from shiwu_worker.errors import ExitCode
from tests.support.checkpoints import change_json, quiet_transformers, write_2022, write_safetensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_embedded_model_is_the_default() -> None:
    """Without a setting it is the package's own."""
    folder = model_folder(None)
    assert model_name(None) == "photo-zh"
    present = {path.name for path in folder.iterdir()}
    assert {"config.json", "processor_config.json", "tokenizer.json", "MODEL_CARD.md"} <= present
    read_checkpoint(folder)


def test_embedded_model_has_its_name_in_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes it as SHIWU_MODEL means the same, unless a folder has this name."""
    assert model_folder("photo-zh") == model_folder(None)
    assert model_name("photo-zh") == "photo-zh"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo-zh").mkdir()
    with pytest.raises(WrongCheckpoint):
        model_folder("photo-zh")


def test_model_name_is_the_folder_or_the_hub_id(tmp_path: Path) -> None:
    """A folder is called by its own name, however it is written; a revision is not part of the name."""
    mine = tmp_path / "mine"
    mine.mkdir()
    assert model_name(f"{mine}/") == model_name(str(mine / ".." / "mine")) == "mine"
    assert model_name("some/model") == model_name(f"some/model@{COMMIT}") == "some/model"


@pytest.mark.parametrize("missing", ["/no/such/folder", "./none", "~/none"])
def test_missing_folder_is_not_requested_from_a_hub(missing: str) -> None:
    """What looks like a path can only be a folder."""
    with pytest.raises(WrongCheckpoint, match="no such folder") as caught:
        model_folder(missing)
    assert caught.value.exit_code is ExitCode.MODEL


def test_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    """A user may name the weights; the remedy is their folder."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"x")
    with pytest.raises(WrongCheckpoint, match=r"got the file .*model\.safetensors.*name its folder"):
        model_folder(str(weights))


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, who can read everything, so the system call is made to fail."""

    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(models.Path, "is_dir", refuse)
    with pytest.raises(WrongCheckpoint, match=r"cannot be read.*Permission denied"):
        model_folder(str(tmp_path))


@pytest.fixture(scope="module")
def revisions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Revisions of folders that differ in one file each."""
    top = tmp_path_factory.mktemp("revisions")
    with quiet_transformers():
        folders = {"bin": write_2022(top / "bin"), "safetensors": write_safetensors(top / "safetensors")}
        folders |= {f"{name} again": write_2022(top / name, seed=1) for name in ("other", "another")}
        for name in ("vocabulary", "processor", "config", "unused"):
            folders[name] = write_2022(top / name)
    vocabulary = folders["vocabulary"] / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8").replace("熊\n猫", "猫\n熊"), encoding="utf-8")
    change_json(folders["processor"] / "preprocessor_config.json", resample=2)
    change_json(folders["config"] / "config.json", hidden_act="gelu")
    (folders["unused"] / "README.md").write_text("x", encoding="utf-8")
    (folders["unused"] / "flax_model.msgpack").write_bytes(b"x")
    return {name: model_revision(folder) for name, folder in folders.items()}


def test_revision_follows_everything_that_is_loaded(revisions: dict[str, str]) -> None:
    """Weights of both kinds, vocabulary, processor and configuration; what is not loaded does not count."""
    assert all(len(revision) == 12 for revision in revisions.values())
    assert revisions["other again"] == revisions["another again"]
    assert revisions["unused"] == revisions["bin"]
    assert len(set(revisions.values())) == len(revisions) - 2


def test_revision_of_a_hub_snapshot_is_its_commit(tmp_path: Path) -> None:
    """The hub's commit names every file already."""
    with quiet_transformers():
        snapshot = write_2022(tmp_path / COMMIT)
    assert model_revision(snapshot) == COMMIT
    assert content_revision(read_checkpoint(snapshot)) != COMMIT
