"""The default task by every algorithm and several seeds, as one table: `python -m recipes.algorithms --out FILE`.

command.py  what it runs, and the table
"""
