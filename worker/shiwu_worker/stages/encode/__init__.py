"""Encode: runs batches through the image tower of the model. Front door: `encoder`, `checkpoint`, `size_check`."""
