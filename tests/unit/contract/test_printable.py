"""Text that a terminal or a log shows: what is spelled out, and what stays."""

from __future__ import annotations

import json

import pytest

from shiwu.cli.hints import notes_of
from shiwu.cli.terminal import echo_data, fit_columns
from shiwu.contract import ErrorCode, ErrorInfo, control_character, printable, printable_json


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://b/猫.jpg", "s3://b/猫.jpg"),
        ("[red]x[/red]", "[red]x[/red]"),
        ("家\u200d庭 👨‍👩‍👧 é\u3000x", "家\u200d庭 👨‍👩‍👧 é\u3000x"),
        ("a\nb\tc\rd", r"a\u000ab\u0009c\u000dd"),
        ("\x1b[31mred", r"\u001b[31mred"),
        ("\x9b31m\x7f", r"\u009b31m\u007f"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\u2066a\u2069\u200b\ufeff\u2028", r"\u2066a\u2069\u200b\ufeff\u2028"),
        ("\udce9", r"\udce9"),
        ("\U000e0041", r"\udb40\udc41"),
        ("", ""),
    ],
)
def test_printable_escapes_control_characters(text: str, expected: str) -> None:
    """Controls, direction marks and invisible characters; letters, emoji and their joiners stay."""
    assert printable(text) == expected
    assert printable(printable(text)) == expected


def test_what_a_label_may_contain_is_printed_as_it_is() -> None:
    """One table decides what messages may contain and what output escapes."""
    for character in map(chr, range(0x10000)):
        assert (control_character(character) is None) == (printable(character) == character), ascii(character)


@pytest.mark.parametrize(
    ("text", "written"),
    [("plain 猫", "plain 猫"), ("a\x9b1m", "a\x9b1m"), ("a\nb", r"a\u000ab"), ("a\r", r"a\u000d"), ("", "")],
)
def test_data_in_a_pipe_is_one_line(text: str, written: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise an id with a line break would be two ids to the next command."""
    echo_data(text)
    assert capsys.readouterr().out == f"{written}\n"


def test_printable_json_keeps_its_meaning() -> None:
    """On several lines, with characters that JSON itself does not escape."""
    value = {"a": ["\x9b\u202e\U000e0041猫", "\x1b\n"], "b": 1}
    raw = json.dumps(value, ensure_ascii=False, indent=2).encode()
    shown = printable_json(raw)
    assert json.loads(shown) == value
    assert shown.isascii() is False
    assert not {"\x9b", "\u202e", "\U000e0041"} & set(shown)


def test_notes_have_the_message_and_a_hint() -> None:
    """A code without a hint has its message only; a code of a newer worker too."""
    assert notes_of(None) == []
    known = ErrorInfo(code=ErrorCode.SOURCE_NOT_FOUND, message="no such key")
    message, hint = notes_of(known)
    assert message == "no such key"
    assert hint.startswith("hint: ")
    assert notes_of(ErrorInfo(code=ErrorCode.CANCELLED, message="by its producer")) == ["by its producer"]


@pytest.mark.parametrize(
    ("natural", "width", "expected"),
    [
        ([10, 20, 5, 5], 100, {0: 10, 1: 20, 2: 5, 3: 5}),
        ([60, 20, 5, 5], 62, {0: 24, 1: 20, 2: 5, 3: 5}),
        ([60, 60, 5, 5], 60, {0: 24, 1: 25, 3: 5}),
        ([60, 60, 5, 5], 10, {0: 1, 1: 1, 3: 5}),
    ],
)
def test_columns_fit_the_terminal(natural: list[int], width: int, expected: dict[int, int]) -> None:
    """A short text keeps its width, a long one wraps, and the optional column goes before texts get narrow."""
    found = fit_columns(natural, width=width, text_columns=(0, 1), optional=(2,))
    assert found == expected
