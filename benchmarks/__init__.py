"""Programs that measure Model1 beside its peers; `results/` holds what they recorded."""
