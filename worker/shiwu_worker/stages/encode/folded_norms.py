"""Folds batch normalisations into the convolutions before them, in image towers made of convolutions.

A folded tower reads and writes each intermediate result once less, and its convolutions work on channels-last memory,
which is the order of the pixels of decoded images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

_LAYERS: Final[Mapping[str, tuple[str, str, str]]] = {
    "EfficientNetEmbeddings": ("convolution", "batchnorm", "activation"),
    "EfficientNetExpansionLayer": ("expand_conv", "expand_bn", "expand_act"),
    "EfficientNetDepthwiseLayer": ("depthwise_conv", "depthwise_norm", "depthwise_act"),
    "EfficientNetFinalBlockLayer": ("project_conv", "project_bn", ""),
    "EfficientNetEncoder": ("top_conv", "top_bn", "top_activation"),
}
"""Classes of transformers whose forward pass applies these in this order: a convolution, its normalisation, and where
there is one its activation, which alone reads what the normalisation gave."""


def fold_norms(vision: nn.Module) -> bool:
    """Fold every batch normalisation that can be folded, in place; returns whether there was one.

    With scale g, offset b, mean m, variance v and epsilon e of the normalisation, weights w become w * g / sqrt(v + e)
    and the bias becomes b - m * g / sqrt(v + e).

    Args:
        vision: an image tower in FP32 and in evaluation mode.
    """
    layers = [(layer, _LAYERS[type(layer).__name__]) for layer in vision.modules() if type(layer).__name__ in _LAYERS]
    foldable = [(layer, names) for layer, names in layers if _can_fold(layer, names)]
    for layer, (conv, norm, activation) in foldable:
        setattr(layer, conv, fuse_conv_bn_eval(getattr(layer, conv), getattr(layer, norm)))
        setattr(layer, norm, nn.Identity())
        if activation and isinstance(getattr(layer, activation), (nn.ReLU, nn.ReLU6, nn.SiLU)):
            getattr(layer, activation).inplace = True
    if foldable:
        vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's overloads
    return bool(foldable)


def _can_fold(layer: Any, names: tuple[str, str, str]) -> bool:
    conv, norm = (getattr(layer, name, None) for name in names[:2])
    return (
        isinstance(conv, nn.Conv2d)
        and type(norm) is nn.BatchNorm2d
        and norm.running_mean is not None
        and not (conv.training or norm.training)
    )
