"""Rewrites the image tower of a loaded model so that it runs fewer and larger steps; the result stays the same.

`patches`: the normalisation of pixels becomes a part of the patch embedding, which becomes one matrix product.
`qkv`: queries, keys and values of each layer become one matrix product.
`norms`: batch normalisations become a part of the convolutions before them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import torch
from torch import nn

from shiwu_worker.stages.encode.folded_norms import fold_norms

PATCHES: Final = "patches"
QKV: Final = "qkv"
NORMS: Final = "norms"
ATTENTION: Final = "attention"
"""Not a rewriting: `attention_kernel` chooses the kernel."""
_EMBEDDINGS: Final = frozenset({"clip", "chinese_clip", "siglip", "metaclip_2", "altclip"})
"""Model types whose embeddings cast images to the type of the patch embedding's weight, and add the positions after."""
_ATTENTION: Final = frozenset(
    {"CLIPAttention", "ChineseCLIPVisionAttention", "SiglipAttention", "MetaClip2Attention", "AltCLIPAttention"}
)
"""Classes whose forward pass `FusedAttention` repeats."""
CENTRE: Final = 128
SCALE: Final = 64
"""(x - 128) / 64 is exact in float16 and bfloat16 for every x of 0 to 255, and keeps folded weights in the range of
float16: with x itself they would become subnormal."""


class FoldedPatches(nn.Module):
    """The patch embedding of a vision transformer over raw pixels: uint8 (n, 3, h, w) → (n, d, rows, columns).

    One kernel scales the pixels and orders them by patch, and one matrix product does the rest.

    Args:
        conv: the convolution over normalised pixels, whose stride is its kernel.
        gain, shift: of the normalisation, for each channel: x · gain + shift.
        positions: the embedding of positions, in FP32, which is added to the patches; it takes the bias.
    """

    def __init__(
        self, conv: nn.Conv2d, *, gain: torch.Tensor, shift: torch.Tensor, positions: nn.Embedding, patches: int
    ) -> None:
        super().__init__()
        self._side = conv.kernel_size[0]
        weight = conv.weight.detach().double()
        bias = (weight * (CENTRE * gain + shift).view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
        if conv.bias is not None:
            bias += conv.bias.detach().double()
        folded = weight * (SCALE * gain).view(1, 3, 1, 1)
        # Pixels lie in memory as (row, column, channel).
        kernel = folded.permute(0, 2, 3, 1).flatten(1).to(conv.weight.dtype)
        self.kernel = nn.Parameter(kernel.contiguous(), requires_grad=False)
        rows = positions.weight.detach().double()
        rows[-patches:] += bias
        positions.weight = nn.Parameter(rows.to(positions.weight.dtype), requires_grad=False)
        self._offset: torch.Tensor
        self.register_buffer("_offset", torch.tensor(-CENTRE / SCALE), persistent=False)
        self.weight: torch.Tensor
        # The model casts images to the type of this: they stay as they are.
        self.register_buffer("weight", torch.empty(0, dtype=torch.uint8), persistent=False)

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Embed the patches; pixels beyond the last whole patch are left out."""
        side, count = self._side, len(raw)
        rows, columns = raw.shape[2] // side, raw.shape[3] // side
        pixels = raw.permute(0, 2, 3, 1)[:, : rows * side, : columns * side]
        pixels = pixels.view(count, rows, side, columns, side, 3).transpose(2, 3)
        patches = torch.empty((count, rows, columns, side, side, 3), dtype=self.kernel.dtype, device=raw.device)
        torch.add(self._offset, pixels, alpha=1 / SCALE, out=patches)
        embedded = nn.functional.linear(patches.flatten(3).flatten(1, 2), self.kernel)
        return embedded.transpose(1, 2).view(count, -1, rows, columns)


class FusedAttention(nn.Module):
    """Self-attention of one layer of a vision transformer, with one matrix product for queries, keys and values."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        width = attention.q_proj.in_features
        self.qkv = nn.Linear(width, 3 * width, device="meta")
        self.qkv.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
        self.qkv.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
        self.out_proj = attention.out_proj
        self._heads, self._scale = attention.num_heads, attention.scale

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **ignored: Any
    ) -> tuple[torch.Tensor, None]:
        """Return the output, and no weights of the attention."""
        # (n, tokens, 3, heads, width of a head) → three times (n, heads, tokens, width of a head)
        count, tokens, _ = hidden_states.shape
        parts = self.qkv(hidden_states).view(count, tokens, 3, self._heads, -1)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind(0)
        output = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=attention_mask, scale=self._scale
        )
        return self.out_proj(output.transpose(1, 2).flatten(2)), None


def normalisation(
    mean: Sequence[float], std: Sequence[float], rescale: float, *, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and shift of each channel: (x · rescale - mean) / std = x · gain + shift."""
    gain = torch.tensor([rescale / s for s in std], dtype=dtype)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=dtype)
    return gain, shift


def takes_raw_pixels(model: Any) -> bool:
    """Whether the model normalises pixels itself, because its patch embedding was folded."""
    return isinstance(getattr(_embeddings(model), "patch_embedding", None), FoldedPatches)


def fuse(
    model: Any, steps: Collection[str], *, mean: Sequence[float], std: Sequence[float], rescale: float
) -> tuple[str, ...]:
    """Rewrite the image tower of a model in FP32; returns the steps that its architecture allows.

    The weights that are replaced are freed.
    """
    done = []
    if PATCHES in steps and _can_fold(model):
        embeddings = _embeddings(model)
        gain, shift = normalisation(mean, std, rescale, dtype=torch.float64)
        embeddings.patch_embedding = FoldedPatches(
            embeddings.patch_embedding,
            gain=gain,
            shift=shift,
            positions=embeddings.position_embedding,
            patches=embeddings.num_patches,
        )
        done.append(PATCHES)
    if QKV in steps and (layers := _layers(model)):
        for layer in layers:
            layer.self_attn = FusedAttention(layer.self_attn)
        done.append(QKV)
    if NORMS in steps and (vision := getattr(model, "vision_model", None)) is not None and fold_norms(vision):
        done.append(NORMS)
    return tuple(done)


def _embeddings(model: Any) -> Any:
    return getattr(getattr(model, "vision_model", None), "embeddings", None)


def _can_fold(model: Any) -> bool:
    embeddings = _embeddings(model)
    conv = getattr(embeddings, "patch_embedding", None)
    positions = getattr(embeddings, "position_embedding", None)
    return (
        model.config.model_type in _EMBEDDINGS
        and type(conv) is nn.Conv2d
        and conv.in_channels == 3
        and conv.groups == 1
        and conv.kernel_size == conv.stride
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.dilation == (1, 1)
        and conv.padding in {(0, 0), "valid"}
        and type(positions) is nn.Embedding
    )


def _layers(model: Any) -> list[Any]:
    """The layers of the image tower if all of them can be rewritten, otherwise none."""
    vision = getattr(model, "vision_model", None)
    if vision is None or getattr(vision.config, "_attn_implementation", None) != "sdpa":
        return []
    layers = [layer for layer in vision.modules() if hasattr(layer, "self_attn")]
    return layers if all(_can_join(layer.self_attn) for layer in layers) else []


def _can_join(attention: Any) -> bool:
    parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    return type(attention).__name__ in _ATTENTION and all(
        type(part) is nn.Linear and part.bias is not None and part.in_features == part.out_features for part in parts
    )
