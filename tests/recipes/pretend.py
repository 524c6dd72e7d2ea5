"""`python -m tests.recipes.pretend OUT`: looks like a run with a trainer rank to whoever watches its folder and its processes:
a step each 0.1 s, its first checkpoint after the third, and an error when the rank dies."""

import json
import subprocess
import sys
from pathlib import Path

PHASES = ("handover", "sample", "score", "train", "publish")


def main(out: Path) -> None:
    out.mkdir(parents=True)
    rank = subprocess.Popen(["bash", "-c", "exec -a ray::TrainerRank sleep 60"])
    for step in range(1, 30):
        try:
            rank.wait(0.1)
            sys.exit("samebit: error: trainer rank 0 failed: it died")
        except subprocess.TimeoutExpired:
            row = {"step": step, "grpo/step": step, **{f"time/{phase}": 0.02 for phase in PHASES}}
            with (out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if step == 3:
            (out / "checkpoints" / "step-00000003").mkdir(parents=True)
    rank.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
