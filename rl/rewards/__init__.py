"""Says what a completion is worth: the data's own verifier, or a function of the user's in a process of its own.

reward.py    judges by the reward of a run; what is said where judging fails
process.py   runs a user's function in a process of its own, `worker.py`
golds.py     judges the gold solutions before a run begins
answer.py    tells whether a text states the right answer: by text, or by math-verify
"""
