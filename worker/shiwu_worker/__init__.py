"""shiwu's worker: claims jobs from Redis, tags their images on one device, and answers each job once.

`pipeline/pipeline.py` has the steps of a job in their order, `service/bootstrap.py` builds the parts, and
`celery_worker` is the Celery worker around them. `docs/architecture.md` lists the packages and their front doors.
"""
