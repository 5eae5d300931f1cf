"""Triton matrix products over groups of rows, which experts and FP8 linear maps share.

No operator of its own: `model1.ops.moe` and `model1.ops.fp8_linear` are the contracts.
"""
