"""Model directories that say much of tokens, as the hub has them."""

import json
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kernels.model import ModelConfig
from kernels.weights.files import save
from tests.model.shapes import TINY, random_weights

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BEGIN, END, TURN, PAD = 256, 257, 258, 259
SPECIAL = ("<s>", "</s>", "<|turn|>", "<pad>")
CHAT = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}<|turn|>"
ENDS = (END, TURN)
CONFIG = replace(TINY, vocab_size=321, heads=8, kv_heads=8, intermediate_size=128, leaves=8)
"""A vocabulary that no number of leaves above one divides."""


def begin_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes; its post-processor writes a begin of text."""
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(BYTES)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|turn|>"],
        padding_side="left",
        chat_template=CHAT,
    )


def write_folder(path: Path, config: ModelConfig = CONFIG) -> Path:
    """A directory as of another framework: no contract; two ends, one of which generation_config.json alone says."""
    path.mkdir(parents=True, exist_ok=True)
    save(config, random_weights(config), path)
    begin_tokenizer().save_pretrained(path)
    fields = json.loads((path / "config.json").read_text())
    del fields["samebit"]
    fields |= {"bos_token_id": BEGIN, "eos_token_id": END, "use_cache": True, "transformers_version": "4.51.0"}
    (path / "config.json").write_text(json.dumps(fields))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [TURN, END], "temperature": 0.6}))
    return path
