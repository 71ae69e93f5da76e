"""What the operator allows, as pure functions: addresses, buckets, folders, callback tasks, retries."""
