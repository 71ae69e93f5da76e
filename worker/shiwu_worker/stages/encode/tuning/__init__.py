"""Batch sizes and CPU threads, learned from real batches. Used by the encode stage only."""
