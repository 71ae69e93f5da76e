"""Whether this machine can do what the other steps need: without a GPU or a package, minutes would be lost."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, Final

from bench.card.measure import Measures, need_cuda

PACKAGES: Final = (
    "celery",
    "transformers",
    "PIL",
    "redis",
    "hiredis",
    "boto3",
    "cykooz_resizer",
    "hypothesis",
    "pytest",
)
"""What workers, tests and benchmarks import."""
SIDE: Final = 256


def measures(*, tiny: bool) -> Measures:
    """A product on the GPU, and all packages."""
    yield "gpu", partial(_gpu, tiny=tiny)
    yield "packages", lambda: {name: _version(name) for name in PACKAGES}


def _gpu(*, tiny: bool) -> Any:
    import torch  # noqa: PLC0415 the other measures do not need it

    if tiny:
        need_cuda()
    check_product("cuda")  # not skipped: without a GPU all that follows would measure the CPU
    return {"name": torch.cuda.get_device_name(), "torch": torch.__version__}


def check_product(device: str) -> None:
    """Raise RuntimeError where a device multiplies wrongly."""
    import torch  # noqa: PLC0415 the other measures do not need it

    matrix = torch.ones(SIDE, SIDE, device=device, dtype=torch.float16)
    product = matrix @ matrix
    if not bool((product == SIDE).all()):
        raise RuntimeError(f"expected a product of {SIDE} in each place, got {product.flatten()[:4].tolist()}")


def _version(name: str) -> str:
    return str(getattr(importlib.import_module(name), "__version__", "imported"))
