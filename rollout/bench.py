"""`python -m rollout.bench`: tokens per second of the engine, and of `transformers` generate on the same model, in one run.

Both decode the same prompts with sampling at temperature 1 for the same number of new tokens; ours also records every
token's log-prob and is exact. The ratio is ours over theirs: above 1 is faster.
"""

import argparse
import json
import platform
import tempfile

import torch
import transformers
from rich.console import Console
from rich.table import Table

from kernels.model.weights import initial, save
from kernels.timing import BENCH_MODEL, median_seconds
from rollout.engine import Engine, EngineConfig
from rollout.sampling import Request, SamplingParams
from rollout.scheduler import Limits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to sample for each")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save(BENCH_MODEL, initial(BENCH_MODEL, 0), folder)
        theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder).eval()
    pages = -(-(args.prompt + args.new) // 16) * max(args.batches)
    limits = Limits(max(args.batches), 8192, 8192)
    engine = Engine(BENCH_MODEL, EngineConfig(pages, 16, prefix_cache=False, limits=limits))
    engine.load(initial(BENCH_MODEL, 0), 0)

    shape = f"{args.prompt} in, {args.new} out, {args.threads} threads"
    table = Table(title=f"decode, {BENCH_MODEL.parameter_count:,} parameters, {shape}")
    for column in ("batch", "ours, tokens/s", "transformers, tokens/s", "ratio"):
        table.add_column(column, justify="right")
    rows = []
    for batch in args.batches:
        prompts = torch.randint(
            0, BENCH_MODEL.vocab_size, (batch, args.prompt), generator=torch.Generator().manual_seed(0)
        )
        requests = [Request(i, tuple(p), SamplingParams(args.new, seed=i)) for i, p in enumerate(prompts.tolist())]

        def generate(prompts: torch.Tensor = prompts) -> object:
            with torch.no_grad():
                return theirs.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    do_sample=True,
                    top_k=0,
                    min_new_tokens=args.new,
                    max_new_tokens=args.new,
                    pad_token_id=0,
                )

        ours_s = median_seconds(lambda requests=requests: engine.generate(requests), args.repeats)  # type: ignore[misc]
        theirs_s = median_seconds(generate, args.repeats)
        tokens = batch * args.new
        row = {"batch": batch, "ours": tokens / ours_s, "transformers": tokens / theirs_s, "ratio": theirs_s / ours_s}
        rows.append(row)
        table.add_row(str(batch), f"{row['ours']:,.0f}", f"{row['transformers']:,.0f}", f"{row['ratio']:.2f}")
    Console().print(table)
    print(f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rows": rows, "torch": torch.__version__, "threads": args.threads}, file, indent=2)


if __name__ == "__main__":
    main()
