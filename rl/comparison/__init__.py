"""Finds where two runs part, by what their folders hold.

runs.py      configs, checkpoints, metrics and completions of two runs, each to its first difference
command.py   `python -m rl.compare RUN_A RUN_B`
"""
