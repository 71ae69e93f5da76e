"""Allowed batch sizes, and how many images a worker holds because of them.

Shared memory is reserved, and loaders start, before torch is imported, so whether a GPU will be used is asked of the
driver.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from shiwu_worker.policy.limits import LABEL_SLOTS
from shiwu_worker.runtime.nvidia import gpus_are_hidden, list_gpus

if TYPE_CHECKING:
    from shiwu_worker.config.settings import Settings

LARGEST_ON_CPU: Final = 64
LARGEST_ON_GPU: Final = 512
GPU_BATCH_S: Final = 0.025
"""Time that batches on a GPU may take if their sizes are chosen by the worker: an interactive job waits for one."""
FIRST_WITH_STEP: Final = 16
"""On a GPU there is a size halfway between this power of two and the next, and so on: less padding, at little cost."""


def may_use_gpu(settings: Settings) -> bool:
    """Whether the model may run on a GPU, as far as is known before torch is imported."""
    if settings.device != "auto":
        return settings.device != "cpu"
    return not gpus_are_hidden() and bool(list_gpus())


def largest_batch(settings: Settings) -> int:
    """The largest batch that may be: asked for, or tried at the start."""
    return settings.max_batch or (LARGEST_ON_GPU if may_use_gpu(settings) else LARGEST_ON_CPU)


def batch_sizes(settings: Settings) -> tuple[int, ...]:
    """Allowed batch sizes: powers of two below the largest batch, on a GPU sizes in between, and the largest batch."""
    largest, has_steps = largest_batch(settings), may_use_gpu(settings)
    sizes = {largest}
    size = 1
    while size < largest:
        sizes.add(size)
        if has_steps and size >= FIRST_WITH_STEP:
            sizes.add(min(largest, size * 3 // 2))
        size *= 2
    return tuple(sorted(sizes))


def slots_for(settings: Settings, batch: int) -> int:
    """What to claim: batches on the device, copied ahead and being filled, what is loading, and a reserve above.

    The reserve comes on top, so that bulk fills batches as it would alone.
    """
    reserve = settings.interactive_reserve if len(set(settings.lanes)) > 1 else 0.0
    needed = 3 * batch + settings.loader_count * settings.loader_threads
    return settings.slots or math.ceil(needed / (1 - reserve))


def slot_count(settings: Settings) -> int:
    """Slots of the shared memory: for the largest batch that may be, and for jobs that wait for labels."""
    return slots_for(settings, largest_batch(settings)) + LABEL_SLOTS
