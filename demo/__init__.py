"""`make demo`: real servers, one real worker, and the tags of sample images, on this machine alone."""
