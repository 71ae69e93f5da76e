"""Decode: turns bytes into RGB pixels for the model. Front door: `decoder`, `image_spec`, `image_formats`."""
