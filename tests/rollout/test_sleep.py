"""Memory that is given back and regained changes no bit, and moves no tensor."""

import resource
from pathlib import Path

import pytest
import torch

from rollout.memory import Reclaimable
from rollout.sampling import RequestError
from tests.model.shapes import SHAPES, TINY, random_weights
from tests.rollout.scenarios import bits, engine, requests

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reclaimable(device: str, dtype: torch.dtype) -> None:
    memory = Reclaimable({"a": (300, 1000), "b": (7,), "c": (64, 3)}, dtype, device)
    a, row = memory.tensors["a"], memory.tensors["a"][5]
    where = {name: t.data_ptr() for name, t in memory.tensors.items()}
    assert memory.bytes >= sum(t.nbytes for t in memory.tensors.values())
    for value in (1.0, 2.0):
        for t in memory.tensors.values():
            assert t.dtype == dtype and t.isnan().all()
            t.fill_(value)
        assert (row == value).all()
        memory.release()
        memory.release()
        assert not memory.held
        memory.regain()
        memory.regain()
        assert memory.held and a is memory.tensors["a"] and row.isnan().all()
    assert where == {name: t.data_ptr() for name, t in memory.tensors.items()}


@pytest.mark.gpu
@CUDA
def test_release_returns_memory_to_the_device() -> None:
    def freed() -> tuple[int, int]:
        """Bytes of the card that a release frees, and that a regain takes. Other tests may use the card meanwhile."""
        free = [torch.cuda.mem_get_info()[0]]
        for change in (memory.release, memory.regain):
            change()
            free.append(torch.cuda.mem_get_info()[0])
        return free[1] - free[0], free[1] - free[2]

    memory = Reclaimable({"a": (1 << 30,)}, torch.bfloat16, "cuda")
    assert any(min(freed()) >= 2 << 30 for _ in range(10))


def test_release_returns_memory_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    memory = Reclaimable({"a": (1 << 26,)}, torch.bfloat16, "cpu")
    full = resident()
    memory.release()
    assert full - resident() > 120 << 20
    memory.regain()
    assert memory.tensors["a"].isnan().all() and resident() > full - (8 << 20)


def test_keys_are_freed_and_weights_stay() -> None:
    served = engine(TINY)
    expected = bits(served.generate(requests(TINY)))
    served.sleep(1)
    assert not served.awake and served.version == 7
    with pytest.raises(RequestError, match="asleep"):
        served.generate(requests(TINY)[:1])
    assert served.idle
    served.wake()
    assert served.awake and bits(served.generate(requests(TINY))) == expected


def test_weights_are_freed_and_loaded_again() -> None:
    served = engine(TINY)
    served.generate(requests(TINY))
    served.sleep(2)
    assert served.version == -1
    served.load(random_weights(TINY, 1), 8)  # takes the weights' memory, not the keys'
    assert not served.awake and served.version == 8
    served.wake()
    fresh = engine(TINY, 1)
    fresh.load(random_weights(TINY, 1), 8)
    assert bits(served.generate(requests(TINY))) == bits(fresh.generate(requests(TINY)))


@pytest.mark.parametrize("level", [1, 2])
def test_requests_in_flight(level: int) -> None:
    """Refused, or ended, or they wait and go on as if nothing had been."""
    expected = bits(engine(TINY).generate(requests(TINY)))
    served = engine(TINY)
    for request in requests(TINY):
        served.add(request)
    done = [c for _ in range(6) for c in served.step()]
    with pytest.raises(RequestError, match="the engine is to sleep while requests are in flight"):
        served.sleep(level)
    assert served.awake
    served.sleep(level, in_flight="resume")
    with pytest.raises(RequestError, match="asleep"):
        served.step()
    if level == 2:
        served.load(random_weights(TINY, 0), 7, in_flight="resume")
    served.wake()
    while not served.idle:
        done += served.step()
    assert bits(sorted(done, key=lambda c: c.request_id)) == expected
    assert served.pool.available == served.pool.pages


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("level", [1, 2])
def test_captured_graphs_stay_valid(level: int) -> None:
    config = SHAPES["narrow heads"]
    asked = requests(config)
    served = engine(config, cuda_graphs=True, dtype=torch.bfloat16, device="cuda")
    expected = bits(served.generate(asked))
    graphs = served.runner.graphs
    assert graphs is not None
    captured = dict(graphs.graphs)
    assert captured
    for seed in (3, 0):
        served.sleep(level)
        between = torch.full((1 << 26,), 3.0, device="cuda")  # somebody else uses the memory
        served.load(random_weights(config, seed), 7)
        del between
        served.wake()
        last = bits(served.generate(asked))
        assert all(graphs.graphs[size] is graph for size, graph in captured.items())  # replayed, not captured again
        assert (last == expected) is (seed == 0)
