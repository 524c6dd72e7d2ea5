"""Rewards the score of a reward model in Hugging Face's form (AutoModelForSequenceClassification)."""

from typing import Any

from rl.hosted.loading import loaded, placed


class RewardModel:
    """Scores completions after their prompts: the logit of one label, in the model's own arithmetic.

    It is loaded once, by transformers: in the one process that then judges (`rl.rewards.reward`) or, placed by `device_map`, in
    an actor of the run (`rl.cluster.hosted`). Its sums are torch's: another machine, another library or other threads may give
    other last bits, and where a score decides what is trained on, the run's hash is as good as that.
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
        self._model, self._words, told = loaded("AutoModelForSequenceClassification", path, dtype, device_map)
        if missing := sorted(told["missing_keys"]):  # its head would be random
            raise ValueError(
                f"{path} is no reward model: it has no {', '.join(missing[:3])} (a language model has no such head)"
            )
        self.placed = placed(self._model)
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

    def __call__(self, prompts: list[Any], completions: list[Any]) -> list[float]:
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
