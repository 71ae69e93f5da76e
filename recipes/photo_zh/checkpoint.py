"""A checkpoint folder, loaded as any user of transformers would load it: AutoModel and AutoProcessor, offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModel, AutoProcessor

ROOT: Final = Path(__file__).resolve().parents[2]
SHIPPED: Final = ROOT / "worker" / "shiwu_worker" / "data" / "photo_zh"
LABEL_SET: Final = ROOT / "worker" / "shiwu_worker" / "data" / "label_sets" / "photo-zh.yaml"
BUILT: Final = ROOT / "build" / "model" / "photo_zh"
PACKAGES: Final = ROOT / "build" / "packages"
SAMPLES: Final = ROOT / "demo" / "photos"
TEXTS_AT_ONCE: Final = 128


class Checkpoint:
    """Encodes pictures and texts into unit vectors."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        ).eval()
        self._processor = AutoProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
        self.scale = float(self._model.logit_scale.detach().exp())
        """Logits are cosines times this."""

    def encode_images(self, images: Iterable[Image.Image]) -> NDArray[np.float32]:
        """Unit vectors of RGB pictures, (n, 320), one picture at a time."""
        found = []
        with torch.inference_mode():
            for image in images:
                values = self._processor(images=image, return_tensors="pt")
                found.append(self._model.get_image_features(**values).pooler_output)
        return _unit(found)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of texts, (n, 320)."""
        found = []
        with torch.inference_mode():
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                some = list(texts[start : start + TEXTS_AT_ONCE])
                values = self._processor(text=some, padding=True, return_tensors="pt")
                found.append(self._model.get_text_features(**values).pooler_output)
        return _unit(found)


def _unit(parts: list[torch.Tensor]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = torch.nn.functional.normalize(torch.cat(parts), dim=-1).numpy()
    return result
