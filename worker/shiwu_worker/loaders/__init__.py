"""Processes that fetch and decode images, forked by a fork server and confined by a sandbox.

Loads no torch. Front door: `pool`, `protocol`, `shared_memory`.
"""
