"""Says what a completion is worth: by the data's own verifier, by functions of the user's, or by those that are here.

reward.py    adds up the rewards of a run; what is said where judging fails
section.py   the keys of a config, and the names of what is built in
styles.py    calls a function as its signature says: ours, TRL's, verl's or OpenRLHF's
here.py      calls functions that are objects of this process, of a script or a notebook
pool.py      hands calls to processes (process.py starts one, worker.py is what it runs) with limits of time
golds.py     judges the gold solutions before a run begins
claim.py     what is judged, and what comes of it

answer.py    built in: the right answer, by text or by math-verify     exact.py   the same text
format.py    built in: the form                                       length.py  short ones
code.py      built in: programs, against the tests of their row (sandbox.py is what runs one)
http.py      built in: what a server answers                          judge.py  what a model says

To add one: a file here with one function, and its name in `BUILT_IN` (section.py). To use one of yours: docs/rewards.md.
What a kind of data brings to judge by is made where its problems are (`Source.judge`, rl/data). Whatever judges must give the
same number for the same text on every machine: the reward decides bits of the weights.
"""
