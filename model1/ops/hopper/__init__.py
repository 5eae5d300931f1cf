"""What kernels for Hopper share. They are written in Gluon, which Triton brings along.

A Gluon kernel says which warps do what, what lies in shared memory and when it may be read; Triton
decides neither. docs/kernels_hopper.md has the designs.
"""
