"""Finished runs side by side: by data, model, recipe, pattern and method, against a baseline paired by seed."""
