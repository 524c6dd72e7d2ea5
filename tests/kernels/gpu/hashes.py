"""SHA-256 of what every op computes on a GPU, one hash an entry: equal on every card of a family.

python -m tests.kernels.gpu.hashes [--family portable]    prints them
python -m tests.kernels.gpu.hashes --write                writes the family's file; only for a change of order that is meant
"""

import argparse
import json
import sys
from collections.abc import Iterator

import torch

from kernels.device import family_of
from kernels.gpu.card import ALL_FAMILIES, card_of, choose_family
from tests.bits import sha256
from tests.kernels.gpu.calls import CUDA, generator, hashed, not_launched
from tests.kernels.gpu.compile import expected_of


def hashes(family: str) -> Iterator[tuple[str, str]]:
    """(entry, SHA-256 of the shapes, dtypes and bytes of its outputs and gradients)."""
    for name, call in hashed(family):
        yield name, sha256(call(generator(name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the file")
    parser.add_argument("--family", default="auto", choices=("auto", *ALL_FAMILIES))
    write, family = (given := parser.parse_args()).write, given.family
    choose_family(family)
    family = family_of(card_of(CUDA))
    file = expected_of(family)
    found = {}
    for name, value in hashes(family):
        found[name] = value
        print(value, name, flush=True)
    if missing := not_launched(family):
        sys.exit(f"not launched: {missing}")
    if write:
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} hashes of {torch.cuda.get_device_name()} written to {file}")


if __name__ == "__main__":
    main()
