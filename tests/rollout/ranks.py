"""What one rank does in the test of tensor parallelism: engines over groups of 1, 2 and 4 ranks, several scenarios each."""

from dataclasses import replace

import torch
import torch.distributed as dist

from kernels.collectives import TreeGroup
from kernels.model import ModelConfig
from rollout.runner import RunnerError
from rollout.sampling import Request, SamplingParams
from tests.model.shapes import EIGHT, random_weights
from tests.rollout.scenarios import LIMITS, bits, engine, flat_head, requests

WORLD = 4
MODELS = {
    "untied": (EIGHT, torch.float32),
    "tied": (replace(EIGHT, tied=True, layers=1), torch.float32),
    "bfloat16": (replace(EIGHT, layers=1), torch.bfloat16),
    "37 ids": (
        replace(EIGHT, layers=1, vocab_size=37),
        torch.float32,
    ),  # of 64 rows: the last of four ranks has no token
}
SERVED = ["roomy", "chunks of 3", "few pages"]


def outcome(config: ModelConfig, dtype: torch.dtype, group: TreeGroup | None) -> dict:
    """The same scenarios on any group: what the engine says and holds."""
    out: dict = {}
    for name in SERVED:
        served = engine(config, 0, group, dtype, **LIMITS[name])
        out[name] = bits(served.generate(requests(config)))
        out[f"{name}, from cache"] = bits(served.generate(requests(config)))
    asked = [(replace(r.sampling, n=2), 1 + r.id, r.id % 4) for r in requests(config)]
    scored = [replace(r, sampling=s, score_from=p, top=k) for r, (s, p, k) in zip(requests(config), asked, strict=True)]
    out["samples and scores"] = bits(engine(config, 0, group, dtype, chunk=5, page_size=4, pages=200).generate(scored))
    out["first digests"] = served.runner.digests()
    out["next digests"] = served.load(random_weights(config, 1), 8)
    out["next weights"] = bits(served.generate(requests(config)))
    served.load(flat_head(config), 9)
    tied_logits = [Request(i, (1, 2), SamplingParams(20, i / 2, seed=4)) for i in range(3)]
    out["ties"] = bits(served.generate([replace(r, top=5) for r in tied_logits]))
    served.load(((p, w * float("nan")) for p, w in random_weights(config)), 10)
    try:
        served.generate(tied_logits)
    except RunnerError as error:
        out["no number"] = str(error)
    return out


def work() -> dict:
    rank, out = dist.get_rank(), {}
    for size in (1, 2, 4):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, WORLD, size)]
        group = TreeGroup(groups[rank // size])
        assert group.shard.size == size
        for name, (config, dtype) in MODELS.items():
            out[size, name] = outcome(config, dtype, group)
    return out
