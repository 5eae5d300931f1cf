"""Bookkeeping of the paged cache in plain Python: who owns which block. Imports no torch."""

from model1.cache.block_manager import BlockManager, OutOfBlocks

__all__ = ["BlockManager", "OutOfBlocks"]
