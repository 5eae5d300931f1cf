# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""V3.2's cached rows of 512 codes, four fp32 scales and 64 rotary channels in bf16.

The same lanes have the same channels as in `model1.ops.hopper.rows_model1`; a scale belongs to
two of its pieces of 64 codes. Source of the bytes: docs/kv_layout.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from model1.ops.hopper.rows_model1 import TOKENS, locate, rope_layout

_ROW_BYTES = gl.constexpr(656)
_SCALE_WORD = gl.constexpr(128)
_ROPE_WORD = gl.constexpr(132)

# Four codes times a scale, rounded to bf16 once; the code of a NaN becomes one.
_CONVERT = gl.constexpr("""{
.reg .b16 low, high, a, b, c, d;
.reg .b32 t, u;
.reg .f32 fa, fb, fc, fd;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 t, low;
cvt.rn.f16x2.e4m3x2 u, high;
mov.b32 {a, b}, t;
mov.b32 {c, d}, u;
cvt.f32.f16 fa, a;
cvt.f32.f16 fb, b;
cvt.f32.f16 fc, c;
cvt.f32.f16 fd, d;
mul.f32 fa, fa, $3;
mul.f32 fb, fb, $3;
mul.f32 fc, fc, $3;
mul.f32 fd, fd, $3;
cvt.rn.bf16x2.f32 $0, fb, fa;
cvt.rn.bf16x2.f32 $1, fd, fc;
}""")

_PREFETCH = gl.constexpr("""{
.reg .pred p; .reg .b32 r; .reg .b64 a;
mov.u32 r, %laneid;
and.b32 r, r, 3;
mad.wide.u32 a, r, 64, $1;
prefetch.global.L2 [a];
prefetch.global.L2 [a+256];
setp.lt.u32 p, r, 3;
@p prefetch.global.L2 [a+512];
mov.u32 $0, 0;
}""")


@gluon.jit
def v32_rows(slot, cache, block_units, block_size, divisor, shift, last_slot):
    """Where the rows of `slot` [32] are, as pointers to int32, and which exist."""
    start, token, exists = locate(slot, cache, block_units, block_size, divisor, shift, last_slot)
    rows = start + token.to(gl.int64) * _ROW_BYTES
    return rows.to(gl.pointer_type(gl.int32), bitcast=True), exists


@gluon.jit
def prefetch_v32_rows(rows):
    """Ask for rows from device memory, to be loaded from the L2 cache later."""
    gl.inline_asm_elementwise(
        _PREFETCH, "=r,l", [rows.to(gl.int64, bitcast=True)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_scale(rows, exists, NUMBER: gl.constexpr):
    """One of a token's four scales, [32] fp32."""
    word = gl.load(rows + (_SCALE_WORD + NUMBER), mask=exists, other=0)
    return word.to(gl.float32, bitcast=True)


@gluon.jit
def copy_rope(rows, exists, tile):
    """Start copying the 64 rotary channels to `tile` [32, 32] words; zeros where no row exists."""
    L: gl.constexpr = rope_layout()
    TOKEN: gl.constexpr = gl.SliceLayout(1, L)
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, L))[None, :] + _ROPE_WORD
    rows = gl.convert_layout(rows, TOKEN, assert_trivial=True)
    exists = gl.convert_layout(exists, TOKEN, assert_trivial=True)
    async_copy.async_copy_global_to_shared(tile, rows[:, None] + word, mask=exists[:, None])


@gluon.jit
def convert_v32_codes(words, scale):
    """[32, 16] words of four codes times `scale` [32] fp32 to [32, 32] words of two bf16."""
    scale, _ = gl.broadcast(scale[:, None], words)
    first, second = gl.inline_asm_elementwise(
        _CONVERT, "=r,=r,r,f", [words, scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return gl.join(first, second).reshape([TOKENS, 32])
