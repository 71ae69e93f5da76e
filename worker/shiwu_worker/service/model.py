"""Makes the model and the parts that use it: the canary and the scorer."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from shiwu_worker.checkpoints.model_files import model_name, model_revision
from shiwu_worker.config.batches import GPU_BATCH_S, batch_sizes
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.health.canary import Canary, known_images
from shiwu_worker.runtime.garbage import freeze_imported
from shiwu_worker.stages.score.scorer import Scorer

if TYPE_CHECKING:
    from shiwu_worker.config.settings import Settings
    from shiwu_worker.stages.decode.image_spec import ImageSpec
    from shiwu_worker.stages.encode.encoder import Encoder


def load_encoder(settings: Settings, folder: Path, spec: ImageSpec, *, is_thorough: bool = False) -> Encoder:
    """Load the model and run its first batches.

    Args:
        is_thorough: measure all batch sizes.

    Raises:
        FatalError: with ExitCode.DEVICE if the device fails, with ExitCode.MODEL for any other failure.
    """
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            # Hashing all weights takes a second for a large model, and importing torch takes longer.
            revision = pool.submit(model_revision, folder)
            # Not at the top of the module: loaders start before torch is imported.
            from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions, is_lost  # noqa: PLC0415 torch takes seconds to import, and loaders start meanwhile

        freeze_imported()
        options = EncoderOptions(
            folder=folder,
            model_id=model_name(settings.model),
            revision=revision.result(),
            device=settings.device,
            dtype=settings.dtype,
            batch_sizes=batch_sizes(settings),
            mean=spec.mean,
            std=spec.std,
            rescale=spec.rescale,
            threads=settings.torch_threads or None,
            is_compiled=settings.compile,
            has_graphs=settings.cuda_graphs,
            fusions=None if settings.fuse == ("auto",) else settings.fuse,
            max_gpu_batch_s=math.inf if settings.max_batch else GPU_BATCH_S,
            known_images=known_images(spec.height, spec.width),
        )
        try:
            encoder = Encoder(options)
            encoder.warm(choose_largest=not settings.max_batch, is_thorough=is_thorough)
        except RuntimeError as error:
            if is_lost(error):
                raise FatalError(ExitCode.DEVICE, f"the device failed while the model was loaded: {error}") from error
            raise
    except FatalError:
        raise
    except Exception as error:  # border: a worker without its model cannot work, whatever the cause
        raise FatalError(ExitCode.MODEL, f"{type(error).__name__}: {error}") from error
    return encoder


def make_canary(settings: Settings, encoder: Encoder, *, on_wrong: Callable[[str], None]) -> Canary:
    """The canary, whose images take the same path as the images of jobs: staging buffer, launch, collect.

    Raises:
        RuntimeError: the encoder was made without the vectors of the known image.
    """
    if encoder.known_vectors is None or encoder.known_images is None:
        raise RuntimeError("expected an encoder with vectors of known images; pass `known_images` to EncoderOptions")
    return Canary(
        encoder.encode,
        images=encoder.known_images,
        references=encoder.known_vectors,
        sizes=lambda: encoder.canary_sizes,
        every_s=settings.canary_s,
        error_kind=encoder.error_kind,
        on_wrong=on_wrong,
    )


def make_scorer(encoder: Encoder, *, max_tags_bytes: int) -> Scorer:
    """The scorer of this model."""
    return Scorer(scale=encoder.scale, bias=encoder.bias, model=encoder.info, max_tags_bytes=max_tags_bytes)
