"""`python -m recipes.multi_gpu`: everything that takes several GPUs of one host, run and recorded by one command.

__main__.py   the command: which parts, one row each, JSON and the table of docs/multi_gpu.md
parts.py      what each part runs, and what it must show
command.py    a command of the project as a process: its output, its time, the memory of the cards meanwhile
engine.py     tokens per second of one engine at a tensor-parallel size
problems.py   questions to train on, where no data is given
record.py     rows as markdown
"""
