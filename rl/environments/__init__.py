"""Environments: how a problem becomes a conversation, and who judges it.

environment.py   what every environment is
choice.py        opens the one that the config names
section.py       its keys
single_turn.py   one prompt, one completion, judged by the run's reward
tools.py         turns between the policy and the tools of an object (docs/environments.md)
verifiers/       environments of the package verifiers, whose clients ask the run's engines
judging.py       what conversations earn, and what is left out of them
conversation.py  one conversation while it is under way, and what it came to
turns.py         what stands between two completions, as tokens
formats/         how models write calls, a file for each family
hosts.py         the objects of conversations in processes: asks them, and makes them again where a process is lost
worker.py        such a process
games/           environments to begin with

To add a kind: a file with a class that has `play` and `judge`, which `choice.py` opens. `play` may ask the sampler as often as
it likes; what it puts between two completions are plain tokens of the transcript, which nobody trains on. A request after the
first has all tokens so far as its prompt, and the first one's seed: noise is keyed by the token's position too. The gold
solutions are judged by the reward alone (`rl/rewards/golds.py`).
"""
