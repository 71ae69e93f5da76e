"""Helpers about this process and its machine: threads, pauses, progress, CPUs, memory allocator."""
