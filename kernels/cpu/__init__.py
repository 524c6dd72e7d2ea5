"""The CPU implementation of the tree: C sources beside each op (`kernels/ops/*/cpu.c`), built once by the system compiler."""

from kernels.cpu.build import BuildError, call, library
