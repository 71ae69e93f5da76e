"""Celery around the pipeline: the app, the worker process, callbacks, revoke and task events.

Front door: `worker_app` (what `celery -A shiwu_worker.app` loads) and `process` (one worker in this process).
"""
