"""Tokenizers: the model's own, or one made from the data."""

import re
from collections.abc import Iterable, Iterator

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from kernels.weights.folder import ModelFolder
from rl.errors import UserError
from rollout.tokenizer import Tokenizer

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_UNBROKEN = re.compile(r"\w{1000}|\s{1000}|[^\w\s]{1000}")  # training on a word takes the square of its length


def from_model(path: str) -> Tokenizer:
    """Reads the tokenizer of a model directory; UserError where it has none, or none of its ids ends a text."""
    tokenizer = Tokenizer.of(ModelFolder(path))
    if tokenizer is None:
        raise UserError(f"model.path={path} holds no tokenizer (tokenizer.json)")
    if tokenizer.end is None:
        raise UserError(
            f"model.path={path}: neither its tokenizer nor its configs name an eos token, which ends a completion"
        )
    return tokenizer


def of_characters(texts: Iterable[str]) -> Tokenizer:
    """Makes one token for each character that occurs in `texts`, in code-point order."""
    characters = sorted({c for text in texts for c in text})
    vocabulary = {token: i for i, token in enumerate((PAD, EOS, UNKNOWN, *characters))}
    tokenizer = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def byte_level_bpe(texts: Iterable[str], vocab_size: int, chat_template: str | None = None) -> Tokenizer:
    """Trains byte-level BPE (Sennrich et al. 2016, over bytes) on `texts`: no text is unknown to it. Whoever loads the trained
    model finds the chat template too."""
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return _wrap(tokenizer, chat_template)


def _pieces(text: str) -> Iterator[str]:
    """`text`, cut where a word does not end."""
    start = 0
    for run in _UNBROKEN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _wrap(tokenizer: Backend, chat_template: str | None = None) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    unknown = {"unk_token": UNKNOWN} if tokenizer.token_to_id(UNKNOWN) is not None else {}
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left", **unknown
    )
    words.chat_template = chat_template
    return Tokenizer(words)
