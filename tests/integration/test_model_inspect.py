"""`shiwu-worker model inspect`: what it says of each kind of model, and its exit code."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from shiwu_worker.__main__ import main
from shiwu_worker.checkpoints.model_files import model_revision
from shiwu_worker.commands import reference_script
from shiwu_worker.commands.model_inspect import family
from shiwu_worker.errors import ExitCode
from tests.support import encoders
from tests.support.adapters import adapted
from tests.support.checkpoints import quiet_transformers, split_weights, write_2022, write_safetensors
from tests.support.hub_server import HubServer
from tests.support.processes import clean_environment
from tests.support.siglip2 import write_siglip2

WORKER = Path(__file__).resolve().parents[2] / "worker" / "shiwu_worker"
PHOTO_ZH = WORKER / "data" / "photo_zh"
ID = "OFA-Sys/chinese-clip-tiny"
# As in tests/unit/stages/test_checkpoint.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """FP32 on one thread, and a label set that the tiny tokenizers read."""
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "tiny.yaml").write_text("name: tiny\nlabels: [猫, 狗]\n", encoding="utf-8")
    values = {"DEVICE": "cpu", "DTYPE": "float32", "TORCH_THREADS": "1", "LABELS_DIR": str(folder), "MAX_BATCH": "2"}
    for name, value in values.items():
        monkeypatch.setenv(f"SHIWU_{name}", value)
    with quiet_transformers():
        yield


def inspect(*args: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, ["model", "inspect", *args], catch_exceptions=False)


def inspected(*args: str) -> dict[str, Any]:
    """What it says of a model that the worker can use."""
    result = inspect(*args, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["usable"] is True
    assert found["reason"] is None
    assert found["load_s"] > 0
    return found


def test_photo_model_answers_as_the_reference_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample photograph shows a cat; on the exact path in FP32 both answers are the same."""
    monkeypatch.setenv("SHIWU_EXACT_DECODE", "1")
    found = inspected(str(PHOTO_ZH), "--labels", "everyday-zh")
    assert found["warnings"] == []
    assert found["reference"]["labels"][0] == found["worker"]["labels"][0] == "猫"
    assert found["same_first"] is True
    assert found["largest_difference"] <= 1e-3
    assert found["family"] == "dual encoder of efficientnet and bert"
    assert found["revision"] == model_revision(PHOTO_ZH)
    assert found["files"]["model.safetensors"] == (PHOTO_ZH / "model.safetensors").stat().st_size
    assert found["image_tower"]["bytes"] == 4 * found["image_tower"]["parameters"] > 4 * 3e6
    assert (found["vector_width"], found["text_tokens"], found["label_count"]) == (320, 32, 256)
    spec = found["preprocessing"]
    assert (spec["width"], spec["resize"], spec["shortest_edge"], spec["filter"]) == (224, "crop", 224, "bicubic")


def test_output_without_a_terminal_is_plain_lines() -> None:
    """Without an argument it is the model of the settings: here the embedded one."""
    result = inspect("--labels", "six-zh")
    assert result.exit_code == 0, result.output
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert lines["usable"] == "yes"
    assert lines["dtype"] == "float32"
    assert lines["labels"] == "six-zh: 6, all readable and apart"
    assert lines["comparison"].startswith("the same first label, scores differ by 0.0")
    assert "MB in this dtype" in lines["image tower"]


def test_output_on_a_terminal_is_a_table(tmp_path: Path) -> None:
    """Also for a model that cannot be used."""
    leader, follower = pty.openpty()
    with open(leader, "rb", buffering=0) as screen:
        done = subprocess.run(
            [sys.executable, "-m", "shiwu_worker", "model", "inspect", str(tmp_path)],
            env=clean_environment({"TERM": "dumb", "COLUMNS": "100"}),
            stdout=follower,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        shown = screen.read(10_000).decode(errors="replace")
        os.close(follower)
    assert done.returncode == ExitCode.MODEL
    assert "│ usable │ no: " in shown


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("clip", "CLIP"),
        ("siglip", "SigLIP"),
        ("altclip", "AltCLIP"),
        ("metaclip_2", "MetaCLIP 2"),
        ("2022", "Chinese-CLIP"),
        ("siglip2", "SigLIP 2"),
    ],
)
def test_each_family_is_named_and_compared(tmp_path: Path, kind: str, expected: str) -> None:
    """Tiny models with random weights; their answers are those of transformers."""
    folder = tmp_path / kind
    side = {"shortest_edge": encoders.SIDE}
    if kind == "2022":
        write_2022(folder)
    elif kind == "siglip2":
        write_siglip2(folder)
    else:
        encoders.saved(encoders.make_model(kind), folder)
        crop = CLIPImageProcessorPil(size=side, crop_size=encoders.SIDE)
        square = SiglipImageProcessorPil(size={"height": encoders.SIDE, "width": encoders.SIDE})
        (square if kind == "siglip" else crop).save_pretrained(folder)
    found = inspected(str(folder), "--labels", "tiny")
    assert found["family"] == expected
    assert found["format"] == ("bin" if kind == "2022" else "safetensors")
    assert found["warnings"] == []
    assert found["same_first"] is True
    assert found["largest_difference"] < 0.01
    assert found["text_tokens"] == (24 if kind == "2022" else encoders.PLACES)


def test_sigmoid_label_set_is_compared_by_sigmoid(tmp_path: Path) -> None:
    """Where the model has a bias; the scores of all labels then do not add up to 1."""
    (tmp_path / "labels" / "tiny.yaml").write_text("name: tiny\nhead: sigmoid\nlabels: [猫, 狗]\n", encoding="utf-8")
    folder = encoders.saved(encoders.make_model("siglip"), tmp_path / "m")
    SiglipImageProcessorPil(size={"height": encoders.SIDE, "width": encoders.SIDE}).save_pretrained(folder)
    found = inspected(str(folder), "--labels", "tiny")
    assert abs(sum(found["reference"]["scores"]) - 1) > 0.05
    assert found["largest_difference"] < 0.01


def test_family_of_an_unknown_type_is_the_type() -> None:
    """Families that the table does not name may run too."""
    assert family({"model_type": "metaclip_2"}) == "MetaCLIP 2"
    assert family({"model_type": "new"}) == "new"


def test_weights_in_parts_and_adapters_are_named(tmp_path: Path) -> None:
    """The format says what is loaded."""
    folder = split_weights(write_safetensors(tmp_path / "parts"))
    assert inspected(str(folder), "--labels", "tiny")["format"] == "safetensors in 2 parts"
    base = write_2022(tmp_path / "base")
    adapted(base, tmp_path / "adapter", target_modules=["value", "v_proj"])
    found = inspected(str(tmp_path / "adapter"), "--labels", "tiny")
    assert found["format"] == f"adapter (safetensors) on {base} (bin)"
    assert found["largest_difference"] < 0.01


def test_broken_folder_ends_with_65_and_the_reason(tmp_path: Path) -> None:
    """What was known before the error is printed."""
    folder = write_2022(tmp_path / "m")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del weights["visual_projection.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    result = inspect(str(folder), "--labels", "tiny")
    assert result.exit_code == ExitCode.MODEL
    assert "family: Chinese-CLIP" in result.stdout
    assert "usable: no: " in result.stdout
    assert "MODEL: " in result.stderr
    assert "visual_projection.weight" in result.stderr
    (folder / "config.json").unlink()
    found = inspect(str(folder), "--json")
    assert found.exit_code == ExitCode.MODEL
    said = json.loads(found.stdout)
    assert said["usable"] is False
    assert "config.json" in said["reason"]
    assert said["family"] is None


def test_labels_that_the_model_cannot_read_end_with_65(tmp_path: Path) -> None:
    """As at the start of a worker."""
    (tmp_path / "labels" / "other.yaml").write_text("name: other\nlabels: [龘, 靐]\n", encoding="utf-8")
    result = inspect(str(write_2022(tmp_path / "m")), "--labels", "other")
    assert result.exit_code == ExitCode.MODEL
    assert "cannot read" in result.stderr
    assert "all readable" not in result.stdout


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    """An unknown label set, a file that is no image, and options of the worker before the command."""
    folder = str(write_2022(tmp_path / "m"))
    unknown = inspect(folder, "--labels", "none")
    assert unknown.exit_code == ExitCode.CONFIG
    assert "--labels: expected one of " in unknown.stderr
    text = tmp_path / "text.jpg"
    text.write_bytes(b"text")
    assert inspect(folder, "--labels", "tiny", "--image", str(text)).exit_code == ExitCode.CONFIG
    result = CliRunner().invoke(main, ["--gpus", "cpu", "model", "inspect", folder])
    assert result.exit_code == 2
    assert "no options before the command model" in result.stderr


def test_image_of_ones_own_is_answered(tmp_path: Path) -> None:
    """Its name stands in the output."""
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    found = inspected(str(write_2022(tmp_path / "m")), "--labels", "tiny", "--image", str(tmp_path / "red.png"))
    assert found["image"] == "red.png"


def test_failing_reference_script_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker does not need it."""

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such processor")

    monkeypatch.setattr(reference_script.AutoProcessor, "from_pretrained", fail)
    found = inspected(str(write_2022(tmp_path / "m")), "--labels", "tiny")
    assert found["warnings"] == ["the reference script failed (ValueError: no such processor)"]
    assert found["reference"] is None
    assert found["image_tower"]["parameters"] > 0


def test_hub_id_is_downloaded_and_its_commit_shown(tmp_path: Path) -> None:
    """With a revision, through the loopback hub."""
    hub = HubServer().start()
    try:
        commit = hub.add(ID, write_2022(tmp_path / "published"), ref="v1")
        environ = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environ |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "SHIWU_DEVICE": "cpu",
            "SHIWU_LABELS_DIR": str(tmp_path / "labels"),
        }
        done = subprocess.run(
            [sys.executable, "-m", "shiwu_worker", "model", "inspect", f"{ID}@v1", "--labels", "tiny", "--json"],
            env=clean_environment(environ),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        hub.stop()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["model"], found["revision"]) == (ID, commit)


HELP = """
import sys
from click.testing import CliRunner
from shiwu_worker.__main__ import main
for args in (["--help"], ["model", "--help"], ["model", "inspect", "--help"]):
    assert CliRunner().invoke(main, args).exit_code == 0
print(*({"torch", "PIL", "numpy", "rich", "transformers"} & set(sys.modules)))
"""


def test_help_imports_no_large_library() -> None:
    """It answers immediately."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
