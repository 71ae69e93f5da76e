"""Batch → unit vectors, with any dual encoder of transformers.

Batches have a few fixed sizes ("rungs"), padded up: each is warmed before the worker is ready, and in a fixed shape a
picture gets the same vector whatever its neighbours are. After the projection everything is FP32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from shiwu.contract import Head, ModelInfo
from shiwu_worker.berths import Berths, Flight
from shiwu_worker.checkpoint import Texts, image_size, load_model
from shiwu_worker.checkpoint_files import WrongCheckpoint, read_checkpoint
from shiwu_worker.cores import usable_cores
from shiwu_worker.crew import Crew
from shiwu_worker.device import card_uuid, choose_device, choose_dtypes, device_name, trouble_of
from shiwu_worker.errors import NonFiniteError, Trouble
from shiwu_worker.label_checks import LabelTokens
from shiwu_worker.malloc import keep_freed_memory
from shiwu_worker.rungs import LONGEST_S, measure, next_batches, worthwhile
from shiwu_worker.tower import GraphedTower, Tower, compiled_tower, eager_tower

log: Any = structlog.get_logger()
T = TypeVar("T")
LEAST_COSINE: Final = 0.999
"""Between a faster number format and FP32, for the pictures of the start-up check."""
CHECKED: Final = 2
QUICK_CORE_S: Final = 0.04
"""Core-seconds of a picture in the model; loading one takes 0.002."""
SLOW: Final = 5.0
"""Times as long is slow, whatever the first pass pays for."""
TRIES: Final = 3
"""Passes of the smallest rung that may show that a picture is quick."""


class Encoder:
    """A loaded model. `launch` and `encode` may be called from several threads, one at a time reaches the device.

    Args:
        folder: the checkpoint, in transformers' format.
        rungs: batch sizes, ascending; the last is the largest batch.
        mean, std, rescale: of the checkpoint's processor: (x · rescale - mean) / std for x of 0 to 255.
        threads: of torch on a CPU; None: torch's own choice, at most the cores that may be used.
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
            torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))
        self._checkpoint = read_checkpoint(folder)
        self._pixels: dict[str, Any] = {"mean": tuple(mean), "std": tuple(std), "rescale": rescale}
        self._is_compiled, self._has_graphs = is_compiled, has_graphs
        self._compiled: Tower | None = None
        self._crew = self._make_crew()
        self._by_captain(lambda: self._open(dtype, known))
        self._exact: Tower | None = None
        self._texts = Texts(self._model, self._checkpoint)
        self._stream: Any = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's own
        self.rungs = tuple(rungs)
        self._berths = self._dock(self.rungs)
        self.info = ModelInfo(
            id=model_id,
            revision=revision,
            dtype=str(self._dtype).removeprefix("torch."),
            device=device_name(self._device),
        )
        self.card_uuid = card_uuid(self._device)
        self.seconds: dict[int, float] = {}
        """The best forward pass of each rung, as measured while warming."""
        self._next_batches: tuple[int, ...] = ()

    @property
    def slowest_s(self) -> float:
        """The forward pass of the largest rung, as measured while warming."""
        return max(self.seconds.values(), default=0.0)

    def fit(self, waiting: int) -> int:
        """How many of so many pictures, at most the largest rung, the next batch should take, once warm."""
        return self._next_batches[waiting]

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

    def _make_crew(self, *, is_divided: bool = False) -> Crew | None:
        threads = torch.get_num_threads()
        return Crew(threads, is_divided=is_divided) if self._device.type == "cpu" and threads > 1 else None

    def _by_captain(self, work: Callable[[], T]) -> T:
        """What takes all cores of a CPU is done by one thread, always the same."""
        return work() if self._crew is None else self._crew.call(work)

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
                if cosine >= LEAST_COSINE:
                    return model, dtype
                log.warning("dtype_refused", dtype=str(dtype), cosine=cosine, expected=LEAST_COSINE)
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

    def _dock(self, rungs: Sequence[int]) -> Berths:
        tower = self._eager(self._model, self._dtype)
        if self._stream is not None and self._has_graphs:
            tower = GraphedTower(tower, rungs=rungs, shape=self._shape, stream=self._stream)
        elif self._is_compiled:
            tower = self._compiled = self._compiled or compiled_tower(tower)
        return self._by_captain(
            lambda: Berths(
                tower, rungs=rungs, shape=self._shape, width=self._width, device=self._device, stream=self._stream,
                crew=self._crew,
            )
        )  # fmt: skip

    def warm(self, *, choose_largest: bool = False, choose_threads: bool = False) -> None:
        """Run every rung, so that no job pays for first calls, and measure them.

        On a CPU batches are divided among the threads from then on, where a picture takes the model long.

        Args:
            choose_largest: keep only the rungs up to the one beyond which batches bring no more pictures a second.
            choose_threads: on a CPU leave a core to the loaders where a picture takes the model little more than them.

        Raises:
            NonFiniteError: when this dtype overflows on this model.
        """
        if self._crew is not None:
            self._choose_crew(choose_threads=choose_threads)
        seconds = measure(self._time, self.rungs, is_enough=self._is_enough if choose_largest else lambda _: False)
        if choose_largest and (largest := worthwhile(seconds)) < self.rungs[-1]:
            seconds = {rung: took_s for rung, took_s in seconds.items() if rung <= largest}
            self._keep(tuple(seconds))
        self.seconds = seconds
        self._next_batches = next_batches(seconds)

    def _choose_crew(self, *, choose_threads: bool) -> None:
        threads = torch.get_num_threads()
        is_quick = self._is_quick(threads)
        if is_quick and choose_threads:
            torch.set_num_threads(threads - 1)
        # A compiled tower has its number of threads built in, and a quick one mostly waits for Python's lock.
        self._crew = self._make_crew(is_divided=not is_quick and not self._is_compiled)
        self._berths = self._dock(self.rungs)

    def _is_quick(self, threads: int) -> bool:
        """Whether a picture takes the model little more than the loaders."""
        least = self.rungs[0]
        for _ in range(TRIES):
            core_s = self._time(least) * threads / least
            if core_s < QUICK_CORE_S or core_s > SLOW * QUICK_CORE_S:
                return core_s < QUICK_CORE_S
        return False

    def _is_enough(self, seconds: Mapping[int, float]) -> bool:
        """Whether a batch twice as large would take too long; or, slow to compile, two in vain end the search."""
        rung = max(seconds)
        return 2 * seconds[rung] > LONGEST_S or (self._is_compiled and worthwhile(seconds) < rung // 2)

    def _keep(self, rungs: tuple[int, ...]) -> None:
        """Free the memory, and the graphs, of the larger ones."""
        self.rungs = rungs
        self._berths = self._dock(rungs)
        if self._stream is not None:
            for rung in rungs:
                self._time(rung)

    def _time(self, rung: int) -> float:
        """Seconds of one pass; where it may compile, at a first run or for another number of threads, of the next."""
        pixels = np.full((rung, *self._shape), 127, np.uint8)
        if self._is_compiled:
            self.encode(pixels)
        began_s = time.monotonic()
        self.encode(pixels)
        return time.monotonic() - began_s

    # -------------------------------------------------------------------------------- batches
    def launch(self, pixels: NDArray[np.uint8], rows: Sequence[int] | None = None) -> Flight:
        """Start a batch: rows of `pixels` uint8 (slots, h, w, 3), or all of it.

        On a CPU it returns when a core is idle, which can begin another batch, or this one is done.

        Raises:
            ValueError: for a wrong shape or more pictures than the largest rung.
        """
        count = len(pixels) if rows is None else len(rows)
        if pixels.shape[1:] != self._shape or pixels.dtype != np.uint8 or not 0 < count <= self.rungs[-1]:
            expected = f"uint8 (1 to {self.rungs[-1]}, {', '.join(map(str, self._shape))})"
            raise ValueError(f"expected {expected}, got {pixels.dtype} {(count, *pixels.shape[1:])}")
        return self._berths.launch(pixels, rows)

    def collect(self, flight: Flight) -> NDArray[np.float32]:
        """The unit vectors float32 (n, d) of a batch that was launched.

        Raises:
            NonFiniteError: names the rows that are not finite.
        """
        return _finite(flight.collect())

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures uint8 (n, h, w, 3) → unit vectors float32 (n, d); raises what `launch` and `collect` raise."""
        return self.collect(self.launch(pixels))

    def encode_exact(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The same in FP32, whatever dtype is in use: for pictures that overflow a smaller one.

        The first call loads the checkpoint again; its weights then stay on the device beside the others.
        """
        return _finite(self._by_captain(lambda: self._exactly(np.ascontiguousarray(pixels))))

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
        return _finite(self._by_captain(lambda: self._texts.encode(texts)))

    def label_tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """What the tokenizer makes of each label; tells which ones the model cannot read."""
        return self._texts.label_tokens(labels)

    def trouble(self, error: BaseException) -> Trouble:
        """What an error of `encode` means for its batch."""
        return trouble_of(error)


def _finite(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        rows = tuple(bad.tolist())
        raise NonFiniteError(f"expected finite vectors, got NaN or infinity in rows {list(rows)[:20]}", rows)
    return vectors
