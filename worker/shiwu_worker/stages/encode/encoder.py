"""Batch → unit vectors, with any dual encoder of transformers.

Batches have a few fixed sizes ("rungs"), padded up: in a fixed shape a picture gets the same vector whatever its
neighbours are. After the projection everything is FP32. Which of the sizes are used, and how many threads on a CPU, is
guessed at the start and learned from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from shiwu.contract import Head, ModelInfo
from shiwu_worker.checkpoints.checkpoint_files import WrongCheckpoint, read_checkpoint
from shiwu_worker.errors import DeviceErrorKind, NonFiniteError
from shiwu_worker.jobs.label_checks import LabelTokens
from shiwu_worker.runtime.cpus import usable_cores
from shiwu_worker.runtime.malloc import keep_freed_memory
from shiwu_worker.stages.encode.batch_sizes import measure
from shiwu_worker.stages.encode.checkpoint import TextEncoder, image_size, load_model
from shiwu_worker.stages.encode.cpu_pool import CpuInferencePool
from shiwu_worker.stages.encode.device import choose_device, choose_dtypes, device_name, error_kind_of, gpu_uuid
from shiwu_worker.stages.encode.staging import InFlightBatch, StagingRing
from shiwu_worker.stages.encode.towers import GraphedTower, Tower, compiled_tower, eager_tower
from shiwu_worker.stages.encode.tuning.batch_size_policy import (
    LONGEST_S,
    BatchSizeChange,
    BatchSizePolicy,
    first_choice,
)
from shiwu_worker.stages.encode.tuning.thread_policy import ThreadChange, ThreadPolicy

__all__ = ["Encoder", "InFlightBatch"]

log: Any = structlog.get_logger()
T = TypeVar("T")
MIN_COSINE: Final = 0.999
"""Between a faster number format and FP32, for the pictures of the start-up check."""
CHECKED: Final = 2
START_CORE_S: Final = 0.4
"""Core-seconds that a batch may take by which the start guesses what larger ones cost."""
PASSES: Final = 2
"""Of each size that the start measures; the first one pays for more than itself."""
MEASURED_ONCE_SD: Final = 0.1
MEASURED_WELL_SD: Final = 0.03
"""Standard deviations of the logarithm of a cost that was measured in one pass, or in several that took turns."""


class Encoder:
    """A loaded model. `launch` and `encode` may be called from several threads, one at a time reaches the device.

    Args:
        folder: the checkpoint, in transformers' format.
        rungs: batch sizes, ascending; no batch is larger than the last one.
        mean, std, rescale: of the checkpoint's processor: (x · rescale - mean) / std for x of 0 to 255.
        threads: of torch on a CPU; None: torch's own choice, as many as cores may be used at most, now and later.
        is_compiled: compile the tower (CPU); each rung costs 15 to 60 s at the start.
        has_graphs: replay CUDA graphs where the device is one.
        known: pictures uint8 (n, h, w, 3) whose vectors are to be known from elsewhere than the device.
    """

    def __init__(
        self,
        *,
        folder: Path,
        model_id: str,
        revision: str,
        device: str = "auto",
        dtype: str = "auto",
        rungs: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
        mean: Sequence[float],
        std: Sequence[float],
        rescale: float = 1 / 255,
        threads: int | None = None,
        is_compiled: bool = False,
        has_graphs: bool = True,
        known: NDArray[np.uint8] | None = None,
    ) -> None:
        self._device = choose_device(device)
        if self._device.type == "cpu":
            keep_freed_memory()
            # Where torch takes fewer than there are cores, by its own choice or OMP_NUM_THREADS, it stays at these.
            self._most_threads = own if (own := torch.get_num_threads()) < usable_cores() else None
            torch.set_num_threads(threads or min(own, usable_cores()))
        self._asked_threads = threads
        self._checkpoint = read_checkpoint(folder)
        self._pixels: dict[str, Any] = {"mean": tuple(mean), "std": tuple(std), "rescale": rescale}
        self._is_compiled, self._has_graphs = is_compiled, has_graphs
        self._compiled: Tower | None = None
        self._cpu_pool = CpuInferencePool(torch.get_num_threads()) if self._device.type == "cpu" else None
        self._run_exclusive(lambda: self._open(dtype, known))
        self._exact: Tower | None = None
        self._texts = TextEncoder(self._model, self._checkpoint)
        self._stream: Any = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's own
        self.rungs = tuple(rungs)
        self._berths = self._make_stager(self.rungs)
        self.info = ModelInfo(
            id=model_id,
            revision=revision,
            dtype=str(self._dtype).removeprefix("torch."),
            device=device_name(self._device),
        )
        self.gpu_uuid = gpu_uuid(self._device)
        self.sizes = self._learn_sizes({rungs[0]: 1.0})
        """How large batches are; a mere guess until the model is warm."""
        self._threads: ThreadPolicy | None = None
        self._run_before: set[int] = set()
        """Sizes that have been run, and no longer pay for a first time."""
        self.measured: tuple[int, ...] = ()
        """Sizes that were measured at the start."""

    @property
    def threads(self) -> int:
        """Threads that the model has on a CPU now; 1 elsewhere."""
        return 1 if self._cpu_pool is None else self._cpu_pool.threads

    # -------------------------------------------------------------------------------- before the first job
    def _open(self, dtype: str, known: NDArray[np.uint8] | None) -> None:
        model = load_model(self._checkpoint)
        # Before the cast: in bfloat16 a scale of 100 would be 98.9.
        self.scale = math.exp(float(model.logit_scale))
        bias = getattr(model, "logit_bias", None)
        self.bias = None if bias is None else float(bias)
        self.default_head: Head = "softmax" if bias is None else "sigmoid"
        side = image_size(model)
        self._shape = (side, side, 3)
        if known is not None and known.shape[1:] != self._shape:
            raise WrongCheckpoint(
                f"{self._checkpoint.config}: the model takes images of {side}×{side}, and the image processor makes "
                f"{known.shape[2]}×{known.shape[1]}; take both from the same model"
            )
        self.known_vectors = None if known is None else self._on_cpu(model, known)
        """Of `known`, float32 (n, d): in FP32 on the CPU, whatever the device is. NaN where the model gives it."""
        self._model, self._dtype = self._cast(model.to(self._device), choose_dtypes(dtype, self._device))
        vectors: Any = self.known_vectors
        if vectors is None:
            vectors = self._eager(self._model, self._dtype)(self._blank(1))
        self._width = int(vectors.shape[1])

    def _run_exclusive(self, work: Callable[[], T]) -> T:
        """What takes all cores of a CPU is done by one thread, always the same."""
        return work() if self._cpu_pool is None else self._cpu_pool.call(work)

    def _cast(self, model: Any, dtypes: Sequence[torch.dtype]) -> tuple[Any, torch.dtype]:
        """The first format in which the model still says what it says in FP32."""
        if len(dtypes) == 1:
            return model.to(dtypes[0]), dtypes[0]
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (CHECKED, *self._shape), np.uint8))
        raw = pixels.to(self._device)
        with torch.inference_mode():
            expected = self._eager(model, torch.float32)(raw)
            for dtype in dtypes[:-1]:
                vectors = self._eager(model.to(dtype), dtype)(raw)
                cosine = float((vectors * expected).sum(dim=1).min())
                if cosine >= MIN_COSINE:
                    return model, dtype
                log.warning("dtype_refused", dtype=str(dtype), cosine=cosine, expected=MIN_COSINE)
                # What a cast has rounded off does not come back.
                model = load_model(self._checkpoint).to(self._device)
        return model.to(dtypes[-1]), dtypes[-1]

    def _on_cpu(self, model: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The model as it was loaded: not yet moved, not yet cast."""
        tower = eager_tower(model, dtype=torch.float32, device=torch.device("cpu"), **self._pixels)
        with torch.inference_mode():
            vectors: NDArray[np.float32] = tower(torch.from_numpy(pixels)).numpy()
        return vectors

    def _eager(self, model: Any, dtype: torch.dtype) -> Tower:
        return eager_tower(model, dtype=dtype, device=self._device, **self._pixels)

    def _blank(self, count: int) -> torch.Tensor:
        return torch.full((count, *self._shape), 127, dtype=torch.uint8, device=self._device)

    def _make_stager(self, rungs: Sequence[int]) -> StagingRing:
        tower = self._eager(self._model, self._dtype)
        if self._stream is not None and self._has_graphs:
            tower = GraphedTower(tower, rungs=rungs, shape=self._shape, stream=self._stream)
        elif self._is_compiled:
            tower = compiled_tower(tower)
        return self._run_exclusive(
            lambda: StagingRing(
                tower, rungs=rungs, shape=self._shape, width=self._width, device=self._device, stream=self._stream,
                cpu_pool=self._cpu_pool,
            )
        )  # fmt: skip

    def warm(self, *, choose_largest: bool = False, is_thorough: bool = False) -> None:
        """Measure as much as a first guess of batch sizes and threads needs; the rest is learned from batches of jobs.

        A size that is compiled, or captured as a CUDA graph, is run here: no job shall wait for that.

        Args:
            choose_largest: begin with the size beyond which batches bring no more pictures a second, and learn; else
                begin with the largest, also where its batches take long.
            is_thorough: measure all sizes, as well as it can be done.

        Raises:
            NonFiniteError: when this dtype overflows on this model.
        """
        core_s = 0.0 if self._cpu_pool is None else self._arrange_threads(self._cpu_pool)
        if is_thorough or self._is_compiled or self._stream is not None:
            costs = measure(self._time, self.rungs, is_enough=self._is_enough if choose_largest else lambda _: False)
            sd = MEASURED_WELL_SD
        else:
            costs, sd = self._look_at_two(core_s), MEASURED_ONCE_SD
        if self._is_compiled:
            self.rungs = tuple(costs)
        self.measured = tuple(costs)
        self.sizes = self._learn_sizes(costs, sd=sd, choose_largest=choose_largest)

    def _arrange_threads(self, cpu_pool: CpuInferencePool) -> float:
        """Decide by the CPU that an image takes one thread, which is the same whatever else runs; return it."""
        tower, raw = self._eager(self._model, self._dtype), self._blank(self.rungs[0])
        vectors = torch.empty((self.rungs[0], self._width))
        cpu_pool.omp_threads = 1
        core_s = min(cpu_pool.start(tower, raw, vectors).wait().cost for _ in range(PASSES)) / self.rungs[0]
        self._threads = ThreadPolicy(
            core_s=core_s,
            cores=usable_cores,
            fixed=self._asked_threads,
            most=self._most_threads,
            is_compiled=self._is_compiled,
            on_change=_log_threads,
        )
        self._follow(self._threads)
        return core_s

    def _follow(self, policy: ThreadPolicy) -> bool:
        """Take a crew of as many threads as the policy says; whether there had to be another one."""
        wanted, cpu_pool = policy.look(), self._cpu_pool
        if cpu_pool is not None and (cpu_pool.threads, cpu_pool.is_divided) == (wanted.threads, wanted.is_divided):
            return False
        self._cpu_pool = self._berths.cpu_pool = CpuInferencePool(wanted.threads, is_divided=wanted.is_divided)
        return True

    def _look_at_two(self, core_s: float) -> dict[int, float]:
        """The cost of the smallest batch, whose images take `core_s` each, and of a larger one that is still quick."""
        smallest = self.rungs[0]
        costs = {smallest: core_s * smallest}
        largest = max(rung for rung in self.rungs if rung == smallest or rung * core_s <= START_CORE_S)
        took = [self._time(largest) for _ in range(PASSES)]
        if largest != smallest:
            costs[largest] = min(took)
        self._run_before.update(costs)
        return costs

    def _is_enough(self, costs: Mapping[int, float]) -> bool:
        """Whether a batch twice as large would take too long; or, slow to compile, two in vain end the search."""
        rung = max(costs)
        per_image = {size: cost / size for size, cost in costs.items()}
        return 2 * costs[rung] / self.threads > LONGEST_S or (self._is_compiled and first_choice(per_image) < rung // 2)

    def _learn_sizes(
        self, costs: Mapping[int, float], *, sd: float = MEASURED_ONCE_SD, choose_largest: bool = True
    ) -> BatchSizePolicy:
        return BatchSizePolicy(
            self.rungs,
            costs,
            measured_sd=sd,
            cost_per_s=self.threads,
            first=None if choose_largest else self.rungs[-1],
            longest_s=LONGEST_S if choose_largest else math.inf,
            on_change=_log_size,
        )

    def _time(self, rung: int) -> float:
        """The cost of one pass; where it may compile, at a first run or for another number of threads, of the next."""
        pixels = np.full((rung, *self._shape), 127, np.uint8)
        if self._is_compiled:
            self.encode(pixels)
        flight = self.launch(pixels)
        self.collect(flight)
        return flight.spent.cost if flight.spent is not None else 0.0

    # -------------------------------------------------------------------------------- batches
    def launch(self, pixels: NDArray[np.uint8], rows: Sequence[int] | None = None) -> InFlightBatch:
        """Start a batch: rows of `pixels` uint8 (slots, h, w, 3), or all of it.

        On a CPU it returns when a core is idle, which can begin another batch, or this one is done.

        Raises:
            ValueError: for a wrong shape or more pictures than the largest rung.
        """
        count = len(pixels) if rows is None else len(rows)
        if pixels.shape[1:] != self._shape or pixels.dtype != np.uint8 or not 0 < count <= self.rungs[-1]:
            expected = f"uint8 (1 to {self.rungs[-1]}, {', '.join(map(str, self._shape))})"
            raise ValueError(f"expected {expected}, got {pixels.dtype} {(count, *pixels.shape[1:])}")
        if self._threads is not None:
            self._prepare(self._threads, self._berths.rung_of(count))
        return self._berths.launch(pixels, rows)

    def _prepare(self, policy: ThreadPolicy, rung: int) -> None:
        if self._follow(policy):
            self.sizes.forget()
        if self._cpu_pool is not None and self._berths.parts_of(rung) == 1:
            self._cpu_pool.omp_threads = policy.next_together(self.sizes.cost_of(rung))

    def collect(self, flight: InFlightBatch) -> NDArray[np.float32]:
        """The unit vectors float32 (n, d) of a batch that was launched.

        Raises:
            NonFiniteError: names the rows that are not finite.
        """
        return _finite(flight.collect())

    def learn(self, flight: InFlightBatch, *, host_s: float = 0.0) -> None:
        """Let a batch of jobs that was collected teach how large batches should be, and how many threads work on them.

        Args:
            host_s: CPU that was spent on the batch as such, beside the model's.
        """
        spent, rung = flight.spent, flight.rung
        if spent is None:
            return
        if self._cpu_pool is not None and rung not in self._run_before:
            self._run_before.add(rung)
            self.sizes.skip(rung)
            return
        usual = 0
        if self._threads is not None:
            work, smallest = self.sizes.cost_of(rung), self.rungs[0]
            is_exact = spent.omp_threads < 2  # threads that work together also wait together, awake
            core_s = spent.cost / work * self.sizes.cost_of(smallest) / smallest if is_exact else None
            self._threads.record(core_s=core_s, together=spent.omp_threads, work=work, seconds=spent.seconds)
            usual = self._threads.together
        if spent.omp_threads in {0, usual}:
            cost = spent.cost + host_s if self._cpu_pool is not None else spent.cost
            self.sizes.record(rung, cost=cost, seconds=spent.seconds)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures uint8 (n, h, w, 3) → unit vectors float32 (n, d); raises what `launch` and `collect` raise."""
        return self.collect(self.launch(pixels))

    def encode_exact(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The same in FP32, whatever dtype is in use: for pictures that overflow a smaller one.

        The first call loads the checkpoint again; its weights then stay on the device beside the others.
        """
        return _finite(self._run_exclusive(lambda: self._exactly(np.ascontiguousarray(pixels))))

    def _exactly(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self._exact is None:
            is_exact = self._dtype is torch.float32
            model = self._model if is_exact else load_model(self._checkpoint).to(self._device)
            self._exact = self._eager(model, torch.float32)
        with torch.inference_mode():
            vectors: NDArray[np.float32] = self._exact(torch.from_numpy(pixels).to(self._device)).cpu().numpy()
        return vectors

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """m texts → unit vectors float32 (m, d). Texts longer than the model's limit are cut, as the tokenizer does."""
        return _finite(self._run_exclusive(lambda: self._texts.encode(texts)))

    def label_tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """What the tokenizer makes of each label; tells which ones the model cannot read."""
        return self._texts.label_tokens(labels)

    def error_kind(self, error: BaseException) -> DeviceErrorKind:
        """What an error of `encode` means for its batch."""
        return error_kind_of(error)


def _finite(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        rows = tuple(bad.tolist())
        raise NonFiniteError(f"expected finite vectors, got NaN or infinity in rows {list(rows)[:20]}", rows)
    return vectors


def _log_size(change: BatchSizeChange) -> None:
    about = {"from": change.before, "to": change.now}
    log.info("batch_size_changed", **about, reason=change.reason, images_per_s=change.images_per_s)


def _log_threads(change: ThreadChange) -> None:
    about = {"from": change.before.threads, "to": change.now.threads}
    about |= {"together_from": change.together_before, "together_to": change.together}
    log.info("model_threads_changed", **about, divided=change.now.is_divided, reason=change.reason)
