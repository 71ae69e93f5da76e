"""The reference script that the worker replaces: transformers' own AutoModel and AutoProcessor, in FP32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from shiwu.broker.chunks import chunks
from shiwu_worker.checkpoints.checkpoint_files import Checkpoint
from shiwu_worker.stages.encode.checkpoint import load_model, quiet_transformers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TEXTS_AT_ONCE: Final = 512
"""Labels in one pass, which bounds the memory."""


def reference_model(checkpoint: Checkpoint) -> Any:
    """The model as a script loads it; an adapter is merged by the worker's code."""
    if checkpoint.adapter:
        return load_model(checkpoint)
    with quiet_transformers():
        return AutoModel.from_pretrained(
            checkpoint.base, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        ).eval()


def reference_logits(
    model: Any, checkpoint: Checkpoint, image: Path, texts: Sequence[str], *, max_tokens: int
) -> NDArray[np.float32]:
    """logits_per_image of one image and these texts.

    Raises:
        Exception: whatever transformers, Pillow or a tokenizer raises.
    """
    has_own = checkpoint.tokenizer == checkpoint.folder and checkpoint.processor_files[0].parent == checkpoint.folder
    source = checkpoint.folder if has_own else checkpoint.base
    with quiet_transformers(), torch.inference_mode(), Image.open(image) as opened:
        processor = AutoProcessor.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        rgb = opened.convert("RGB")
        # SigLIP was trained with full padding.
        padding = "max_length" if model.config.model_type == "siglip" else True
        options = {"padding": padding, "truncation": True, "max_length": max_tokens, "return_tensors": "pt"}
        parts = [
            model(**processor(images=rgb, text=list(part), **options)).logits_per_image[0]
            for part in chunks(texts, TEXTS_AT_ONCE)
        ]
        logits: NDArray[np.float32] = torch.cat(parts).numpy()
    return logits
