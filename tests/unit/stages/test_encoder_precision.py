"""Every batch size and number format of the encoder against FP32, and what keeps a GPU as exact as promised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from structlog.testing import capture_logs

from shiwu_worker.checkpoints.model_files import model_folder
from shiwu_worker.config.types import FUSIONS
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.stages.encode.capture_rules import why_not_capturable
from shiwu_worker.stages.encode.device import keep_full_precision
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from shiwu_worker.stages.encode.fusion import fuse
from shiwu_worker.stages.encode.size_check import SizeCheck
from shiwu_worker.stages.encode.towers import eager_tower
from tests.support.encoders import make_encoder, make_model, noise, saved


def wrong_at(encoder: Encoder, *sizes: int) -> None:
    """Let the tower give wrong vectors in the last row of batches of these sizes."""
    right = encoder._staging._tower

    def tower(raw: torch.Tensor) -> torch.Tensor:
        vectors = right(raw)
        if len(raw) in sizes:
            vectors[-1] = -vectors[-1]
        return vectors

    encoder._staging._tower = tower


@pytest.mark.parametrize("is_thorough", [True, False])
def test_size_with_a_wrong_row_is_not_used(tmp_path: Path, is_thorough: bool) -> None:
    """A library has other kernels for other sizes, so each size that is timed is compared with FP32."""
    folder = saved(make_model("clip"), tmp_path)
    encoder = make_encoder(folder, batch_sizes=(1, 2, 4), known_images=noise(3), threads=1)
    wrong_at(encoder, 4)
    with capture_logs() as logs:
        encoder.warm(choose_largest=True, is_thorough=is_thorough)
    assert encoder.batch_sizes == (1, 2)
    assert [line["batch_size"] for line in logs if line["event"] == "batch_size_gives_wrong_vectors"] == [4]
    with pytest.raises(ValueError, match="1 to 2"):
        encoder.encode(noise(3))


def test_size_that_is_wrong_once_is_not_used(tmp_path: Path) -> None:
    """A later run of the start that is right is no reason to trust it: the fault may come and go."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), known_images=noise(3), threads=1)
    right, runs = encoder._staging._tower, list[int]()

    def tower(raw: torch.Tensor) -> torch.Tensor:
        runs.append(len(raw))
        return right(raw) * (-1 if len(raw) == 4 and runs.count(4) == 1 else 1)

    encoder._staging._tower = tower
    encoder.warm(choose_largest=True, is_thorough=True)
    assert runs.count(4) > 1
    assert encoder.batch_sizes == (1, 2)


def test_vectors_of_another_batch_are_noticed() -> None:
    """Batches that are under way together have other images in the same row, and all of them are compared."""
    vectors: NDArray[np.float32] = np.eye(3, dtype=np.float32)
    check = SizeCheck(noise(3), vectors, shape=(16, 16, 3))
    right = [vectors[check.rows(4, number)] for number in range(3)]
    assert check.wrong(right) is None
    for number in range(3):
        overwritten = [*right]
        overwritten[number] = right[(number + 1) % 3]
        assert "4 of 4, the first is row 0" in str(check.wrong(overwritten))


def test_wrong_smallest_size_ends_the_worker(tmp_path: Path) -> None:
    """No batch of this model would be right."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), known_images=noise(1), threads=1)
    wrong_at(encoder, 1)
    with pytest.raises(FatalError, match="batches of 1 give wrong vectors") as caught:
        encoder.warm(is_thorough=True)
    assert caught.value.exit_code is ExitCode.CANARY


def test_text_tower_stays_in_full_precision(tmp_path: Path) -> None:
    """Labels are encoded once, so their speed matters little, and no label can overflow."""
    folder = saved(make_model("clip"), tmp_path)
    narrow, full = make_encoder(folder, dtype="bfloat16"), make_encoder(folder)
    np.testing.assert_array_equal(narrow.encode_texts(["猫", "dog"]), full.encode_texts(["猫", "dog"]))
    weights = {name: weight.dtype for name, weight in narrow._model.module.named_parameters()}
    assert {dtype for name, dtype in weights.items() if name.startswith(("text", "logit"))} == {torch.float32}
    assert {dtype for name, dtype in weights.items() if name.startswith("vis")} == {torch.bfloat16}


def test_full_precision_is_kept_on_a_gpu() -> None:
    """The FP32 reference is not rounded to TF32, and no partial sum to FP16."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {flag: getattr(matmul, flag) for flag in flags}, cudnn.allow_tf32
    try:
        keep_full_precision()
        assert not any(getattr(matmul, flag) for flag in flags)
        assert not cudnn.allow_tf32
    finally:
        for flag, value in before[0].items():
            setattr(matmul, flag, value)
        cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("fusions", [(), FUSIONS], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", ["clip", "chinese_clip", "metaclip_2", "altclip", "siglip"])
def test_supported_architectures_can_be_captured(kind: str, fusions: Sequence[str]) -> None:
    """None of their passes reads a number back to the host or leaves the device, which a CUDA graph cannot record.

    They run on torch's device without memory, which shows every tensor that is made on the host.
    """
    model, meta, normal = make_model(kind).requires_grad_(False), torch.device("meta"), (0.5, 0.5, 0.5)
    fuse(model, fusions, mean=normal, std=normal, rescale=1 / 255)
    tower = eager_tower(model.to(meta).half(), dtype=torch.float16, mean=normal, std=normal, device=meta)
    assert why_not_capturable(tower, torch.from_numpy(noise(2)).to(meta)) is None


MASK, WEIGHT = torch.tensor([True, False]), torch.ones(2)
UNCAPTURABLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mask": lambda raw: raw[MASK.to(raw.device)],
    "written mask": lambda raw: raw.index_put((MASK.to(raw.device),), raw[:1]),
    "where": lambda raw: torch.where(raw > 0)[0],
    "argwhere": torch.argwhere,
    "bincount": lambda raw: torch.bincount(raw.flatten()),
    "item": lambda raw: raw * float(raw.max()),
}
ACROSS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    # As `torch.tensor` ends, which for the device without memory leaves this out.
    "numbers of the host": torch.ops.aten.lift_fresh,
    "tensor of the host": lambda raw: raw * WEIGHT.to(raw.device)[:, None, None, None],
    "made on the host": lambda raw: raw * torch.arange(2).to(raw.device)[:, None, None, None],
}


@pytest.mark.parametrize("name", UNCAPTURABLE)
def test_pass_that_waits_for_the_device_is_recognised(name: str) -> None:
    """The host needs a number before it can go on."""
    assert "waits for the device" in str(why_not_capturable(UNCAPTURABLE[name], torch.from_numpy(noise(2))))


@pytest.mark.parametrize("name", ACROSS)
def test_pass_that_copies_between_devices_is_recognised(name: str) -> None:
    """Memory of the host that is not pinned is copied at once, which a graph cannot record."""
    assert why_not_capturable(ACROSS[name], torch.from_numpy(noise(2)).to("meta")) is not None


def test_single_numbers_of_the_host_can_be_captured() -> None:
    """They are arguments of kernels."""
    number = torch.tensor(2.0)
    assert why_not_capturable(lambda raw: raw * number + 1, torch.from_numpy(noise(2)).to("meta")) is None


def test_embedded_model_can_be_captured() -> None:
    """Neither does the model of the package."""
    options = EncoderOptions(
        folder=model_folder(None), model_id="m", revision="r", device="cpu", mean=(0.5,) * 3, std=(0.5,) * 3, threads=1
    )
    model = Encoder(options)._model
    assert why_not_capturable(model.eager_tower(), model.blank_images(2)) is None
