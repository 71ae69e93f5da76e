"""Log lines are valid JSON, whatever values they hold."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest
import structlog

from shiwu.contract import Answer, ErrorCode, ErrorInfo, ImageInfo, Lane, Stage, Status, Tag, Timing
from shiwu_worker.telemetry import logs


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    before, handlers, level = structlog.get_config(), logging.getLogger().handlers[:], logging.getLogger().level
    yield
    structlog.configure(**before)
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
    logging.captureWarnings(capture=False)


def test_unusual_values_are_logged(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Objects, bytes, sets, invalid UTF-8, NaN and an error with its traceback: each gives one line."""
    logs.set_up(level="info", form="json")
    log = structlog.get_logger("odd")
    log.info("猫", value=object(), raw=b"\xff", several={1}, number=float("nan"))
    log.info("name", path="\udc80.jpg")
    log.info("keys", value={(1, 2): 3})
    try:
        raise OSError("no")
    except OSError:
        log.exception("bad")
    found = [json.loads(line) for line in capfdbinary.readouterr().err.splitlines()]
    assert [line["event"] for line in found] == ["猫", "name", "keys", "bad"]
    assert "OSError: no" in found[3]["exception"]


def test_job_has_one_line_with_all_its_times(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The line has each stage in milliseconds and an error's code; below the level there is no logger."""
    logs.set_up(level="info", form="json")
    assert logs.job_logger(level="warning") is None
    log_job = logs.job_logger(level="info")
    assert log_job is not None
    image = ImageInfo(reference="s3://b/k")
    timing = Timing(queue=1.5, decode=2.0, total=3.5)
    tagged = Answer(
        id="a", status=Status.TAGGED, lane=Lane.BULK, image=image, tags=(Tag("猫", 0.5, 0.1),), timing=timing
    )
    error = ErrorInfo(code=ErrorCode.PICTURE_BROKEN, message="cut", stage=Stage.DECODE)
    log_job(tagged, 0.001, False)
    log_job(Answer(id="b", status=Status.REJECTED, error=error), 0.001, True)
    first, second = (json.loads(line) for line in capfdbinary.readouterr().err.splitlines())
    assert (first["event"], first["top"], first["queue_ms"], first["decode_ms"], first["commit_ms"]) == (
        "tagged",
        "猫",
        1.5,
        2.0,
        1.0,
    )
    assert (second["event"], second["code"], second["stage"]) == ("answered_before", "picture_broken", "decode")


@pytest.mark.parametrize("form", ["json", "console"])
def test_control_characters_are_escaped_in_all_lines(form: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Controls and direction marks of references and messages are spelled out, by every logger, in both forms."""
    logs.set_up(level="info", form=form)
    log = structlog.get_logger("odd")
    odd = "[/red]\x1b[2J\x9b31m\u202egpj\n猫"
    log.info("failed", image=odd, error=f"no {odd}", ids=[odd], nested={"a": odd})
    logging.getLogger("celery").error("unknown message %s", odd)
    written = capfd.readouterr().err
    own = re.sub(r"\x1b\[\d*m", "", written) if form == "console" else written
    assert not {"\x1b", "\x9b", "\u202e"} & set(own)
    assert len(own.splitlines()) == 2
    assert own.count("猫") == 5
    if form == "json":
        first, second = map(json.loads, own.splitlines())
        assert (first["image"], first["ids"], second["event"]) == (odd, [odd], f"unknown message {odd}")


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("odd", ["\x1b[2J", "\x7f", "\x9b31m", "\u202e猫"])
def test_control_characters_are_escaped_in_job_lines(form: str, odd: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where the line is written without structlog."""
    logs.set_up(level="info", form=form)
    log_job = logs.job_logger(level="info")
    assert log_job is not None
    image = ImageInfo(reference=f"s3://b/{odd}")
    log_job(Answer(id="a", status=Status.EXPIRED, image=image), 0.0012, False)
    written = capfd.readouterr().err
    own = re.sub(r"\x1b\[\d*m", "", written) if form == "console" else written
    assert own.count("\n") == 1
    assert own.strip("\n").isprintable()
    assert "expired" in own


@pytest.mark.parametrize("form", ["json", "console"])
def test_traceback_shows_no_local_variables(form: str, capfd: pytest.CaptureFixture[str]) -> None:
    """They may be passwords; the text of the error is escaped, on a line of its own for people."""
    logs.set_up(level="info", form=form)
    password = "hu" + "sh"

    def fail() -> None:
        raise ValueError(f"no \x1b[2J\u202e {len(password)}")

    for log in (structlog.get_logger("own"), logging.getLogger("library")):
        try:
            fail()
        except ValueError:
            log.error("failed", exc_info=True)
    written = capfd.readouterr().err
    own = re.sub(r"\x1b\[\d*m", "", written)
    assert own.count(r"ValueError: no \u001b[2J\u202e 4") == 2
    assert password not in own
    assert not {"\x1b", "\u202e"} & set(own)
    assert len(own.splitlines()) == 2 if form == "json" else len(own.splitlines()) > 6


@pytest.mark.parametrize("form", ["json", "console"])
def test_lines_of_libraries_show_no_passwords(form: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Libraries quote the URLs that they are given, also in errors. References of jobs are not changed."""
    logs.set_up(level="info", form=form)
    try:
        raise ValueError("no https://u:hu/sh@mirror/x")
    except ValueError:
        logging.getLogger("library").exception("cannot connect to %s", "redis://:hu/sh@h/0")
    structlog.get_logger("own").info("fetched", image="s3://b/a@b.jpg")
    written = re.sub(r"\x1b\[\d*m", "", capfd.readouterr().err)
    assert "hu/sh" not in re.sub(r"raise ValueError.*", "", written)
    assert "redis://h/0" in written
    assert "no https://mirror/x" in written
    assert "s3://b/a@b.jpg" in written


def test_job_line_has_the_form_of_all_lines(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    logs.set_up(level="info", form="json")
    log_job = logs.job_logger(level="info")
    assert log_job is not None
    log_job(Answer(id="a", status=Status.EXPIRED), 0.0012, False)
    structlog.get_logger("x").info("other")
    first, second = (json.loads(line) for line in capfdbinary.readouterr().err.splitlines())
    assert first["commit_ms"] == 1.2
    assert [*first][-3:] == [*second] == ["event", "level", "timestamp"]
    assert re.sub(r"\d", "0", first["timestamp"]) == re.sub(r"\d", "0", second["timestamp"])
