"""Options of loaders with small limits, for tests that start none."""

from __future__ import annotations

from typing import Final

from shiwu_worker.loaders.protocol import LoaderOptions
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.limits import DecodeLimits, FetchLimits, S3Options, SandboxLimits
from shiwu_worker.stages.decode.image_spec import ImageSpec

SPEC: Final = ImageSpec(32, 32, "squash", None, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")
LIMITS: Final = DecodeLimits(max_pixels=1_000_000, max_side=16_384, formats=FORMATS)
"""Small, so that an input takes milliseconds."""
LOADER_OPTIONS: Final = LoaderOptions(
    spec=SPEC,
    slots=1,
    threads=1,
    access=AccessRules(),
    fetch=FetchLimits(max_bytes=1000, total_timeout_s=1.0, connect_timeout_s=1.0, read_timeout_s=1.0),
    s3=S3Options(None, None),
    decode=LIMITS,
    sandbox=SandboxLimits(memory_bytes=1 << 30),
)
