"""Training: text corpora, data loading, optimisers, checkpoints of a run and the loop itself."""
