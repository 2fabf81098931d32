"""Compare finished runs, by data, model, recipe, pattern and method, with a baseline of the same seeds."""
