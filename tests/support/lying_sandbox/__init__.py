"""The folder with the `sitecustomize` of a sandbox that lies."""
