"""Problems: where they come from, how they become tokens, and how an answer is judged."""

from rl.data.problem import TRAIN, WARMUP, Judge, Problem, ProblemStream, Source
from rl.data.sources import open_source

__all__ = ["TRAIN", "WARMUP", "Judge", "Problem", "ProblemStream", "Source", "open_source"]
