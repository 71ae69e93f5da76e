"""A model that is compiled: where that cannot be done the worker answers all the same, and says why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch._dynamo.backends.debugging import boxed_nop

from shiwu_worker.stages.encode import compiler
from shiwu_worker.stages.encode.compiler import why_no_compiler, why_no_cpp_compiler
from shiwu_worker.stages.encode.encoder import Encoder
from shiwu_worker.stages.encode.towers import MAX_COMPILED_SIZES, Tower, compiled_tower
from tests.support.encoders import make_encoder, make_model, noise, saved

COMPILED_AND_PRINTED = """
import sys
from pathlib import Path
from tests.support.encoders import make_encoder, noise
encoder = make_encoder(Path(sys.argv[1]), batch_sizes=(2,), is_compiled=True, threads=1)
encoder.warm(is_thorough=True)
print(encoder._is_compiled)
print(encoder.encode(noise(2)).tolist())
"""


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or Triton, which needs it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "expected a C compiler (gcc, cc, clang)" in str(why_no_compiler())
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setattr(compiler, "find_spec", lambda _: None)
    assert "triton" in str(why_no_compiler())
    monkeypatch.setattr(compiler, "find_spec", lambda _: "found")
    assert why_no_compiler() is None


def test_missing_cpp_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one that inductor would call."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "expected a C++ compiler (g++)" in str(why_no_cpp_compiler())
    (tmp_path / "clang++-19").touch(mode=0o755)
    monkeypatch.setenv("CXX", "clang++-19")
    assert why_no_cpp_compiler() is None


def warmed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, compiled: Callable[[Tower], Tower]
) -> tuple[Encoder, list[str]]:
    """An encoder for a CPU whose compiler makes this of a tower, after its start, and its log lines about that."""
    monkeypatch.setattr(compiler, "why_no_cpp_compiler", lambda: None)
    monkeypatch.setattr(compiler, "compiled_tower", compiled)
    encoder = make_encoder(folder, is_compiled=True, threads=1, known_images=noise(1))
    with capture_logs() as logs:
        encoder.warm()
    return encoder, [line["event"] + ": " + line["reason"] for line in logs if "compiled" in line["event"]]


def broken(eager: Tower) -> Tower:
    """A tower whose larger sizes cannot be compiled."""

    def run(raw: torch.Tensor) -> torch.Tensor:
        if len(raw) > 1:
            raise torch._dynamo.exc.BackendCompilerFailed(eager, OSError("no space left"), None)
        return eager(raw)

    return run


def wrong(eager: Tower) -> Tower:
    """A tower that is compiled wrongly for one size."""
    return lambda raw: eager(raw) * (1 if len(raw) != 2 else -1)


@pytest.mark.parametrize(
    ("compiled", "line"),
    [(broken, "model_not_compiled: BackendCompilerFailed"), (wrong, "compiled_model_refused: expected a cosine")],
)
def test_cpu_runs_eager_where_the_compiler_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Callable[[Tower], Tower], line: str
) -> None:
    """Whether it raises or its vectors are wrong, at any size; all sizes are timed again."""
    folder = saved(make_model("clip"), tmp_path)
    encoder, lines = warmed(folder, monkeypatch, compiled)
    assert len(lines) == 1
    assert lines[0].startswith(line)
    assert not encoder._is_compiled
    plain = make_encoder(folder, threads=1)
    assert encoder.timed_sizes == encoder.batch_sizes == plain.batch_sizes
    np.testing.assert_array_equal(encoder.encode(noise(2)), plain.encode(noise(2)))


def test_right_tower_of_a_cpu_stays_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is logged."""
    encoder, lines = warmed(saved(make_model("clip"), tmp_path), monkeypatch, lambda eager: lambda raw: eager(raw) * 1)
    assert encoder._is_compiled
    assert lines == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
def test_every_size_is_compiled_with_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on another thread than that of the start, which is where a CPU's batches run."""
    weight = torch.ones(12, 4)
    frozen: list[int] = []

    def compile_frozen(graph: Any, inputs: Any, **_: Any) -> Any:
        frozen.append(len(inputs))
        return boxed_nop(graph, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.fw_compiler_freezing", compile_frozen)
    tower = compiled_tower(lambda raw: raw.flatten(1).float() @ weight)
    sizes = range(1, MAX_COMPILED_SIZES + 1)

    @torch.inference_mode()
    def run() -> list[torch.Tensor]:
        return [tower(torch.ones((size, 2, 2, 3), dtype=torch.uint8)) for size in sizes]

    with ThreadPoolExecutor(1) as pool:
        vectors = pool.submit(run).result()
    assert [len(each) for each in vectors] == list(sizes)
    assert len(frozen) == len(sizes)


def test_error_of_the_model_is_no_error_of_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fails without a compiler too ends the start."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), threads=1)
    monkeypatch.setattr(encoder, "_time_pass", lambda size: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.warm(is_thorough=True)


def run_alone(folder: Path, cache: Path, **environment: str) -> tuple[list[str], str]:
    """The lines that a process with an encoder prints, and its log."""
    env = {name: value for name, value in os.environ.items() if name not in {"CC", "CXX"}}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-c", COMPILED_AND_PRINTED, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return lines[-2:], done.stdout + done.stderr


def test_cpu_without_a_compiler_runs_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one log line, and with the vectors and threads of a model that was not to be compiled."""
    monkeypatch.setattr(compiler, "why_no_cpp_compiler", lambda: "expected g++")
    folder = saved(make_model("clip"), tmp_path)
    with capture_logs() as logs:
        encoder = make_encoder(folder, is_compiled=True, threads=1)
        encoder.warm()
    assert [line["reason"] for line in logs if line["event"] == "model_not_compiled"] == ["expected g++"]
    assert not encoder._is_compiled
    np.testing.assert_array_equal(encoder.encode(noise(2)), make_encoder(folder, threads=1).encode(noise(2)))


@pytest.mark.long
def test_process_without_a_compiler_starts(tmp_path: Path) -> None:
    """With a real PATH that has none: torch itself would end the start there."""
    folder = saved(make_model("clip"), tmp_path / "model")
    (is_compiled, vectors), text = run_alone(folder, tmp_path / "cache", PATH=str(tmp_path))
    assert is_compiled == "False"
    assert text.count("model_not_compiled") == 1
    assert "expected a C++ compiler (g++), got none" in text
    assert vectors == str(make_encoder(folder, threads=1).encode(noise(2)).tolist())


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(why_no_cpp_compiler() is not None, reason="needs g++")
def test_compiled_model_is_found_again_by_the_next_start(tmp_path: Path) -> None:
    """The first start fills the folder of TORCHINDUCTOR_CACHE_DIR; the next one builds nothing, so no file is new."""
    folder, cache = saved(make_model("clip"), tmp_path / "model"), tmp_path / "cache"
    (is_compiled, vectors), _ = run_alone(folder, cache)
    assert is_compiled == "True"
    built = {path: path.stat().st_mtime_ns for path in cache.rglob("*.so")}
    assert built
    assert run_alone(folder, cache)[0] == ["True", vectors]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.so")} == built
    eager = make_encoder(folder, threads=1).encode(noise(2))
    np.testing.assert_allclose(np.array(eval(vectors)), eager, atol=1e-5)  # noqa: S307 what this test printed
