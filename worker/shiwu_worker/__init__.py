"""shiwu's worker: it claims jobs from Redis, tags their pictures on one device, and answers each once.

The way of a picture stands in `pipeline`; `wiring` builds the parts; `app` is the Celery worker around them.
"""
