"""Threads of the encoder on a CPU: how many, and what runs on the exclusive one."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shiwu_worker.stages.encode import compiler, cpu_pool, model
from shiwu_worker.stages.encode import encoder as encoder_module
from shiwu_worker.stages.encode.cpu_pool import CpuInferencePool
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from shiwu_worker.stages.encode.towers import eager_tower
from shiwu_worker.stages.encode.tuning import thread_policy as model_threads
from shiwu_worker.stages.encode.tuning.thread_policy import POLL_INTERVAL_S
from tests.support.encoders import make_encoder, make_model, noise, saved
from tests.support.pictogram import PICTOGRAM_ZH


def be_fast_below(core_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model count as fast that takes fewer core-seconds for an image, whatever the number of cores."""
    monkeypatch.setattr(model_threads, "fast_below_s", lambda _cores: core_s)


pytestmark = pytest.mark.usefixtures("silent_transformers")


def test_threads_are_set_only_when_given(tmp_path: Path) -> None:
    """None keeps torch's own choice."""
    folder, before = saved(make_model("clip"), tmp_path), torch.get_num_threads()
    make_encoder(folder)
    assert torch.get_num_threads() == before
    try:
        Encoder(
            EncoderOptions(
                folder=folder,
                model_id="m",
                revision="r",
                device="cpu",
                mean=(0.5,) * 3,
                std=(0.5,) * 3,
                threads=1,
            )
        )
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_threads_follow_the_usable_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator can take a core away from a running container; images keep their vectors."""
    before = torch.get_num_threads()
    cores = [2]
    for part in (encoder_module, cpu_pool):
        monkeypatch.setattr(part, "usable_cores", lambda: cores[0])
    be_fast_below(0.0, monkeypatch)
    try:
        torch.set_num_threads(2)
        encoder = make_encoder(saved(make_model("clip"), tmp_path))
        encoder.warm()
        assert encoder._thread_policy is not None
        assert (encoder.threads, encoder._staging.split_count(4)) == (2, 2)
        expected = encoder.encode(noise(4))
        for count, parts in ((1, 1), (2, 2)):
            cores[0] = count
            encoder._thread_policy._updated_s -= POLL_INTERVAL_S
            np.testing.assert_allclose(encoder.encode(noise(4)), expected, atol=1e-5)
            assert (encoder.threads, encoder._staging.split_count(4)) == (count, parts)
    finally:
        torch.set_num_threads(before)


def test_fast_model_leaves_a_core_to_the_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU time of one image decides, not elapsed time; the number that was asked for is used."""
    before = torch.get_num_threads()
    for part in (encoder_module, cpu_pool):
        monkeypatch.setattr(part, "usable_cores", lambda: 2)
    folder = saved(make_model("clip"), tmp_path)

    class SlowPool(CpuInferencePool):
        """A pool whose every batch is delayed."""

        def submit(self, *args: Any) -> Any:
            time.sleep(0.1)  # the delay itself
            return super().submit(*args)

    monkeypatch.setattr(encoder_module, "CpuInferencePool", SlowPool)
    try:
        for asked, border_s, threads in ((None, 0.04, 1), (None, 0.0, 2), (2, 0.04, 2)):
            torch.set_num_threads(2)
            be_fast_below(border_s, monkeypatch)
            encoder = make_encoder(folder, batch_sizes=(1, 2), threads=asked)
            encoder.warm()
            assert encoder.threads == threads
            assert encoder._staging.split_count(2) == (2 if border_s == 0 else 1)
    finally:
        torch.set_num_threads(before)


def test_split_batch_gives_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch of one size, an image gets the same vector at every position. The model is not fast."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole, split = (make_encoder(PICTOGRAM_ZH, batch_sizes=(1, 2, 4)) for _ in range(2))
        be_fast_below(math.inf, monkeypatch)
        whole.warm()
        be_fast_below(0.0, monkeypatch)
        split.warm()
        assert torch.get_num_threads() == 2, "expected a model that is not fast to keep all cores"
        pools = [encoder._cpu_pool for encoder in (whole, split)]
        assert [pool is not None and pool.split_count(4) for pool in pools] == [1, 2]
        pixels = noise(4, 64)
        vectors = split.encode(pixels)
        np.testing.assert_allclose(vectors, whole.encode(pixels), atol=1e-5)
        np.testing.assert_array_equal(vectors[[2, 3, 0, 1]], split.encode(pixels[[2, 3, 0, 1]]))
        np.testing.assert_array_equal(vectors[::-1], split.encode(pixels[::-1].copy()))
    finally:
        torch.set_num_threads(before)


def test_threads_do_not_exceed_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container sees all cores of its node; a number that was asked for is used as it is."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for part in (encoder_module, cpu_pool):
            monkeypatch.setattr(part, "usable_cores", lambda: 1)
        make_encoder(PICTOGRAM_ZH)
        assert torch.get_num_threads() == 1
        make_encoder(PICTOGRAM_ZH, threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_work_on_all_cores_runs_on_the_exclusive_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, buffers, texts, whole batches and FP32; a second OpenMP team would slow all of them."""
    before = torch.get_num_threads()
    # On a busy machine an image of the tiny model may take so much CPU that its batches would be split.
    be_fast_below(math.inf, monkeypatch)
    seen: dict[str, set[str]] = {}

    def noted(what: str, work: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            seen.setdefault(what, set()).add(threading.current_thread().name)
            return work(*args, **named)

        return run

    monkeypatch.setattr(model, "load_model", noted("weights", model.load_model))
    monkeypatch.setattr(encoder_module, "StagingRing", noted("buffers", encoder_module.StagingRing))
    monkeypatch.setattr(model, "eager_tower", lambda *args, **named: noted("tower", eager_tower(*args, **named)))
    try:
        encoder = make_encoder(saved(make_model("clip"), tmp_path), dtype="bfloat16", threads=2)
        encoder.warm()
        monkeypatch.setattr(encoder._texts, "encode", noted("texts", encoder._texts.encode))
        encoder.encode_texts(["a"])
        encoder.encode_exact(noise(1))
        encoder.encode(noise(1))
    finally:
        torch.set_num_threads(before)
    assert seen == {what: {"encode-exclusive"} for what in ("weights", "buffers", "tower", "texts")}


@pytest.mark.parametrize(("is_compiled", "parts"), [(False, 2), (True, 1)])
def test_compiled_tower_is_not_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_compiled: bool, parts: int
) -> None:
    """A compiled tower has a fixed number of threads."""
    before = torch.get_num_threads()
    be_fast_below(0.0, monkeypatch)
    monkeypatch.setattr(compiler, "why_no_cpp_compiler", lambda: None)
    monkeypatch.setattr(compiler, "compiled_tower", lambda eager: eager)
    try:
        encoder = make_encoder(saved(make_model("clip"), tmp_path), threads=2, is_compiled=is_compiled)
        encoder.warm()
        assert encoder._cpu_pool is not None
        assert encoder._cpu_pool.split_count(4) == parts
    finally:
        torch.set_num_threads(before)
