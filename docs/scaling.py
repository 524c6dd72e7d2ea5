"""`python docs/scaling.py` writes the tables of docs/scaling.md and docs/scaling.svg from docs/collectives.json.

What it takes from measurements: start-up and bandwidth of the sums over NVLink (a line through the smallest and the largest
message of each), and the trainer's rate. What it assumes, and says so in the page: the network between nodes.
"""

import json
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from kernels.tree import fold  # noqa: E402

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8  # ranks of a node
LAYER = 192_950_528  # parameters of one layer of Qwen3-8B: what FSDP2 reduces at once
NETWORK_START, NETWORK_RATE = 10e-6, 50e9  # assumed: seconds, bytes/s of one card (a 400 Gbit/s adapter each)
BACKWARD = 430e12 * 4 / 6  # FLOP/s of the backward pass, of 430 TFLOP/s forward and backward (trainer, one H100)


@dataclass(frozen=True)
class Link:
    """Models a link: a message of b bytes takes start + b / rate seconds."""

    start: float
    rate: float

    def seconds(self, size: float, messages: float = 1) -> float:
        """Returns the seconds of `messages` messages of `size` bytes in all."""
        return messages * self.start + size / self.rate


NETWORK = Link(NETWORK_START, NETWORK_RATE)


@dataclass(frozen=True)
class Measured:
    """Holds the links that the measured times were fitted to."""

    tree: Link  # reduce-scatter in peer memory
    nccl: Link
    all_reduce_tree: Link  # by bytes received: 6 an element, over ranks
    all_reduce_nccl: Link  # 4 an element
    about: str


def measured(path: Path) -> Measured:
    """Fits the links to what `python -m kernels.collectives.bench --json` wrote."""
    report = json.loads(path.read_text())
    ranks = report["ranks"]

    def link(kind: str, name: str, size: int) -> Link:
        """`size`: bytes received for an element, before the share that stays."""
        rows = [row for row in report["rows"] if row["sum"].startswith(kind)]
        received, seconds = [], []
        for row in (rows[0], rows[-1]):
            elements = math.prod(int(n) for n in row["n"].split(" x "))
            received.append(size * elements * (ranks - 1) / ranks)
            seconds.append(row[name] * 1e-6)
        rate = (received[1] - received[0]) / (seconds[1] - seconds[0])
        return Link(max(seconds[0] - received[0] / rate, 0.0), rate)

    return Measured(
        tree=link("reduce_scatter", "peers", 4),
        nccl=link("reduce_scatter", "NCCL", 4),
        all_reduce_tree=link("all_reduce", "peers", 6),
        all_reduce_nccl=link("all_reduce", "NCCL", 4),
        about=f"`python -m kernels.collectives.bench --ranks {ranks}` on {ranks} x {report['device']}, torch {report['torch']}",
    )


# seconds of a reduce-scatter of `n` float32 elements on each of `ranks` ------------------------------------------------


def ring(m: Measured, n: int, ranks: int) -> float:
    """Times a ring: each part goes round; there is a ring for every card of a node, so that an adapter carries 1 / NODE of the
    bytes."""
    inside = m.nccl.seconds(4 * n * (ranks - 1) / ranks, ranks - 1)
    if ranks <= NODE:
        return inside
    return max(inside, NETWORK.seconds(4 * n / NODE * (ranks - 1) / ranks, ranks - 1))


def flat(m: Measured, n: int, ranks: int) -> float:
    """Times what is done inside a node: each rank receives its part of everyone, then adds."""
    inside = min(ranks, NODE)
    near = m.tree.seconds(4 * n * (inside - 1) / ranks)
    far = NETWORK.seconds(4 * n * (ranks - inside) / ranks, ranks / inside - 1)
    return max(near, far) if ranks > NODE else near


def levels(m: Measured, n: int, ranks: int, halving: bool = False) -> float:
    """Times the same tree by levels (`kernels/collectives/levels.py`): an exchange inside the node, then one between the ranks
    of a number on all nodes; or, `halving`, a level of the tree each between nodes."""
    inside = min(ranks, NODE)
    near = m.tree.seconds(4 * n * (inside - 1) / inside)
    nodes = ranks // inside
    return near + NETWORK.seconds(4 * n / inside * (nodes - 1) / nodes, math.log2(nodes) if halving else nodes - 1)


def halving(m: Measured, n: int, ranks: int) -> float:
    """By levels, with halving between nodes: fewer start-ups, and not built."""
    return levels(m, n, ranks, halving=True)


def chain(m: Measured, n: int, ranks: int, leaves: int = 1024) -> float:
    """Times a left fold that does not depend on the ranks: nothing may be added before what stands left of it is there, so
    every leaf is sent unreduced."""
    return flat(m, n * leaves // ranks, ranks)


WAYS: dict[str, Callable[[Measured, int, int], float]] = {
    "ring (NCCL)": ring,
    "tree, one exchange": flat,
    "tree, by levels": levels,
    "by levels, halving": halving,
    "left fold of 1024 leaves": chain,
}


# bytes over the network --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """Bytes that cross the network for a model of `parameters`, trained on `nodes` of NODE cards; served in 2 bytes."""

    parameters: int
    nodes: int

    @property
    def weights(self) -> float:
        """Through a card's adapter for a micro-batch: FSDP2 gathers the rounded weights for forward and backward pass."""
        return 2 * 2 * self.parameters / NODE * (self.nodes - 1) / self.nodes

    @property
    def gradients(self) -> float:
        """Likewise, of a reduce-scatter by levels."""
        return 4 * self.parameters / NODE * (self.nodes - 1) / self.nodes

    @property
    def replicated(self) -> float:
        """Likewise, all there is with a replica a node: slices are exchanged and added, then sums gathered."""
        return 2 * self.gradients

    def published(self, split: bool) -> float:
        """Into a node of engines: all of it where they are apart, else what the node's trainer ranks do not hold."""
        return 2 * self.parameters * (1 if split else (self.nodes - 1) / self.nodes)


MODEL = 8_190_735_360  # parameters of Qwen3-8B


# the bits --------------------------------------------------------------------------------------------------------------


def by_halving(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns what each of `parts` (one a rank, [ranks, n]) ends with where neighbours exchange halves, then neighbours of
    these: the slice that rank r ends with is r with its bits reversed."""
    held = list(parts)
    step = 1
    while step < len(parts):
        half = [len(x) // 2 for x in held]
        new = []
        for r, x in enumerate(held):
            other = held[r ^ step]
            low, high = (x, other) if r & step == 0 else (other, x)  # the lower rank's subtree stands left
            mine = slice(None, half[r]) if r & step == 0 else slice(half[r], None)
            new.append(low[mine] + high[mine])
        held, step = new, 2 * step
    return held


def check_bits(ranks: int, leaves: int = 1024) -> tuple[bool, bool]:
    """Returns (whether one exchange, levels of nodes and halving have the bits of one rank, whether a ring has)."""
    draw = np.random.default_rng(ranks)
    width = max(ranks, 16)
    x = draw.standard_normal((leaves, width)).astype(np.float32) * np.exp2(draw.integers(-20, 20, (leaves, width)))
    x = x.astype(np.float32)
    root = fold(list(x), operator.add)
    per_rank = [fold(list(part), operator.add) for part in np.split(x, ranks)]
    one_exchange = fold(per_rank, operator.add)
    inside = min(ranks, NODE)
    nodes = [fold(per_rank[i : i + inside], operator.add) for i in range(0, ranks, inside)]
    by_levels = fold(nodes, operator.add)
    slices = by_halving(per_rank)
    bits = int(math.log2(ranks))
    halved = np.concatenate([slices[int(f"{i:0{bits}b}"[::-1], 2) if bits else 0] for i in range(ranks)])
    same = all(a.tobytes() == root.tobytes() for a in (one_exchange, by_levels, halved))
    around = []
    for i, part in enumerate(np.split(np.stack(per_rank), ranks, axis=1)):  # part i starts at rank i + 1
        total = part[(i + 1) % ranks].copy()
        for j in range(2, ranks + 1):
            total = total + part[(i + j) % ranks]
        around.append(total)
    return same, np.concatenate(around).tobytes() == root.tobytes()


# the page --------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Writes a table as lines of markdown."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(r) + " |" for r in rows)]


def numbers(m: Measured) -> dict[str, list[str]]:
    """Makes the tables of the page, by name."""
    links = {
        "reduce-scatter, tree in peer memory": m.tree,
        "reduce-scatter, NCCL": m.nccl,
        "all-reduce to bf16, tree in peer memory": m.all_reduce_tree,
        "all-reduce in bf16, NCCL": m.all_reduce_nccl,
    }
    constants = [[name, f"{k.start * 1e6:.1f}", f"{k.rate / 1e9:.0f}", "measured"] for name, k in links.items()]
    constants.append(["between nodes, a card", f"{NETWORK.start * 1e6:.1f}", f"{NETWORK.rate / 1e9:.0f}", "assumed"])
    times = [[str(w), *(f"{way(m, LAYER, w) * 1e3:.2f}" for way in WAYS.values())] for w in RANKS]
    hidden = [[str(w), *(f"{way(m, LAYER, w) * BACKWARD / (4 * LAYER):,.0f}" for way in WAYS.values())] for w in RANKS]
    crossing = []
    for nodes in (w // NODE for w in RANKS if w > NODE):
        c = Crossing(MODEL, nodes)
        adapter = [c.weights, c.gradients, c.weights + c.gradients, c.replicated]
        into = [c.published(split=False), c.published(split=True)]
        seconds = [size / NODE / NETWORK_RATE for size in into]
        cells = [*(f"{size / 1e9:.2f}" for size in adapter), *(f"{size / 1e9:.1f}" for size in into)]
        crossing.append([str(nodes), *cells, f"{seconds[0]:.3f}", f"{seconds[1]:.3f}"])
    same = [[str(w), *("equal" if b else "differ" for b in check_bits(w))] for w in (1, *RANKS)]
    return {
        "constants": [f"Measured: {m.about}.", "", *table(["", "start, us", "GB/s received", ""], constants)],
        "times": table(["ranks", *(f"{name}, ms" for name in WAYS)], times),
        "hidden": table(["ranks", *WAYS], hidden),
        "network": table(
            [
                "nodes",
                "weights, GB an adapter",
                "gradients, GB",
                "together",
                "with a replica a node",
                "published into a node, colocated, GB",
                "split, GB",
                "seconds, colocated",
                "split",
            ],
            crossing,
        ),
        "bits": table(["ranks", "tree: one exchange, by levels, by halving", "ring"], same),
    }


def svg(m: Measured) -> str:
    """Draws milliseconds of one layer over ranks, both on logarithmic axes."""
    width, height, left, right, top, bottom = 640, 340, 56, 190, 20, 40
    low, high = 0.5, 1000.0

    def x(ranks: int) -> float:
        return left + (math.log2(ranks) - 1) / 9 * (width - left - right)

    def y(ms: float) -> float:
        return height - bottom - math.log(ms / low) / math.log(high / low) * (height - top - bottom)

    style = 'font-family="sans-serif" font-size="12" fill="#444"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">']
    out += ["<title>Reduce-scatter of one layer's gradient against ranks</title>"]
    out += [f'<rect width="{width}" height="{height}" fill="white"/>']
    for ms in (1, 10, 100):
        out += [f'<line x1="{left}" x2="{width - right}" y1="{y(ms):.1f}" y2="{y(ms):.1f}" stroke="#ddd"/>']
        out += [f'<text x="{left - 8}" y="{y(ms) + 4:.1f}" text-anchor="end" {style}>{ms} ms</text>']
    for w in RANKS:
        out += [f'<text x="{x(w):.1f}" y="{height - bottom + 18}" text-anchor="middle" {style}>{w}</text>']
    out += [f'<text x="{x(45):.1f}" y="{height - 6}" text-anchor="middle" {style}>ranks, {NODE} a node</text>']
    edge = (x(NODE) + x(2 * NODE)) / 2
    out += [
        f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="{top}" y2="{height - bottom}" stroke="#bbb" stroke-dasharray="3 4"/>'
    ]
    colors = ("#888888", "#d9822b", "#1f6fb2", "#3a9a6b", "#b03a5b")
    for (name, way), color in zip(WAYS.items(), colors, strict=True):
        points = [(x(w), y(min(max(way(m, LAYER, w) * 1e3, low), high))) for w in RANKS]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        out += [f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>']
        a, b = points[-1] if way is not chain else points[4]
        out += [
            f'<text x="{a + 8:.1f}" y="{b + 4:.1f}" font-family="sans-serif" font-size="12" fill="{color}">{name}</text>'
        ]
    return "\n".join([*out, "</svg>"]) + "\n"


def filled(page: str, tables: dict[str, list[str]]) -> str:
    """Returns `page` with what stands between <!-- NAME --> and <!-- end --> replaced."""
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, rest = page.split(begin)
        page = before + begin + "\n".join(lines) + end + rest.partition(end)[2]
    return page


def main() -> None:
    """Writes the tables and the drawing."""
    m = measured(HERE / "collectives.json")
    page = HERE / "scaling.md"
    page.write_text(filled(page.read_text(), numbers(m)))
    (HERE / "scaling.svg").write_text(svg(m))


if __name__ == "__main__":
    main()
