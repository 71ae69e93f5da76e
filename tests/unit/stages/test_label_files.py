"""Files of label sets: each fault is told with the name of the file and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiwu_worker.stages.score.label_files import load_label_sets

WRONG = [
    ("name: a\nlabels: []", "labels"),
    ("name: a\nlabels: [x, x]", "once"),
    ('name: a\nlabels: ["x\\ny"]', "U+000A"),
    ('name: a\nlabels: ["x\\u202ey"]', "U+202E"),
    ('name: a\nlabels: [x]\ntemplates: ["{}\\n"]', "U+000A"),
    ("name: a\nlabels: [x]\ntemplates: ['no place']", "exactly one"),
    ("name: a\nlabels: [x]\nlabel: y", "expected keys of name, labels"),
    ("labels: [x]", "name"),
    ("name: two words\nlabels: [x]", "name"),
    ("name: a\nlabels: [x]\nhead: relu", "head"),
    ("[", "YAML"),
    ("", "file"),
    ("name: a\nlabels: [x]\nlabels: [y]", "line 3: expected every key once, got 'labels' again"),
    ("name: a\nlabels: [猫，狗]", "write [猫, 狗]"),
    ("name: a\nlabels: [猫、狗, 鸟]", "got '、' in '猫、狗'"),
    ("name: a\nlabels:\n- yes\n", "line 3: expected a text, got 'yes', which YAML reads as bool"),
    ("name: a\nlabels:\n- 猫\n- no\n", 'write it in quotes: "no"'),
    ("name: a\nlabels:\n- 123\n", "got '123', which YAML reads as int"),
    ("name: a\nlabels:\n- 1.50\n", 'write it in quotes: "1.50"'),
    ("name: a\nlabels:\n- 2024-01-02\n", "got '2024-01-02'"),
    ("name: a\nlabels:\n- null\n", "got 'null'"),
    ("name: a\nlabels:\n-\n", "expected a text, got ''"),
    ("name: 2024\nlabels: [x]", "got '2024'"),
    ("name: a\nlabels:\n- 猫: 狗\n", "labels number 1: expected keys of label, min_cosine, got '猫'"),
    ("name: a\nlabels:\n- {label: 123}\n", "got '123', which YAML reads as int"),
    ("name: a\nlabels:\n- {min_cosine: 0.2}\n", "labels number 1 label"),
    ("name: a\nlabels: [x, {label: x}]", "once"),
    ("name: a\nlabels: [{label: x, min_cosine: 2}]", "labels number 1 min_cosine"),
    ("name: a\nlabels: [x]\nmin_cosine: -1.5", "min_cosine"),
    ("name: a\nlabels: [x]\nscale: 0", "scale"),
    ("name: a\nlabels: [x]\nbias: .nan", "bias"),
    ("name: a\nlabels:\n- " + "x" * 101, "labels number 1 label: expected a text of at most 100 characters, got 'xxx"),
]


@pytest.mark.parametrize(("text", "wrong"), WRONG)
def test_error_names_the_wrong_file(tmp_path: Path, text: str, wrong: str) -> None:
    """The error says which file, and what in it."""
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        load_label_sets([tmp_path])
    assert wrong in str(caught.value)


def test_labels_may_have_their_own_least_cosine(tmp_path: Path) -> None:
    """The set's bound is that of labels without one; where there is none, any cosine will do."""
    text = "name: a\nscale: 80\nbias: -12.5\nmin_cosine: 0.2\nlabels: [猫, {label: 狗, min_cosine: 0.3}]\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "b.yaml").write_text("name: b\nlabels: [{label: 猫}, {label: 狗, min_cosine: 0.3}]\n", encoding="utf-8")
    (tmp_path / "c.yaml").write_text("name: c\nlabels: [猫, 狗]\n", encoding="utf-8")
    sets = load_label_sets([tmp_path])
    assert [sets[name].min_cosines for name in "abc"] == [(0.2, 0.3), (-1.0, 0.3), None]
    assert (sets["a"].scale, sets["a"].bias, sets["a"].words) == (80.0, -12.5, ("猫", "狗"))
    assert len({one.info.digest for one in sets.values()}) == 3


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "big5"])
def test_error_for_another_encoding_asks_for_utf8(tmp_path: Path, encoding: str) -> None:
    """Editors on Windows save Chinese text as GBK, or as UTF-16 where they call it Unicode."""
    (tmp_path / "mine.yaml").write_text("name: a\nlabels: [動物]\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"mine\.yaml: line \d: expected UTF-8, .*save the file as UTF-8"):
        load_label_sets([tmp_path])


@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml", "mine.YAML", "Mine.Yml"])
def test_files_are_read_whatever_the_case_of_their_suffix(tmp_path: Path, name: str) -> None:
    """With a byte order mark and a Chinese name, as an editor may write them; quoted texts are taken as they are."""
    text = 'name: 颜色\nlabels: [红, "no", "红，绿", "1"]\n'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    (tmp_path / "notes.txt").write_text("no label set")
    assert load_label_sets([tmp_path])["颜色"].words == ("红", "no", "红，绿", "1")


@pytest.mark.parametrize("name", ["none", "a_file", "x" * 300])
def test_folder_that_cannot_be_read_is_an_error_of_its_own(tmp_path: Path, name: str) -> None:
    """Not one of the system, which would end a worker without a reason for the operator."""
    (tmp_path / "a_file").touch()
    with pytest.raises(ValueError, match="expected a folder of label sets that can be read"):
        load_label_sets([tmp_path / name])


def test_two_files_of_a_folder_with_one_name_are_rejected(tmp_path: Path) -> None:
    """The later one would win without a word; in another folder it replaces the set on purpose."""
    first, second = tmp_path / "1", tmp_path / "2"
    for folder, file, labels in ((first, "a.yaml", "[x]"), (second, "b.yaml", "[y]")):
        folder.mkdir()
        (folder / file).write_text(f"name: mine\nlabels: {labels}\n")
    assert load_label_sets([first, second])["mine"].words == ("y",)
    (first / "c.yml").write_text("name: mine\nlabels: [z]\n")
    with pytest.raises(ValueError, match=r"c\.yml: name: .* 'mine', the name in .*a\.yaml"):
        load_label_sets([first, second])
