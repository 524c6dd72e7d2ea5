"""Problems: where they come from, how they become tokens, and how an answer is judged."""

from rl.data.problem import TRAIN, WARMUP, Judge, Problem, ProblemStream, Source
from rl.data.sources import left_out, open_source

__all__ = ["TRAIN", "WARMUP", "Judge", "Problem", "ProblemStream", "Source", "left_out", "open_source"]
