"""The gallery page in a real headless Chromium: it filters, sorts, fades tags, and loads nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shiwu.contract import Answer
from shiwu.gallery.thumbnails import Thumbnail
from tests.support import chromium
from tests.support.chromium import Browser
from tests.support.gallery_pages import rejected, render, tagged

pytestmark = pytest.mark.xdist_group("browser")
HOSTILE = "<img src=https://example.org/x onerror=window.hit=1></script><script>window.hit=1</script>"
SHOWN_IDS = "[...document.querySelectorAll('#cards .ref')].map((ref) => ref.textContent.slice(12, -4))"
COUNTS = "document.getElementById('counts').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all pages of this file."""
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium in .venv/chromium: run `python -m tests.support.chromium`, which needs npm and node")
    with Browser(program, tmp_path_factory.mktemp("chromium")) as started:
        yield started


def webp(colour: tuple[int, int, int]) -> str:
    """A thumbnail of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (160, 107), colour).save(file, "WEBP")
    return base64.b64encode(file.getvalue()).decode()


ANSWERS = (
    tagged("low", tags={"猫": 0.4, "狗": 0.35}, total=30.0),
    tagged("high", tags={"猫": 0.9, "狗": 0.05}, total=90.0),
    tagged("dog", tags={"狗": 0.6, "猫": 0.3}, total=10.0),
    rejected("none"),
    rejected("broken", code="picture_broken", text="expected a whole JPEG image"),
)


def show(browser: Browser, folder: Path, answers: Sequence[Answer] = ANSWERS, **options: Any) -> None:
    """Open the page of these answers."""
    path = folder / "page.html"
    path.write_text(render(answers, **options), encoding="utf-8")
    browser.open(path.as_uri())


def set_control(browser: Browser, name: str, value: str | bool) -> list[str]:
    """Change a control as a person does; the references that are shown then."""
    field = "checked" if isinstance(value, bool) else "value"
    text = str(value).lower() if isinstance(value, bool) else f"'{value}'"
    browser.run(
        f"document.getElementById('{name}').{field} = {text};"
        f"document.getElementById('{name}').dispatchEvent(new Event('input', {{bubbles: true}}));"
        "new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))"
    )
    shown: list[str] = browser.run(SHOWN_IDS)
    return shown


def complaints(browser: Browser) -> list[Any]:
    """Errors and warnings of the console, and exceptions."""
    kinds = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
    return [event["params"] for event in browser.events if event["method"] in kinds]


def requested(browser: Browser) -> list[str]:
    """Addresses that the page asked for, without those of its own data."""
    events = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    return [event["request"]["url"] for event in events if not event["request"]["url"].startswith("data:")]


def test_page_shows_images_and_loads_nothing(browser: Browser, tmp_path: Path) -> None:
    """Thumbnails are drawn from their data URLs, errors have their cards, and nothing but the file is asked for."""
    thumbnails = {"s3://images/high.jpg": Thumbnail(webp=webp((200, 30, 30)))}
    show(browser, tmp_path, thumbnails=thumbnails)
    sizes = (
        "Promise.all([...document.images].map((one) => one.decode().then(() => [one.naturalWidth, one.naturalHeight])))"
    )
    assert browser.run(sizes) == [[160, 107]]
    assert browser.run(COUNTS) == "5 of 5 shown · 3 tagged · 2 rejected"
    codes = "[...document.querySelectorAll('.code')].map((one) => one.textContent)"
    assert browser.run(codes) == ["rejected: source_not_found in fetch", "rejected: picture_broken in fetch"]
    assert browser.run("document.querySelector('.tags .fill').getBoundingClientRect().width") > 40
    assert complaints(browser) == []
    assert requested(browser) == [(tmp_path / "page.html").as_uri()]


def test_filters_and_sort_order_the_images(browser: Browser, tmp_path: Path) -> None:
    """Text, label, status, code; score, margin, time, and the other way round."""
    show(browser, tmp_path)
    assert browser.run(SHOWN_IDS) == ["low", "high", "dog", "none", "broken"]
    assert set_control(browser, "sort", "score") == ["high", "dog", "low", "none", "broken"]
    assert set_control(browser, "sort", "margin") == ["high", "dog", "low", "none", "broken"]
    assert set_control(browser, "reverse", True)[-1] == "high"
    assert set_control(browser, "reverse", False)[0] == "high"
    assert set_control(browser, "sort", "time") == ["high", "low", "dog", "none", "broken"]
    assert set_control(browser, "status", "tagged") == ["high", "low", "dog"]
    assert set_control(browser, "text", "DOG") == ["dog"]
    assert set_control(browser, "text", "") == ["high", "low", "dog"]
    assert set_control(browser, "status", "") == ["high", "low", "dog", "none", "broken"]
    assert set_control(browser, "code", "picture_broken") == ["broken"]
    browser.run("document.querySelector('button[type=reset]').click()")
    assert set_control(browser, "label", "狗") == ["low", "high", "dog"]
    assert browser.run("document.querySelector('#label option:nth-child(2)').textContent") == "狗 (3)"
    assert complaints(browser) == []


def test_names_are_read_and_found_without_escapes(browser: Browser, tmp_path: Path) -> None:
    """The name of a file in Chinese; the reference itself is the hint."""
    reference = "file:///data/%E6%88%91%E7%9A%84%20%E7%8C%AB.jpg"
    show(browser, tmp_path, [tagged("cat", reference=reference), tagged("dog")])
    shown = "[...document.querySelectorAll('#cards .ref')].map((ref) => [ref.textContent, ref.title])"
    assert browser.run(shown)[0] == ["file:///data/我的 猫.jpg", reference]
    assert len(set_control(browser, "text", "我的 猫")) == 1
    assert complaints(browser) == []


def test_threshold_acts_in_the_page(browser: Browser, tmp_path: Path) -> None:
    """Tags below it fade, a label counts from it on, images that do not reach it can be left out."""
    show(browser, tmp_path)
    faded = "[...document.querySelectorAll('li.below bdi')].length"
    assert browser.run(faded) == 0
    assert len(set_control(browser, "threshold", "0.5")) == 5
    assert browser.run(faded) == 4
    assert browser.run(COUNTS) == "5 of 5 shown · 3 tagged · 2 rejected · 2 with a tag of 0.50 or more"
    assert set_control(browser, "only", True) == ["high", "dog"]
    assert set_control(browser, "label", "猫") == ["high"]
    assert set_control(browser, "threshold", "0.2") == ["low", "high", "dog"]
    assert browser.run("document.getElementById('threshold-text').textContent") == "0.20"
    assert complaints(browser) == []


def test_second_answers_stand_next_to_the_first(browser: Browser, tmp_path: Path) -> None:
    """They can be filtered by whether the first tags are equal, and the threshold fades tags of both."""
    others = {
        "low": tagged("x", tags={"猫": 0.8, "熊": 0.1}),
        "high": tagged("y", tags={"狗": 0.6}),
        "none": rejected("none"),
    }
    show(browser, tmp_path, others=others)
    texts = "[...document.querySelectorAll('.second bdi, .second .which')].map((one) => one.textContent)"
    second = "second answer"
    assert browser.run(texts) == [second, "猫", "熊", second, "狗", f"{second}: rejected, source_not_found"]
    assert browser.run(COUNTS) == "5 of 5 shown · 3 tagged · 2 rejected · 1 with another first tag"
    assert set_control(browser, "second", "other") == ["high"]
    assert set_control(browser, "second", "same") == ["low", "none"]
    assert set_control(browser, "second", "none") == ["dog", "broken"]
    assert set_control(browser, "second", "") == ["low", "high", "dog", "none", "broken"]
    set_control(browser, "threshold", "0.5")
    faded = "[...document.querySelectorAll('#cards article li.below bdi')].map((one) => one.textContent)"
    assert browser.run(faded) == ["猫", "狗", "熊", "狗", "猫"]
    assert complaints(browser) == []


def test_hostile_texts_are_shown_and_not_obeyed(browser: Browser, tmp_path: Path) -> None:
    """In a label, a reference, an id, a code, a message, a title and a note, and in second answers."""
    answers = [
        tagged(HOSTILE, reference=f"s3://images/{HOSTILE}", tags={HOSTILE: 0.5}),
        rejected("b", code=HOSTILE, text=HOSTILE),
    ]
    others = {HOSTILE: tagged(HOSTILE, tags={HOSTILE: 0.4}), "b": rejected("b", code=HOSTILE)}
    show(browser, tmp_path, answers, title=HOSTILE, note=HOSTILE, others=others)
    assert browser.run("document.querySelector('.tags bdi').textContent") == HOSTILE
    assert browser.run("document.querySelector('.message').textContent") == HOSTILE
    assert browser.run("[window.hit === undefined, document.images.length, document.scripts.length]") == [True, 0, 2]
    assert complaints(browser) == []
    assert len(requested(browser)) == 1


def test_policy_blocks_a_foreign_script(browser: Browser, tmp_path: Path) -> None:
    """Even where markup came into the page it could neither run nor load anything."""
    page = render(ANSWERS).replace("</main>", f"</main>{HOSTILE}<style>body{{display:none}}</style>")
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    browser.open(path.as_uri())
    assert browser.run("[window.hit === undefined, getComputedStyle(document.body).display]") == [True, "block"]
    refused = [event["entry"]["text"] for event in complaints(browser) if "entry" in event]
    assert any("Content Security Policy" in text for text in refused)
    assert len(requested(browser)) == 1 + sum("example.org" in url for url in requested(browser))
    blocked = [event for event in browser.events if event["method"] == "Network.loadingFailed"]
    assert len(blocked) == sum("example.org" in url for url in requested(browser))


def test_thousand_images_stay_usable(browser: Browser, tmp_path: Path) -> None:
    """The page is drawn, sorted and filtered within seconds on a busy machine."""
    answers = [tagged(f"n{n:04}", tags={"猫": (n * 37 % 1000) / 1000, "狗": 0.0}) for n in range(1000)]
    thumbnails = {
        answer.image.reference: Thumbnail(webp=webp((n % 256, 90, 90)))
        for n, answer in enumerate(answers)
        if answer.image
    }
    show(browser, tmp_path, answers, thumbnails=thumbnails)
    assert browser.run(COUNTS) == "1000 of 1000 shown · 1000 tagged"
    browser.run("window.began = performance.now()")
    assert set_control(browser, "sort", "score")[0] == "n0027"
    assert len(set_control(browser, "threshold", "0.9")) == 1000
    assert len(set_control(browser, "only", True)) == 100
    assert browser.run("performance.now() - window.began") < 10_000
    assert complaints(browser) == []
