"""Batch → unit vectors, with any dual encoder of transformers.

Batches have a few allowed sizes and are padded up to one of them: in a fixed shape an image gets the same vector
whatever its neighbours are. After the projection everything is FP32. Which batch sizes are used, and how many threads
on a CPU, is estimated at the start and learned from the batches of jobs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from structlog.typing import FilteringBoundLogger

from shiwu.contract import ModelInfo
from shiwu_worker.checkpoints.checkpoint_files import read_checkpoint
from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError
from shiwu_worker.jobs.label_checks import LabelTokens
from shiwu_worker.runtime.cpus import usable_cores
from shiwu_worker.runtime.malloc import keep_freed_memory
from shiwu_worker.stages.encode.accelerator import open_accelerator
from shiwu_worker.stages.encode.batch_sizes import time_batch_sizes
from shiwu_worker.stages.encode.checkpoint import TextEncoder
from shiwu_worker.stages.encode.compiler import EAGER, cpu_tower, described
from shiwu_worker.stages.encode.cpu_pool import CpuInferencePool, limit_threads
from shiwu_worker.stages.encode.device import (
    choose_device,
    device_name,
    error_kind_of,
    gpu_memory,
    gpu_uuid,
    is_lost,
    keep_full_precision,
)
from shiwu_worker.stages.encode.gpu_sizes import BUFFERS, back_to_back
from shiwu_worker.stages.encode.gpu_tower import gpu_tower
from shiwu_worker.stages.encode.model import DeviceModel, EncoderOptions
from shiwu_worker.stages.encode.size_check import SizeCheck, finite
from shiwu_worker.stages.encode.staging import InFlightBatch, StagingRing
from shiwu_worker.stages.encode.towers import GraphedTower
from shiwu_worker.stages.encode.tuning.batch_size_policy import MAX_BATCH_S, BatchSizePolicy, largest_useful
from shiwu_worker.stages.encode.tuning.change_log import log_size_change, log_thread_change
from shiwu_worker.stages.encode.tuning.thread_policy import ThreadPolicy

__all__ = ["Encoder", "EncoderOptions", "InFlightBatch", "is_lost"]

log: FilteringBoundLogger = structlog.get_logger()
T = TypeVar("T")
START_CORE_S: Final = 0.4
"""Core-seconds of the largest batch that a quick start runs, to estimate the cost of larger ones."""
START_PASSES: Final = 2
"""Passes of each batch size that a quick start times; the first one also pays for warming up."""
QUICK_START_SD: Final = 0.1
THOROUGH_START_SD: Final = 0.03
"""Standard deviations of the logarithm of a cost that was timed in one pass, or in several that took turns."""


class Encoder:
    """A loaded model.

    `launch` and `encode` are thread-safe; one batch at a time reaches the device. Build it, then call `warm` once.

    Raises:
        FatalError: with ExitCode.MODEL, when torch cannot use the device.
        WrongCheckpoint: when the checkpoint cannot be used.
    """

    def __init__(self, options: EncoderOptions) -> None:
        self._options = options
        self._device = choose_device(options.device)
        is_cpu = self._device.type == "cpu"
        if is_cpu:
            keep_freed_memory()
        else:
            keep_full_precision()
        self._max_threads = limit_threads(options.threads) if is_cpu else None
        checkpoint = read_checkpoint(options.folder)
        self._cpu_pool = CpuInferencePool(torch.get_num_threads()) if is_cpu else None
        self._model = self._run_exclusive(lambda: DeviceModel(options, checkpoint, self._device))
        self._texts = TextEncoder(self._model.module, checkpoint)
        self.text_tokens = self._texts.max_tokens
        """Longest text in tokens; `encode_texts` cuts longer ones."""
        self.batch_sizes = tuple(options.batch_sizes)
        """Allowed batch sizes, ascending."""
        known, known_vectors = self._model.known_images, self._model.known_vectors
        self._check = SizeCheck(known, known_vectors, shape=self._model.image_shape)
        self._wrong_sizes: dict[int, str | None] = {}
        """What is wrong with the vectors of each size that was timed."""
        self._graphs: GraphedTower | None = None
        self._is_compiled = options.is_compiled
        """Whether the tower is compiled, as far as the start has come."""
        self._staging = self._make_staging()
        self.size_policy = self._make_size_policy({self.batch_sizes[0]: 1.0})
        """How large batches are; not measured before `warm`."""
        self._thread_policy: ThreadPolicy | None = None
        self._warmed_sizes: set[int] = set()
        """Batch sizes whose first pass, which also pays for warming up, is over."""
        self.timed_sizes: tuple[int, ...] = ()
        """Batch sizes that `warm` timed."""
        self.gpu_uuid = gpu_uuid(self._device)
        self.gpu_memory: Callable[[], tuple[int, int] | None] = lambda: gpu_memory(self._device)
        """Returns the bytes that this process has reserved on its GPU, and all that it has; None for a CPU."""
        self.info = ModelInfo(
            id=options.model_id,
            revision=options.revision,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=device_name(self._device),
        )
        self.scale, self.bias = self._model.scale, self._model.bias
        self.default_head = self._model.default_head
        self.known_vectors = self._model.known_vectors
        """Reference vectors of the known images, float32 (n, d), computed in FP32 on the CPU."""
        self.known_images = known
        """The known images that have a reference, uint8 (n, h, w, 3)."""

    @property
    def canary_sizes(self) -> tuple[int, ...]:
        """Batch sizes in which known images should be checked now: on a GPU all that jobs get, else the smallest."""
        if self._cpu_pool is not None:
            return self.batch_sizes[:1]
        return tuple(size for size in self.batch_sizes if size <= self.size_policy.largest)

    @property
    def threads(self) -> int:
        """Threads that the model uses on a CPU now; 1 on a GPU."""
        return 1 if self._cpu_pool is None else self._cpu_pool.threads

    def _run_exclusive(self, work: Callable[[], T]) -> T:
        """Run work that uses all cores of a CPU, always on the same thread."""
        return work() if self._cpu_pool is None else self._cpu_pool.run_exclusive(work)

    def _make_staging(self) -> StagingRing:
        """Staging buffers in front of the image tower: with CUDA graphs, compiled or eager."""
        tower, shape = self._model.eager_tower(), self._model.image_shape
        accelerator = open_accelerator(self._device)
        if accelerator is not None:
            tower, self._graphs, self.batch_sizes = gpu_tower(
                tower, self._options, shape=shape, accelerator=accelerator, may_compile=self._is_compiled
            )
            self._is_compiled = self._graphs is not None and self._graphs.is_compiled
        else:
            tower, self._is_compiled = cpu_tower(tower, may_compile=self._is_compiled)
        return self._run_exclusive(
            lambda: StagingRing(
                tower,
                batch_sizes=self.batch_sizes,
                shape=shape,
                width=self._model.vector_width,
                accelerator=accelerator,
                cpu_pool=self._cpu_pool,
            )
        )

    # -------------------------------------------------------------------------------- before the first job
    def warm(self, *, choose_largest: bool = False, is_thorough: bool = False) -> None:
        """Time as many batch sizes as a first choice of batch sizes and threads needs.

        Sizes that are compiled or captured as a CUDA graph are all run here, so that no job waits for that.

        Args:
            choose_largest: begin with the smallest size at which an image costs about as little as at any; otherwise
                begin with the largest, also if its batches take long.
            is_thorough: time all sizes in several passes.

        Raises:
            FatalError: with ExitCode.CANARY, when batches of the smallest size give wrong vectors.
            NonFiniteError: when this dtype overflows on this model and there are no known images.
        """
        core_s = 0.0 if self._cpu_pool is None else self._choose_threads(self._cpu_pool)
        if is_thorough or self._is_compiled or self._device.type == "cuda":
            costs, sd = self._time_sizes(choose_largest=choose_largest), THOROUGH_START_SD
        else:
            costs, sd = self._time_two_sizes(core_s), QUICK_START_SD
        if self._is_compiled:
            self.batch_sizes = tuple(costs)
        costs = self._without_wrong(costs)
        self.timed_sizes = tuple(costs)
        self.size_policy = self._make_size_policy(costs, sd=sd, choose_largest=choose_largest)

    def _time_sizes(self, *, choose_largest: bool) -> dict[int, float]:
        """The costs of all sizes that may be of use. A compiled model that fails or is wrong at any is replaced."""
        is_enough = self._is_enough if choose_largest else lambda _: False
        try:
            costs = time_batch_sizes(self._time_pass, self.batch_sizes, is_enough=is_enough)
        except Exception as error:  # border: a compiler raises errors of many kinds
            if not self._is_compiled or isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError):
                raise
            log.warning("model_not_compiled", reason=described(error), meaning=EAGER)
        else:
            wrong = {size: reason for size, reason in self._wrong_sizes.items() if reason}
            if not wrong or not self._is_compiled:
                return costs
            log.error("compiled_model_refused", batch_sizes=sorted(wrong), reason=next(iter(wrong.values())))
        self._stop_compiling()
        return time_batch_sizes(self._time_pass, self.batch_sizes, is_enough=is_enough)

    def _stop_compiling(self) -> None:
        """Replace the compiled tower by an eager one."""
        # Both sets of graphs and buffers together might not fit.
        del self._staging
        self._graphs, self._is_compiled = None, False
        self._staging = self._make_staging()
        self._wrong_sizes.clear()
        if self._cpu_pool is not None:
            self._choose_threads(self._cpu_pool)

    def _without_wrong(self, costs: Mapping[int, float]) -> dict[int, float]:
        """The costs of the sizes whose vectors were right in every row. A size with a wrong graph runs eager.

        Raises:
            FatalError: with ExitCode.CANARY, when the smallest size is wrong.
        """
        right = dict(costs)
        for size in costs:
            reason = self._wrong_sizes.get(size)
            if reason and self._graphs is not None and self._graphs.drop(size):
                log.error("graph_gives_wrong_vectors", batch_size=size, reason=reason, meaning="this size runs eager")
                del self._wrong_sizes[size]
                right[size] = self._time_pass(size)
                reason = self._wrong_sizes.get(size)
            if reason:
                log.error("batch_size_gives_wrong_vectors", batch_size=size, reason=reason)
                del right[size]
                if size == self.batch_sizes[0]:
                    raise FatalError(ExitCode.CANARY, f"batches of {size} give wrong vectors: {reason}")
        self.batch_sizes = tuple(size for size in self.batch_sizes if size in right or size not in costs)
        self._staging.batch_sizes = self.batch_sizes
        return right

    def _choose_threads(self, cpu_pool: CpuInferencePool) -> float:
        """Choose threads by the core-seconds that an image takes on one thread; returns these.

        On one thread that figure does not depend on what else runs on the machine.
        """
        size = self.batch_sizes[0]
        tower, raw = self._model.eager_tower(), self._model.blank_images(size)
        vectors = torch.empty((size, self._model.vector_width))
        cpu_pool.omp_threads = 1
        core_s = min(cpu_pool.submit(tower, raw, vectors).wait().cost for _ in range(START_PASSES)) / size
        self._thread_policy = ThreadPolicy(
            core_s=core_s,
            cores=usable_cores,
            fixed=self._options.threads,
            max_threads=self._max_threads,
            is_compiled=self._is_compiled,
            on_change=log_thread_change,
        )
        self._apply_threads(self._thread_policy)
        return core_s

    def _apply_threads(self, policy: ThreadPolicy) -> bool:
        """Replace the pool if the policy asks for other threads; returns whether it was replaced."""
        wanted, pool = policy.update(), self._cpu_pool
        if pool is not None and (pool.threads, pool.splits_batches) == (wanted.threads, wanted.splits_batches):
            return False
        self._cpu_pool = CpuInferencePool(wanted.threads, splits_batches=wanted.splits_batches)
        self._staging.cpu_pool = self._cpu_pool
        return True

    def _time_two_sizes(self, core_s: float) -> dict[int, float]:
        """Costs of the smallest batch, whose images take `core_s` each, and of a larger one that is still quick."""
        smallest = self.batch_sizes[0]
        costs = {smallest: core_s * smallest}
        largest = max(size for size in self.batch_sizes if size == smallest or size * core_s <= START_CORE_S)
        passes = [self._time_pass(largest) for _ in range(START_PASSES)]
        if largest != smallest:
            costs[largest] = min(passes)
        self._warmed_sizes.update(costs)
        return costs

    def _is_enough(self, costs: Mapping[int, float]) -> bool:
        """Whether enough sizes are timed and larger ones can be skipped.

        A batch of twice the size would take too long. With torch.compile, two larger sizes without a gain also end it.
        """
        largest = max(costs)
        per_image = {size: cost / size for size, cost in costs.items()}
        is_too_long = 2 * costs[largest] / self.threads > MAX_BATCH_S
        return is_too_long or (self._is_compiled and largest_useful(per_image) < largest // 2)

    def _make_size_policy(
        self, costs: Mapping[int, float], *, sd: float = QUICK_START_SD, choose_largest: bool = True
    ) -> BatchSizePolicy:
        return BatchSizePolicy(
            self.batch_sizes,
            costs,
            measured_sd=sd,
            cost_per_s=self.threads,
            first=None if choose_largest else self.batch_sizes[-1],
            max_batch_s=MAX_BATCH_S if choose_largest else math.inf,
            on_change=log_size_change,
        )

    def _time_pass(self, size: int) -> float:
        """The cost of one pass, whose vectors are checked; on a GPU others are under way.

        A tower compiled for a CPU runs twice: the first run, or other threads, may compile.
        """

        def launch(number: int = 0) -> InFlightBatch:
            return self.launch(self._check.images, self._check.rows(size, number))

        if self._cpu_pool is None:
            cost, results = back_to_back(launch, under_way=BUFFERS)
        else:
            if self._is_compiled:
                self.collect(launch())
            batch = launch()
            results = [batch.collect()]
            cost = batch.spent.cost if batch.spent is not None else 0.0
        # A size that was wrong once stays wrong.
        self._wrong_sizes[size] = self._wrong_sizes.get(size) or self._check.wrong(results)
        return cost

    # -------------------------------------------------------------------------------- batches
    def launch(self, pixels: NDArray[np.uint8], rows: Sequence[int] | None = None) -> InFlightBatch:
        """Start a batch: rows of `pixels` uint8 (slots, h, w, 3), or all of it.

        On a GPU it returns while the device works. On a CPU it returns when a thread could begin another batch.

        Raises:
            ValueError: for a wrong shape or more images than the largest batch size.
        """
        count = len(pixels) if rows is None else len(rows)
        shape = self._model.image_shape
        if pixels.shape[1:] != shape or pixels.dtype != np.uint8 or not 0 < count <= self.batch_sizes[-1]:
            expected = f"uint8 (1 to {self.batch_sizes[-1]}, {', '.join(map(str, shape))})"
            raise ValueError(f"expected {expected}, got {pixels.dtype} {(count, *pixels.shape[1:])}")
        if self._thread_policy is not None:
            self._update_threads(self._thread_policy, self._staging.padded_size(count))
        return self._staging.launch(pixels, rows)

    def _update_threads(self, policy: ThreadPolicy, size: int) -> None:
        if self._apply_threads(policy):
            self.size_policy.forget()
        if self._cpu_pool is not None and self._staging.split_count(size) == 1:
            self._cpu_pool.omp_threads = policy.next_together(self.size_policy.cost_of(size))

    def collect(self, batch: InFlightBatch) -> NDArray[np.float32]:
        """The unit vectors float32 (n, d) of a launched batch; waits for the device.

        Raises:
            NonFiniteError: names the rows that are not finite.
        """
        return finite(batch.collect())

    def learn(self, batch: InFlightBatch, *, host_s: float = 0.0) -> None:
        """Learn from a collected batch of jobs how large batches should be and how many threads should work on them.

        Args:
            host_s: CPU seconds that the batch took besides the model.
        """
        spent, size = batch.spent, batch.size
        if spent is None:
            return
        if self._cpu_pool is not None and size not in self._warmed_sizes:
            self._warmed_sizes.add(size)
            self.size_policy.skip(size)
            return
        usual_threads = 0
        if self._thread_policy is not None:
            work, smallest = self.size_policy.cost_of(size), self.batch_sizes[0]
            # OpenMP threads that work together spin while they wait, so their core-seconds do not measure an image.
            is_exact = spent.omp_threads < 2
            core_s = spent.cost / work * self.size_policy.cost_of(smallest) / smallest if is_exact else None
            self._thread_policy.record(core_s=core_s, together=spent.omp_threads, work=work, seconds=spent.seconds)
            usual_threads = self._thread_policy.together
        if spent.omp_threads in {0, usual_threads}:
            cost = spent.cost + host_s if self._cpu_pool is not None else spent.cost
            self.size_policy.record(size, cost=cost, seconds=spent.seconds)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images uint8 (n, h, w, 3) → unit vectors float32 (n, d); raises what `launch` and `collect` raise."""
        return self.collect(self.launch(pixels))

    def encode_exact(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode in FP32, whatever dtype is in use: for images that overflow a smaller format.

        The first call loads the checkpoint again; its weights then stay on the device in addition to the others.
        """
        return finite(self._run_exclusive(lambda: self._model.encode_fp32(pixels)))

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """m texts → unit vectors float32 (m, d). The tokenizer cuts texts to the model's limit."""
        return finite(self._run_exclusive(lambda: self._texts.encode(texts)))

    def label_tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """What the tokenizer makes of each label, and whether the model can read it."""
        return self._texts.label_tokens(labels)

    def error_kind(self, error: BaseException) -> DeviceErrorKind:
        """What an error of `encode` means for its batch."""
        return error_kind_of(error, self._device)
