"""The model of most tests: it knows pictograms and starts quickly, where the embedded model takes photographs.

An image takes a quarter of the time of the embedded model, and the samples of `tests/support/samples` are of the
pictograms that it was trained on, so their tags are known exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

PICTOGRAM_ZH: Final = Path(__file__).parent / "pictogram_zh"
LABELS_DIR: Final = Path(__file__).parent / "pictogram_labels"
"""Holds the label set `pictogram-zh`: every word that the model knows."""
SETTINGS: Final = {
    "SHIWU_MODEL": str(PICTOGRAM_ZH),
    "SHIWU_LABELS_DIR": str(LABELS_DIR),
    "SHIWU_DEFAULT_LABELS": "six-zh",
}
