# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""MODEL1's cached rows of 448 + 64 channels: addresses, prefetch, loads, conversion to bf16.

A warp group of 128 threads takes 32 tokens: four neighbouring lanes have one token, each 16 of the
64 bytes that share a scale. Source of the bytes: docs/kv_layout.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TOKENS = gl.constexpr(32)  # of a warp group
_ROW_BYTES = gl.constexpr(576)
_SCALE_BYTES = gl.constexpr(8)
_ROPE_WORD = gl.constexpr(112)  # 448 bytes of codes are 112 words of 32 bits

# The bits of an e4m3 code, moved to where bf16 has them, are the number times 2^-120: $3 and $4
# hold, twice, two powers of two whose product is 2^120 times the scale. One factor alone would
# leave bf16's range for scales above 2^7. A NaN code gives 480: `nan_bits` finds those.
# prmt puts a code under eight copies of its sign; moved up by four bits, sign, exponent and
# mantissa stand right, and what is between them is cleared.
_CONVERT = gl.constexpr("""{
.reg .b32 t, u;
prmt.b32 t, $2, 0, 0x9180;
prmt.b32 u, $2, 0, 0xB3A2;
shl.b32 t, t, 4;
shl.b32 u, u, 4;
and.b32 t, t, 0x87F087F0;
and.b32 u, u, 0x87F087F0;
mul.bf16x2 t, t, $3;
mul.bf16x2 u, u, $3;
mul.bf16x2 $0, t, $4;
mul.bf16x2 $1, u, $4;
}""")
# Exponent e, a byte, to the factors 2^(min(e, 134) - 7) and 2^max(e - 134, 0), each twice.
_FACTORS = gl.constexpr("""{
.reg .b32 low, high;
min.u32 low, $2, 134;
sub.u32 high, $2, low;
mad.lo.u32 $0, low, 0x00800080, 0x3C003C00;
mad.lo.u32 $1, high, 0x00800080, 0x3F803F80;
}""")

# Adds bit 7 of every byte whose other bits are all ones: NaN in e4m3, whatever the sign.
_NAN_BITS = gl.constexpr("""{
.reg .b32 t;
and.b32 t, $2, 0x7F7F7F7F;
add.u32 t, t, 0x01010101;
lop3.b32 $0, t, 0x80808080, $1, 0xEA;
}""")

_PREFETCH = gl.constexpr("""{
.reg .pred p; .reg .b32 r; .reg .b64 a;
mov.u32 r, %laneid;
and.b32 r, r, 3;
mad.wide.u32 a, r, 64, $1;
prefetch.global.L2 [a];
prefetch.global.L2 [a+256];
setp.eq.u32 p, r, 0;
@p prefetch.global.L2 [$1+512];
setp.eq.u32 p, r, 1;
@p prefetch.global.L2 [$2];
mov.u32 $0, 0;
}""")


@gluon.constexpr_function
def codes_layout():
    """32 tokens x 16 words of four codes, of which a lane has four."""
    return gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])


@gluon.constexpr_function
def rope_layout():
    """32 tokens x 32 words of two bf16 numbers, of which a lane has eight."""
    return gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])


@gluon.jit
def divide(number, divisor, shift):
    """number // block_size as the high half of a product, for numbers that are not negative.

    `divisor`, 32 bits without a sign, and `shift` are what `fast_divisor` returns.
    """
    return (gl.umulhi(number.to(gl.uint32) * 2, divisor.to(gl.uint32)) >> shift).to(gl.int32)


@gluon.jit
def locate(slot, cache, block_units, block_size, divisor, shift, last_slot):
    """Where the blocks of `slot` [32] start, the tokens' places in them, and which exist.

    block_units: 16-byte units from block to block. Slots outside the cache, -1 first, point at
    slot 0, so that they can be prefetched.
    """
    exists = (slot >= 0) & (slot <= last_slot)
    slot = gl.where(exists, slot, 0)
    block = divide(slot, divisor, shift)
    return cache + block.to(gl.int64) * block_units * 16, slot - block * block_size, exists


@gluon.jit
def row_pointers(slot, cache, block_units, block_size, divisor, shift, last_slot):
    """Where the rows and scales of `slot` [32] are, as pointers to int32, and which exist."""
    start, token, exists = locate(slot, cache, block_units, block_size, divisor, shift, last_slot)
    rows = start + token.to(gl.int64) * _ROW_BYTES
    scales = start + (block_size.to(gl.int64) * _ROW_BYTES + token.to(gl.int64) * _SCALE_BYTES)
    words = gl.pointer_type(gl.int32)
    return rows.to(words, bitcast=True), scales.to(words, bitcast=True), exists


@gluon.jit
def prefetch_rows(rows, scales):
    """Ask for rows and scales from device memory, to be loaded from the L2 cache later."""
    gl.inline_asm_elementwise(
        _PREFETCH, "=r,l,l", [rows.to(gl.int64, bitcast=True), scales.to(gl.int64, bitcast=True)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_codes(rows, exists, TILE: gl.constexpr):
    """The 64 codes of a scale, [32, 16] words; zeros for rows that do not exist."""
    L: gl.constexpr = codes_layout()
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, L))[None, :] + TILE * 16
    return gl.load(rows[:, None] + word, mask=exists[:, None], other=0)


@gluon.jit
def load_rope(rows, exists):
    """The 64 rotary channels, [32, 32] words of two bf16 numbers."""
    L: gl.constexpr = rope_layout()
    TOKEN: gl.constexpr = gl.SliceLayout(1, L)
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, L))[None, :] + _ROPE_WORD
    rows = gl.convert_layout(rows, TOKEN, assert_trivial=True)
    exists = gl.convert_layout(exists, TOKEN, assert_trivial=True)
    return gl.load(rows[:, None] + word, mask=exists[:, None], other=0)


@gluon.jit
def convert_codes(words, scales, BYTE: gl.constexpr):
    """[32, 16] words of four codes to [32, 32] words of two bf16.

    The scale is byte BYTE of `scales` [32]. Exact but for products that bf16 has no numbers for,
    which are rounded as a product is.
    """
    exponent = ((scales >> (8 * BYTE)) & 0xFF)[:, None]
    low, high = gl.inline_asm_elementwise(
        _FACTORS, "=r,=r,r", [exponent], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    low, _ = gl.broadcast(low, words)
    high, _ = gl.broadcast(high, words)
    first, second = gl.inline_asm_elementwise(
        _CONVERT, "=r,=r,r,r,r", [words, low, high], dtype=(gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(first, second).reshape([TOKENS, 32])


@gluon.jit
def nan_bits(found, words):
    """`found`, with more bits set where a word has the code of a NaN.

    Not pure for the compiler: it would move the test behind the words' last use and spill them.
    """
    return gl.inline_asm_elementwise(
        _NAN_BITS, "=r,r,r", [found, words], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def side_by_side(x, y):
    """[32, n] and [32, n] to [32, 2n]."""
    return gl.join(x, y).permute((0, 2, 1)).reshape([x.shape[0], x.shape[1] * 2])
