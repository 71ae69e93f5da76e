"""Decode: turns bytes into the RGB pixels that the model takes. Front door: `decoder`, `image_spec`."""
