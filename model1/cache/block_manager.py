"""Which request owns which block of the KV cache.

Every block id 0 .. num_blocks - 1 is either free or owned by exactly one request. A request's
blocks are in the order of its tokens: token i lies in block `table[i // block_size]`. Plain
integers only; the bytes belong to `model1.ops.kv_cache`.
"""

from __future__ import annotations

from model1.errors import Model1Error


class OutOfBlocks(Model1Error, RuntimeError):
    """Too few free blocks; the manager is unchanged and the caller may free some and retry."""


class BlockManager:
    """Hands out the `num_blocks` blocks of `block_size` tokens to requests named by id.

    Raises ValueError if num_blocks or block_size is not positive.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is reused first, and a fresh manager counts up from 0.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[str, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request owns."""
        return len(self._free)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Requests that hold a table, oldest first."""
        return tuple(self._tables)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one request occupy. Negative: ValueError."""
        if num_tokens < 0:
            raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int, request_id: str | None = None) -> bool:
        """Whether `ensure(request_id, num_tokens)` would succeed; None = a new request."""
        return self._missing(request_id, num_tokens) <= len(self._free)

    def ensure(self, request_id: str, num_tokens: int) -> list[int]:
        """Grow a request, new or known, until `num_tokens` tokens fit; return its block table.

        Never shrinks: fewer tokens than before change nothing. Raises OutOfBlocks, with nothing
        changed, if the free blocks do not suffice, and ValueError if num_tokens is negative.
        """
        missing = self._missing(request_id, num_tokens)
        if missing > len(self._free):
            raise OutOfBlocks(
                f"request {request_id!r} needs {missing} more blocks for {num_tokens} tokens, "
                f"{len(self._free)} of {self.num_blocks} are free"
            )
        table = self._tables.setdefault(request_id, [])
        table.extend(self._free.pop() for _ in range(missing))
        return list(table)

    def block_table(self, request_id: str) -> list[int]:
        """The request's blocks in token order, as a copy. ValueError if it holds no table."""
        return list(self._known(request_id))

    def free(self, request_id: str) -> None:
        """Give every block of the request back. ValueError if it holds none or was freed."""
        table = self._known(request_id)
        del self._tables[request_id]
        self._free.extend(reversed(table))

    def check_invariants(self) -> None:
        """AssertionError unless every block is owned exactly once or free exactly once."""
        owned = [block_id for table in self._tables.values() for block_id in table]
        assert sorted(owned + self._free) == list(range(self.num_blocks)), (
            f"blocks must be free or owned once, got free {self._free} and tables {self._tables}"
        )

    def _missing(self, request_id: str | None, num_tokens: int) -> int:
        held = 0 if request_id is None else len(self._tables.get(request_id, ()))
        return max(self.num_blocks_for(num_tokens) - held, 0)

    def _known(self, request_id: str) -> list[int]:
        if request_id not in self._tables:
            raise ValueError(f"request {request_id!r} holds no blocks: unknown or already freed")
        return self._tables[request_id]
