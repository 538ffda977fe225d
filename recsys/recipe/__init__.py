"""Recipes: YAML to a checked `Recipe` to a `Run`."""
