"""Shows the worst sample of a run token by token: both log-probabilities, coloured by probability, with their bits."""

import math
from typing import Any

import numpy as np

from rl.metrics import difference, differs, worst
from rl.report.chart import Chart, Point, Series
from rl.report.folder import Run, floats

SHADES = (0.9, 0.5, 0.1, 0.01)
"""Lower edges of the classes of probability that colour a token; the last class is everything below."""
WINDOW = 256
"""Tokens shown around the worst one; the curves show all."""


def token_view(run: Run) -> dict[str, Any] | None:
    """Collects what the template shows of the worst completion; None where none holds the log-probs of both sides."""
    if (row := run.worst) is None:
        return None
    sampler, trainer = floats(row["logprobs"]), floats(row["trainer_logprobs"])
    different, gap = differs(trainer, sampler), difference(trainer, sampler)
    at = worst(trainer, sampler)[1]
    start = max(0, min(at - WINDOW // 2, len(sampler) - WINDOW))
    ids = list(row.get("tokens") or range(len(sampler)))
    texts = list(row.get("token_texts") or ids)
    stop = min(start + WINDOW, len(sampler), len(texts))
    unlike = different.nonzero()[0]
    both = [Series("sampler", _points(sampler), 2), Series("trainer", _points(trainer), 0, "line dashed")]
    d = [Series("d", _points(gap), 3, "line dots")]
    return {
        "row": row,
        "count": len(sampler),
        "different": len(unlike),
        "at": at,
        "gap": float(abs(gap[at])),
        "of": "all steps" if float(abs(gap[at])) == run.largest_gap else "the completions that were kept",
        "start": start,
        "stop": stop,
        "scale": [f"p ≥ {edge:g}" for edge in SHADES] + [f"p < {SHADES[-1]:g}"],
        "tokens": [_token(i, texts[i], ids[i], sampler[i], trainer[i], i == at) for i in range(start, stop)],
        "charts": [
            Chart("Both curves", "log-probability, nats", both, "response token"),
            Chart("Their difference", "d = trainer − sampler, nats", d, "response token", flat="0 at every token"),
        ],
    }


def _points(values: np.ndarray) -> list[Point]:
    return [(i, float(v) if math.isfinite(v) else None) for i, v in enumerate(values)]


def _token(i: int, text: Any, id_: Any, sampler: np.float32, trainer: np.float32, is_worst: bool) -> dict[str, Any]:
    p = math.exp(min(float(sampler), 0.0)) if math.isfinite(sampler) else 0.0
    bits = [int(v.view(np.uint32)) for v in (sampler, trainer)]
    return {
        "index": i,
        "text": str(text).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅",
        "id": id_,
        "p": p,
        "shade": next((c for c, edge in enumerate(SHADES) if p >= edge), len(SHADES)),
        "values": [str(v) if math.isfinite(v) else "not finite" for v in (sampler, trainer)],
        "short": [f"{v:.3f}" if math.isfinite(v) else "n/a" for v in (sampler, trainer)],
        "hex": [f"{b:08x}" if math.isfinite(v) else "–" for b, v in zip(bits, (sampler, trainer), strict=True)],
        "differing": (bits[0] ^ bits[1]).bit_count(),
        "worst": is_worst,
    }
