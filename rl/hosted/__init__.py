"""Models that `transformers` computes and accelerate places: a reward model, and a reference or teacher that the exact kernels
do not serve.

Their arithmetic is torch's own. What they say is the same again on the same machine, with the same versions and placed alike;
nothing more is promised of it. Sampler and trainer agree to the last bit all the same.

loading.py          loads a model directory, whole or spread over devices
language_model.py   the log-probs of a batch's loss rows
asked.py            which of them a run asks, and what is known of them before it starts

The scores of a reward model are `rl.rewards.model`; the actors in which a run has them, `rl.cluster.hosted`.
"""
