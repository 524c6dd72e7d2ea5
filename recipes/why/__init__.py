"""Why exactness: the same task with exact kernels and without, several seeds each.

__main__.py   runs them, several at once, and goes on where one fails
record.py     reads what the runs left: why.json, and why.svg
"""
