"""`python -m rollout.bench`: tokens per second of the engine, and of `transformers` generate on the same model, in one run.
`--device cuda` prints the table of Qwen3-8B's shapes instead, or of another `--model` (serving_card.py).

Both decode the same prompts with sampling at temperature 1 for the same number of new tokens; ours also records every
token's log-prob and is exact.
"""

import argparse
from functools import partial
from typing import Any

import torch

from kernels.bench.peer import Comparison, arguments, median_seconds, peer
from kernels.host.command import count, progress
from kernels.model.formats import FORMATS, PLAIN
from kernels.model.known import BENCH
from kernels.weights.initial import initial
from rollout.engine import Engine, EngineConfig
from rollout.sampling import Request, SamplingParams
from rollout.scheduler import Limits

ROWS = ("decode", "throughput", "prefix", "prefill")
MORE = ("speculate",)  # not unless it is asked for


def parsed() -> argparse.Namespace:
    """Returns the arguments, or ends with one line."""
    parser = arguments(__doc__)
    parser.add_argument("--prompt", type=count, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=count, default=32, help="tokens to sample for each")
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--rows", default=",".join(ROWS), help="of the GPU's table: any of " + ", ".join(ROWS + MORE))
    parser.add_argument(
        "--peer-new", type=int, default=8, help="tokens that transformers decodes of each request on a GPU; 0: none"
    )
    parser.add_argument(
        "--peer-seconds",
        type=float,
        default=75,
        help="no row of transformers is begun after so many seconds of its own",
    )
    parser.add_argument("--format", choices=(PLAIN, *FORMATS), default=PLAIN, help="of the projections, on a GPU")
    parser.add_family()
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    if unknown := sorted(set(args.rows) - {*ROWS, *MORE}):
        parser.error(f"--rows {','.join(unknown)}: the rows are {', '.join(ROWS + MORE)}")
    if args.format != PLAIN and (args.device != "cuda" or set(args.rows) & set(MORE)):
        parser.error(f"--format={args.format} is for --device=cuda and the rows {', '.join(ROWS)}")
    if args.format != PLAIN and args.model != "qwen3_8b":
        parser.error(f"--format={args.format} is for --model=qwen3_8b, not {args.model}")
    parser.require(args.device, args.family)
    if args.device == "cpu" and (length := args.prompt + args.new) > BENCH.max_positions:
        parser.error(f"--prompt and --new are {length} tokens; the model has {BENCH.max_positions} positions")
    return args


def main() -> None:
    """Prints tokens per second of each batch."""
    args = parsed()
    if args.device == "cuda":
        from kernels.bench import serving_card, speculation_card  # triton, which a machine without a GPU may lack

        if rows := [row for row in args.rows if row not in MORE]:
            serving_card.run(args.model, rows, args.peer_new, args.peer_seconds, args.json, args.format)
        if "speculate" in args.rows:
            speculation_card.run(args.model, args.json, beside=bool(rows))
        return
    torch.set_num_threads(args.threads)
    theirs = peer().eval()
    pages = -(-(args.prompt + args.new) // 16) * max(args.batches)
    limits = Limits(max(args.batches), 8192, 8192)
    engine = Engine(BENCH, EngineConfig(pages, 16, prefix_cache=False, limits=limits))
    engine.load(initial(BENCH, 0), 0)
    table = Comparison(f"decode, {args.prompt} in, {args.new} out", "batch", args.threads)
    for batch in progress(args.batches):
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, BENCH.vocab_size, (batch, args.prompt), generator=generator)
        requests = [Request(i, tuple(p), SamplingParams(args.new, seed=i)) for i, p in enumerate(prompts.tolist())]
        work = partial(engine.generate, requests), partial(_generate, theirs, prompts, args.new)
        table.add(str(batch), batch * args.new, *(median_seconds(side, args.repeats) for side in work))
    table.show(args.json)


@torch.no_grad()
def _generate(model: Any, prompts: torch.Tensor, new: int) -> None:
    sampling = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)}
    model.generate(prompts, **sampling, min_new_tokens=new, max_new_tokens=new)
