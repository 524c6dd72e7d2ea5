"""Experts in plain Triton: any card that multiplies bfloat16 in 16-wide tensor-core steps."""
