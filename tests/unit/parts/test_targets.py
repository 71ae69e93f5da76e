"""Files of results: complete under their name, or not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shiwu.parts import Objects, Target, TargetError, open_target
from tests.support.servers import S3Server

TEMPORARY = ".mine-"


@pytest.fixture(params=["folder", "bucket"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Target]]:
    """Opens the same place again, as another process does."""
    objects, address = Objects(), str(tmp_path / "out")
    with ExitStack() as stack:
        if request.param == "bucket":
            s3: S3Server = request.getfixturevalue("s3")
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for name, value in s3.env.items():
                patch.setenv(name, value)
            objects, address = Objects(s3.env), f"s3://pictures/parts/{tmp_path.name}/"

        def open_place() -> Target:
            target = open_target(address, objects=objects, temporary=TEMPORARY)
            stack.callback(target.close)
            return target

        yield open_place


def test_staged_file_gets_its_name_when_it_is_published(open_again: Callable[[], Target]) -> None:
    """Until then it has a temporary name, also for other processes; publishing replaces an older file."""
    target = open_again()
    target.put("part-1", b"older")
    target.local("part-1").write_bytes(b"rows")
    staged = target.stage("part-1", token="t")
    assert staged.startswith(TEMPORARY)
    assert open_again().names() == {"part-1", staged}
    target.publish(staged, "part-1")
    assert open_again().names() == {"part-1"}


def test_file_that_was_never_staged_is_no_result(open_again: Callable[[], Target]) -> None:
    """What a crashed process leaves begins with the temporary name, and can be deleted."""
    target = open_again()
    target.local("part-1").write_bytes(b"half")
    left = open_again().names()
    assert all(name.startswith(TEMPORARY) for name in left)
    for name in left:
        target.delete(name)
    assert open_again().names() == set()


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """The error names it."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TargetError, match="expected a folder to write to at"):
        open_target(str(tmp_path / "file" / "out"), objects=Objects(), temporary=TEMPORARY)


def test_folder_that_is_gone_is_an_error_of_the_target(tmp_path: Path) -> None:
    """Also what cannot be deleted."""
    target = open_target(str(tmp_path / "out"), objects=Objects(), temporary=TEMPORARY)
    (tmp_path / "out" / "folder").mkdir()
    with pytest.raises(TargetError, match="folder"):
        target.delete("folder")
    (tmp_path / "out" / "folder").rmdir()
    (tmp_path / "out").rmdir()
    with pytest.raises(TargetError, match="No such file"):
        target.names()
