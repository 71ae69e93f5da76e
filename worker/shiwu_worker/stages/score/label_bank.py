"""Label sets by name, and a cache of their text vectors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, get_args
from weakref import WeakValueDictionary

import numpy as np
import structlog
from structlog.typing import FilteringBoundLogger

from shiwu.contract import ErrorCode, Head, Stage
from shiwu_worker.errors import Rejected
from shiwu_worker.jobs.label_checks import LabelTokens, check_labels
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedLabels, TextVectors
from shiwu_worker.stages.score.label_warnings import label_warnings

if TYPE_CHECKING:
    from numpy.typing import NDArray

log: FilteringBoundLogger = structlog.get_logger()
SIGMOID_LACKS_BIAS: Final = (
    "expected softmax, got sigmoid, which needs a bias, and this model has none: every score would be near 1. "
    "Use softmax and set min_cosine as the threshold, or give the label set a bias"
)


class LabelBank:
    """Label sets and their vectors.

    Args:
        default: name of the label set for requests that name none.
        encode_texts: (m texts) → float32 (m, d) unit vectors; called on the thread that calls `encoded`.
        max_cached: label sets whose vectors are kept; the least recently used one is dropped first.
        label_tokens: the model's tokens of labels, for warnings about labels that the model cannot read.
        has_bias: whether the model has a bias; without it only label sets with their own bias may use sigmoid.
        inline_head: head of inline labels if the request names none.

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
        inline_head: Head = "softmax",
    ) -> None:
        self._has_bias = has_bias
        self._names = sorted(sets)
        self._by_request: dict[tuple[str | None, Head | None], LabelSet] = {}
        """Named label sets by the name (None: the default) and the head (None: the set's own) of a request."""
        for name, label_set in sets.items():
            if self._lacks_bias(label_set):
                raise ValueError(f"label set {name}: head: {SIGMOID_LACKS_BIAS}")
            self._add(name, label_set)
            if name == default:
                self._add(None, label_set)
        self._encode_texts = encode_texts
        self._label_tokens = label_tokens
        self._max_cached = max_cached
        self._inline_head = inline_head
        # The keys are whole values. With a digest or joined texts as a key, two label sets could share one entry, so a
        # producer could get the labels of another.
        self._encoded: OrderedDict[LabelSet, EncodedLabels] = OrderedDict()
        self._last: EncodedLabels | None = None
        """The label set of the last call: most jobs of a batch have the same one."""
        self._texts: WeakValueDictionary[tuple[tuple[str, ...], tuple[str, ...]], TextVectors] = WeakValueDictionary()

    def _add(self, name: str | None, label_set: LabelSet) -> None:
        self._by_request[name, None] = label_set
        for head in get_args(Head):
            with_head = label_set if head == label_set.head else replace(label_set, head=head)
            if not self._lacks_bias(with_head):
                self._by_request[name, head] = with_head

    def _lacks_bias(self, label_set: LabelSet) -> bool:
        return label_set.head == "sigmoid" and label_set.bias is None and not self._has_bias

    def resolve(self, labels: str | tuple[str, ...] | None, head: Head | None = None) -> LabelSet:
        """The label set of a request. Thread-safe.

        Raises:
            Rejected: unknown_label_set, or invalid_request for sigmoid without a bias.
        """
        if isinstance(labels, tuple):
            found = LabelSet(name=None, words=labels, head=head or self._inline_head)
            if not self._lacks_bias(found):
                return found
        elif (named := self._by_request.get((labels, head))) is not None:
            return named
        elif labels is not None and labels not in self._names:
            text = f"labels: expected one of {', '.join(self._names)}, got {labels!r}"
            raise Rejected(ErrorCode.UNKNOWN_LABEL_SET, text, stage=Stage.CLAIM)
        raise Rejected(ErrorCode.INVALID_REQUEST, f"head: {SIGMOID_LACKS_BIAS}", stage=Stage.CLAIM)

    def encoded(self, label_set: LabelSet) -> EncodedLabels:
        """The label set with its vectors, which are computed on first use. Call it on one thread only."""
        if self._last is not None and self._last.label_set is label_set:
            return self._last
        found = self._encoded.get(label_set)
        if found is None:
            found = self._add_encoded(label_set)
        self._encoded.move_to_end(label_set)
        self._last = found
        return found

    def _add_encoded(self, label_set: LabelSet) -> EncodedLabels:
        key = (label_set.templates, label_set.words)
        texts = self._texts.get(key)
        if texts is None:
            texts = self._texts[key] = self._encode(label_set)
        warnings = label_warnings(label_set, texts.findings)
        if warnings:
            codes = [str(warning.code) for warning in warnings]
            text = "; ".join(warning.message for warning in warnings)
            log.warning(
                "labels_questionable", name=label_set.name, digest=label_set.info.digest, codes=codes, text=text
            )
        encoded = self._encoded[label_set] = EncodedLabels(label_set, texts, warnings)
        while len(self._encoded) > self._max_cached:
            self._encoded.popitem(last=False)
        return encoded

    def _encode(self, label_set: LabelSet) -> TextVectors:
        """Vectors of the labels, averaged over the templates and renormalised, and findings about the labels.

        This is the zero-shot recipe of CLIP (Radford et al. 2021, section 3.1.4).
        """
        words = label_set.words
        total = sum(
            self._encode_texts([template.replace("{}", word) for word in words]) for template in label_set.templates
        )
        vectors = np.asarray(total / np.linalg.norm(total, axis=1, keepdims=True), dtype=np.float32)
        return TextVectors(vectors, check_labels(words, tokens=self._label_tokens(words), vectors=vectors))
