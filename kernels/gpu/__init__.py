"""What GPU implementations share.

card.py        the card: family, multiprocessors, shared memory, read from the device
launch.py      launches a compiled kernel without its host cost; dialect.py names what Triton's versions call differently
overlap.py     lets a kernel be set up while the one before it runs
arithmetic.py  exp, log, folds and the noise, in Triton; workspace.py arrival counters
hopper/        the ring of Hopper's kernels, a toolkit beside the ops that use it
driver.py      memory straight from the CUDA driver; ahead.py compiles for a card that need not be there
"""
