"""The main path: what happens to a job from its claim to its committed answer.

Front door: `pipeline`, and what the service builds for it: `claimer`, `admission`, `in_flight`, `label_queue`,
`shared_images`, `batch_executor`, `heartbeat`, `cancellations`, `sharded_committer`, `shard_roles`. `observer` is what
the service implements. `load_results`, `vector_cache` and `known_files` are private.
"""
