"""`make demo`: real servers, one real worker, and the tags of sample pictures, on this machine alone."""
