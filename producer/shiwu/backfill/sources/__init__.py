"""Where the images of a backfill are listed: buckets, S3 Inventory, files of lines, tables.

Front door: `opening`, `base`.
"""
