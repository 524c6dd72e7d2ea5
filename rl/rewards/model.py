"""Rewards the score of a reward model in Hugging Face's form (AutoModelForSequenceClassification)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


class RewardModel:
    """Scores completions after their prompts: the logit of one label, in the model's own arithmetic.

    It is loaded once, in the one process that then judges (`rl.rewards.reward`), by transformers and, with `device_map`, placed
    by accelerate. Its sums are torch's: another machine, another library or other threads may give other last bits, and where a
    score decides what is trained on, the run's hash is as good as that.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "auto",
        max_length: int = 4096,
        device_map: Any = None,
        label: int = 0,
        batch: int = 8,
        threads: int = 1,
    ) -> None:
        """ValueError, in one line, for a folder that is none of such a model.

        path        a Hugging Face model directory, or a name on the hub
        dtype       float32, bfloat16, float16; auto: as stored
        max_length  tokens of prompt and completion; the start of a longer text is cut off
        device_map  as of transformers ("auto", "cuda:1", {...}), which needs accelerate; null: the CPU
        label       which logit of several
        batch       texts of one forward pass, of one problem, padded to one length
        threads     of torch, on a CPU
        """
        import torch

        if max_length < 1 or batch < 1 or threads < 1:
            raise ValueError(f"max_length={max_length}, batch={batch}, threads={threads}: each must be at least 1")
        torch.set_num_threads(threads)
        self._model, self._words = _loaded(path, dtype, device_map)
        labels = self._model.config.num_labels
        if not 0 <= label < labels:
            raise ValueError(f"label={label}: {path} has {labels} label(s), numbered from 0")
        self._max, self._label, self._batch = max_length, label, batch
        if self._words.pad_token is None:
            self._words.pad_token = self._words.eos_token
        self._words.truncation_side, self._words.padding_side = "left", "right"
        if self._words.pad_token is not None:  # which token of a padded text is its last
            self._model.config.pad_token_id = self._words.pad_token_id
        else:
            self._batch = 1

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        trainer_state: None,
        log_metric: Callable[..., None],
        log_extra: Callable[..., None],
    ) -> list[float]:
        """Returns the scores of the completions of one problem, as TRL calls for them. A conversation is written by the chat
        template of the reward model."""
        import torch

        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for first in range(0, len(texts), self._batch):
            part = self._encoded(texts[first : first + self._batch])
            with torch.inference_mode():
                logits = self._model(**part.to(self._model.device)).logits
            scores += logits[:, self._label].float().tolist()
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + str(completion)
        if self._words.chat_template is None:
            raise ValueError("the prompt is a conversation, and the tokenizer of the reward model has no chat template")
        return str(self._words.apply_chat_template([*prompt, *completion], tokenize=False))

    def _encoded(self, texts: list[str]) -> Any:
        how: dict[str, Any] = {"truncation": True, "max_length": self._max, "return_tensors": "pt"}
        return self._words(texts, padding=len(texts) > 1, **how)


def _loaded(path: str, dtype: str, device_map: Any) -> tuple[Any, Any]:
    """Loads the model and its tokenizer. A language model without a head for scores is refused: its head would be random."""
    import torch
    import transformers

    known = ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise ValueError(f"dtype={dtype}: must be one of {', '.join(known)}")
    folder = str(Path(path).expanduser())
    if (("/" in path and path.count("/") > 1) or path.startswith((".", "~"))) and not Path(folder).is_dir():
        raise ValueError(f"{path} is no folder")
    transformers.logging.set_verbosity_error()
    asked = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "output_loading_info": True}
    if device_map is not None:
        asked["device_map"] = device_map
    try:
        model, told = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **asked)
        words = transformers.AutoTokenizer.from_pretrained(folder)
    except ImportError as error:
        raise ValueError(
            f"device_map={device_map} needs accelerate: pip install accelerate ({_short(error)})"
        ) from None
    except Exception as error:  # of several libraries, for what the folder lacks
        raise ValueError(f"{path} is no reward model that transformers loads: {_short(error)}") from None
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"{path} is no reward model: it has no {', '.join(missing[:3])} (a language model has no such head)"
        )
    return model.eval(), words


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
