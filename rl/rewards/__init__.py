"""Says what a completion is worth: the data's own verifier, or a function of the user's in a process of its own.

reward.py    judges by the reward of a run; what is said where judging fails
process.py   runs a user's function in a process of its own, `worker.py`
golds.py     judges the gold solutions before a run begins
answer.py    tells whether a text states the right answer: by text, or by math-verify

To add one: a function (problem, text) -> float, 1 for a right answer, anywhere it can be imported: `reward=module:function`.
What a kind of data brings to judge by is made where its problems are (`Source.judge`, rl/data). Whatever judges must give the
same number for the same text on every machine: the reward decides bits of the weights.
"""
