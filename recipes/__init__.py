"""Recipes: how the files that the project ships, but nobody wrote by hand, are made from packages of registries."""
