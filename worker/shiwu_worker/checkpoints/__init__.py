"""Model folders on disk and on the hub: which files there are, which one holds what, how they are downloaded.

Loads no torch. Front door: `model_files`, `checkpoint_files`, `hub`.
"""
