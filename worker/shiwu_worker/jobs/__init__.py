"""Plain data that all stages share: a job, its timestamps, its label set, its history and its outcome."""
