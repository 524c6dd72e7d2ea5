"""A rank reads its own rows of a model directory, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh

from kernels.model import saved
from kernels.weights import files as module
from kernels.weights.files import find, read_rows, save
from tests.bits import assert_same_bits
from tests.model.shapes import SHAPES, random_weights
from trainer.trainer import Trainer, TrainerConfig


@pytest.mark.parametrize("name", ["tiny", "tied", "qwen2", "experts, dense layers", "61 ids", "37 ids, tied"])
def test_a_trainer_begins_with_the_files_bits(name: str, mesh: DeviceMesh, tmp_path: Path) -> None:
    config = SHAPES[name]
    save(config, random_weights(config), tmp_path, file_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    trainer = Trainer(config, TrainerConfig(1, 1), mesh, tmp_path)
    whole = Trainer(config, TrainerConfig(1, 1), mesh, random_weights(config))
    assert_same_bits(list(trainer.shard().values()), list(whole.shard().values()))
    ours, theirs = ([p.detach().to_local() for p in t.model.parameters()] for t in (trainer, whole))
    assert_same_bits(ours, theirs)  # a tied head too


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_rows_are_those_of_the_stacked_tensor(data: st.DataObject, tmp_path: Path) -> None:
    """Any range, across the borders of the files' tensors; no tensor is read whole unless it is asked for whole."""
    config = SHAPES["61 ids"]
    if not (tmp_path / "config.json").exists():
        save(config, random_weights(config), tmp_path, file_bytes=20_000)
    where = find(config, tmp_path)
    whole = {p.name: w for p, w in random_weights(config)}
    parameter = data.draw(st.sampled_from(saved(config)))
    start = data.draw(st.integers(0, parameter.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, parameter.shape[0]))
    read: list[int] = []

    class Slices:
        def __init__(self, path: Path, framework: str) -> None:
            self._file = original(path, framework)

        def __enter__(self) -> "Slices":
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def get_slice(self, name: str) -> Any:
            part = self._file.get_slice(name)

            class Rows:
                def __getitem__(self, rows: slice) -> Any:
                    read.append(rows.stop - rows.start)
                    return part[rows]

            return Rows()

    original = module.safe_open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "safe_open", Slices)
        rows = read_rows(where, parameter, start, stop)
    assert_same_bits(rows, whole[parameter.name][start:stop])
    assert sum(read) == max(min(stop, sum(parameter.stored)) - start, 0)
