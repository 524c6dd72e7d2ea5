"""Ends with one line where another file hides one of samebit's packages. Run by path, as the first thing of each package that
imports others: by then a `trainer.py` in the working folder would have been imported in the place of our `trainer`.
And says which version of a package is installed."""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version_of(package: str) -> str | None:
    """Returns the version of an installed package; None where there is none (samebit too, run from a folder)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_packages(names: tuple[str, ...]) -> None:
    """Ends with exit code 2 where one of them is not the folder beside this one."""
    for name in names:
        spec = find_spec(name)
        ours = ROOT / name / "__init__.py"
        if spec is not None and spec.origin and Path(spec.origin).resolve() != ours:
            hint = "rename it, or start in another folder"
            print(f"samebit: error: {spec.origin} hides the package {name!r} of {ROOT}: {hint}", file=sys.stderr)
            sys.exit(2)
