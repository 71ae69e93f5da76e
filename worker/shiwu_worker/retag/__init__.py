"""`shiwu-worker retag`: tags made from kept vectors and new labels. No image is read.

Front door: `command`. Needs the extra `vectors` (pyarrow).
"""
