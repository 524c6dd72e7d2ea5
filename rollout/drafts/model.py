"""Drafts by another model, which an engine of its own serves: an example of a drafter that is not a look-up."""

from collections.abc import Sequence as Many
from dataclasses import replace

from rollout.drafts.drafter import Draft
from rollout.engine import Engine
from rollout.sampling import Request
from rollout.sequence import Sequence


class ModelDrafter:
    """Drafts what a small model of the same vocabulary draws. It draws with the noise of the sequence that it drafts for (same
    seed, positions and filters), which two models that agree on the distribution turn into the same token: at temperature 1 a
    greedy draft would be right far less often.

    `engine`: serves the small model on this rank alone, with pages of one token and a prefix cache, so that of a sequence it
    computes only what is new. It must hold the longest sequence, and be idle between drafts."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def draft(self, sequences: Many[Sequence], most: int) -> list[Draft | None]:
        """Returns drafts, as `Drafter.draft`; None for a sequence that is too long for the small model."""
        longest = self.engine.scheduler.max_positions
        asked = []
        for i, sequence in enumerate(sequences):
            new = min(most, longest - len(sequence.tokens))
            if new > 0:
                one = replace(
                    sequence.request.sampling, max_new_tokens=new, seed=sequence.seed, n=1, stop=(), stop_ids=()
                )
                asked.append(Request(i, tuple(sequence.tokens), one))
        drawn = {c.request_id: Draft(c.token_ids, "model") for c in self.engine.generate(asked)}
        return [drawn.get(i) for i in range(len(sequences))]

    def ended(self, sequence: Sequence) -> None:
        """Needs nothing of it."""
