"""The image tower of a GPU: its attention kernel by measurement, compiled where that works, otherwise eager graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from shiwu_worker.stages.encode import gpu_tower as parts
from shiwu_worker.stages.encode.attention_kernel import KERNELS, prefer, with_fastest_attention
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from shiwu_worker.stages.encode.gpu_tower import gpu_tower
from tests.support.encoders import make_encoder, make_model, noise, saved
from tests.support.fake_accelerator import FakeAccelerator, FakeGraph, Work

SHAPE = (2, 2, 3)
WIDTH = 12


def tower(raw: torch.Tensor) -> torch.Tensor:
    """The pixels of each image themselves, as its vector."""
    return raw.flatten(1).float()


def first_kernel(raw: torch.Tensor) -> torch.Tensor:
    """A tower whose vector is the attention kernel that torch prefers in it."""
    return torch.tensor([torch._C._get_sdp_priority_order()[0]])


def timer(times_ms: dict[str, float | Exception]) -> Callable[[Any], float]:
    """Tells what a pass takes by the kernel that is preferred in it."""
    names = {int(backend): name for name, backend in KERNELS.items()}

    def time_s(timed: Any) -> float:
        found = "torch" if timed is first_kernel else names[int(timed(torch.empty(0)))]
        time_ms = times_ms[found]
        if isinstance(time_ms, Exception):
            raise time_ms
        return time_ms / 1000

    return time_s


@pytest.mark.parametrize(
    ("times_ms", "chosen"),
    [
        ({"torch": 6.4, "flash": 6.4, "cudnn": 5.9, "efficient": 9.0}, "cudnn"),
        ({"torch": 6.4, "flash": 6.38, "cudnn": 6.35, "efficient": 6.3}, "torch"),
        ({"torch": 9.0, "flash": RuntimeError("no flash"), "cudnn": RuntimeError("no"), "efficient": 7.0}, "efficient"),
        ({"torch": 9.0, **dict.fromkeys(KERNELS, RuntimeError("No available kernel."))}, "torch"),
    ],
)
def test_fastest_attention_kernel_is_used(times_ms: dict[str, float | Exception], chosen: str) -> None:
    """If it saves more than chance; kernels that cannot do the work are left out."""
    before = torch._C._get_sdp_priority_order()
    with capture_logs() as logs:
        found = with_fastest_attention(first_kernel, timer(times_ms))
    [line] = [line for line in logs if line["event"] == "attention_kernel_chosen"]
    assert line["kernel"] == chosen
    assert line["pass_ms"] == {name: time for name, time in times_ms.items() if not isinstance(time, Exception)}
    assert (found is first_kernel) == (chosen == "torch")
    if chosen != "torch":
        assert int(found(torch.empty(0))) == int(KERNELS[chosen])
    assert torch._C._get_sdp_priority_order() == before


def test_lost_device_is_no_reason_to_choose_another_kernel() -> None:
    """Nothing can be measured on it any more."""
    with pytest.raises(torch.AcceleratorError):
        with_fastest_attention(first_kernel, timer({"torch": 1.0, "flash": torch.AcceleratorError("CUDA error")}))


def test_attention_without_memory_is_left_to_torch() -> None:
    """The sizes that fit are found later."""
    assert with_fastest_attention(first_kernel, timer({"torch": torch.OutOfMemoryError("full")})) is first_kernel


@torch.inference_mode()
def test_preferred_kernel_leaves_the_others_enabled() -> None:
    """A mask, or FP32, is no work for flash attention; the tower must run all the same."""
    query = torch.randn(1, 2, 4, 8)
    mask = torch.zeros(4, 4)
    attend = torch.nn.functional.scaled_dot_product_attention
    run = prefer(lambda raw: attend(raw, raw, raw, attn_mask=mask), "cudnn")
    torch.testing.assert_close(run(query), attend(query, query, query, attn_mask=mask))


def options(**changes: Any) -> EncoderOptions:
    """Options of a GPU."""
    usual: dict[str, Any] = {"folder": Path(), "model_id": "m", "revision": "r", "mean": (0.5,), "std": (0.5,)}
    return EncoderOptions(**{**usual, "batch_sizes": (1, 2, 4), "fusions": (), **changes})


class CompilingDevice(FakeAccelerator):
    """A device whose towers are compiled when the host calls them, before their work is queued."""

    def run(self, work: Work, raw: torch.Tensor) -> torch.Tensor:
        """Queue a pass."""
        work(raw)
        return super().run(work, raw)


def build(**changes: Any) -> Any:
    """The graphs, or the tower without them, with the log."""
    device = CompilingDevice(seed=0, width=WIDTH)
    with capture_logs() as logs:
        found, graphs, sizes = gpu_tower(tower, options(**changes), shape=SHAPE, accelerator=device)
    assert sizes == (1, 2, 4)
    return found, graphs, [line for line in logs if line["event"] == "model_not_compiled"]


def test_compiled_tower_is_captured_if_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only if the options ask for it."""
    monkeypatch.setattr(parts, "why_no_compiler", lambda: None)
    monkeypatch.setattr(parts, "compiled_for_gpu", lambda eager: lambda raw: eager(raw) + 0)
    found, graphs, lines = build(is_compiled=True)
    assert found is graphs
    assert (graphs.is_compiled, graphs.captured_sizes, lines) == (True, (1, 2, 4), [])
    assert not build()[1].is_compiled


def broken(raw: torch.Tensor) -> torch.Tensor:
    """A compiled tower that cannot be compiled."""
    raise torch._dynamo.exc.BackendCompilerFailed(tower, ValueError("ptxas"), None)  # type: ignore[no-untyped-call]  # torch's own


@pytest.mark.parametrize(
    ("reason", "compiled", "expected"),
    [("expected a C compiler", tower, "expected a C compiler"), (None, broken, "BackendCompilerFailed")],
)
def test_model_that_cannot_be_compiled_runs_as_eager_graphs(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, compiled: Any, expected: str
) -> None:
    """With one log line that says why."""
    monkeypatch.setattr(parts, "why_no_compiler", lambda: reason)
    monkeypatch.setattr(parts, "compiled_for_gpu", lambda _: compiled)
    _, graphs, [line] = build(is_compiled=True)
    assert (graphs.is_compiled, graphs.captured_sizes) == (False, (1, 2, 4))
    assert line["reason"].startswith(expected)


def test_compiling_without_graphs_is_refused_with_a_log_line() -> None:
    """Otherwise the setting would have no effect without a word."""
    _, graphs, [line] = build(is_compiled=True, has_graphs=False)
    assert graphs is None
    assert "SHIWU_CUDA_GRAPHS" in line["reason"]


def gpu_encoder(folder: Path, monkeypatch: pytest.MonkeyPatch, compiled: Any) -> Encoder:
    """An encoder over the fake device, whose model was asked to be compiled."""
    monkeypatch.setattr(
        "shiwu_worker.stages.encode.encoder.open_accelerator", lambda _: FakeAccelerator(seed=0, width=8)
    )
    monkeypatch.setattr(parts, "why_no_compiler", lambda: None)
    monkeypatch.setattr(parts, "compiled_for_gpu", compiled)
    return make_encoder(folder, is_compiled=True, threads=1, known_images=noise(1), fusions=())


def wrong_at_two(eager: Any) -> Any:
    """A compiler that makes a mistake for one size."""
    return lambda raw: eager(raw) * (1 if len(raw) != 2 else -1)


def test_wrong_compiled_model_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is wrong for one size is not trusted for the others; all sizes are checked again."""
    folder = saved(make_model("clip"), tmp_path)
    encoder = gpu_encoder(folder, monkeypatch, wrong_at_two)
    with capture_logs() as logs:
        encoder.warm(is_thorough=True)
    assert [line["batch_sizes"] for line in logs if line["event"] == "compiled_model_refused"] == [[2]]
    assert encoder._graphs is not None
    assert not encoder._graphs.is_compiled
    assert encoder.batch_sizes == encoder.timed_sizes == (1, 2, 4)
    images = noise(2)
    np.testing.assert_allclose(encoder.encode(images), make_encoder(folder, threads=1).encode(images), atol=1e-6)


def test_right_compiled_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vectors were compared with FP32 at every size."""
    encoder = gpu_encoder(saved(make_model("clip"), tmp_path), monkeypatch, lambda eager: lambda raw: eager(raw) * 1)
    encoder.warm(is_thorough=True)
    assert encoder._graphs is not None
    assert encoder._graphs.is_compiled


class WrongGraph(FakeAccelerator):
    """A device whose graphs of one size are wrong."""

    def capture(self, work: Work, raw: torch.Tensor, *, pool: Any) -> FakeGraph:
        """Capture something else for this size."""
        return super().capture(work if len(raw) != 2 else lambda each: -work(each), raw, pool=pool)


def test_size_with_a_wrong_graph_runs_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operators without a graph are right, so the size stays in use; the others keep their graphs."""
    monkeypatch.setattr("shiwu_worker.stages.encode.encoder.open_accelerator", lambda _: WrongGraph(seed=0, width=8))
    encoder = make_encoder(saved(make_model("clip"), tmp_path), threads=1, known_images=noise(1))
    with capture_logs() as logs:
        encoder.warm(is_thorough=True)
    assert [line["batch_size"] for line in logs if line["event"] == "graph_gives_wrong_vectors"] == [2]
    assert encoder._graphs is not None
    assert encoder._graphs.captured_sizes == (1, 4)
    assert encoder.batch_sizes == encoder.timed_sizes == (1, 2, 4)
    images = noise(2)
    np.testing.assert_allclose(encoder.encode(images), encoder.encode_exact(images), atol=1e-6)
