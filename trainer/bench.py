"""`python -m trainer.bench`: forward + backward of the trainer's model, and of `transformers` with SDPA, in one run.

Both compute the log-prob of every token of the same sequences and its gradient. Ours packs without padding, sums on the
tree and is exact. The ratio is ours over theirs: above 1 is faster.
"""

import argparse
import json
import platform
import tempfile

import torch
import transformers
from rich.console import Console
from rich.table import Table

from kernels.model import Layout
from kernels.model.weights import initial, save
from kernels.timing import BENCH_MODEL, median_seconds
from trainer.model import TrainerModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1x512", "4x128", "64x16"], help="sequences x tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save(BENCH_MODEL, initial(BENCH_MODEL, 0), folder)
        theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa").train()
    ours = TrainerModel(BENCH_MODEL)
    named = dict(ours.named_parameters())
    with torch.no_grad():
        for parameter, whole in initial(BENCH_MODEL, 0):
            named[parameter.name].copy_(whole)

    table = Table(title=f"forward + backward, {BENCH_MODEL.parameter_count:,} parameters, {args.threads} threads")
    for column in ("sequences x tokens", "ours, tokens/s", "transformers, tokens/s", "ratio"):
        table.add_column(column, justify="right")
    rows = []
    for shape in args.shapes:
        sequences, length = map(int, shape.split("x"))
        ids = torch.randint(0, BENCH_MODEL.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
        layout = Layout.packed([length] * sequences, [1] * sequences)
        targets = torch.cat([torch.arange(1, length) + i * length for i in range(sequences)])
        groups = torch.arange(sequences + 1) * (length - 1)
        temperatures = torch.ones(len(targets))

        def step_ours() -> None:
            ours(ids.flatten(), layout, targets, groups, temperatures).sum().backward()  # noqa: B023
            ours.zero_grad()

        def step_theirs() -> None:
            logits = theirs(ids, use_cache=False).logits[:, :-1]  # noqa: B023
            torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).sum().backward()  # noqa: B023
            theirs.zero_grad()

        tokens = sequences * length
        ours_s, theirs_s = median_seconds(step_ours, args.repeats), median_seconds(step_theirs, args.repeats)
        row = {"shape": shape, "ours": tokens / ours_s, "transformers": tokens / theirs_s, "ratio": theirs_s / ours_s}
        rows.append(row)
        table.add_row(shape, f"{row['ours']:,.0f}", f"{row['transformers']:,.0f}", f"{row['ratio']:.2f}")
    Console().print(table)
    print(f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rows": rows, "torch": torch.__version__, "threads": args.threads}, file, indent=2)


if __name__ == "__main__":
    main()
