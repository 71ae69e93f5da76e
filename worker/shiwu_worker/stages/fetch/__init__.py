"""Fetch: reads the bytes of an image from S3, HTTP or a local folder.

Front door: `fetcher`, `error_table`, `validators`, `s3.base`, `s3.boto`, `s3.factory`.
"""
