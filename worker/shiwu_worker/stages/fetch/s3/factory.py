"""Creates the client of the object store that the operator chose."""

from __future__ import annotations

from shiwu_worker.policy.limits import S3Options
from shiwu_worker.stages.fetch.s3.base import ObjectStore, S3Limits
from shiwu_worker.stages.fetch.s3.boto import BotoStore


def new_store(options: S3Options, limits: S3Limits) -> ObjectStore:
    """A client of the store; it connects when the first object is requested."""
    if options.client == "obstore":
        # Imported here because obstore is an optional dependency.
        from shiwu_worker.stages.fetch.s3.obstore import ObstoreStore  # noqa: PLC0415 an optional dependency

        return ObstoreStore(options, limits)
    return BotoStore(options, limits)
