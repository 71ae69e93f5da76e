"""Celery around the pipeline: the app, the worker process, callbacks, revoke and task events.

Front door: `worker_app` (what `celery -A shiwu_worker.app` loads), `process` (one worker in this process), and
`callback_app`, for a check of the callback settings.
"""
