# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""What lies in shared memory, for all warp groups: barriers, tiles and rows of numbers.

Each kind is one allocation, because a warp group keeps the address of every allocation that it uses
in a register.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl

# Barriers; of two, for the first and the second of a pair of buffers.
LOW_READY = gl.constexpr(0)  # two: channels 0 to 255 of keys that are copied are there
HIGH_READY = gl.constexpr(2)  # two: all channels and the bias
LOW_FREE = gl.constexpr(4)  # two
HIGH_FREE = gl.constexpr(6)  # two
WEIGHTS_READY = gl.constexpr(8)  # two: of the first and of the second attending warp group
QUERIES_READY = gl.constexpr(10)
TOTALS_READY = gl.constexpr(11)
NUM_BARRIERS = gl.constexpr(12)

# Tiles of keys, 64 tokens x 256 channels: two of low channels, two of high ones; queries one each.
LOW = gl.constexpr(0)
HIGH = gl.constexpr(2)
NUM_KEY_TILES = gl.constexpr(4)
Q_HIGH = gl.constexpr(1)

# Rows of 64 numbers, one for a head; two each, one of an attending warp group.
DECAY = gl.constexpr(0)
MAXIMUM = gl.constexpr(2)
TOTAL = gl.constexpr(4)
NUM_ROWS = gl.constexpr(6)
