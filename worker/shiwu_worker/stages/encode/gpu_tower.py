"""The image tower of a GPU, made of the parts that the options ask for and the machine allows."""

from __future__ import annotations

import structlog
import torch
from structlog.typing import FilteringBoundLogger

from shiwu_worker.stages.encode.accelerator import Accelerator
from shiwu_worker.stages.encode.attention_kernel import with_fastest_attention
from shiwu_worker.stages.encode.compiler import described, why_no_compiler
from shiwu_worker.stages.encode.fusion import ATTENTION
from shiwu_worker.stages.encode.gpu_sizes import fitting_sizes, time_size
from shiwu_worker.stages.encode.model import EncoderOptions, chosen_fusions
from shiwu_worker.stages.encode.towers import AcceleratedTower, GraphedTower, Tower, compiled_for_gpu

log: FilteringBoundLogger = structlog.get_logger()
MEASURED_SIZE = 64
"""Largest batch with which attention kernels are compared."""
_EAGER = "the model runs as CUDA graphs of torch's own kernels, which is slower and gives the same answers"


def gpu_tower(
    eager: Tower,
    options: EncoderOptions,
    *,
    shape: tuple[int, int, int],
    accelerator: Accelerator,
    may_compile: bool = True,
) -> tuple[Tower, GraphedTower | None, tuple[int, ...]]:
    """The tower, its graphs if there are any, and the batch sizes that it takes.

    Args:
        may_compile: whether the tower is compiled if the options ask for it.

    Raises:
        RuntimeError: not even the smallest size fits, or the device failed.
    """
    sizes, limit_s = options.batch_sizes, options.max_gpu_batch_s
    if ATTENTION in chosen_fusions(options.fusions, torch.device("cuda")):
        measured = max(size for size in sizes if size <= max(MEASURED_SIZE, sizes[0]))
        eager = with_fastest_attention(
            eager, lambda tower: time_size(AcceleratedTower(tower, accelerator), measured, shape, accelerator)
        )
    if not options.has_graphs:
        if options.is_compiled:
            log.warning(
                "model_not_compiled", reason="a compiled model needs SHIWU_CUDA_GRAPHS", meaning="it runs eager"
            )
        tower = AcceleratedTower(eager, accelerator)
        fitting = fitting_sizes(tower, batch_sizes=sizes, shape=shape, accelerator=accelerator, limit_s=limit_s)
        return tower, None, fitting
    graphs = None
    if options.is_compiled and may_compile:
        graphs = _compiled_graphs(eager, options, shape=shape, accelerator=accelerator)
    if graphs is None:
        graphs = GraphedTower(eager, batch_sizes=sizes, shape=shape, accelerator=accelerator, limit_s=limit_s)
    return graphs, graphs, graphs.fitting_sizes


def _compiled_graphs(
    eager: Tower, options: EncoderOptions, *, shape: tuple[int, int, int], accelerator: Accelerator
) -> GraphedTower | None:
    """Graphs of the compiled tower; None, with a log line, where it cannot be compiled."""
    if reason := why_no_compiler():
        log.warning("model_not_compiled", reason=reason, meaning=_EAGER)
        return None
    try:
        return GraphedTower(
            eager,
            compiled=compiled_for_gpu(eager),
            batch_sizes=options.batch_sizes,
            shape=shape,
            accelerator=accelerator,
            limit_s=options.max_gpu_batch_s,
        )
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 border: a compiler raises errors of many kinds, and the model runs without it
        log.warning("model_not_compiled", reason=described(error), meaning=_EAGER)
        return None
