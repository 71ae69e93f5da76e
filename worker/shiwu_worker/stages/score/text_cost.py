"""What it costs to encode texts, learned from texts that were encoded."""

from __future__ import annotations

from typing import Final

FIRST_UNIT_S: Final = 1e-4
"""Assumed until the first texts were encoded, which happens before the first job."""
MARKS: Final = 2
"""Tokens that a tokenizer adds at both ends of a text."""
MIN_LEARNED_TEXTS: Final = 8
"""A call with fewer texts costs mostly what any call costs, so it does not make the others dearer."""
UP_GAIN: Final = 0.2
DOWN_GAIN: Final = 0.5
"""Weights of a new measurement. Higher costs often come from other work on the machine and pass."""


class TextCost:
    """Estimates seconds from the lengths of texts. Thread-safe: the estimate is one number.

    A unit is a character, which stands for about one token.

    Args:
        max_units: the model cuts longer texts.
    """

    def __init__(self, *, max_units: int) -> None:
        self._max_units = max_units
        self._unit_s = FIRST_UNIT_S
        self._is_measured = False

    def units(self, text: str) -> int:
        """The length that counts."""
        return min(len(text) + MARKS, self._max_units)

    def seconds(self, units: float) -> float:
        """How long the device is expected to take for so many units."""
        return units * self._unit_s

    def learn(self, *, texts: int, units: float, seconds: float) -> None:
        """Learn from one call of the model.

        Args:
            texts: how many there were.
            units: their number times the units of the longest, to which the others are padded.
        """
        found_s = seconds / max(1.0, units)
        if not self._is_measured:
            self._unit_s, self._is_measured = found_s, True
        elif found_s < self._unit_s:
            self._unit_s += DOWN_GAIN * (found_s - self._unit_s)
        elif texts >= MIN_LEARNED_TEXTS:
            self._unit_s += UP_GAIN * (found_s - self._unit_s)
