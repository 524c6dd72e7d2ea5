"""The algorithm and the loop."""

import os
import runpy
import sys
from pathlib import Path

_packages = runpy.run_path(str(Path(__file__).resolve().parent.parent / "kernels" / "packages.py"))
# An optional package of transformers has the name of our folder: one would be imported in place of the other
if _other := _packages["version_of"]("kernels"):
    print(f"samebit: error: the package 'kernels' {_other} hides samebit's: pip uninstall kernels", file=sys.stderr)
    sys.exit(2)
_packages["check_packages"](("kernels", "rollout", "trainer"))
_packages["check_needed"]("rl")
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # it aborts on SIGTERM; read when ray is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of addresses without names; read with torch
