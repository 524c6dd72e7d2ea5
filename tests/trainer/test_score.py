"""`python -m trainer.score`: the file it reads, and what it says of a bad one."""

from pathlib import Path

import numpy as np
import pytest

from trainer.batch import BatchError
from trainer.score import main, read

GOOD = {
    "token_ids": np.arange(10),
    "lengths": np.array([4, 6]),
    "prompts": np.array([2, 2]),
    "temperatures": np.ones(2),
    "top_k": np.array([0, 3]),
    "top_p": np.ones(2),
    "min_p": np.zeros(2),
}


def written(folder: Path, **changes: np.ndarray) -> Path:
    np.savez(folder / "batch.npz", **{**GOOD, **changes})
    return folder / "batch.npz"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    batch = read(written(tmp_path), 10)
    assert all(np.array_equal(batch[name], array) for name, array in GOOD.items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_ids": np.arange(10) + 1}, "token_ids 1 .. 10 for a vocabulary of 10"),
        ({"token_ids": np.arange(10) - 1}, "token_ids -1 .. 8 for a vocabulary"),
        ({"token_ids": np.ones(10)}, "must be integers"),
        ({"token_ids": np.arange(9)}, "10 in all, for token_ids"),
        ({"token_ids": np.array([{}] * 10, dtype=object)}, "no .npz of arrays"),
        ({"lengths": np.array([10, 0])}, "lengths of 0 and more"),
        ({"prompts": np.array([1])}, "each must be"),
    ],
    ids=["above", "below", "floats", "count", "pickle", "empty text", "texts"],
)
def test_a_batch_that_is_none(changes: dict[str, np.ndarray], reason: str, tmp_path: Path) -> None:
    with pytest.raises(BatchError, match=reason):
        read(written(tmp_path, **changes), 10)


def test_files_that_are_no_batch(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("text", b"not a batch"), ("zip", b"PK\x03\x04 not a zip")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BatchError):
            read(tmp_path / name, 10)
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(BatchError):
        read(tmp_path / "one.npy", 10)
    np.savez(tmp_path / "few.npz", token_ids=GOOD["token_ids"])
    with pytest.raises(BatchError, match="lengths"):
        read(tmp_path / "few.npz", 10)


@pytest.mark.parametrize(
    ("options", "reason"),
    [([], "does not exist"), (["--threads", "0"], "'0' is not a positive integer"), (["--dtype", "int8"], "--dtype")],
)
def test_bad_input_is_one_line(
    options: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["score", str(tmp_path), str(written(tmp_path)), str(tmp_path / "out.npy"), *options]
    )
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and reason in error
    assert error.startswith("samebit: error: ") and error.count("\n") == 1
