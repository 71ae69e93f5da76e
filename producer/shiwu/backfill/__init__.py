"""From a bucket or a list to tags: the command `shiwu backfill`. Needs the extra `backfill` (boto3, obstore, pyarrow).

Front door: `command`.
"""
