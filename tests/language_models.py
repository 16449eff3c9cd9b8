"""Small causal language models and a tokenizer, made here: nothing is downloaded."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 300
TINY_VOCAB, PADDED_VOCAB = 150, 160
CONTEXT = 32
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=CONTEXT,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
END = "<|endoftext|>"
TEXTS = [
    "The cat sat on the mat, naïvely → and sat there for a while; then it left the mat.\n" * 3,
    "A short one.",
    "def windows(lengths, context):\n    return [length // context for length in lengths]\n" * 5,
]


def causal_lm(family: str = "GPT2", **config: Any) -> Any:
    """Random weights, and a head large enough that its losses differ from log V."""
    import transformers

    torch.manual_seed(1)
    settings = getattr(transformers, f"{family}Config")(**{**SIZES, **config})
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


class Tiny(nn.Module):
    """A model of one file without transformers, whose `transform` is given the head's logits.

    `strike`: (at which call, what) to raise.
    """

    def __init__(self, transform: Any = lambda z: z, head: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mlp = nn.Embedding(PADDED_VOCAB, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, PADDED_VOCAB) if head is None else head
        self.transform, self.calls, self.strike = transform, 0, None  # type: ignore[var-annotated]

    def forward(self, ids: Tensor) -> Any:
        if self.strike:
            self.calls += 1
            if self.calls == self.strike[0]:
                raise self.strike[1]
        return self.transform(self.head(self.mlp(self.table(ids)).tanh() * 4))


def byte_tokenizer() -> Any:
    """Byte-level BPE of 300 tokens, its end of text the beginning too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def tokenizer_with_bos() -> Any:
    """Return the same, which puts its end of text before each text by itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.bos_token_id)]
    )
    return tokenizer


@torch.no_grad()
def brute_force(model: Any, ids: Tensor, context: int, stride: int) -> float:
    """The ten-line loop: one window at a time, stock cross-entropy in fp64, each target once."""
    total, done, start = 0.0, 0, 0
    while done < len(ids) - 1:
        stop = min(start + context, len(ids) - 1)
        logits = model(ids[None, start:stop]).logits[0].double()
        losses = F.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="none")
        total += losses[done - start :].sum().item()
        start, done = start + stride, stop
    return total


@torch.no_grad()
def windows_nll(model: Any, ids: Tensor, context: int) -> float:
    """NLL of disjoint windows of a model that returns logits, stock cross-entropy in fp64."""
    total = 0.0
    for start in range(0, len(ids) - 1, context):
        target = ids[start + 1 : start + context + 1]
        logits = model(ids[None, start : start + len(target)])[0].double()
        total += F.cross_entropy(logits, target, reduction="sum").item()
    return total
