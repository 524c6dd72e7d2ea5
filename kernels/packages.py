"""Ends with one line where another file hides one of samebit's packages, or where one that they need is not installed. Run by
path, as the first thing of each package that imports others: by then a `trainer.py` in the working folder would have been
imported in the place of our `trainer`. And says which version of a package is installed."""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NEEDED = {
    "kernels": ("torch", "numpy"),
    "rollout": ("torch", "numpy", "psutil", "rich", "safetensors", "tokenizers", "transformers"),
    "trainer": ("torch", "numpy", "psutil", "rich", "safetensors"),
    "rl": (
        *(
            "torch",
            "numpy",
            "ray",
            "hydra",
            "psutil",
            "pydantic",
            "transformers",
            "tokenizers",
            "safetensors",
            "datasets",
        ),
        *("reasoning_gym", "math_verify", "wandb", "rich", "jinja2"),
    ),
}
"""What each package of ours needs, by the names that are imported; pyproject.toml says which versions."""
_BY_NAME = {"hydra": "hydra-core", "reasoning_gym": "reasoning-gym", "math_verify": "math-verify[antlr4_9_3]"}


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


def check_needed(package: str) -> None:
    """Ends with exit code 2 where something that `package`, one of ours, needs is not installed."""
    missing = [_BY_NAME.get(name, name) for name in NEEDED[package] if find_spec(name) is None]
    if missing:
        print(
            f"samebit: error: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install -e {ROOT}",
            file=sys.stderr,
        )
        sys.exit(2)
