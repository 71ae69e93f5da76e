"""What the worker checks before it loads the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.service import bootstrap


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("name: x\nlabels: []", {}, "labels"),
        ("labels: [猫", {}, "YAML"),
        ("name: x\nlabels: [猫, 狗]", {"default_labels": "y"}, "SHIWU_DEFAULT_LABELS"),
        ("", {"labels_dir": Path("/no/such")}, "SHIWU_LABELS_DIR: expected a folder of label sets, got /no/such"),
        ("", {"labels_dir": Path(f"/{'x' * 300}")}, "SHIWU_LABELS_DIR: expected a folder of label sets, got /xxx"),
    ],
)
def test_label_errors_end_the_start_before_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, options: dict[str, Any], expected: str
) -> None:
    """The exit code is that of wrong settings, and neither the model nor a loader was started."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("expected the labels first")

    for name in ("model_folder", "load_encoder", "start_loaders", "open_queues"):
        monkeypatch.setattr(bootstrap, name, fail)
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    settings = Settings(**({"labels_dir": tmp_path} | options))
    with (
        pytest.raises(FatalError, match=expected) as caught,
        bootstrap.open_service(settings, on_fatal=lambda _: None),
    ):
        pass
    assert caught.value.exit_code is ExitCode.CONFIG
