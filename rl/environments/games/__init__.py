"""Environments to read and to begin with: a calculator, and a game of many turns.

calculator.py   `+recipe=calculator`: sums with a tool that computes them, judged by the data's verifier
guess.py        `+recipe=guess`: a number to find, lower or higher, judged by the environment itself
"""
