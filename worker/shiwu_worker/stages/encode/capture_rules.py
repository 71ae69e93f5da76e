"""Which operators a CUDA graph cannot record, found before a capture is tried.

A capture that fails leaves torch's allocator in a doubtful state (pytorch issues 180395 and 190348), so a model that
waits for the device, or copies between devices, is recognised by its operators in an eager pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_SYNCHRONISING: Final = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::nonzero",
        "aten::masked_select",
        "aten::unique",
        "aten::_unique2",
        "aten::unique_consecutive",
        "aten::is_nonzero",
        "aten::equal",
        "aten::repeat_interleave",
        "aten::nonzero_numpy",
        "aten::argwhere",
        "aten::unique_dim",
        "aten::bincount",
        "aten::allclose",
    }
)
"""Operators whose result the host reads before it can go on."""


class NotCapturable(Exception):
    """A pass has an operator that a graph cannot record; the text names it."""


class _CaptureRules(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Raises at the first operator that cannot be captured."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition(".")[0]
        if (name in _SYNCHRONISING and "output_size" not in (kwargs or {})) or _counts_first(name, args):
            raise NotCapturable(f"{name} waits for the device")
        if name == "aten::lift_fresh" and self._device.type != "cpu":
            raise NotCapturable(f"{name} copies numbers of the host to {self._device}")
        for tensor in args:
            # A single number on the host is an argument of the kernel.
            if isinstance(tensor, torch.Tensor) and tensor.device.type != self._device.type and tensor.dim() > 0:
                raise NotCapturable(f"{name} takes a tensor on {tensor.device}, not on {self._device}")
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != self._device.type and tensor.numel() > 0:
                raise NotCapturable(f"{name} gives a tensor on {tensor.device}, not on {self._device}")
        return result


def _counts_first(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the shape of the result depends on how many values of a mask are true."""
    if name == "aten::where":
        return len(args) == 1
    masks = args[1] if name in {"aten::index", "aten::index_put_", "aten::index_put"} and len(args) > 1 else ()
    return any(isinstance(mask, torch.Tensor) and mask.dtype in {torch.bool, torch.uint8} for mask in masks)


def why_not_capturable(
    tower: Callable[[torch.Tensor], torch.Tensor], raw: torch.Tensor, *, device: torch.device | None = None
) -> str | None:
    """The operator for which a pass of this tower cannot be captured; None if all can.

    Args:
        device: where the results of all operators must be; that of `raw` by default.
    """
    try:
        with torch.inference_mode(), _CaptureRules(device or raw.device):
            tower(raw)
    except NotCapturable as error:
        return str(error)
    return None
