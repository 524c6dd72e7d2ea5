"""The worst sample of a run, token by token: both log-probabilities, coloured by probability, with their bits."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from rl.charts import Series, line_chart
from rl.page import labelled

Row = Mapping[str, Any]
PROBABILITY_CLASSES = (0.9, 0.5, 0.1, 0.01)
"""Lower edges of the colour classes of a token; the last class is everything below."""
COLUMNS = ("#", "Token", "p", "Sampler", "Trainer", "Bits of sampler", "of trainer", "differing")


def _float_bits(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float32).view(np.uint32)


def _worst(completions: Sequence[Row]) -> tuple[Row, np.ndarray] | None:
    """The row with most differing tokens, then the largest gap, then the least likely token; and its differing bits."""
    best = None
    for row in completions:
        ours, theirs = row.get("trainer_logprobs"), row.get("logprobs")
        if not ours or not theirs or len(ours) != len(theirs):
            continue
        xor = _float_bits(ours) ^ _float_bits(theirs)
        gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
        lowest = min((v for v in theirs if v is not None), default=0.0)
        key = (int(np.count_nonzero(xor)), max(gaps, default=0.0), -lowest)
        if best is None or key > best[0]:
            best = (key, row, xor)
    return None if best is None else best[1:]


def worst_sample(completions: Sequence[Row]) -> str:
    """The card with the prompt, the tokens, both curves and the table of the worst of `completions`, as HTML."""
    worst = _worst(completions)
    if worst is None:
        return '<div class="card"><p class="nothing">No sampled completion holds the log-probabilities of both sides.</p></div>'
    row, xor = worst
    ours, theirs, count = row["trainer_logprobs"], row["logprobs"], len(xor)
    different = int(np.count_nonzero(xor))
    tokens = list(row.get("tokens") or [])
    texts = [_visible(t) for t in (row.get("token_texts") or tokens or range(count))]
    texts += ["?"] * (count - len(texts))
    if different:
        words = f'<span class="critical">{different} of {count} tokens differ in their bits.</span>'
    else:
        words = (
            f'<span class="ok">0 of {count} tokens differ.</span> No sampled completion has a gap; this is the one with '
            "the least likely token, where a gap would show first."
        )
    chips, lines = [], []
    for i in range(count):
        t, r, x = ours[i], theirs[i], int(xor[i])
        p = 0.0 if r is None else math.exp(min(r, 0.0))
        shade = next((c for c, edge in enumerate(PROBABILITY_CLASSES) if p >= edge), len(PROBABILITY_CLASSES))
        gap = f"{x.bit_count()} bits differ" if x else "same bits"
        chips.append(
            f'<span class="tok p{shade}{" diff" if x else ""}" title="{escape(f"p = {p:.4g}, {gap}")}"><b>'
            f'{escape(texts[i])}</b><small class="mono">{_short(r)}<br>{_short(t)}</small></span>'
        )
        hexes = [f"{int(_float_bits([v])[0]):08x}" if v is not None else "–" for v in (r, t)]
        id_ = f" <small>{escape(str(tokens[i]))}</small>" if row.get("token_texts") and i < len(tokens) else ""
        lines.append(
            f'<tr><td class="n">{i}</td><td><code>{escape(texts[i])}</code>{id_}</td><td class="n">{p:.4f}</td>'
            f'<td class="n mono">{_exact(r)}</td><td class="n mono">{_exact(t)}</td><td class="n mono">{hexes[0]}</td>'
            f'<td class="n mono">{hexes[1]}</td><td class="n {"critical" if x else "ok"}">'
            f"{x.bit_count() if x else 0}</td></tr>"
        )
    curve = line_chart(
        "Both curves",
        "log-probability, nats",
        [
            Series("sampler", tuple(enumerate(theirs)), 2),
            Series("trainer", tuple(enumerate(ours)), 0, dashed=True),
        ],
        x_name="response token",
    )
    edges = [f"p ≥ {edge:g}" for edge in PROBABILITY_CLASSES] + [f"p < {PROBABILITY_CLASSES[-1]:g}"]
    scale = "".join(f'<span class="p{i}">{escape(text)}</span>' for i, text in enumerate(edges))
    titles = "".join(f"<th{'' if c == 'Token' else ' class=n'}>{c}</th>" for c in COLUMNS)
    return (
        f'<div class="card"><p>Step {escape(str(row.get("step", "?")))}: {words}</p>{labelled("prompt", row.get("prompt"))}'
        f'<div class="scale">{scale} under each token: log-probability of the sampler, then of the trainer</div>'
        f'<div class="tokens">{"".join(chips)}</div></div><div class="pair">{curve}'
        f'<div class="card"><div class="tall"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></div></div>"
    )


def _visible(token: Any) -> str:
    text = str(token)
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _short(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _exact(value: float | None) -> str:
    return "not finite" if value is None else str(np.float32(value))
