"""Claim: takes jobs from the lanes under a lease.

Front door: `lease_queue`, `notifier`, and for shards `lane_watch`, `shard_claims`, `sharded_claims`.
"""
