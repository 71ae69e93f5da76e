"""Commands of extensions in the help and on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from shiwu.cli.base import main

PLUGIN = """
import click

@click.command(short_help="Greet.")
def hello():
    click.echo("hello from the extension")

no_command = 3
"""
ENTRIES = """
[shiwu.commands.bulk]
hello = shiwu_test_plugin:hello
lost = shiwu_test_missing:lost [losing]
tag = shiwu_test_plugin:hello
"""


@pytest.fixture(autouse=True)
def _extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution with commands for `shiwu`."""
    (tmp_path / "shiwu_test_plugin.py").write_text(PLUGIN)
    info = tmp_path / "shiwu_test_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shiwu-test-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    # Read once per process: read again now, and once more after the test.
    main.__dict__.pop("_extensions", None)
    yield
    main.__dict__.pop("_extensions", None)


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and output of `shiwu` with these arguments."""
    done = CliRunner().invoke(main, arguments)
    return done.exit_code, done.output


def test_extension_command_runs() -> None:
    assert run("hello") == (0, "hello from the extension\n")


def test_own_command_wins_over_an_extension() -> None:
    assert isinstance(main.get_command(click.Context(main), "tag"), click.Command)
    assert "hello from" not in run("tag", "--help")[1]


def test_help_lists_sections_in_order() -> None:
    main_help = run("--help")[1]
    places = [
        main_help.index(text)
        for text in ("\nJobs:", "\n  tag ", "\nBulk:", "\n  hello ", "\nOperations:", "\n  sweep ")
    ]
    assert places == sorted(places)
    assert "Needs the extra `losing`." in main_help


@pytest.mark.parametrize("arguments", [("lost",), ("lost", "start", "--x")], ids=["bare", "options"])
def test_missing_library_names_its_extra(arguments: tuple[str, ...]) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert "lost needs shiwu_test_missing: run `pip install '.[losing]'` in a clone of shiwu" in output


def test_entry_that_is_no_command_is_an_error(tmp_path: Path) -> None:
    entries = tmp_path / "shiwu_test_plugin-1.dist-info" / "entry_points.txt"
    entries.write_text("[shiwu.commands.bulk]\nwrong = shiwu_test_plugin:no_command\n")
    with pytest.raises(TypeError, match="expected a click command at shiwu_test_plugin:no_command"):
        CliRunner().invoke(main, ["wrong"], catch_exceptions=False)
