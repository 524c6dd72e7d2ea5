"""Random weights: the same for a seed and a name, on every machine and under every layout."""

import math
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod

import torch

from kernels.model import ModelConfig, Parameter, saved
from kernels.ops import normal


def initial(config: ModelConfig, seed: int, soonest: bool = False) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Draws random weights, float32: norms 1, biases 0, matrices normal with standard deviation init_std (o and down divided by
    sqrt(2 layers), Radford et al. 2019, section 2.3). Each tensor's noise is keyed by (seed, name), so it depends on
    neither order nor sharding (`kernels.ops.normal`). Drawn by up to 8 threads, as many tensors ahead; in the order of
    `saved`, or, `soonest`, in one that lets no thread wait."""

    def draw(parameter: Parameter) -> torch.Tensor:
        if not parameter.columns:
            return (torch.zeros if parameter.name.endswith("bias") else torch.ones)(parameter.shape)
        deviation = config.init_std / math.sqrt(2 * config.layers) if parameter.to_stream else config.init_std
        shape = (sum(parameter.stored), parameter.columns)
        return parameter.from_files(normal(shape, seed, zlib.crc32(parameter.name.encode()), deviation))

    workers, todo = min(8, os.cpu_count() or 1), saved(config)
    if soonest:
        todo.sort(key=lambda p: prod(p.shape))
    late = [todo.pop(), todo.pop()] if soonest else []  # the largest, a thread each: begun first, given last
    with ThreadPoolExecutor(workers) as pool:
        largest = [(parameter, pool.submit(draw, parameter)) for parameter in late]
        drawn: deque[tuple[Parameter, Future[torch.Tensor]]] = deque()
        for parameter in todo:
            drawn.append((parameter, pool.submit(draw, parameter)))
            if len(drawn) > workers:
                first, tensor = drawn.popleft()
                yield first, tensor.result()
        for first, tensor in (*drawn, *largest):
            yield first, tensor.result()
