"""The algorithm and the loop."""

import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    _other = version("kernels")
except PackageNotFoundError:
    pass
else:  # an optional package of transformers that has the name of our folder: one would be imported in place of the other
    print(f"samebit: error: the package 'kernels' {_other} hides samebit's: pip uninstall kernels", file=sys.stderr)
    sys.exit(2)
_packages = runpy.run_path(str(Path(__file__).resolve().parent.parent / "kernels" / "packages.py"))
_packages["check_packages"](("kernels", "rollout", "trainer"))
