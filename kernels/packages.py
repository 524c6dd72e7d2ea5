"""Ends with one line where another file hides one of samebit's packages. Run by path, as the first thing of each package that
imports others: by then a `trainer.py` in the working folder would have been imported in the place of our `trainer`."""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check_packages(names: tuple[str, ...]) -> None:
    """Ends with exit code 2 where one of them is not the folder beside this one."""
    for name in names:
        spec = find_spec(name)
        ours = ROOT / name / "__init__.py"
        if spec is not None and spec.origin and Path(spec.origin).resolve() != ours:
            hint = "rename it, or start in another folder"
            print(f"samebit: error: {spec.origin} hides the package {name!r} of {ROOT}: {hint}", file=sys.stderr)
            sys.exit(2)
