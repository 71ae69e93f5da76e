"""Makes the model, and the known picture that it is asked about, from the settings."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shiwu_worker.checkpoints.model_files import model_name, model_revision
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.health.canary import Canary, known_image
from shiwu_worker.runtime.garbage import freeze_imported
from shiwu_worker.stages.decode.image_spec import ImageSpec


def load_encoder(settings: Settings, folder: Path, spec: ImageSpec, *, is_thorough: bool = False) -> Any:
    """The model, loaded and warm.

    Args:
        is_thorough: measure all batch sizes.

    Raises:
        FatalError: with ExitCode.MODEL, whatever it was that failed.
    """
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            # It reads all weights, a second for a large model; torch's import takes longer.
            revision = pool.submit(model_revision, folder)
            # Here and not above: loaders start meanwhile.
            from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions  # noqa: PLC0415

        freeze_imported()
        options = EncoderOptions(
            folder=folder,
            model_id=model_name(settings.model),
            revision=revision.result(),
            device=settings.device,
            dtype=settings.dtype,
            batch_sizes=settings.batch_sizes,
            mean=spec.mean,
            std=spec.std,
            rescale=spec.rescale,
            threads=settings.torch_threads or None,
            is_compiled=settings.compile,
            has_graphs=settings.cuda_graphs,
            known_images=known_image(spec.height, spec.width),
        )
        encoder = Encoder(options)
        encoder.warm(choose_largest=not settings.max_batch, is_thorough=is_thorough)
    except FatalError:
        raise
    except Exception as error:  # border: any failure here means that this worker can't work
        raise FatalError(ExitCode.MODEL, f"{type(error).__name__}: {error}") from error
    return encoder


def make_canary(settings: Settings, encoder: Any, spec: ImageSpec, *, on_wrong: Callable[[str], None]) -> Canary:
    """The known picture, on the same way as jobs: gathered into a berth, launched, collected."""
    return Canary(
        lambda pixels: encoder.collect(encoder.launch(pixels, [0])),
        pixels=known_image(spec.height, spec.width),
        reference=encoder.known_vectors[0],
        every_s=settings.canary_s,
        error_kind=encoder.error_kind,
        on_wrong=on_wrong,
    )
