"""Model folders on disk and on the hub: finds, checks and downloads their files.

Loads no torch. Front door: `model_files`, `checkpoint_files`, `hub`.
"""
