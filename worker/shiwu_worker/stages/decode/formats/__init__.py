"""Strict readers of single image formats. Used by `image_readers` only."""
