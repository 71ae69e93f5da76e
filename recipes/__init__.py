"""Recipes: how the shipped files that are not written by hand are made from packages of registries."""
