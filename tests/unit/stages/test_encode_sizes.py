"""Batch sizes of the encoder: timed at the start, and learned from batches of jobs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shiwu_worker.stages.encode import compiler, cpu_pool
from shiwu_worker.stages.encode.cpu_pool import Spent
from shiwu_worker.stages.encode.encoder import Encoder
from shiwu_worker.stages.encode.towers import Tower
from tests.support.encoders import make_encoder, make_model, noise, saved

pytestmark = pytest.mark.usefixtures("silent_transformers")


def test_quick_start_times_two_batch_sizes(tmp_path: Path) -> None:
    """The smallest and a larger one that is still quick, each twice; the cost of the others is learned later."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(1, 2, 4, 8), threads=1)
    seen: list[int] = []
    hook = encoder._model.module.vision_model.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(len(named["pixel_values"])), with_kwargs=True
    )
    encoder.warm(choose_largest=True)
    hook.remove()
    assert encoder.timed_sizes == (1, 8)
    assert seen == [1, 1, 8, 8]
    seconds = encoder.size_policy.seconds()
    assert seconds.keys() == {1, 2, 4, 8}
    assert all(took_s > 0 for took_s in seconds.values())


def test_thorough_start_times_all_batch_sizes(tmp_path: Path) -> None:
    """`--tune` starts this way."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(1, 2, 4, 8))
    encoder.warm(choose_largest=True, is_thorough=True)
    assert encoder.timed_sizes == (1, 2, 4, 8)


def costing(encoder: Encoder, costs: Mapping[int, float]) -> None:
    """Set the cost of each pass of a size."""
    encoder._time_pass = lambda size: costs[size]  # type: ignore[method-assign]  # injected times


def test_start_begins_with_the_largest_useful_size(tmp_path: Path) -> None:
    """Larger sizes are tried later. The start begins with the largest batch that the operator set."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(1, 2, 4, 8), threads=1)
    costing(encoder, {1: 0.1, 2: 0.12, 4: 0.238, 8: 0.48})
    encoder.warm(choose_largest=True, is_thorough=True)
    assert (encoder.batch_sizes, encoder.size_policy.largest) == ((1, 2, 4, 8), 2)
    assert encoder.size_policy.slowest_s == pytest.approx(0.12)
    assert [encoder.size_policy.take(waiting) for waiting in range(3)] == [0, 1, 2]
    assert encoder.encode(noise(8)).shape == (8, 8)
    costing(encoder, {1: 0.1, 2: 0.5, 4: 1.2, 8: 3.0})
    encoder.warm(is_thorough=True)
    assert encoder.size_policy.largest == 8


def test_slow_model_is_timed_with_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images would take more than half a second: their cost is estimated, and no size above a second is chosen."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(1, 2, 4, 8), threads=1)
    costing(encoder, {1: 0.4})
    monkeypatch.setattr(encoder, "_choose_threads", lambda _: 0.4)
    encoder.warm(choose_largest=True)
    assert encoder.timed_sizes == (1,)
    assert encoder.size_policy.largest == 2


def spend(encoder: Encoder, count: int, cost_s: float, **more: Any) -> None:
    """Run a batch of jobs for which the model takes `cost_s` CPU seconds, as the score thread does."""
    batch = encoder.launch(noise(count))
    encoder.collect(batch)
    batch.spent = Spent(cost=cost_s, seconds=cost_s, **more)
    encoder.learn(batch)


def test_best_size_is_learned_from_batches_of_jobs(tmp_path: Path) -> None:
    """A wrong start is corrected; the first batch of a size, which also pays for warming up, is ignored."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(1, 2, 4, 8), threads=1)
    costing(encoder, {1: 0.01, 2: 0.1, 4: 0.2, 8: 0.4})
    encoder.warm(choose_largest=True, is_thorough=True)
    encoder._warmed_sizes.clear()
    assert encoder.size_policy.largest == 1
    first: dict[int, float] = {}
    for _ in range(200):
        count = encoder.size_policy.take(8)
        spend(encoder, count, 0.009 + 0.001 * count if count in first else first.setdefault(count, 5.0))
    assert encoder.size_policy.largest == 8


def test_compile_time_is_not_counted_as_pass_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size compiles once, and only its later passes count. Two sizes without a gain end the search."""
    clock, compiled, towers = SimpleNamespace(now_s=0.0), list[int](), list[Tower]()

    def slow_to_compile(eager: Tower) -> Tower:
        towers.append(eager)

        def run(raw: torch.Tensor) -> torch.Tensor:
            size = len(raw)
            clock.now_s += {1: 0.1, 2: 0.12, 4: 0.235, 8: 0.47, 16: 0.94}[size] if size in compiled else 20
            compiled.extend([size] if size not in compiled else [])
            return eager(raw)

        return run

    monkeypatch.setattr(compiler, "why_no_cpp_compiler", lambda: None)
    monkeypatch.setattr(compiler, "compiled_tower", slow_to_compile)
    monkeypatch.setattr(
        cpu_pool, "time", SimpleNamespace(monotonic=lambda: clock.now_s, thread_time=lambda: clock.now_s)
    )
    folder = saved(make_model("clip"), tmp_path)
    encoder = make_encoder(folder, batch_sizes=(1, 2, 4, 8, 16), is_compiled=True, threads=1)
    encoder.warm(choose_largest=True)
    assert encoder.batch_sizes == encoder.timed_sizes == (1, 2, 4, 8)
    assert encoder.size_policy.largest == 2
    # On one thread elapsed time is also its CPU time.
    assert encoder.size_policy.seconds() == pytest.approx({1: 0.1, 2: 0.12, 4: 0.235, 8: 0.47})
    assert compiled == [1, 2, 4, 8]
    assert len(towers) == 1
