"""Environments: how a problem becomes a conversation, and who judges it.

environment.py   what every environment is
single_turn.py   one prompt, one completion, judged by the run's reward

To add one: a file with a class that has `play` and `judge`, which `rl/train.py` makes. `play` may ask the sampler as often as
it likes; what it puts between two completions (a tool's answer, another question) are plain tokens of the transcript, which
nobody trains on. A request after the first has all tokens so far as its prompt, and the first one's seed: noise is keyed by the
token's position too. The gold solutions are judged by the reward alone (`rl/rewards/golds.py`).
"""
