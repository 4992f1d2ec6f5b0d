"""Recipes: data only, found by flagscale-config through the entry point `flagscale.recipes`."""

__all__: list[str] = []
