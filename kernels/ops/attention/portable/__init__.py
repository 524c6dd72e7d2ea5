"""Attention in plain Triton, and the order of a row that the kernels of every family follow (rows.py)."""
