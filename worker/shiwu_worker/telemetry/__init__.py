"""Telemetry for operators: metrics, queue and GPU monitors, traces, logs.

All modules are open to other packages; `tracing` needs the extra `otel` and is imported only with `SHIWU_TRACES`.
"""
