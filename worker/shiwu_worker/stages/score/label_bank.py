"""Label sets by name, and a cache of their text vectors.

Vectors are cached by text, so that label sets share them, and by label set. Those of configured sets are kept forever.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, get_args
from weakref import WeakValueDictionary

import numpy as np
import structlog
from structlog.typing import FilteringBoundLogger

from shiwu.broker.chunks import chunks
from shiwu.contract import ErrorCode, Head, Stage
from shiwu_worker.errors import Rejected
from shiwu_worker.jobs.label_checks import LabelTokens, check_labels, check_texts
from shiwu_worker.jobs.label_rules import Phrase, Templates
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedLabels, EncodedWord, TextVectors
from shiwu_worker.stages.score.label_warnings import label_warnings
from shiwu_worker.stages.score.text_cost import TextCost
from shiwu_worker.stages.score.word_cache import WordCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

log: FilteringBoundLogger = structlog.get_logger()
TEXTS_PER_CALL: Final = 128
"""Most texts of one call of the model, where nothing waits for it."""
DEFAULT_CACHE_BYTES: Final = 256 << 20
DEFAULT_TOKENS: Final = 77
"""Length limit of CLIP's texts."""
SIGMOID_LACKS_BIAS: Final = (
    "expected softmax, got sigmoid, which needs a bias, and this model has none: every score would be near 1. "
    "Use softmax and set min_cosine as the threshold, or give the label set a bias"
)


class LabelBank:
    """Label sets and their vectors. Thread-safe, but only one thread at a time may encode.

    Args:
        default: name of the label set for requests that name none.
        encode_texts: (m texts) → float32 (m, d) unit vectors; called on the thread that encodes.
        label_tokens: the model's tokens of labels, for warnings about labels that the model cannot read.
        max_cached: inline label sets whose vectors are kept; the least recently used one is dropped first.
        max_bytes: memory for vectors of inline labels; one half holds label sets, the other single labels.
        has_bias: whether the model has a bias; without it only label sets with their own bias may use sigmoid.
        inline_head: head of inline labels if the request names none.
        max_tokens: the model cuts longer texts.
        clock: gives monotonic seconds.

    Raises:
        ValueError: when a label set uses sigmoid without a bias.
    """

    def __init__(
        self,
        *,
        sets: Mapping[str, LabelSet],
        default: str,
        encode_texts: Callable[[Sequence[str]], NDArray[np.float32]],
        label_tokens: Callable[[Sequence[str]], Sequence[LabelTokens]],
        max_cached: int,
        has_bias: bool,
        max_bytes: int = DEFAULT_CACHE_BYTES,
        inline_head: Head = "softmax",
        max_tokens: int = DEFAULT_TOKENS,
        revision: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._has_bias = has_bias
        self._default = default
        self.sets = dict(sets)
        """The label sets by name."""
        self._by_request = self._requests(sets)
        self.configured = tuple({label_set.text_key: label_set for label_set in sets.values()}.values())
        """The label sets of the operator and of the package, without those that differ in name or head only."""
        self.cost = TextCost(max_units=max_tokens)
        self._encode_texts = encode_texts
        self._label_tokens = label_tokens
        self._max_cached = max_cached
        self._max_set_bytes = max_bytes // 2
        self._inline_head = inline_head
        self._revision = revision
        self._clock = clock
        self._lock = threading.Lock()
        self._words = WordCache(max_bytes=max_bytes // 2)
        # The keys are whole values. With a digest or joined texts as a key, two label sets could share one entry, so a
        # producer could get the labels of another.
        self._encoded: OrderedDict[LabelSet, EncodedLabels] = OrderedDict()
        self._encoded_bytes = 0
        self._pinned_keys = {label_set.text_key for label_set in sets.values()}
        self._pinned: dict[LabelSet, EncodedLabels] = {}
        self._texts: WeakValueDictionary[Hashable, TextVectors] = WeakValueDictionary()

    def _requests(self, sets: Mapping[str, LabelSet]) -> dict[tuple[str | None, Head | None], LabelSet]:
        """Label sets by the name (None: the default) and the head (None: the set's own) of a request."""
        found: dict[tuple[str | None, Head | None], LabelSet] = {}
        for name, label_set in sets.items():
            if self._lacks_bias(label_set):
                raise ValueError(f"label set {name}: head: {SIGMOID_LACKS_BIAS}")
            heads: dict[Head | None, LabelSet] = {None: label_set}
            for head in get_args(Head):
                with_head = label_set if head == label_set.head else replace(label_set, head=head)
                if not self._lacks_bias(with_head):
                    heads[head] = with_head
            for asked in (name, None) if name == self._default else (name,):
                found |= {(asked, head): with_head for head, with_head in heads.items()}
        return found

    def _lacks_bias(self, label_set: LabelSet) -> bool:
        return label_set.head == "sigmoid" and label_set.bias is None and not self._has_bias

    def resolve(self, labels: str | tuple[str, ...] | None, head: Head | None = None) -> LabelSet:
        """The label set of a request.

        Raises:
            Rejected: unknown_label_set, or invalid_request for sigmoid without a bias.
        """
        if isinstance(labels, tuple):
            found = LabelSet(name=None, words=labels, head=head or self._inline_head)
            if not self._lacks_bias(found):
                return found
        elif (named := self._by_request.get((labels, head))) is not None:
            return named
        elif labels is not None and (labels, None) not in self._by_request:
            text = f"labels: expected one of {', '.join(sorted(self.sets))}, got {labels!r}"
            raise Rejected(ErrorCode.UNKNOWN_LABEL_SET, text, stage=Stage.CLAIM)
        raise Rejected(ErrorCode.INVALID_REQUEST, f"head: {SIGMOID_LACKS_BIAS}", stage=Stage.CLAIM)

    # -------------------------------------------------------------------------------- other sets while the worker runs
    def check(self, sets: Mapping[str, LabelSet]) -> None:
        """Check that `install` would accept these sets.

        Raises:
            ValueError: a label set uses sigmoid without a bias.
        """
        self._requests(sets)

    def default_of(self, sets: Mapping[str, LabelSet]) -> LabelSet | None:
        """The set among these that requests without labels get."""
        return sets.get(self._default)

    def install(self, sets: Mapping[str, LabelSet], encoded: Sequence[EncodedLabels]) -> None:
        """Resolve requests to these sets from now on. Sets that they replace stay cached for jobs that have them.

        Args:
            encoded: those of the sets that are new, with their vectors.

        Raises:
            ValueError: a label set uses sigmoid without a bias.
        """
        by_request = self._requests(sets)
        configured = {label_set.text_key: label_set for label_set in sets.values()}
        with self._lock:
            former, self._pinned = self._pinned, {each.label_set: each for each in encoded}
            self._pinned_keys = set(configured)
            for label_set, each in former.items():
                if label_set.text_key in configured:
                    self._pinned.setdefault(label_set, each)
                else:
                    self._cache(each)
        self._words.pin_only({phrase for label_set in configured.values() for phrase in label_set.phrases})
        self.configured = tuple(configured.values())
        self.sets = dict(sets)
        # One assignment, so that each request finds the former sets or the new ones.
        self._by_request = by_request

    # -------------------------------------------------------------------------------- cached vectors
    def known(self, label_set: LabelSet) -> EncodedLabels | None:
        """The label set with its vectors, or None where some are not cached as a set. Encodes nothing."""
        # Most jobs name a set of the operator. They need no lock, because sets are only added to a mapping.
        if (pinned := self._pinned.get(label_set)) is not None:
            return pinned
        with self._lock:
            # Asked again: `install` may have replaced the mapping.
            if (pinned := self._pinned.get(label_set)) is not None:
                return pinned
            if (found := self._encoded.get(label_set)) is not None:
                self._encoded.move_to_end(label_set)
                return found
            # A set that differs in its name or head only has the same vectors.
            texts = self._texts.get(label_set.text_key)
            return None if texts is None else self._keep(label_set, texts)

    def cached_words(self, label_set: LabelSet, phrases: Sequence[Phrase] | None = None) -> dict[Phrase, EncodedWord]:
        """Those of the phrases, by default all of the set, whose vectors are cached."""
        return self._words.find(label_set.phrases if phrases is None else phrases)

    def units(self, phrase: Phrase) -> int:
        """What a phrase costs in units of `cost`: its length in all its templates."""
        templates, text = phrase
        return sum(self.cost.units(template.replace("{}", text)) for template in templates)

    # -------------------------------------------------------------------------------- encoding
    def encode_words(self, label_set: LabelSet, phrases: Sequence[Phrase]) -> dict[Phrase, EncodedWord]:
        """Compute the vectors of phrases of this set; learn what that costs.

        The vector of a phrase is averaged over the templates and renormalised: the zero-shot recipe of CLIP (Radford et
        al. 2021, section 3.1.4). Raises whatever the model raises.
        """
        by_templates: dict[Templates, list[str]] = defaultdict(list)
        for templates, text in phrases:
            by_templates[templates].append(text)
        found: dict[Phrase, EncodedWord] = {}
        for templates, texts in by_templates.items():
            found |= self._encode(templates, texts)
        (self._words.pin if self._is_configured(label_set) else self._words.add)(found)
        return found

    def _encode(self, templates: Templates, texts: Sequence[str]) -> dict[Phrase, EncodedWord]:
        began_s = self._clock()
        sentences = [[template.replace("{}", text) for text in texts] for template in templates]
        total = np.sum([self._encode_texts(each) for each in sentences], axis=0)
        vectors = np.asarray(total / np.linalg.norm(total, axis=1, keepdims=True), dtype=np.float32)
        # Copies, because a row would keep the vectors of all other labels.
        found = {
            (templates, text): EncodedWord(vector.copy(), tokens)
            for text, vector, tokens in zip(texts, vectors, self._label_tokens(texts), strict=True)
        }
        units = sum(len(each) * max(map(self.cost.units, each)) for each in sentences)
        self.cost.learn(texts=len(texts) * len(sentences), units=units, seconds=self._clock() - began_s)
        return found

    def complete(self, label_set: LabelSet, words: Mapping[Phrase, EncodedWord]) -> EncodedLabels:
        """The label set with its vectors, made from the vectors of all its texts."""
        encoded = [words[phrase] for phrase in label_set.phrases]
        vectors, tokens = np.stack([each.vector for each in encoded]), [each.tokens for each in encoded]
        if label_set.rules is None:
            findings = check_labels(label_set.words, tokens=tokens, vectors=vectors)
        else:
            counts = [len(each) for each in label_set.rules.phrases]
            findings = check_texts(label_set.words, counts, tokens=tokens, vectors=vectors)
        with self._lock:
            texts = self._texts.setdefault(label_set.text_key, TextVectors(vectors, findings))
            return self._keep(label_set, texts)

    def encoded(self, label_set: LabelSet) -> EncodedLabels:
        """The label set with its vectors; those that are missing are computed while the caller waits."""
        if (known := self.known(label_set)) is not None:
            return known
        words = self.cached_words(label_set)
        missing = [phrase for phrase in dict.fromkeys(label_set.phrases) if phrase not in words]
        for portion in chunks(missing, TEXTS_PER_CALL):
            words |= self.encode_words(label_set, portion)
        return self.complete(label_set, words)

    def _is_configured(self, label_set: LabelSet) -> bool:
        return label_set.name is not None and label_set.text_key in self._pinned_keys

    def _keep(self, label_set: LabelSet, texts: TextVectors) -> EncodedLabels:
        """Cache a label set with its vectors. The caller holds the lock."""
        warnings = label_warnings(label_set, texts.findings, revision=self._revision)
        if warnings:
            codes = [str(warning.code) for warning in warnings]
            text = "; ".join(warning.message for warning in warnings)
            log.warning(
                "labels_questionable", name=label_set.name, digest=label_set.info.digest, codes=codes, text=text
            )
        encoded = EncodedLabels(label_set, texts, warnings, is_calibrated=self._is_calibrated(label_set))
        if self._is_configured(label_set):
            self._pinned[label_set] = encoded
        else:
            self._cache(encoded)
        return encoded

    def _is_calibrated(self, label_set: LabelSet) -> bool | None:
        if label_set.calibrated_for is None or self._revision is None:
            return None
        return label_set.calibrated_for == self._revision

    def _cache(self, encoded: EncodedLabels) -> None:
        """Keep a label set for a while. The caller holds the lock."""
        label_set = encoded.label_set
        if (former := self._encoded.pop(label_set, None)) is not None:
            self._encoded_bytes -= former.vectors.nbytes
        self._encoded[label_set] = encoded
        self._encoded_bytes += encoded.vectors.nbytes
        while len(self._encoded) > 1 and (
            len(self._encoded) > self._max_cached or self._encoded_bytes > self._max_set_bytes
        ):
            _, dropped = self._encoded.popitem(last=False)
            self._encoded_bytes -= dropped.vectors.nbytes
