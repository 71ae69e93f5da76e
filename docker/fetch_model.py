"""Put a model of the hub into a folder: `fetch_model.py OWNER/NAME REVISION FOLDER` makes FOLDER/OWNER/NAME."""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import snapshot_download

PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]
"""What a worker loads: no pickled weights, no code."""


def main(model: str, revision: str, folder: str) -> None:
    """Download, and end with an error where there are no weights that a worker would load."""
    place = Path(folder) / model
    snapshot_download(model, revision=revision, local_dir=place, allow_patterns=PATTERNS)
    if not any(place.glob("*.safetensors")):
        sys.exit(f"expected *.safetensors in {model} at {revision}, found none")


if __name__ == "__main__":
    main(*sys.argv[1:])
