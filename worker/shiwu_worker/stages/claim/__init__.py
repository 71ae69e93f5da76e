"""Claim: takes jobs from the lanes under a lease. Front door: `lease_queue`, `notifier`."""
