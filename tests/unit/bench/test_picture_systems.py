"""The model of the workers that benchmarks start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench.picture_systems import Place

from tests.support.processes import WorkerProcess


@pytest.mark.parametrize(("setting", "model"), [(None, ""), ("/models/vit", "/models/vit")])
def test_worker_has_the_model_that_was_asked_for(setting: str | None, model: str, tmp_path: Path) -> None:
    """Not that of the tests, which is another one than the embedded model: the empty setting."""
    parts: Any = {"source": SimpleNamespace(env={}), "checkpoint": SimpleNamespace(setting=setting)}
    others: Any = dict.fromkeys(("url", "client", "folder", "lane", "dtype"))
    env = Place(**parts, **others, worker_env={}).model_env
    assert WorkerProcess(redis_url="redis://127.0.0.1:1", folder=tmp_path, env=env).env["SHIWU_MODEL"] == model
