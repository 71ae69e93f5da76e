"""The image tower of a GPU, made of the parts that the options ask for."""

from __future__ import annotations

from shiwu_worker.stages.encode.accelerator import Accelerator
from shiwu_worker.stages.encode.gpu_sizes import fitting_sizes
from shiwu_worker.stages.encode.model import EncoderOptions
from shiwu_worker.stages.encode.towers import AcceleratedTower, GraphedTower, Tower


def gpu_tower(
    eager: Tower, options: EncoderOptions, *, shape: tuple[int, int, int], accelerator: Accelerator
) -> tuple[Tower, GraphedTower | None, tuple[int, ...]]:
    """The tower, its graphs if there are any, and the batch sizes that it takes.

    Raises:
        torch.OutOfMemoryError: not even the smallest size fits.
    """
    sizes, limit_s = options.batch_sizes, options.max_gpu_batch_s
    if options.has_graphs:
        graphs = GraphedTower(eager, batch_sizes=sizes, shape=shape, accelerator=accelerator, limit_s=limit_s)
        return graphs, graphs, graphs.fitting_sizes
    tower = AcceleratedTower(eager, accelerator)
    return tower, None, fitting_sizes(tower, batch_sizes=sizes, shape=shape, accelerator=accelerator, limit_s=limit_s)
