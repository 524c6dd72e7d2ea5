"""Tells what a machine's card is, and whether it computes as recorded: `python -m kernels.doctor`.

facts.py        card, driver and versions
checks.py       a part of every op's contract, the sampler against the trainer, a small run
recorded.json   what was computed on which card: a line each, and one more for every card that somebody sends
"""
