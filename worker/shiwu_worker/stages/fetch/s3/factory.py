"""The client of the object store that the operator chose."""

from __future__ import annotations

from shiwu_worker.stages.fetch.s3.base import ObjectStore, S3Limits, S3Options
from shiwu_worker.stages.fetch.s3.boto import BotoStore


def new_store(options: S3Options, limits: S3Limits) -> ObjectStore:
    """Connects to nothing yet."""
    if options.client == "obstore":
        # Here and not above: it is an extra.
        from shiwu_worker.stages.fetch.s3.obstore import ObstoreStore  # noqa: PLC0415

        return ObstoreStore(options, limits)
    return BotoStore(options, limits)
