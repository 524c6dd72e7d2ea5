"""A model directory whose tokenizer has a chat template with tools."""

from dataclasses import replace
from pathlib import Path

from kernels.weights.files import save
from rl.data.tokenizer import byte_level_bpe
from tests.model.shapes import TINY, random_weights
from tests.rl.environments.test_turns import QWEN, TEXTS

CALLS = QWEN.replace(
    "{%- else %}{{ message.role }}:\n{{ message.content }}",
    "{%- else %}{{ message.role }}:\n{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}",
)
"""Which writes calls, too."""


def chat_folder(path: Path, max_positions: int = 1024) -> Path:
    """Writes a directory: random weights of the tiny shape, and a tokenizer of bytes."""
    tokenizer = byte_level_bpe([*TEXTS, "<tool_call> </tool_call>"], 480, CALLS)
    config = replace(TINY, vocab_size=480, max_positions=max_positions)
    save(config, random_weights(config), path)
    for name, content in tokenizer.files.items():
        (path / name).write_bytes(content)
    return path
