"""Environments of the package `verifiers` (`pip install 'samebit[verifiers]'`), which runs their episodes and judges them.

play.py      the environment: asks for episodes, and makes transcripts of what they asked the policy
line.py      the route that their clients speak, /inference/v1/generate of rollout/server, over the run's engines
host.py      the process that has them: starts it, asks it, hears from it
worker.py    such a process
renderer.py  what stands between two completions, for its client: turns.py in the package's words
plugins/     an agent without a process of its own, for environments that bring none
"""
