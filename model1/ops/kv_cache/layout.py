"""Every byte layout of the paged KV cache; docs/kv_layout.md draws them.

A cache is `uint8 [num_blocks, block stride]`; a block holds `block_size` tokens and a slot is
`block_id * block_size + offset`. Four layouts exist:

    fp32, bf16   the token's channels back to back
    model1_fp8   two planes per block: every token's e4m3 + bf16 row, then every token's scale bytes
    v32_fp8      one row per token: e4m3, fp32 scales, bf16

Plain integers only: nothing here touches a tensor or a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model1.errors import ConfigError

LayoutName = Literal["model1_fp8", "v32_fp8", "bf16", "fp32"]

FP8_E4M3_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max
# Lower bound of amax / FP8_E4M3_MAX, so that the smallest scale is 2^-13 and zeros stay zeros.
MIN_SCALE = 1e-4
E8M0_BIAS = 127  # a scale byte e means 2^(e - 127)
E8M0_NAN = 255

_ITEM_BYTES = {"model1_fp8": 1, "v32_fp8": 1, "bf16": 2, "fp32": 4}
_TILE = {"model1_fp8": 64, "v32_fp8": 128}
_ROPE_ITEM_BYTES = 2  # the rotary channels of both FP8 layouts are bf16
_SCALE_ROW_ALIGN = 8  # model1_fp8: one 8-byte load fetches a token's (up to eight) scale bytes
_MAX_MODEL1_D_NOPE = 1024  # up to 16 scale bytes a token, so that scale rows divide data rows
_FP8_ALIGN = 16  # rows start on 16 bytes for 16-byte vector loads
# Rotary widths of an FP8 row come in steps of 8 channels, which keeps that alignment.
_FP8_ROPE_STEP = _FP8_ALIGN // _ROPE_ITEM_BYTES


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How one token's `d_nope` plain and `d_rope` rotary channels lie in a block.

    The FP8 layouts quantise the plain channels in tiles that share a scale and keep the rotary ones
    in bf16. With 448 + 64 and 512 + 64 channels they are the MODEL1 and V3.2 formats of FlashMLA,
    byte for byte. Tiles are whole, so d_nope is a multiple of 64 in model1_fp8, up to 1024, and of
    128 in v32_fp8, which has no half tiles: other multiples of 64 need model1_fp8. d_rope is a
    multiple of 8 in both; fp32 and bf16 take any widths.
    Raises ConfigError for an unknown name and for widths that the layout cannot hold.
    """

    name: LayoutName
    d_nope: int
    d_rope: int

    def __post_init__(self) -> None:
        if self.name not in _ITEM_BYTES:
            raise ConfigError(f"name must be one of {', '.join(_ITEM_BYTES)}, got {self.name!r}")
        if self.d_nope <= 0:
            raise ConfigError(f"d_nope must be positive, got {self.d_nope}")
        if self.d_rope < 0:
            raise ConfigError(f"d_rope must not be negative, got {self.d_rope}")
        if not self.is_fp8:
            return
        if self.d_nope % self.tile:
            raise ConfigError(
                f"d_nope must be a multiple of {self.tile} for {self.name}, got {self.d_nope}"
            )
        if self.name == "model1_fp8" and self.d_nope > _MAX_MODEL1_D_NOPE:
            raise ConfigError(
                f"d_nope must be at most {_MAX_MODEL1_D_NOPE} for model1_fp8, got {self.d_nope}"
            )
        if self.d_rope % _FP8_ROPE_STEP:
            raise ConfigError(
                f"d_rope must be a multiple of {_FP8_ROPE_STEP} for {self.name}, got {self.d_rope}"
            )

    @property
    def is_fp8(self) -> bool:
        """Whether the plain channels are quantised."""
        return self.name in _TILE

    @property
    def d(self) -> int:
        """Channels of one token."""
        return self.d_nope + self.d_rope

    @property
    def tile(self) -> int:
        """Plain channels that share one scale; all of them where nothing is quantised."""
        return _TILE.get(self.name, self.d_nope)

    @property
    def num_tiles(self) -> int:
        """Scales of one token; 0 where nothing is quantised."""
        return self.d_nope // self.tile if self.is_fp8 else 0

    @property
    def rope_start_bytes(self) -> int:
        """Where the rotary channels begin, counted from the start of the token's row."""
        if self.name == "v32_fp8":
            return self.d_nope + _round_up(4 * self.num_tiles, _FP8_ALIGN)
        return self.d_nope * _ITEM_BYTES[self.name]

    @property
    def row_bytes(self) -> int:
        """Distance between the rows of neighbouring tokens: 576 for MODEL1, 656 for V3.2."""
        item_bytes = _ROPE_ITEM_BYTES if self.is_fp8 else _ITEM_BYTES[self.name]
        return self.rope_start_bytes + self.d_rope * item_bytes

    @property
    def scale_row_bytes(self) -> int:
        """Bytes per token in the scale plane at the end of a block; 0 where there is none."""
        if self.name != "model1_fp8":
            return 0
        return _round_up(self.num_tiles, _SCALE_ROW_ALIGN)

    @property
    def bytes_per_token(self) -> int:
        """All bytes of one token, block padding not counted: 584 for MODEL1, 656 for V3.2."""
        return self.row_bytes + self.scale_row_bytes

    @property
    def alignment_bytes(self) -> int:
        """What the cache's start must be a multiple of."""
        return _FP8_ALIGN if self.is_fp8 else _ITEM_BYTES[self.name]

    @property
    def block_step_bytes(self) -> int:
        """What a block stride must be a multiple of; whole rows where nothing is quantised."""
        return _FP8_ALIGN if self.is_fp8 else self.row_bytes

    def scale_plane_start_bytes(self, block_size: int) -> int:
        """Where a model1_fp8 block of `block_size` tokens keeps its scale plane."""
        return block_size * self.row_bytes

    def block_bytes(self, block_size: int) -> int:
        """Bytes in use in a block of `block_size` tokens."""
        if block_size <= 0:
            raise ConfigError(f"block_size must be positive, got {block_size}")
        return block_size * self.bytes_per_token

    def block_stride_bytes(self, block_size: int) -> int:
        """Distance between blocks as allocated here.

        model1_fp8 rounds up to whole rows, so that row r of the buffer starts at r * row_bytes
        in every block; the other layouts have no padding.
        """
        if self.name == "model1_fp8":
            return _round_up(self.block_bytes(block_size), self.row_bytes)
        return self.block_bytes(block_size)


def kv_layout(
    kind: Literal["fp8", "bf16", "fp32"],
    form: Literal["model1", "v32"],
    d_nope: int,
    d_rope: int,
) -> KVLayout:
    """The layout for a storage kind and an attention form; only FP8 depends on the form.

    The widths that each takes: see `KVLayout`.
    Raises ConfigError for an unknown kind or form and for widths that the layout cannot hold.
    """
    if kind not in ("fp8", "bf16", "fp32"):
        raise ConfigError(f"kind must be 'fp8', 'bf16' or 'fp32', got {kind!r}")
    if form not in ("model1", "v32"):
        raise ConfigError(f"form must be 'model1' or 'v32', got {form!r}")
    if kind != "fp8":
        return KVLayout(kind, d_nope, d_rope)
    return KVLayout("model1_fp8" if form == "model1" else "v32_fp8", d_nope, d_rope)
