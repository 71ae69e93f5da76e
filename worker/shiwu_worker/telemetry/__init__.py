"""What the worker tells operators: metrics, traces, logs, and the watches of queues and GPU."""
