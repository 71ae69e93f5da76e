"""What the READMEs say is run: their Python, their commands, their names."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner

from shiwu.cli import main
from shiwu_worker.config.settings import Settings
from tests.support import pictures
from tests.support.celery_client import celery_client
from tests.support.servers import S3Server, WorkerProcess

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.zh-CN.md"]

# Celery's client leaves the sockets of its result consumer to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def blocks(name: str) -> list[str]:
    """The Python blocks of a README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("name", READMES)
def test_the_python_blocks_run(
    name: str,
    shared_worker: WorkerProcess,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The client's example and the plain Celery one, against a real worker and real pictures."""
    for key in ("cat.jpg", "a.jpg", "b.jpg"):
        s3.put(key, pictures.jpeg(pictures.picture("猫脸")))
    monkeypatch.setenv("SHIWU_REDIS_URL", shared_worker.redis_url)
    ours, celerys, late = blocks(name)
    exec(compile(ours, name, "exec"), {})  # noqa: S102 it is our own README
    assert "tagged" in capsys.readouterr().out
    exec(compile(late, name, "exec"), {})  # noqa: S102 it is our own README
    with celery_client(shared_worker.redis_url) as app:
        exec(compile(celerys, name, "exec"), {"app": app})  # noqa: S102 it is our own README


def test_both_languages_show_the_same_code() -> None:
    """The Chinese README's commands and names are the English one's."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)

    def names(text: str) -> set[str]:
        return set(re.findall(r"`([A-Z]+(?:_[A-Z0-9]+)+|make \w+|SHIWU_\w+)`", text))

    assert names(english) == names(chinese)


def test_both_languages_have_the_same_parts() -> None:
    """Headings, rows of tables, paragraphs, and code and commands without their comments."""

    def parts(name: str) -> list[str]:
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(
            r"```python\n.*?```|^    [^\n]*", lambda found: re.sub(r" +#.*", "", found[0]), text, flags=re.S | re.M
        )
        text = re.sub(r"```mermaid\n.*?```", lambda found: re.sub(r'"[^"]*"', '""', found[0]), text, flags=re.S)
        kept = r"```.*?```|^    .*?$|^#+(?= )|^\||(?<=\n\n)(?=[^|#` \n])"
        return re.findall(kept, text, flags=re.S | re.M)

    english, chinese = (parts(name) for name in READMES)
    assert english == chinese
    assert len(english) > 50


@pytest.mark.parametrize("name", READMES)
def test_every_named_setting_and_target_exists(name: str) -> None:
    """SHIWU_X is a setting, `make x` a target, a linked file a file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    known = {field.upper() for field in Settings.model_fields}
    assert {found for found in re.findall(r"SHIWU_([A-Z0-9_]+)", text) if found} <= known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"make ([a-z]+)", text)) <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def test_the_help_of_every_command_is_there() -> None:
    """`shiwu … --help` of what the README names."""
    commands = ([], ["tag"], ["enqueue"], ["results"], ["status"], ["cancel"], ["sweep"], ["dead"], ["dead", "requeue"])
    for command in commands:
        result = CliRunner().invoke(main, [*command, "--help"])
        assert result.exit_code == 0
        assert "Usage" in result.output


@pytest.mark.parametrize("name", READMES)
def test_a_readme_is_short_and_narrow(name: str) -> None:
    """Fewer than 150 lines of at most 120 columns, tables and code included; Chinese characters take two columns."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    wide = [line for line in lines if sum(1 + (unicodedata.east_asian_width(one) in "WF") for one in line) > 120]
    assert wide == []
