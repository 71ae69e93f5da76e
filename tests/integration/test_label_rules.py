"""A label set of version 2 on real photographs: tried as a shadow, calibrated on them, and taken over by the worker."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click.testing import CliRunner

from shiwu import Client
from shiwu.contract import Answer, Status
from shiwu_worker.__main__ import main
from shiwu_worker.commands.answer_vectors import read_truth
from tests.support.health_port import value
from tests.support.processes import ROOT, free_ports
from tests.support.servers import WorkerProcess
from tests.support.waiting import wait_until

PHOTOS: Final = ROOT / "demo" / "photos"
SAMPLES: Final = (
    *("bridge.jpg", "cat.jpg", "chair.png", "clock.jpg", "coffee.webp", "crocodile.jpg", "dahlia.jpg", "dam.jpg"),
    *("hammer.gif", "koala.avif", "lemurs.jpg", "macaw.webp", "palace.jpg", "rocket.jpg", "sunset.jpg", "two-dogs.jpg"),
)
NOW: Final = "name: now\nlabels: [猫, 狗, 花, 桥, 宫殿, 锤子]\n"
ANIMALS: Final = ("猫", "狗", "熊", "鳄鱼", "蜥蜴", "鸟")
RULES: Final = {
    "version": 2,
    "name": "rules",
    "unknown": "其他",
    "labels": [
        {"label": "猫", "aliases": ["cat"]},
        *({"label": word} for word in ANIMALS[1:]),
        {"label": "花", "texts": ["花", "盆栽"]},
        {"label": "桥", "group": "buildings"},
        {"label": "宫殿", "group": "buildings"},
        "锤子",
    ],
    "groups": {
        "animals": {"exclusive": True, "labels": list(ANIMALS), "parent": "动物"},
        "buildings": {},
    },
}


def photos() -> list[str]:
    """References of half of the sample photographs."""
    return [(PHOTOS / name).as_uri() for name in SAMPLES]


def ask(client: Client, **fields: Any) -> list[Answer]:
    """The answers for all photographs."""
    found = client.wait_many(client.enqueue_many(photos(), **fields), timeout_s=60)
    assert {answer.status for answer in found.values()} == {Status.TAGGED}
    return list(found.values())


def labels_of(answer: Answer) -> list[str]:
    """The labels of its tags."""
    return [tag.label for tag in answer.tags or ()]


def run(*arguments: str) -> str:
    """What `shiwu-worker labels` prints."""
    done = CliRunner().invoke(main, ["labels", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_sets_are_compared_on_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in subfolders; files that are hidden or no images are left alone, and a broken image is counted."""
    monkeypatch.setenv("SHIWU_MAX_BATCH", "2")
    monkeypatch.setenv("SHIWU_LOADERS", "1")
    folder = tmp_path / "照片"
    for source, name in (("cat.jpg", "a/猫 1.jpg"), ("two-dogs.jpg", "b/dogs.JPG"), ("cut-off.jpg", "a/cut.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PHOTOS / source, folder / name)
    shutil.copy(PHOTOS / "dahlia.jpg", folder / ".hidden.jpg")
    (folder / "notes.txt").write_text("no image")
    for name, words in (("one", "[猫, 花]"), ("two", "[狗, 猫, 花]")):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nlabels: {words}\n", encoding="utf-8")
    sets = (str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml"))
    done = CliRunner().invoke(main, ["labels", "diff", *sets, "--images", str(folder), "--top-k", "1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["images"], found["same"], found["top1_changed"]) == (2, 1, 1)
    assert next(each for each in found["labels"] if each["label"] == "狗")["images"] == ["b/dogs.JPG"]
    assert "images left out: 1 (picture_broken 1)" in done.stderr
    done = CliRunner().invoke(main, ["labels", "diff", *sets])
    assert (done.exit_code, "expected either --answers or --images" in done.output) == (2, True)


def test_truth_names_images_by_their_paths(tmp_path: Path) -> None:
    """Or by their references, as answers do."""
    lines = ('{"image": "a/猫 1.jpg", "labels": ["猫"]}', '{"image": "s3://b/k", "labels": []}')
    truth = read_truth(io.BytesIO("\n".join(lines).encode()), folder=tmp_path)
    assert truth == {(tmp_path / "a" / "猫 1.jpg").as_uri(): ["猫"], "s3://b/k": []}


def write_rules(folder: Path, **fields: object) -> None:
    """Write the set with these fields more; the file changes in one step."""
    text = yaml.safe_dump({**RULES, **fields}, allow_unicode=True)
    (folder / "rules.tmp").write_text(text, encoding="utf-8")
    os.replace(folder / "rules.tmp", folder / "rules.yaml")


def calibrate(folder: Path, answers: Sequence[Answer]) -> str:
    """Write `rules.yaml` with the head z and its calibration file into this folder; what the command prints."""
    folder.mkdir()
    write_rules(folder, head="z", calibration="rules.json")
    lines = folder / "answers.jsonl"
    lines.write_bytes(b"\n".join(answer.to_json() for answer in answers))
    command = ("calibrate", "rules", "--answers", str(lines), "--false-rate", "0.6", "--accept")
    return run(*command, "-o", str(folder / "rules.json"))


def check_rules(answers: Sequence[Answer], z: float) -> None:
    """At most one animal, and its parent with it; z decides; the label for unknown images stands alone."""
    for answer in answers:
        names = labels_of(answer)
        animals = set(ANIMALS) & set(names)
        assert len(animals) <= 1
        assert not animals or "动物" in names
        assert answer.unknown is (True if names == ["其他"] else None)
        assert "其他" not in names or len(names) == 1
        for tag in answer.tags or ():
            assert tag.z is not None
            assert tag.label in {"动物", "其他"} or tag.z >= z
            assert (tag.group == "animals") is (tag.label in ANIMALS)
        assert [tag.z for tag in answer.tags or ()] == sorted((tag.z or 0.0 for tag in answer.tags or ()), reverse=True)


def check_names(answers: Sequence[Answer]) -> None:
    """The cat is one, other photographs show animals too, and some show nothing that the set knows."""
    names = {Path(photo).stem: labels_of(answer) for photo, answer in zip(photos(), answers, strict=True)}
    assert {"猫", "动物"} <= set(names["cat"])
    has_animal = {name for name, labels in names.items() if "动物" in labels}
    assert has_animal & {"crocodile", "koala", "lemurs", "macaw", "two-dogs"}, names
    assert any(answer.unknown for answer in answers)


def settings(folder: Path, port: int) -> dict[str, Any]:
    """Of the worker: the embedded model, these label sets, and one of them as the shadow of all images."""
    labels = {
        "labels_dir": folder,
        "labels_poll_s": 0.5,
        "default_labels": "now",
        "shadow": "rules",
        "shadow_share": 1.0,
    }
    loading = {"allow_folders": PHOTOS, "loaders": 1, "loader_spares": 0}
    return {**labels, **loading, "model": "", "max_batch": 8, "http_port": port}


def labels_waiting(port: int) -> float:
    """How many labels of the worker have no vectors yet."""
    return sum(value(port, "shiwu_labels_waiting", lane=lane) or 0.0 for lane in ("interactive", "bulk", "none"))


@pytest.mark.long
def test_set_of_version_2_from_shadow_to_answers(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shadow counts what would change; then the calibrated set answers, after a reload, by its rules."""
    folder, (port,) = tmp_path / "labels", free_ports(1)
    folder.mkdir()
    (folder / "now.yaml").write_text(NOW, encoding="utf-8")
    write_rules(folder)
    with (
        WorkerProcess(redis_url=redis_url, folder=tmp_path, **settings(folder, port)) as worker,
        Client(redis_url) as client,
    ):
        worker.wait_ready()
        wait_until(lambda: labels_waiting(port) == 0, timeout_s=60, what="the vectors of all labels")
        first = ask(client, want=["tags", "vector"], top_k=1)
        assert all(labels_of(answer)[0] in NOW for answer in first)

        monkeypatch.setenv("SHIWU_LABELS_DIR", str(tmp_path / "new"))
        monkeypatch.setenv("SHIWU_MAX_BATCH", "1")
        text = calibrate(tmp_path / "new", first)
        assert "asked for:   60.0%" in text
        for name in ("rules.json", "rules.yaml"):
            os.replace(tmp_path / "new" / name, folder / name)
        wait_until(lambda: '"label_sets_reloaded"' in worker.log_text(), timeout_s=60, what="the calibrated set")

        second = ask(client, labels="rules", threshold="set")
        z = json.loads((folder / "rules.json").read_text(encoding="utf-8"))["z"]
        check_rules(second, z)
        check_names(second)
        [labels] = {answer.labels for answer in second}
        assert labels is not None
        assert (labels.calibrated, labels.head, labels.calibration is None) == (True, "z", False)
        known = wait_until(lambda: client.known_labels(labels.digest), timeout_s=10, what="the record of the set")
        assert known.aliases is not None
        assert known.aliases[known.labels.index("猫")] == ("cat",)

        ask(client, top_k=1)
        assert value(port, "shiwu_shadow_images_total", result="dropped") == 0
    found = json.loads(run("shadow", str(worker.log_path), "--json"))
    assert [each["images"] for each in found] == [len(photos())] * 2
    assert len({each["shadow_digest"] for each in found}) == 2
    assert all(each["same"] < each["images"] for each in found)
