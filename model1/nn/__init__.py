"""The model as a readable statement: modules own weights, `model1.ops` does the work."""
