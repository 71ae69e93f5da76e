"""Chooses the attention kernel of the image tower by measurement.

torch takes the first of its kernels that can do the work. Which one is fastest depends on the GPU, the number of tokens
and the width of a head: on a Hopper GPU cuDNN's is the fastest for some shapes and several times slower for others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog
import torch
from structlog.typing import FilteringBoundLogger
from torch.nn.attention import SDPBackend, sdpa_kernel

from shiwu_worker.stages.encode.device import is_out_of_memory

log: FilteringBoundLogger = structlog.get_logger()
KERNELS: Final = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MIN_GAIN: Final = 0.02
"""Share of the time of a pass that another kernel must save, in addition to what may be chance."""
Tower = Callable[[torch.Tensor], torch.Tensor]


def prefer(tower: Tower, kernel: str) -> Tower:
    """The tower, with this attention kernel wherever it can do the work.

    All other kernels stay enabled: the setting is the process's, and other threads encode texts, for which this kernel
    may not do.
    """
    others = [backend for name, backend in KERNELS.items() if name != kernel]
    order = [KERNELS[kernel], *others, SDPBackend.MATH]

    def run(raw: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(order, set_priority=True):
            return tower(raw)

    return run


def with_fastest_attention(tower: Tower, time_s: Callable[[Tower], float]) -> Tower:
    """The tower with the attention kernel that makes it fastest; as it is where none is faster than torch's choice.

    Args:
        time_s: seconds of one pass of a tower.

    Raises:
        torch.AcceleratorError: the device was lost.
    """
    try:
        usual_s = time_s(tower)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return tower
    seconds: dict[str, float] = {}
    for kernel in KERNELS:
        try:
            seconds[kernel] = time_s(prefer(tower, kernel))
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise
            log.info("attention_kernel_not_available", kernel=kernel, reason=str(error)[:300])
    fastest = min(seconds, key=lambda kernel: seconds[kernel], default=None)
    is_faster = fastest is not None and seconds[fastest] < (1 - MIN_GAIN) * usual_s
    times_ms = {kernel: round(1000 * pass_s, 3) for kernel, pass_s in {"torch": usual_s, **seconds}.items()}
    log.info("attention_kernel_chosen", kernel=fastest if is_faster else "torch", pass_ms=times_ms)
    return prefer(tower, fastest) if is_faster and fastest is not None else tower
