"""Plain PyTorch manifold-constrained hyper-connections.

Where a CPU records no gradient the Sinkhorn rounds run in NumPy: a few tokens cost only the number
of calls, and there are dozens of them in every sublayer.
"""

from __future__ import annotations
