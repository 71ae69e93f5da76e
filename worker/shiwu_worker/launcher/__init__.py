"""One worker process for each GPU: which there are, who gets which, and who restarts them.

Loads neither torch nor Celery. Front door: `start`.
"""
