"""The rewritten image tower: the same vectors in FP32, and vectors as close to the truth in narrower formats."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from shiwu_worker.config.settings import Settings
from shiwu_worker.config.types import FUSIONS
from shiwu_worker.service.model import load_encoder
from shiwu_worker.stages.decode.image_spec import ImageSpec
from shiwu_worker.stages.encode.capture_rules import why_not_capturable
from shiwu_worker.stages.encode.fusion import FoldedPatches, FusedAttention, fuse
from shiwu_worker.stages.encode.model import EncoderOptions, chosen_fusions
from shiwu_worker.stages.encode.towers import Tower, eager_tower
from tests.support.encoders import SIDE, make_encoder, make_model, noise, saved

KINDS = ["clip", "chinese_clip", "metaclip_2", "altclip", "siglip"]
NORMALISATION: dict[str, Any] = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "rescale": 1 / 255}
IMAGES = torch.from_numpy(noise(8))


def tower_of(model: Any, dtype: torch.dtype = torch.float32) -> Tower:
    """The image tower in this format."""
    return eager_tower(model.to(dtype), dtype=dtype, device=torch.device("cpu"), **NORMALISATION)


def fused(model: Any, *steps: str) -> Any:
    """A copy with these steps, which must all be possible."""
    copied = copy.deepcopy(model)
    assert fuse(copied, steps, **NORMALISATION) == steps
    return copied


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "tolerance"), [(("patches",), 1e-5), (("qkv",), 1e-6), (("patches", "qkv"), 1e-5)])
def test_fused_tower_gives_the_same_vectors(kind: str, steps: tuple[str, ...], tolerance: float) -> None:
    """For every architecture that is supported."""
    model = make_model(kind)
    expected = tower_of(model)(IMAGES)
    rewritten = fused(model, *steps)
    found = tower_of(rewritten)(IMAGES)
    assert float((found - expected).abs().max()) <= tolerance
    assert ("patches" in steps) == any(isinstance(part, FoldedPatches) for part in rewritten.modules())
    assert ("qkv" in steps) == any(isinstance(part, FusedAttention) for part in rewritten.modules())


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folded_patches_are_as_exact_as_before(kind: str, dtype: torch.dtype) -> None:
    """Against FP64, after positions were added; pixels are exact in both formats, and weights not subnormal."""
    model = make_model(kind)
    conv = model.vision_model.embeddings.patch_embedding
    torch.nn.init.normal_(conv.weight, std=0.05)
    gain = torch.tensor([NORMALISATION["rescale"] / std for std in NORMALISATION["std"]]).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(NORMALISATION["mean"], NORMALISATION["std"], strict=True)])
    shift = shift.view(1, 3, 1, 1)
    images = torch.from_numpy(noise(256)).permute(0, 3, 1, 2)

    def embed(each: Any, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = each.vision_model.embeddings(pixels).double()
        return found

    exact = embed(copy.deepcopy(model).double(), images.double() * gain + shift)
    before = embed(copy.deepcopy(model).to(dtype), (images.float() * gain + shift).to(dtype))
    after = embed(fused(model, "patches").to(dtype), images)
    errors = [float((found - exact).square().mean().sqrt()) for found in (before, after)]
    assert errors[1] <= errors[0]


def test_memory_of_replaced_weights_is_freed() -> None:
    """The rewritten model has as many numbers as before."""
    model = make_model("clip")
    rewritten = fused(model, "patches", "qkv")
    sizes = [sum(weight.numel() for weight in each.parameters()) for each in (model, rewritten)]
    assert sizes[0] == sizes[1]
    assert not [name for name, _ in rewritten.vision_model.named_parameters() if "q_proj" in name or "v_proj" in name]
    assert [name for name, _ in rewritten.text_model.named_parameters() if "q_proj" in name]


@torch.inference_mode()
def test_pixels_beyond_the_last_whole_patch_are_left_out() -> None:
    """As by the convolution: SigLIP of 384 pixels has patches of 14."""
    conv = torch.nn.Conv2d(3, 4, 5, 5, bias=True)
    positions = torch.nn.Embedding(9, 4)
    with torch.no_grad():
        positions.weight.zero_()
    raw = IMAGES.permute(0, 3, 1, 2)
    assert SIDE % 5
    expected = conv(raw.float())
    folded = FoldedPatches(
        conv, gain=torch.ones(3).double(), shift=torch.zeros(3).double(), positions=positions, patches=9
    )
    found = folded(raw) + positions.weight.T.view(1, 4, 3, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


def test_other_models_stay_as_they_are() -> None:
    """Another kind of patch embedding, another kind of attention."""
    model = make_model("clip")
    embeddings = model.vision_model.embeddings
    embeddings.patch_embedding = torch.nn.Conv2d(3, 16, 8, 4)
    layer = model.vision_model.encoder.layers[0]
    layer.self_attn = torch.nn.MultiheadAttention(16, 2)
    assert fuse(model, ("patches", "qkv"), **NORMALISATION) == ()
    assert type(embeddings.patch_embedding) is torch.nn.Conv2d


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoder_of_a_fused_model_gives_the_same_answers(tmp_path: Path, kind: str, dtype: str) -> None:
    """Also for images that are encoded in FP32 whatever the format is, and with its start's checks passed."""
    folder = saved(make_model(kind), tmp_path)
    usual = make_encoder(folder, threads=1)
    with capture_logs() as logs:
        encoder = make_encoder(
            folder, dtype=dtype, threads=1, known_images=noise(3), fusions=("patches", "qkv", "attention")
        )
        encoder.warm(is_thorough=True)
    assert [line["steps"] for line in logs if line["event"] == "model_fused"] == [["patches", "qkv"]]
    np.testing.assert_allclose(encoder.known_vectors, usual.encode(noise(3))[:1], atol=1e-6)
    exact = usual.encode(noise(4))
    np.testing.assert_allclose(encoder.encode(noise(4)), exact, atol=1e-5 if dtype == "float32" else 0.05)
    np.testing.assert_allclose(encoder.encode_exact(noise(4)), exact, atol=1e-5)
    assert why_not_capturable(encoder._model.eager_tower(), IMAGES) is None


def test_fusion_that_changes_vectors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is then used as it was loaded."""

    def fuse_wrong(model: Any, steps: Any, **_: Any) -> tuple[str, ...]:
        if "qkv" not in steps:
            return ()
        model.vision_model.encoder.layers[0].mlp.fc1.weight.data *= 1.5
        return ("qkv",)

    monkeypatch.setattr("shiwu_worker.stages.encode.model.fuse", fuse_wrong)
    folder = saved(make_model("clip"), tmp_path)
    with capture_logs() as logs:
        encoder = make_encoder(folder, threads=1, known_images=noise(1), fusions=("qkv",))
    assert [line["steps"] for line in logs if line["event"] == "fusion_refused"] == [["qkv"]]
    np.testing.assert_array_equal(encoder.encode(noise(4)), make_encoder(folder, threads=1).encode(noise(4)))


def test_gpu_takes_all_steps_and_a_cpu_norms() -> None:
    """Unless the operator names some."""
    assert chosen_fusions(None, torch.device("cuda")) == FUSIONS
    assert chosen_fusions(None, torch.device("cpu")) == ("norms",)
    assert chosen_fusions(("qkv",), torch.device("cpu")) == ("qkv",)


@pytest.mark.parametrize(
    ("text", "value"), [("auto", ("auto",)), ("None", ()), ("QKV, patches", ("qkv", "patches")), ("", ("auto",))]
)
def test_setting_names_the_steps(monkeypatch: pytest.MonkeyPatch, text: str, value: tuple[str, ...]) -> None:
    """None of them is a word, because an empty variable means the default."""
    monkeypatch.setenv("SHIWU_FUSE", text)
    assert Settings().fuse == value
    monkeypatch.setenv("SHIWU_FUSE", "auto,qkv")
    with pytest.raises(ValueError, match="expected auto, none, or some of patches, qkv, attention, norms, got auto"):
        Settings()


@pytest.mark.parametrize(("largest", "limit_s"), [(0, 0.025), (256, math.inf)])
def test_worker_passes_its_settings_to_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, limit_s: float
) -> None:
    """The time of a batch is limited unless the operator set a size."""
    made: list[EncoderOptions] = []

    class Recorder:
        def __init__(self, options: EncoderOptions) -> None:
            made.append(options)

        def warm(self, **_: Any) -> None:
            """Do nothing."""

    monkeypatch.setattr("shiwu_worker.stages.encode.encoder.Encoder", Recorder)
    folder = saved(make_model("clip"), tmp_path)
    spec = ImageSpec(SIDE, SIDE, "squash", None, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for steps, passed in ((("auto",), None), (("qkv",), ("qkv",)), ((), ())):
        settings = Settings(model=str(folder), device="cuda", fuse=steps, max_batch=largest)
        load_encoder(settings, folder, spec)
        assert made[-1].fusions == passed
        assert made[-1].max_gpu_batch_s == limit_s
        assert made[-1].batch_sizes[-1] == (largest or 512)
