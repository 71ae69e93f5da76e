"""The main path: what happens to a job from its claim to its committed answer.

Front door: `pipeline`; `heartbeat`, `cancellations` and `batch_executor` for the service that builds them.
"""
