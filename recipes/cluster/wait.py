"""`python -m recipes.cluster.wait ADDRESS NODES [SECONDS]`: waits until the Ray at ADDRESS has so many nodes; else code 1."""

import sys
import time

import ray


def main(address: str, nodes: int, seconds: float = 300.0) -> int:
    """Returns 0 once `nodes` nodes are alive, 1 after `seconds` with one line that says how many are."""
    until, there, reason = time.monotonic() + seconds, 0, ""
    while time.monotonic() < until:
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level="error")
            there = sum(node["Alive"] for node in ray.nodes())
        except Exception as error:  # of whatever kind: it is not there yet
            reason = f" ({' '.join(str(error).split())[:200]})"
        if there >= nodes:
            return 0
        time.sleep(1)
    print(f"{there} of {nodes} nodes are in the Ray at {address} after {seconds:.0f} s{reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
