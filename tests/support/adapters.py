"""LoRA adapter folders as training leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from shiwu_worker.checkpoints.checkpoint_files import read_checkpoint
from shiwu_worker.stages.encode.checkpoint import TextEncoder, load_model


def adapted(base: Path, folder: Path, **options: Any) -> Any:
    """A LoRA adapter as training leaves it, its weights no longer zero; returns peft's own model."""
    model, _ = load(base)
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, task_type="FEATURE_EXTRACTION", **options))
    torch.manual_seed(3)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            weight.data.add_(torch.randn_like(weight) * 0.5)
    wrapped.base_model.config._name_or_path = str(base)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def load(folder: Path) -> tuple[Any, TextEncoder]:
    """The model and its texts."""
    checkpoint = read_checkpoint(folder)
    model = load_model(checkpoint)
    return model, TextEncoder(model, checkpoint)
