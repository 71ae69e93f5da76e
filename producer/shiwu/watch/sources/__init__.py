"""Sources of messages that are read by the watcher: MinIO's Redis target in both forms, and SQS."""

__all__: list[str] = []
