"""Liveness and readiness: the monitor, the probe files, the HTTP server and the canary.

Front door: `monitor`, `readiness`, `probe_files`, `http_server`, `canary`.
"""
