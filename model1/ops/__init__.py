"""Functions on tensors, one folder per operator: its contract, its oracle and its kernels."""
