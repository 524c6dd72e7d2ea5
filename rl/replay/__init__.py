"""Keeps batches of a run, and computes one of them again alone, on both sides, to name the first op at which they part.

kept.py       a batch in a folder: tokens, both sides' log-probs, and the weights that sampled it
recording.py  what each op of a forward pass returned, a digest a token
sides.py      the trainer's forward and the sampler's, over the tokens of a batch
parting.py    the first layer and op at which two recordings differ
command.py    `python -m rl.replay FOLDER`
"""
