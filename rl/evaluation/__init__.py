"""Evaluates a policy on held-out problems: before a run, every so many steps, after it, or a model that is there.

measures.py    what an evaluation found: accuracy, pass@k, maj@k, lengths, each with its formula
evaluator.py   plays the conversations of an evaluation and measures them; `make_evaluator` makes a run's
sets.py        opens the further sets of `eval.sets`
samples.py     keeps every sample of an evaluation, a file each
command.py     `python -m rl.evaluate MODEL [key=value ...]`
"""

from rl.evaluation.evaluator import Evaluator, Evaluators, make_evaluator, make_set_evaluator
from rl.evaluation.measures import Evaluation, measure
from rl.evaluation.sets import EvaluationSet, open_sets
