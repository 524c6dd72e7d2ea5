"""What GPU implementations share: `arithmetic` (exp, log, folds and the noise, in Triton) and `workspace` (counters)."""
