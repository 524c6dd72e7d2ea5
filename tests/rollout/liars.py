"""Drafters that lie on purpose, and paces that check whatever they say. Imported by the ranks, so it needs no pytest."""

import hashlib
from collections.abc import Iterable, Sequence

from rollout.drafts.drafter import Draft, Drafter
from rollout.drafts.speculation import Speculation
from rollout.engine import Engine
from rollout.sampling import Completion
from rollout.sequence import Sequence as Sample

LIES = ("right", "wrong", "random", "half", "right until the last", "too long", "stops", "no tokens of the model")


def number(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class Liar:
    """Knows what some requests will say, and says something of it."""

    def __init__(self, lie: str, vocab: int, truth: Iterable[Completion] = (), chance: float = 0.5) -> None:
        """`chance`: of "half", that a token is right."""
        self.lie, self.vocab, self.chance = lie, vocab, chance
        self.said = {(c.request_id, c.sample): c.token_ids for c in truth}
        self.heard: list[Sample] = []

    def draft(self, sequences: Sequence[Sample], most: int) -> list[Draft | None]:
        return [self.one(sequence, most) for sequence in sequences]

    def one(self, sequence: Sample, most: int) -> Draft | None:
        place, request = len(sequence.tokens), sequence.request
        noise = [number(request.id, sequence.sample, place + i) for i in range(most + 100)]
        junk = [n % self.vocab for n in noise]
        truth = list(self.said.get((request.id, sequence.sample), ())[sequence.sampled :]) or junk[:1]
        wrong = [(t + 1) % self.vocab for t in truth]
        stops = list(request.sampling.stop_ids)
        tokens = {
            "right": truth[:most],
            "wrong": wrong[:most],
            "random": junk[:most],
            "half": [t if n < self.chance * 2**32 else w for t, w, n in zip(truth, wrong, noise, strict=False)][:most],
            "right until the last": [*truth[: most - 1], wrong[min(most, len(truth)) - 1]],
            "too long": [*truth, *junk],
            "stops": [*truth[:1], *stops, *stops][:most],
            "no tokens of the model": [*truth[:1], -1, self.vocab, 2**40],
        }[self.lie]
        return Draft(tokens, self.lie) if tokens else None

    def ended(self, sequence: Sample) -> None:
        self.heard.append(sequence)


class Rash:
    """Checks drafts of any length in most steps, whether it pays or not."""

    def __init__(self, reach: int = 5, pause: int = 4) -> None:
        """`pause`: every so many steps nothing is drafted."""
        self.reach, self.pause, self.steps = reach, pause, 0

    def wants(self, running: int) -> bool:
        self.steps += 1
        return self.steps % self.pause > 0

    def lengths(self, running: int, chances: Sequence[tuple[float, int]], room: int) -> list[int]:
        most = [length for _, length in chances]
        return [min(length, number(self.steps, i) % (self.reach + 2)) for i, length in enumerate(most)]

    def record(self, drafted: bool, running: int, rows: int, seconds: float) -> None:
        assert seconds >= 0 and rows >= running and (rows > running or not drafted)

    def plain(self, running: int) -> float | None:
        return None


def speculate(engine: Engine, drafter: Drafter, reach: int = 5, pause: int = 4) -> Speculation:
    """Lets a drafter guess in an engine that speculates, and checks what it says."""
    vocab = engine.runner.config.vocab_size
    engine.speculation = Speculation([drafter], Rash(reach, pause), vocab, engine.config.overlap)
    return engine.speculation
