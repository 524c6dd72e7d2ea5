"""Every benchmark of the project, behind the commands of the packages that it measures.

timer.py     times calls, by the clock or by the device's, and rows of a GPU table beside their baselines
table.py     prints rows of figures so that none is lost on a narrow terminal
peer.py      what the engine's and the trainer's share: `transformers`' model beside ours, tokens a second

`python -m kernels.bench`               specs.py: each op as its spec describes it; on a GPU cards.py, the rows of card_rows.py
`python -m kernels.collectives.bench`   collectives.py: tree sums beside NCCL's
`python -m rollout.bench`               serving.py: the engine; on a GPU serving_card.py, at Qwen3-8B's shapes
`python -m rollout.bench_scheduler`     schedule.py: what planning costs, and a soak that counts pages
`python -m trainer.bench`               training.py: forward and backward; on a GPU training_card.py
`python -m rl.bench_publish`            publication.py: new weights from the trainer's ranks to the engines'

The one room of `kernels` that looks up: it imports the engine, the trainer and the loop, and nothing but the commands above
imports it.
"""
