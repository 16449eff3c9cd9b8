"""Text for train_gpt.py: documents, a tokenizer, and windows of tokens.

A document is <|endoftext|> text <|endoftext|>, cut into windows of `context` tokens. The target of
a position is the next token of the document. It is -100 where the last window is padded, so every
token of the text, and its end, is scored once.
"""

from __future__ import annotations

import random
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
IGNORE = -100
# `encodings` holds tables of code points, which are not text either.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
HELD_OUT_EVERY = 20


class InputError(Exception):
    """The user gave something that cannot work. The message is one line."""


class Windows(NamedTuple):
    inputs: Tensor  # [W, context]
    targets: Tensor  # [W, context]

    @property
    def tokens(self) -> int:
        return int((self.targets != IGNORE).sum())


def read_documents(paths: Sequence[Path]) -> list[str]:
    """Read one document from each file, or Python's standard library if there are no files."""
    return [read_text(path) for path in paths] or standard_library()


def read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        problem = error.strerror
    except UnicodeDecodeError:
        problem = "not UTF-8"
    else:
        if text and "\0" not in text:
            return text
        problem = "binary" if text else "empty"
    raise InputError(f"argument --text: {path}: {problem}; expected a file of UTF-8 text")


def standard_library() -> list[str]:
    """Read Python's own source, in the order of the files' names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    wanted = [name for name in names if SKIPPED_FOLDERS.isdisjoint(name.split("/"))]
    documents = [(root / name).read_text("utf-8", "replace") for name in wanted]
    return [text for text in documents if text]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return (training, held out): every 20th document, at least one; of one document its end."""
    if len(documents) == 1:
        (text,) = documents
        cut = len(text) - max(1, len(text) // HELD_OUT_EVERY)
        return [text[:cut]], [text[cut:]]
    every = min(HELD_OUT_EVERY, len(documents))
    training = [text for i, text in enumerate(documents, 1) if i % every]
    return training, documents[every - 1 :: every]


def choose(documents: list[str], budget: int) -> list[str]:
    """Draw documents until they have `budget` UTF-8 bytes. The draw is the same in every run."""
    chosen: list[int] = []
    for i in random.Random(0).sample(range(len(documents)), len(documents)):
        if budget <= 0:
            break
        chosen.append(i)
        budget -= len(documents[i].encode())
    return [documents[i] for i in sorted(chosen)]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: it can write any text, and a token is a known number of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def cut_into_windows(documents: list[str], tokenizer: Tokenizer, context: int) -> Windows:
    """Return windows padded on the right, which causal attention does not see."""
    tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> does not end there
    end = tokenizer.token_to_id(END)
    inputs, targets = [], []
    for encoding in tokenizer.encode_batch_fast(documents):
        tokens = torch.tensor([end, *encoding.ids, end])
        padding = (0, -(len(tokens) - 1) % context)
        inputs.append(F.pad(tokens[:-1], padding, value=end).view(-1, context))
        targets.append(F.pad(tokens[1:], padding, value=IGNORE).view(-1, context))
    windows = Windows(torch.cat(inputs), torch.cat(targets))
    longest = int((windows.targets != IGNORE).sum(1).max())
    if longest < context:
        raise InputError(
            f"argument --context: {context} is longer than the longest training document, "
            f"{longest} tokens; give longer text or a shorter context"
        )
    return windows


def for_transformers(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context,
        split_special_tokens=True,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END),
    )


def save_texts(folder: Path, documents: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # those of a run before may be more
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
