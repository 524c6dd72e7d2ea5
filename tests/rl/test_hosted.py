"""Models that transformers computes beside a run: a reference, a teacher, a reward model in an actor of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from kernels.host.place import HOST
from rl.compose import check
from rl.data import open_source
from rl.errors import UserError
from rl.frozen import frozen_model
from rl.hosted.asked import by_transformers, check_hosted, elsewhere, hosted_model, needs_cards
from rl.hosted.language_model import LanguageModel
from rl.identity import identity
from rl.model import model_config
from rl.placement import Node, beside
from rl.prepare import prepare
from rl.prove import main as prove
from rl.report import read_lines
from tests.rl.command import Outcome, command, summary
from trainer.batch import Batch

pytest.importorskip("accelerate")
RUN = (
    "steps=2",
    "warmup.steps=0",
    "algorithm.prompts_per_step=8",
    "trainer.leaf_sequences=8",
    "trainer.micro_leaves=1",
    "eval.problems=16",
    "data.problems=2000",
    "model.hf.num_hidden_layers=2",
    "rollout.pages=256",
    "checkpoint.every=1",
    "logger=none",
)
SHAPE: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}


def saved(kind: Any, folder: Path, seed: int = 0, **shape: Any) -> Path:
    """A model of a family that the exact kernels do not compute, with the tokenizer of the run."""
    tokenizer = open_source(check([*RUN])[0]).tokenizer
    torch.manual_seed(seed)
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    size = {"vocab_size": 64, "num_labels": 1, **ends}
    kind(GPT2Config(**{**SHAPE, **size, **shape})).save_pretrained(folder)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(GPT2LMHeadModel, tmp_path_factory.mktemp("models") / "teacher")


def distils(teacher: Path, *keys: str) -> tuple[str, ...]:
    return (*RUN, "algorithm=distillation", f"algorithm.teacher={teacher}", "algorithm.device_map=auto", *keys)


def test_its_logprobs_are_those_of_transformers(teacher: Path) -> None:
    """At the temperature of each row, of the rows alone, and of each sequence as if it stood alone."""
    ids = np.array([3, 1, 4, 1, 5, 9, 2, 6], dtype=np.int64)
    heat = np.array([0.5, 1.0, 2.0, 1.0], dtype=np.float32)
    batch = Batch.of(ids, np.array([5, 3]), np.array([1, 3, 6, 7]), temperatures=heat)
    found = LanguageModel(str(teacher), "cpu").logprobs(batch)
    reference, expected = AutoModelForCausalLM.from_pretrained(teacher).eval(), list[float]()
    for sequence, rows, heats in ((ids[:5], (1, 3), heat[:2]), (ids[5:], (1, 2), heat[2:])):
        logits = reference(torch.from_numpy(sequence)[None]).logits[0].detach()
        for row, one in zip(rows, heats, strict=True):
            expected.append(torch.log_softmax(logits[row - 1] / float(one), -1)[sequence[row]].item())
    assert found.dtype == np.float32 and found.tolist() == pytest.approx(expected, rel=1e-5)
    again = LanguageModel(str(teacher), "auto")
    assert again.logprobs(batch.take(1, 2)).tobytes() == found[2:].tobytes() or torch.cuda.is_available()
    assert again.placed == ("cuda:0" if torch.cuda.is_available() else "cpu")


def test_its_digest_is_that_of_its_files(teacher: Path, tmp_path: Path) -> None:
    other = saved(GPT2LMHeadModel, tmp_path / "other", seed=1)
    first, second = (LanguageModel(str(folder), "cpu").digest() for folder in (teacher, other))
    shutil.copy(teacher / "model.safetensors", other)
    assert first != second and LanguageModel(str(other), "cpu").digest() == first


def test_a_model_that_is_not_finite_is_said(teacher: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(teacher)
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    shutil.copytree(teacher, tmp_path / "nan")
    model.save_pretrained(tmp_path / "nan")
    batch = Batch.of(np.array([1, 2, 3]), np.array([3]), np.array([1, 2]))
    with pytest.raises(ValueError, match="finds the log-prob of response token 0 to be nan"):
        LanguageModel(str(tmp_path / "nan"), "cpu").logprobs(batch)


def test_it_is_named_as_another_programs(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the identity with the versions, of a reward model too; and the proof of the layouts refuses it."""
    (config,) = check([*distils(teacher)])
    assert elsewhere(config) == [f"algorithm.teacher={teacher}"]
    mine = identity(config, open_source(config))
    assert f"torch {torch.__version__}" in mine["what transformers computes"]
    assert mine["algorithm.device_map"] == "auto"
    (judged,) = check([*RUN, "reward={function: model, args: {path: there}}"])
    assert elsewhere(judged) == ["reward=model"] and "torch" in by_transformers(judged)
    (exact,) = check([*RUN, "algorithm.kl_coef=0.1"])
    assert elsewhere(exact) == [] and "what transformers computes" not in identity(exact, open_source(exact))
    with pytest.raises(SystemExit, match="2"):
        prove(["algorithm=distillation", f"algorithm.teacher={teacher}", "algorithm.device_map=cpu"])
    assert "algorithm.teacher=" in (said := capsys.readouterr().err) and "those of another program" in said


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("algorithm.device_map=auto",), "set algorithm.kl_coef and algorithm.reference, or leave it null"),
        (
            ("algorithm.device_map=auto", "algorithm.kl_coef=0.1"),
            "with algorithm.reference=null: .* set algorithm.refer",
        ),
        (("algorithm=distillation", "algorithm.device_map=auto"), "algorithm.teacher is null"),
    ],
)
def test_it_places_a_directory(keys: tuple[str, ...], line: str) -> None:
    (config,) = check([*RUN, *keys])
    with pytest.raises(UserError, match=line):
        config.algorithm.check(config.rollout.max_new_tokens)


def test_what_the_exact_kernels_do_not_compute_names_the_key(teacher: Path) -> None:
    (config,) = check([*distils(teacher, "algorithm.device_map=null", "model.hf.vocab_size=64")])
    with pytest.raises(UserError, match=r"model_type .*gpt2.* not supported.*algorithm.device_map=auto"):
        frozen_model(config, model_config(config, 40))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("algorithm.teacher=/no/where",), "algorithm.teacher=/no/where is no folder"),
        (("rollout.top_p=0.9",), "rollout.top_p=0.9 with algorithm.teacher"),
    ],
)
def test_what_it_cannot_be(teacher: Path, keys: tuple[str, ...], line: str) -> None:
    (config,) = check([*distils(teacher), *keys])
    with pytest.raises(UserError, match=line):
        hosted_model(config)


def test_a_folder_that_does_not_fit_the_run_is_refused(teacher: Path, tmp_path: Path) -> None:
    def asks(folder: Path, length: int = 20) -> None:
        (config,) = check([*distils(folder)])
        hosted = hosted_model(config)
        assert hosted
        check_hosted(hosted, open_source(config).tokenizer, 32, length)

    asks(teacher)
    with pytest.raises(UserError, match="sequences of up to 65 tokens exceed its 64 positions"):
        asks(teacher, 65)
    with pytest.raises(UserError, match="its vocabulary of 31 is smaller than the policy's of 32"):
        asks(saved(GPT2LMHeadModel, tmp_path / "small", vocab_size=31))
    bare = saved(GPT2LMHeadModel, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        asks(bare)
    (bare / "config.json").write_text(json.dumps({"model_type": "nobody's"}))
    with pytest.raises(UserError, match="is no model that transformers knows"):
        asks(bare)


def test_it_has_the_cards_that_no_rank_has(teacher: Path) -> None:
    two = ("device=cuda", "trainer.world_size=2", "rollout.tp=2")
    (colocated,) = check([*distils(teacher), *two])
    (split,) = check([*distils(teacher), *two, "cluster.placement=split"])
    asked = needs_cards(colocated)
    assert asked == "algorithm.device_map=auto" and not needs_cards(check([*distils(teacher)])[0])
    eight = [Node(HOST, tuple(range(8)), cpus=2)]
    assert beside(colocated, eight, asked).cards == (2, 3, 4, 5, 6, 7)
    assert beside(split, eight, asked).cards == (4, 5, 6, 7)
    with pytest.raises(UserError, match=r"^algorithm.device_map=auto spreads a model .* there are none"):
        beside(colocated, [Node(HOST, (0, 1), cpus=2)], asked)
    (many,) = check([*distils(teacher), *two, "cluster.address=auto", "cluster.nodes=1"])
    nodes = [Node("10.0.0.1", (0, 1)), Node("10.0.0.2", (0,))]
    assert beside(many, nodes, asked) == Node("10.0.0.2", (0,))


def test_a_reward_model_that_is_placed_has_cards_too() -> None:
    model = "{function: model, args: {path: there, device_map: DEVICES}}"
    for devices, needed in (("auto", True), ("balanced", True), ("cuda:1", False), ("null", False)):
        (config,) = check([*RUN, "device=cuda", f"reward={model.replace('DEVICES', devices)}"])
        assert bool(needs_cards(config)) == needed, devices


@pytest.mark.parametrize("value", ["atuo", "cuda:x", "{h: auto}", "1.5", "true", "[cpu]", "{}", "''"])
def test_a_device_map_that_is_none_is_one_line(value: str, teacher: Path) -> None:
    with pytest.raises(
        UserError, match=r"^algorithm.device_map=.*: must be auto, balanced, .* a device \(cpu, cuda:1\)"
    ):
        check([*distils(teacher), f"algorithm.device_map={value}"])
    reward = f"reward={{function: model, args: {{path: {teacher}, device_map: {value}}}}}"
    with pytest.raises(UserError, match=r"^reward=model: device_map: must be auto, balanced, "):
        prepare(check([*RUN, reward])[0])


def test_device_maps_that_are(teacher: Path) -> None:
    for value in ("balanced_low_0", "cpu", "cuda:3", "1", "{transformer: cuda:1}", "{a: 0, b: cpu}"):
        assert check([*distils(teacher), f"algorithm.device_map={value}"])[0].algorithm.device_map is not None


def finish(folder: Path, *keys: str) -> Outcome:
    with command(*keys, cwd=folder) as running:
        return running.finish()


@pytest.mark.slow
def test_a_run_distils_a_teacher_that_transformers_computes_and_goes_on(teacher: Path, tmp_path: Path) -> None:
    """Judged meanwhile by a reward model in an actor: on this machine it ends in one hash wherever it was stopped."""
    judge = saved(GPT2ForSequenceClassification, tmp_path / "judge")
    reward = f"reward={{function: model, args: {{path: {judge}, device_map: auto}}}}"
    keys = distils(teacher, "trainer.lr=3e-3", reward)
    whole = finish(tmp_path, *keys, "out_dir=whole", "trainer.world_size=1")
    assert whole.code == 0, whole
    assert f"algorithm.teacher={teacher}, reward=model: by another program" in whole.out
    assert "algorithm.teacher: transformers computes it, on cpu" in whole.out
    rows = [row for row in read_lines(tmp_path / "whole" / "metrics.jsonl") if "reward/mean" in row]
    assert all(row["policy/kl_ref"] > 0 and row["reward/model"] != 0 for row in rows)
    assert all(row["divergence/tokens_nonzero"] == 0 for row in rows)
    assert summary(tmp_path / "whole")["elsewhere"] == [f"algorithm.teacher={teacher}", "reward=model"]
    assert finish(tmp_path, *keys, "steps=1", "out_dir=parts", "trainer.world_size=2").code == 0
    other = saved(GPT2LMHeadModel, tmp_path / "other", seed=1)
    refused = finish(tmp_path, *keys, "out_dir=parts", f"algorithm.teacher={other}")
    assert "other weights than the run began with" in refused.error(2)
    refused = finish(tmp_path, *keys, "out_dir=parts", "algorithm.device_map=cpu")
    assert "algorithm.device_map=auto there, algorithm.device_map=cpu here" in refused.error(2)
    assert finish(tmp_path, *keys, "out_dir=parts", "trainer.world_size=2").code == 0
    assert summary(tmp_path / "parts")["weights_sha256"] == summary(tmp_path / "whole")["weights_sha256"]


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_line(teacher: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(teacher, bad)
    (bad / "model.safetensors").write_bytes(b"nothing")
    line = finish(tmp_path, *distils(bad), "out_dir=run").error(2)
    assert line.startswith("algorithm.teacher: ") and "is no model that transformers loads" in line
