"""The gallery page: nothing that an answer says is markup or an address, and nothing secret is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiwu.contract import Answer, AnswerWarning, LabelsInfo, ModelInfo, Tag
from shiwu.gallery.thumbnails import Thumbnail
from tests.support.gallery_pages import ParsedPage, rejected, render, tagged

WEBP = base64.b64encode(b"RIFF\x00\x00\x00\x00WEBP" + bytes(6000)).decode()
HOSTILE = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            "</script><script>alert(1)</script>",
            "<!--<script>",
            "]]>",
            "<img src=https://example.org/x onerror=alert(1)>",
            "{{ 7*7 }}{% raw %}",
            '" onload="alert(1)',
            "javascript:alert(1)",
            "\u2028\u2029\u202e\u0000",
            "&lt;b&gt;",
        ]
    ),
)
PLAIN = ParsedPage(render([tagged("plain")]))


def hostile_answer(text: str) -> Answer:
    """An answer that says this text wherever a text may stand."""
    base = rejected(text, code=text, text=text)
    return Answer(
        id=text,
        status=text,
        image=base.image.__class__(reference=text, format=text, width=1, height=1) if base.image else None,
        tags=(Tag(label=text, score=0.5, cosine=0.1),),
        error=base.error,
        labels=LabelsInfo(digest=text, count=1, head=text, name=text),
        model=ModelInfo(id=text, revision=text, dtype=text, device=text),
        warnings=(AnswerWarning(code=text, message=text),),
    )


@given(HOSTILE)
@settings(max_examples=150, deadline=None)
def test_hostile_texts_add_no_element(text: str) -> None:
    """Labels, ids, references, codes, messages, titles and notes leave the page's elements as they are."""
    page = render([hostile_answer(text)], title=text, note=text or "none")
    parsed = ParsedPage(page)
    facts = [("span", {}), ("bdi", {})] * 2
    note = [("p", {"class": "note", "role": "note"}), ("bdi", {})]
    kept = [one for one in parsed.elements if one[0] != "meta"]
    for one in facts + note:
        kept.remove(one)
    assert kept == [one for one in PLAIN.elements if one[0] != "meta"]
    assert parsed.data[0]["tags"][0][0] == parsed.data[0]["id"]
    assert "<" not in parsed.texts["script"][0]


@given(HOSTILE)
@settings(max_examples=50, deadline=None)
def test_hostile_second_answers_add_no_element(text: str) -> None:
    """Their tags and codes are data, as those of the first answers."""
    first, second = tagged("plain"), hostile_answer(text)
    plain = ParsedPage(render([first], others={}))
    parsed = ParsedPage(render([first], others={"plain": second}))
    before, after = (Counter(name for name, _ in page.elements) for page in (plain, parsed))
    assert after - before == Counter({"span": 2, "bdi": 2})  # model and label set
    assert parsed.data[0]["other"]["tags"][0][0] == parsed.data[0]["other"]["status"]
    assert "<" not in parsed.texts["script"][0]


@given(HOSTILE)
@settings(max_examples=50, deadline=None)
def test_texts_reach_the_page_whole(text: str) -> None:
    """A label without control characters is shown as it is."""
    answer = tagged("a", tags={text: 0.5})
    shown = ParsedPage(render([answer])).data[0]["tags"][0][0]
    assert shown == text or re.search(r"\\u[0-9a-f]{4}", shown)


def test_page_loads_nothing_but_data() -> None:
    """The only address is that of the empty icon, and the policy forbids all others."""
    page = render([tagged("a"), rejected("b")], {"s3://images/a.jpg": Thumbnail(webp=WEBP)})
    parsed = ParsedPage(page)
    addresses = [
        value for _, found in parsed.elements for name, value in found.items() if name in {"src", "href", "action"}
    ]
    assert addresses == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", "".join(parsed.texts["style"]))
    assert parsed.data[0]["webp"] == WEBP


def test_policy_allows_only_this_script_and_style() -> None:
    """The hashes in the policy are those of what stands in the page."""
    parsed = ParsedPage(render([tagged("a")]))
    (policy,) = [found["content"] for name, found in parsed.elements if found.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for rule, text in (("style-src", parsed.texts["style"][0]), ("script-src", parsed.texts["script"][-1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_query_strings_are_gone() -> None:
    """A signature in an URL is not written to the page, even where an answer holds it."""
    signed = "https://user:word@example.org/a.jpg?X-Amz-Signature=SECRET#part"
    page = render([tagged("a", reference=signed)])
    assert "https://example.org/a.jpg" in page
    assert not re.search("SECRET|user:word|#part", page)


@pytest.mark.parametrize(
    ("reference", "readable"),
    [
        ("file:///data/%E6%88%91%E7%9A%84%20%E7%8C%AB.jpg", "file:///data/我的 猫.jpg"),
        ("https://example.org/%E7%8C%AB.jpg?q=%E7%8B%97", "https://example.org/猫.jpg"),
        ("file:///data/%C2%85%E2%80%AE.jpg", "file:///data/\\u0085\\u202e.jpg"),
        ("file:///data/%ff.jpg", None),
        ("s3://images/100%25.jpg", None),
        ("s3://images/猫.jpg", None),
    ],
    ids=["file", "https", "control", "not utf-8", "s3", "plain"],
)
def test_names_in_urls_are_shown_readable(reference: str, readable: str | None) -> None:
    """Beside the reference itself, where both differ."""
    card = ParsedPage(render([tagged("a", reference=reference)])).data[0]
    assert card["ref"] == reference.partition("?")[0]
    assert card.get("readable") == readable


def test_odd_numbers_are_shown_as_zero() -> None:
    """JSON has no infinity, and the script would fail on null."""
    card = ParsedPage(render([tagged("a", tags={"猫": float("inf")}, total=float("nan"))])).data[0]
    assert card["tags"][0][1] == 0.0
    assert card["total"] == 0.0


@pytest.mark.parametrize(("sha256", "changed"), [("a" * 64, False), ("b" * 64, True)])
def test_images_that_changed_are_marked(sha256: str, changed: bool) -> None:
    """The thumbnail shows another image than the one that was tagged."""
    answer = tagged("a")
    assert answer.image is not None
    image = answer.image.__class__(reference="s3://images/a.jpg", sha256="a" * 64)
    answer = Answer(id="a", status="tagged", image=image, tags=answer.tags)
    card = ParsedPage(render([answer], {"s3://images/a.jpg": Thumbnail(webp=WEBP, sha256=sha256)})).data[0]
    assert card["changed"] is changed


def test_missing_thumbnails_have_a_reason() -> None:
    """The code on the card, and the problem in the head of the page."""
    page = render(
        [tagged("a"), tagged("b")], {"s3://images/a.jpg": Thumbnail(code="source_forbidden")}, note="no worker here"
    )
    parsed = ParsedPage(page)
    assert [card.get("unseen") for card in parsed.data] == ["source_forbidden", None]
    assert "no worker here" in parsed.texts["bdi"]


def test_thousand_images_make_one_file() -> None:
    """8 kB a thumbnail: under 10 MB."""
    answers = [tagged(f"job-{n}", tags={f"标签{n % 200}-{k}": 0.9 / (k + 1) for k in range(5)}) for n in range(1000)]
    thumbnails = {f"s3://images/job-{n}.jpg": Thumbnail(webp=WEBP) for n in range(1000)}
    page = render(answers, thumbnails)
    assert len(page.encode()) < 10_000_000
    assert len(ParsedPage(page).data) == 1000
