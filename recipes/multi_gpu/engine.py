"""`python -m recipes.multi_gpu.engine --tp 2`: tokens per second of one engine over the cards of its ranks.

Random weights in Qwen3-8B's widths; prompts of 64 tokens, sampled at temperature 1; the second of two equal runs, whose
completions must be those of the first. With `--same-as FILE` they must also be those of the engine that wrote the file.
"""

import json
import time
from pathlib import Path

import torch

from kernels.host.command import Parser, fail
from kernels.model import ModelConfig
from kernels.tree import is_power_of_two
from rl.compose import check
from rl.model import model_config
from rollout.engine import EngineConfig
from rollout.lockstep import Lockstep
from rollout.sampling import Completion, Request, SamplingParams
from rollout.scheduler import Limits
from rollout.source import Source

PROMPT, PAGE = 64, 16
BATCHES = (1, 16, 64, 256)


def model(layers: int) -> ModelConfig:
    """Returns a model of Qwen3-8B's widths."""
    return model_config(check(["model=qwen3_8b", f"model.hf.num_hidden_layers={layers}"])[0], None)


def requests(batch: int, new: int, vocabulary: int) -> list[Request]:
    """Draws the requests of a batch, always the same."""
    prompts = torch.randint(0, vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    return [Request(i, tuple(p), SamplingParams(new, seed=i)) for i, p in enumerate(prompts.tolist())]


def bits(completions: list[Completion]) -> list[list[list[str]]]:
    """Writes tokens, and log-probs as exact texts."""
    return [[list(map(str, c.token_ids)), [x.hex() for x in c.logprobs]] for c in completions]


def measure(engine: Lockstep, batch: int, new: int, vocabulary: int) -> tuple[float, list[list[list[str]]]]:
    """Returns (tokens per second, bits of the completions) of the second of two equal runs."""
    asked = requests(batch, new, vocabulary)
    first = engine.generate(asked)
    torch.cuda.synchronize()
    start = time.perf_counter()
    second = engine.generate(asked)
    seconds = time.perf_counter() - start
    if bits(first) != bits(second):
        fail(f"batch {batch}: the second run differs from the first", 1)
    return batch * new / seconds, bits(second)


def main() -> None:
    """Measures each batch and compares its bits; exit code 1 where they differ."""
    parser = Parser(prog="recipes.multi_gpu.engine", description=__doc__)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--new", type=int, default=128, help="tokens to sample for each prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--json", type=Path, help="write the rates, and the bits of the completions, to this file")
    parser.add_argument("--same-as", type=Path, help="a file written so, whose bits must be these")
    args = parser.parse_args()
    if not is_power_of_two(args.tp) or args.tp > torch.cuda.device_count():
        fail(f"--tp {args.tp}: must be a power of two, and there are {torch.cuda.device_count()} CUDA devices", 2)
    parser.require("cuda")
    config = model(args.layers)
    most = max(args.batches)
    limits = Limits(most, 8192, 2048)
    serving = EngineConfig(
        pages=most * -(-(PROMPT + args.new) // PAGE),
        page_size=PAGE,
        prefix_cache=False,
        limits=limits,
        dtype=torch.bfloat16,
        device="cuda",
        cuda_graphs=True,
        overlap=True,
    )
    source = Source("Qwen3-8B widths", config, None, torch.bfloat16, None)
    expected = json.loads(args.same_as.read_text())["bits"] if args.same_as else {}
    rates: dict[str, float] = {}
    found: dict[str, list[list[list[str]]]] = {}
    with Lockstep(source, serving, args.tp, threads=4) as engine:
        for batch in args.batches:
            rates[str(batch)], found[str(batch)] = measure(engine, batch, args.new, config.vocab_size)
            print(f"tp {args.tp}, batch {batch}: {rates[str(batch)]:,.0f} tokens/s", flush=True)
            if expected and expected[str(batch)] != found[str(batch)]:
                fail(f"batch {batch}: other completions or log-probs than those of {args.same_as}", 1)
    if args.json:
        args.json.write_text(json.dumps({"tp": args.tp, "rates": rates, "bits": found}) + "\n")


if __name__ == "__main__":
    main()
