"""Turns requests into completions."""

import runpy
from pathlib import Path

_packages = runpy.run_path(str(Path(__file__).resolve().parent.parent / "kernels" / "packages.py"))
_packages["check_packages"](("kernels",))
_packages["check_needed"]("rollout")
