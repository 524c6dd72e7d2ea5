"""A reward model in Hugging Face's form, tiny and random: its scores are transformers'; a folder that is none is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rl.compose import check
from rl.data import Problem, open_source
from rl.errors import UserError
from rl.prove import main as prove
from rl.rewards.claim import Claim
from rl.rewards.model import RewardModel
from rl.rewards.reward import open_reward
from tests.weights.folders import begin_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 257, "pad_token_id": 259,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rm") / "model"
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(LlamaConfig(**SHAPE, num_labels=2)).save_pretrained(path)
    begin_tokenizer().save_pretrained(path)
    return path


def called(model: RewardModel, prompt: Any, completions: list[Any]) -> list[float]:
    return model([prompt] * len(completions), completions)


def test_its_scores_are_those_of_transformers(folder: Path) -> None:
    """One text at a time; padded ones may differ in the last bits, as torch's sums do."""
    texts, words = ["a", "12345678", ""], begin_tokenizer()
    reference = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    for label in (0, 1):
        expected = [reference(**words("1+1=" + t, return_tensors="pt")).logits[0, label].item() for t in texts]
        alone = RewardModel(str(folder), dtype="float32", label=label, batch=1)
        assert called(alone, "1+1=", texts) == expected and len({*expected}) == 3
        padded = RewardModel(str(folder), dtype="float32", label=label, batch=2)
        assert called(padded, "1+1=", texts) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_start_of_a_long_text_is_cut_off_and_a_conversation_is_written_by_its_template(folder: Path) -> None:
    short = RewardModel(str(folder), dtype="float32", max_length=5, batch=1)
    assert called(short, "xxxxxxxxx", ["34"]) != called(short, "xxxxxxxxx", ["43"])
    assert called(short, "abcdefghxx", ["34"]) == called(short, "hgfedcbaxx", ["34"])
    whole = RewardModel(str(folder), dtype="float32")
    turns = [{"role": "user", "content": "1+1="}]
    answers = [[{"role": "assistant", "content": text}] for text in ("2", "3")]
    assert called(whole, turns, answers) != called(whole, "1+1=", ["2", "3"])


def test_accelerate_places_it(folder: Path) -> None:
    pytest.importorskip("accelerate")
    plain, placed = (RewardModel(str(folder), "float32", device_map=where) for where in (None, "auto"))
    assert called(plain, "1+1=", ["2"]) == called(placed, "1+1=", ["2"]) or torch.cuda.is_available()


def test_a_run_judges_by_it_in_one_process(folder: Path) -> None:
    model = f"{{function: model, args: {{path: {folder}, dtype: float32}}}}"
    entry = f"[{model},{{function: length, weight: 0, args: {{target: 4, limit: 9}}}}]"
    (config,) = check(["data.problems=200", f"reward={entry}", "scoring.workers=3"])
    source = open_source(config)
    reward = open_reward(config.reward, source, config.scoring)
    problems = [Problem(str(i), f"{i}+1=", (1,), "2", "2", None) for i in range(4)]
    verdicts = reward.judge([Claim(p, text) for p in problems for text in ("1", "2")])
    scores = [called(RewardModel(str(folder), "float32"), p.prompt, ["1", "2"]) for p in problems]
    assert [v.parts["model"] for v in verdicts] == [score for pair in scores for score in pair]
    assert reward.judge._pool is not None and reward.judge._pool.workers == 1  # type: ignore[union-attr]


def language_model(path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(path)
    begin_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("path: /no/where", "/no/where is no folder"),
        ("path: EMPTY", "is no model that transformers loads as AutoModelForSequenceClassification"),
        ("path: BROKEN", "is no model that transformers loads as AutoModelForSequenceClassification"),
        ("path: LM", "it has no score.weight (a language model has no such head)"),
        ("path: RM, label: 2", "has 2 label(s), numbered from 0"),
        ("path: RM, dtype: float8", "dtype=float8: must be one of"),
        ("path: RM, max_length: 0", "each must be at least 1"),
        ("path: RM, lenght: 3", "lenght"),
    ],
)
def test_what_cannot_judge_is_one_line(args: str, said: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"model_type": "llama"})[:-3])
    lm = language_model(tmp_path / "lm") if "LM" in args else tmp_path
    for name, path in {"EMPTY": "empty", "BROKEN": "broken"}.items():
        args = args.replace(name, str(tmp_path / path))
    args = args.replace("RM", str(folder)).replace("LM", str(lm))
    (config,) = check(["data.problems=200", f"reward={{function: model, args: {{{args}}}}}"])
    with pytest.raises(UserError) as error:
        open_reward(config.reward, open_source(config), config.scoring)
    assert said in str(error.value) and "\n" not in str(error.value), error.value


def test_the_proof_refuses_what_is_not_ours(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        prove([f"reward={{function: model, args: {{path: {folder}}}}}"])
    assert "reward=model: its values are those of another program" in capsys.readouterr().err
