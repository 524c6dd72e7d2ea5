"""SHA-256 of what every op computes on a GPU, one hash an entry: equal on every Hopper card.

python -m tests.kernels.gpu.hashes            prints them
python -m tests.kernels.gpu.hashes --write    writes expected_hashes.json; only for a change of order that is meant
"""

import argparse
import json
import sys
from collections.abc import Iterator

import torch

from tests.bits import sha256
from tests.kernels.gpu.calls import WIDE, generator, not_launched, spec_calls
from tests.kernels.gpu.compile import EXPECTED


def hashes() -> Iterator[tuple[str, str]]:
    """(entry, SHA-256 of the shapes, dtypes and bytes of its outputs and gradients)."""
    for name, call in (*spec_calls(), *WIDE.items()):
        yield name, sha256(call(generator(name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {EXPECTED.name}")
    write = parser.parse_args().write
    found = {}
    for name, value in hashes():
        found[name] = value
        print(value, name, flush=True)
    if missing := not_launched():
        sys.exit(f"not launched: {missing}")
    if write:
        EXPECTED.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} hashes of {torch.cuda.get_device_name()} written to {EXPECTED}")


if __name__ == "__main__":
    main()
