"""The algorithm and the loop."""

import sys
from importlib.metadata import PackageNotFoundError, version

try:
    _other = version("kernels")
except PackageNotFoundError:
    pass
else:  # an optional package of transformers that has the name of our folder: one would be imported in place of the other
    print(f"samebit: error: the package 'kernels' {_other} hides samebit's: pip uninstall kernels", file=sys.stderr)
    sys.exit(2)
