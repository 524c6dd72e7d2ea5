"""Sequences with several trained stretches: an environment that answers, and what the trainer makes of its transcripts."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rl.algorithms import open_algorithm
from rl.algorithms.grpo import GrpoSection
from rl.data import Problem
from rl.environments.environment import Generate, score
from rl.pack import pack
from rl.samples import Sample, Transcript, completions
from rollout.sampling import Completion, Request, SamplingParams
from tests.bits import assert_same_bits
from tests.model.shapes import SHAPES, random_weights
from tests.rl.algorithms.groups import PLAIN
from tests.rollout.scenarios import engine
from tests.trainer.batches import gradients, plain_model, token_logprobs
from trainer.batch import Batch

ANSWER = (3, 1, 4, 1, 5)


class Echo:
    """Answers the first completion with fixed tokens, and then lets the policy say more, hotter and cut."""

    def play(
        self, requests: Sequence[Request], generate: Generate, problems: Sequence[Problem] = ()
    ) -> list[Transcript]:
        first = generate(requests)
        said = [r.prompt_ids + c.token_ids + ANSWER for r, c in zip(requests, first, strict=True)]
        second = generate(
            [
                Request(r.id, text, SamplingParams(4, 1.5, r.sampling.seed, top_p=0.9))
                for r, text in zip(requests, said, strict=True)
            ]
        )
        return [(r.prompt_ids, a, ANSWER, b) for r, a, b in zip(requests, first, second, strict=True)]

    def judge(self, problems: Sequence[Problem], transcripts: Sequence[Transcript]) -> list[Sample]:
        return [Sample(t, "", float(sum(i for c in completions(t) for i in c.token_ids))) for t in transcripts]


def played(name: str) -> tuple[list[Problem], list[Transcript]]:
    config, random = SHAPES[name], np.random.default_rng(1)
    prompts = [tuple(random.integers(0, config.vocab_size, n).tolist()) for n in (1, 9, 17, 4)]
    problems = [Problem(f"p{i}", "", prompt, "", "", None) for i, prompt in enumerate(prompts)]
    requests = [Request(i, prompts[i // 2], SamplingParams(3 + i % 3, 0.7, seed=i)) for i in range(8)]
    return problems, Echo().play(requests, engine(config, pages=120, page_size=4).generate)


def singly(transcript: Transcript, turn: int) -> Batch:
    """The same sequence with one of its stretches trained on."""
    seen = -1
    pieces: list[tuple[int, ...] | Completion] = []
    for piece in transcript:
        seen += isinstance(piece, Completion)
        pieces.append(piece.token_ids if isinstance(piece, Completion) and seen != turn else piece)
    (one,) = completions(tuple(pieces))
    return pack([tuple(pieces)], *np.full((2, len(one.token_ids)), 0.5, np.float32))


@pytest.mark.parametrize("name", ["tiny", "tied"])
def test_the_trainer_computes_what_was_recorded_in_every_turn(name: str) -> None:
    """All sequences packed, and each stretch of each sequence on its own: the sampler's bits."""
    config, (problems, transcripts) = SHAPES[name], played(name)
    model = plain_model(config, {p.name: w for p, w in random_weights(config)})
    section = {"name": "grpo", "prompts_per_step": 4, "group_size": 2, "advantage": "grpo", "loss_mean": "token"}
    grpo = open_algorithm(GrpoSection.model_validate(section | PLAIN | {"clip_low": 0.2, "clip_high": 0.28}), 9)
    batch = grpo.batch(score(problems, transcripts, Echo()))
    assert len({*batch.temperatures.tolist()}) == 2 and (batch.counts > 4).all()
    together = token_logprobs(model, batch, leaf_sequences=2).detach()
    assert_same_bits(together, torch.from_numpy(batch.logprobs), "all")
    for i, transcript in enumerate(transcripts):
        mine = together[torch.from_numpy(batch.sequence == i)]
        alone = [token_logprobs(model, singly(transcript, turn)).detach() for turn in (0, 1)]
        assert_same_bits(torch.cat(alone), mine, f"sequence {i}")


def test_a_gradient_of_one_stretch_does_not_depend_on_the_other() -> None:
    """Where the other's weights are 0, the gradient has the bits of this stretch alone."""
    config, (_, transcripts) = SHAPES["tiny"], played("tiny")
    weights = {p.name: w for p, w in random_weights(config)}
    for transcript in transcripts[::3]:
        sizes = [len(c.token_ids) for c in completions(transcript)]
        for turn in (0, 1):
            shares = np.repeat(np.float32([0.5 * (turn == 0), 0.5 * (turn == 1)]), sizes)
            both = pack([transcript], np.full(sum(sizes), 0.5, np.float32), shares)
            inside, alone = gradients(config, weights, both), gradients(config, weights, singly(transcript, turn))
            for key in alone:
                assert_same_bits(inside[key] + 0.0, alone[key] + 0.0, f"turn {turn}, {key}")
