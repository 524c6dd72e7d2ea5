"""`python -m recipes.cluster.wait ADDRESS NODES [SECONDS]`: waits until the Ray at ADDRESS has so many nodes; else code 1, or
code 2 at once where it refuses this process's token."""

import sys
import time

import ray

from rl.cluster.probe import TokenError, check_address
from rl.lines import short


def main(address: str, nodes: int, seconds: float = 300.0) -> int:
    """Returns 0 once `nodes` nodes are alive, 1 after `seconds` with one line that says how many are, 2 with one line at once
    where Ray is there and refuses the token."""
    until, there, reason = time.monotonic() + seconds, 0, ""
    while time.monotonic() < until:
        try:
            if not ray.is_initialized():
                check_address(address)
                ray.init(address=address, log_to_driver=False, logging_level="error")
            there = sum(node["Alive"] for node in ray.nodes())
        except TokenError as error:
            print(error, file=sys.stderr)
            return 2
        except Exception as error:  # of whatever kind: it is not there yet
            reason = f" ({short(error)})"
        if there >= nodes:
            return 0
        time.sleep(1)
    print(f"{there} of {nodes} nodes are in the Ray at {address} after {seconds:.0f} s{reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
