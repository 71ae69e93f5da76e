"""The label bank: what a request means, vectors computed once, and no label set that is taken for another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import shiwu_worker
from shiwu.contract import ErrorCode, Head, Lane, ModelInfo, RequestError, WarningCode, parse_request
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode, FatalError, Rejected
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_checks import LabelFindings, LabelTokens
from shiwu_worker.jobs.label_rules import Phrase
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedWord
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.service.labels import load_label_bank, read_label_sets
from shiwu_worker.stages.score.label_bank import LabelBank
from shiwu_worker.stages.score.label_files import load_label_sets
from shiwu_worker.stages.score.label_warnings import label_warnings
from shiwu_worker.stages.score.scorer import Scorer
from shiwu_worker.stages.score.text_cost import TextCost
from shiwu_worker.stages.score.word_cache import OVERHEAD_BYTES
from tests.support.encoders import make_encoder, make_model, saved

EMBEDDED = Path(shiwu_worker.__file__).parent / "data/label_sets"


MODEL = ModelInfo(id="m", revision="r", dtype="float32", device="cpu")


class Texts:
    """A text encoder that gives every text a vector of its own, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.texts: list[str] = []

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors made of each text's hash."""
        self.calls += 1
        self.texts += texts
        return np.stack([vector_of(text) for text in texts])

    def tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """A token for each letter; labels of question marks are not readable."""
        return [LabelTokens(tuple(map(ord, label)), is_readable=set(label) != {"?"}) for label in labels]


def vector_of(text: str) -> NDArray[np.float32]:
    """A unit vector that no other text has."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    raw = np.frombuffer(digest, np.uint8).astype(np.float64) - 127.5
    return (raw / np.linalg.norm(raw)).astype(np.float32)


def make_bank(texts: Texts, *, max_cached: int = 2, max_bytes: int = 1 << 20) -> LabelBank:
    """A bank with the embedded sets."""
    return LabelBank(
        sets=load_label_sets([EMBEDDED]),
        default="six-zh",
        encode_texts=texts,
        label_tokens=texts.tokens,
        max_cached=max_cached,
        max_bytes=max_bytes,
        has_bias=True,
    )


def test_embedded_label_sets_are_loaded() -> None:
    """The six words of the reference script bare, 256 everyday words, and all that the embedded model knows."""
    sets = load_label_sets([EMBEDDED])
    assert sets["six-zh"].words == ("动物", "人物", "交通工具", "食物", "建筑", "植物")
    assert sets["six-zh"].templates == ("{}",)
    assert len(sets["everyday-zh"].words) == 256
    assert len(sets["photo-zh"].words) > 1000


def test_vectors_are_averaged_over_templates_and_cached() -> None:
    """Unit vectors; the second use computes nothing; the least recently used set goes first."""
    texts = Texts()
    bank = make_bank(texts, max_bytes=0)
    first = bank.encoded(LabelSet("x", ("猫", "小狗"), ("{}", "一张{}的图片")))
    assert np.linalg.norm(first.vectors, axis=1) == pytest.approx(1.0)
    calls = texts.calls
    other = bank.encoded(LabelSet("other name", ("猫", "小狗"), ("{}", "一张{}的图片"), "sigmoid"))
    assert other.vectors is first.vectors
    assert texts.calls == calls
    for words in (("a",), ("b",)):
        bank.encoded(LabelSet(None, words))
    del first, other
    bank.encoded(LabelSet("x", ("猫", "小狗"), ("{}", "一张{}的图片")))
    assert texts.calls > calls + 2


def test_labels_are_cached_one_by_one() -> None:
    """A set that shares labels with an earlier one costs its new labels only; templates tell labels apart."""
    texts = Texts()
    bank = make_bank(texts)
    bank.encoded(LabelSet(None, ("猫", "狗")))
    assert texts.texts == ["猫", "狗"]
    bank.encoded(LabelSet(None, ("鸟", "狗", "猫")))
    assert texts.texts == ["猫", "狗", "鸟"]
    bank.encoded(LabelSet(None, ("狗",), ("一张{}",)))
    assert texts.texts == ["猫", "狗", "鸟", "一张狗"]


def test_memory_of_inline_labels_is_bounded() -> None:
    """The least recently used labels are dropped, and encoded again when they are needed."""
    texts = Texts()
    entry_bytes = vector_of("").nbytes + OVERHEAD_BYTES
    bank = make_bank(texts, max_cached=1, max_bytes=2 * 3 * entry_bytes)
    for words in (("a", "b"), ("c",), ("a", "d")):
        bank.encoded(LabelSet(None, words))
    assert bank.cached_words(LabelSet(None, ("a", "b", "c", "d"))).keys() == {(("{}",), word) for word in "acd"}


def test_set_that_is_completed_twice_counts_once() -> None:
    """Its memory counts once, so later sets find the same room."""
    texts = Texts()
    label_set = LabelSet(None, ("a", "b"))
    set_bytes = 2 * vector_of("").nbytes
    bank = make_bank(texts, max_cached=9, max_bytes=2 * 3 * set_bytes)
    for _ in range(3):
        bank.complete(label_set, bank.encode_words(label_set, label_set.phrases))
    bank.encoded(LabelSet(None, ("c", "d")))
    bank.encoded(LabelSet(None, ("e", "f")))
    calls = texts.calls
    bank.encoded(label_set)
    assert texts.calls == calls


def test_inline_labels_never_drop_configured_sets() -> None:
    """However many label sets requests bring along, the operator's sets and their labels stay."""
    texts = Texts()
    bank = make_bank(texts, max_cached=1, max_bytes=0)
    configured = [bank.encoded(label_set) for label_set in bank.configured]
    assert len(configured) == 3
    for number in range(20):
        bank.encoded(LabelSet(None, (f"word {number}", "other")))
    calls = texts.calls
    assert [bank.known(label_set) for label_set in bank.configured] == configured
    assert bank.known(bank.resolve("six-zh", "sigmoid")) is not None
    bank.encoded(LabelSet(None, bank.resolve("six-zh").words[:3]))
    assert texts.calls == calls


def test_cost_is_learned_from_measured_calls() -> None:
    """Seconds per unit of length: a change is learned within a few calls, and a short call does not raise it."""
    cost = TextCost(max_units=10)
    assert (cost.units("abc"), cost.units("a" * 100)) == (5, 10)
    cost.learn(texts=100, units=1000, seconds=1.0)
    assert cost.seconds(100) == pytest.approx(0.1)
    cost.learn(texts=1, units=5, seconds=1.0)
    assert cost.seconds(100) == pytest.approx(0.1)
    for _ in range(20):
        cost.learn(texts=100, units=1000, seconds=4.0)
    assert cost.seconds(100) == pytest.approx(0.4, rel=0.05)
    for _ in range(10):
        cost.learn(texts=100, units=1000, seconds=1.0)
    assert cost.seconds(100) == pytest.approx(0.1, rel=0.05)


@given(st.lists(st.text("abc猫", min_size=1, max_size=5), min_size=1, max_size=8, unique=True), st.data())
def test_vectors_by_label_equal_vectors_by_set(words: list[str], data: st.DataObject) -> None:
    """In whatever portions the labels are encoded, and whatever was cached before."""
    label_set = LabelSet(None, tuple(words), ("{}", "一张{}"))
    by_set, by_label = make_bank(Texts()), make_bank(Texts())
    cached: dict[Phrase, EncodedWord] = {}
    left = data.draw(st.permutations(label_set.phrases))
    while left:
        size = data.draw(st.integers(1, len(left)))
        cached |= by_label.encode_words(label_set, left[:size])
        left = left[size:]
    found = by_label.complete(label_set, cached)
    assert np.array_equal(found.vectors, by_set.encoded(label_set).vectors)
    assert found.texts.findings == by_set.encoded(label_set).texts.findings


def test_real_text_tower_gives_a_label_one_vector(tmp_path: Path) -> None:
    """Alone, or with longer labels to which it is padded: the same up to rounding."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path))
    words = ["a", "bcd", "猫", "efghijk"]
    whole = encoder.encode_texts(words)
    single = np.concatenate([encoder.encode_texts([word]) for word in words])
    assert whole == pytest.approx(single, abs=1e-5)


def test_equal_label_sets_share_one_object() -> None:
    """Jobs with the same inline labels are scored together, whichever message they came in."""
    bank = make_bank(Texts())
    asked = [parse_request({"image": "s3://b/k", "labels": ["猫", "狗"]}).labels for _ in range(2)]
    assert asked[0] is not asked[1]
    assert bank.encoded(bank.resolve(asked[0])) is bank.encoded(bank.resolve(asked[1]))


def test_request_is_resolved_to_its_label_set() -> None:
    """Nothing is the default set, a name a set, words themselves; the head may be chosen."""
    bank = make_bank(Texts())
    assert bank.resolve(None).name == "six-zh"
    assert bank.resolve("photo-zh").name == "photo-zh"
    assert bank.resolve(("猫",)).words == ("猫",)
    chosen = bank.resolve("six-zh", "sigmoid")
    assert (chosen.head, chosen.words) == ("sigmoid", bank.resolve(None).words)
    assert chosen.info.digest != bank.resolve(None).info.digest
    with pytest.raises(Rejected, match="expected one of everyday-zh, photo-zh, six-zh"):
        bank.resolve("none")


def test_sigmoid_needs_a_bias() -> None:
    """Of the model or of the label set: without one every score is near 1, which says nothing."""
    calibrated = LabelSet("mine", ("猫",), bias=-10.0)
    sets = {"mine": calibrated, "plain": LabelSet("plain", ("猫",))}
    bank = LabelBank(
        sets=sets, default="plain", encode_texts=Texts(), label_tokens=Texts().tokens, max_cached=2, has_bias=False
    )
    assert bank.resolve("mine", "sigmoid").head == "sigmoid"
    for labels in ("plain", ("猫", "狗"), None):
        with pytest.raises(Rejected, match=r"sigmoid, which needs a bias.*min_cosine") as caught:
            bank.resolve(labels, "sigmoid")
        assert caught.value.code is ErrorCode.INVALID_REQUEST
    wrong = {"plain": LabelSet("plain", ("猫",), head="sigmoid")}
    with pytest.raises(ValueError, match=r"label set plain: head: .*sigmoid"):
        LabelBank(
            sets=wrong, default="plain", encode_texts=Texts(), label_tokens=Texts().tokens, max_cached=2, has_bias=False
        )


def test_worker_with_sigmoid_and_no_bias_ends_with_config(tmp_path: Path) -> None:
    """As for other label sets that cannot work, the exit code is 64 and the text names the set."""
    (tmp_path / "mine.yaml").write_text("name: mine\nhead: sigmoid\nlabels: [猫]\n", encoding="utf-8")
    encoder = SimpleNamespace(
        encode_texts=Texts(),
        label_tokens=Texts().tokens,
        text_tokens=77,
        bias=None,
        default_head="softmax",
        info=MODEL,
    )
    settings = Settings(labels_dir=tmp_path)
    with pytest.raises(FatalError, match="label set mine") as caught:
        load_label_bank(settings, encoder, read_label_sets(settings))
    assert caught.value.exit_code is ExitCode.CONFIG
    encoder.bias = -12.0
    assert load_label_bank(settings, encoder, read_label_sets(settings)).resolve("mine").head == "sigmoid"


def warned(bank: LabelBank, *labels: str, head: Head | None = None) -> list[WarningCode | str]:
    """The codes of the warnings for inline labels."""
    return [one.code for one in bank.encoded(bank.resolve(labels, head)).warnings]


def test_labels_give_warnings() -> None:
    """Unreadable, alike and single labels, each by its own code; usual labels give none."""
    bank = make_bank(Texts(), max_cached=9)
    assert warned(bank, "猫", "狗") == []
    assert warned(bank, "猫", "??", "???") == [WarningCode.LABELS_UNREADABLE]
    assert warned(bank, "猫") == [WarningCode.SINGLE_LABEL]
    assert warned(bank, "猫", head="sigmoid") == []
    # The fake model cuts "ab" as tokenizers cut at their limit.
    bank._label_tokens = lambda labels: [LabelTokens((ord(label[0]),), is_readable=True) for label in labels]
    assert warned(bank, "ab", "ac", "d") == [WarningCode.LABELS_ALIKE]


def test_warning_names_few_labels_and_stays_short() -> None:
    """It stands in every answer, so neither many nor long labels make it long."""
    many = tuple(f"{number}{'x' * 99}" for number in range(9))
    found = LabelFindings(unreadable=many, alike=(("猫", "猫咪"), many))
    one, two = label_warnings(LabelSet(None, ("猫", "狗")), found)
    assert one.message.startswith(f"the model cannot read 9 of 2 labels: 0{'x' * 59}…, 1")
    assert two.message.startswith("the model cannot tell these labels apart: 猫 = 猫咪; 0x")
    assert max(len(one.message), len(two.message)) < 400


def test_warnings_are_logged_once_per_label_set() -> None:
    """Every answer carries them; the log has one line, with all codes and the labels."""
    bank = make_bank(Texts())
    with structlog.testing.capture_logs() as logged:
        first = bank.encoded(bank.resolve(("??",)))
        assert bank.encoded(bank.resolve(("??",))).warnings is first.warnings
    (line,) = logged
    assert (line["event"], line["log_level"]) == ("labels_questionable", "warning")
    assert line["codes"] == ["labels_unreadable", "single_label"]
    assert "??" in line["text"]


# Texts that are easily taken for others once they are joined, quoted or cut.
JOINTS = st.sampled_from(
    ["\n", "\0", "\x1f", ",", "，", " ", "|", '"', "\\", "\\n", "{}", "[", "]", '","', "猫", "狗", ""]
)
WORDS = st.one_of(st.lists(JOINTS, min_size=1, max_size=4).map("".join), st.text(max_size=4))
WORD_LISTS = st.lists(WORDS, min_size=1, max_size=4, unique=True).map(tuple)
SETS = st.builds(LabelSet, st.none(), WORD_LISTS, st.sampled_from([("{}",), ("{}\n",), ("{}", "{}{"), ("{},",)]))
CLOSE_SETS = st.lists(SETS, min_size=1, max_size=6)
SCORER = Scorer(scale=20.0, bias=None, model=MODEL)


def regrouped(label_set: LabelSet) -> LabelSet:
    """Other labels that give the same text when they are joined by line breaks."""
    return LabelSet(None, tuple("\n".join(label_set.words).split("\n")), label_set.templates)


def expected_vectors(label_set: LabelSet) -> NDArray[np.float64]:
    """The vectors of the labels by the definition."""
    total = sum(
        np.stack([vector_of(template.replace("{}", word)) for word in label_set.words]).astype(np.float64)
        for template in label_set.templates
    )
    vectors: NDArray[np.float64] = total / np.linalg.norm(total, axis=1, keepdims=True)
    return vectors


@given(CLOSE_SETS, st.integers(1, 3))
def test_no_label_set_gets_the_tags_of_another(sets: list[LabelSet], max_cached: int) -> None:
    """Whatever texts are asked for together and one after the other, each job has its own words and cosines."""
    bank = LabelBank(
        sets={}, default="", encode_texts=Texts(), label_tokens=Texts().tokens, max_cached=max_cached, has_bias=False
    )
    asked = [one for label_set in sets for one in (label_set, regrouped(label_set))] * 2
    image = vector_of("the image")
    jobs = [
        Job(
            id=f"j{number}",
            key=Lane.BULK.queue,
            attempt=1,
            raw=b"",
            moments=StageTimestamps(claimed_s=0.0),
            request=parse_request({"image": "s3://b/k.jpg", "top_k": 1000}),
            label_set=label_set,
            labels=bank.encoded(label_set),
        )
        for number, label_set in enumerate(asked)
    ]
    SCORER.score(jobs, np.stack([image] * len(jobs)))
    for job, label_set in zip(jobs, asked, strict=True):
        cosines = expected_vectors(label_set) @ image
        assert job.tags is not None
        assert sorted(tag.label for tag in job.tags) == sorted(label_set.words)
        found = {tag.label: tag.cosine for tag in job.tags}
        expected = dict(zip(label_set.words, cosines.tolist(), strict=True))
        if len(expected) == len(label_set.words):
            assert found == pytest.approx(expected, abs=2e-6)


@given(st.lists(SETS, min_size=2, max_size=6))
def test_different_label_sets_have_different_digests(sets: list[LabelSet]) -> None:
    """An answer's digest stands for the labels, the templates and the head, however the texts could be joined."""
    asked = {one for label_set in sets for one in (label_set, regrouped(label_set))}
    assert len({label_set.info.digest for label_set in asked}) == len(asked)


CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
NO_WIDTH = [0x00AD, 0x180E, 0x200B, *range(0x2060, 0x2066), *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFC)]


@pytest.mark.parametrize("code", [*CONTROLS, *NO_WIDTH, 0xD800, 0xDFFF])
def test_control_characters_in_labels_are_rejected(code: int) -> None:
    """In a message they are `invalid_labels`, wherever the label stands in the list."""
    with pytest.raises(RequestError) as caught:
        parse_request({"image": "s3://b/k", "labels": ["猫", f"狗{chr(code)}鸟"]})
    assert caught.value.code is ErrorCode.INVALID_LABELS


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8))
def test_labels_that_pass_can_be_written_and_printed(label: str) -> None:
    """What the door lets through has no character that breaks a line or turns a terminal's text around."""
    try:
        request = parse_request({"image": "s3://b/k", "labels": [label]})
    except RequestError:
        return
    assert isinstance(request.labels, tuple)
    assert request.labels[0] == label.strip()
    assert not {ord(char) for char in request.labels[0]} & {*CONTROLS, *NO_WIDTH}
    assert request.to_json()
