"""Says how likely a language model in Hugging Face's form finds the tokens of a batch."""

from typing import Any

import numpy as np

from rl.hosted.loading import digest_of, loaded, placed
from trainer.batch import Batch

_ROWS = 512  # whose logits are in float32 at the same time


class LanguageModel:
    """Holds a reference or a teacher that the exact kernels do not serve, in the dtype that is stored."""

    def __init__(self, path: str, device_map: Any, threads: int = 1) -> None:
        """ValueError, in one line, for a folder that is none of such a model. `device_map`: of accelerate; `threads`: of torch,
        on a CPU."""
        import torch

        torch.set_num_threads(threads)
        self._path = path
        self._model, _, told = loaded("AutoModelForCausalLM", path, "auto", device_map)
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"{path} is no language model: it has no {', '.join(missing[:3])}")
        self.placed = placed(self._model)

    def digest(self) -> str:
        """Returns the SHA-256 of the files of its folder."""
        return digest_of(self._path)

    def logprobs(self, batch: Batch) -> np.ndarray:
        """Returns its log-probs of all loss rows of `batch`, float32 [R]: log softmax(logits / temperature) over its whole
        vocabulary, in float32. Each sequence is a forward pass of its own, so that no other one changes its bits. ValueError
        where one is not finite."""
        parts = [self._of_one(batch.take(i, i + 1)) for i in range(batch.sequences)]
        found = np.concatenate([np.zeros(0, np.float32), *parts])
        if len(bad := np.flatnonzero(~np.isfinite(found))):
            raise ValueError(f"{self._path} finds the log-prob of response token {bad[0]} to be {found[bad[0]]}")
        return found

    def _of_one(self, one: Batch) -> np.ndarray:
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(one.token_ids)[None].to(self._model.device)
            logits = self._model(input_ids=ids, use_cache=False).logits[0]
            heat = torch.from_numpy(one.temperatures).to(logits.device)
            rows = torch.from_numpy(one.rows).to(logits.device)
            chosen = ids[0].to(logits.device)[rows]
            parts = [
                torch.log_softmax(logits[rows[some] - 1].float() / heat[some, None], -1).gather(1, chosen[some, None])
                for some in (slice(i, i + _ROWS) for i in range(0, len(rows), _ROWS))
            ]
            return torch.cat([torch.zeros(0, 1), *(part.cpu() for part in parts)])[:, 0].numpy()
