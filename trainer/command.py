"""Commands whose bad input is one line and exit code 2: `kernels.command`, by the name that recipes import."""

from kernels.command import Parser, fail

__all__ = ["Parser", "fail"]
