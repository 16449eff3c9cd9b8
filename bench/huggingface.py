"""Causal language models of transformers: their loss and gradients with ours in its place.

    python -m bench huggingface                      a table, a minute on a CPU
    python -m bench huggingface --only Llama Gemma2 --csv models.csv

Each architecture with a small configuration and random weights, in float32. The differences from
transformers' own loss, relative to the loss and to the largest gradient of each parameter; and how
many tensors of the logits' size a training step makes, outside of the loss's own chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunked_ce.huggingface import causal_lm_loss, enable

from . import options
from .records import Table

VOCAB, WIDTH, BATCH, LENGTH = 211, 16, 3, 24
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=32,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_GROUPED = _COMMON | dict(num_key_value_heads=1, head_dim=8)
_GPT = dict(vocab_size=VOCAB, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("GPT2LMHeadModel", _GPT),
    "Llama": ("LlamaForCausalLM", _GROUPED),
    "Mistral": ("MistralForCausalLM", _GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "Gemma2": ("Gemma2ForCausalLM", _GROUPED | dict(final_logit_softcapping=3.0)),
    "Gemma3": ("Gemma3ForCausalLM", _GROUPED),
    "Granite": ("GraniteForCausalLM", _GROUPED | dict(logits_scaling=3.0)),
    "Cohere": ("CohereForCausalLM", _GROUPED | dict(logit_scale=0.25)),
    "Phi": ("PhiForCausalLM", _COMMON),
    "Phi3": ("Phi3ForCausalLM", _COMMON),
    "GPTNeoX": ("GPTNeoXForCausalLM", _COMMON),
    "OPT": ("OPTForCausalLM", _COMMON | dict(ffn_dim=24, word_embed_proj_dim=WIDTH)),
    "OLMo2": ("Olmo2ForCausalLM", _GROUPED),
    "Mamba": ("MambaForCausalLM", _COMMON),
    "Mixtral": ("MixtralForCausalLM", _GROUPED | dict(num_local_experts=2)),
    "Falcon": ("FalconForCausalLM", _COMMON),
    "Starcoder2": ("Starcoder2ForCausalLM", _GROUPED),
    "GPTJ": ("GPTJForCausalLM", _GPT | dict(rotary_dim=4)),
    "HyperCLOVAX": ("HyperCLOVAXForCausalLM", _GROUPED | dict(logits_scaling=0.5)),
}  # fmt: skip


class Difference(NamedTuple):
    """Of one way of computing the loss from transformers' own."""

    model: str
    way: str
    loss: float
    gradient: float
    tensors: int


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of an architecture with random weights, in training."""
    kind, options = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**options)).to(dtype).train()


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Return token ids with labels. Some labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    return dict(input_ids=ids, labels=labels)


class LogitsMade(TorchDispatchMode):
    """Counts new tensors [..., V] of at least as many elements as the logits, less the last."""

    def __init__(self, rows: int = BATCH) -> None:
        super().__init__()
        self.least = rows * (LENGTH - 1) * VOCAB
        self.count = 0
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        old = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.numel() >= self.least:
                if VOCAB in t.shape[-1:] and _address(t) not in old:
                    self.count += 1
                    self.dtypes.add(t.dtype)
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def step(
    model: Any, inputs: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return the loss, the gradients, and how many tensors of the logits' size were made."""
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    with LogitsMade() as made:
        loss = model(**(inputs or batch())).loss
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, made.count


def differences(name: str) -> list[Difference]:
    """Return transformers' own row, 0 but for the tensors, and the rows of both of ours."""
    model = build(name)
    expected, gradients, made = step(model)
    found = [Difference(name, "transformers", 0.0, 0.0, made)]
    for way, use in (("causal_lm_loss", _with_loss), ("enable", enable)):
        undo = use(model)
        loss, ours, made = step(model)
        undo.disable()
        difference = largest_difference(ours, gradients)
        found.append(Difference(name, way, float(abs(loss / expected - 1)), difference, made))
    return found


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference, relative to its parameter's largest gradient.

    A thousandth of the largest of all at least: what cancels exactly (a key's bias) is noise.
    """
    assert {n for n, g in ours.items() if g is None} == {n for n, g in theirs.items() if g is None}
    grads = {n: g for n, g in theirs.items() if g is not None}
    floor = 1e-3 * max(float(g.abs().max()) for g in grads.values())
    return max(
        float((ours[n] - g).abs().max()) / max(float(g.abs().max()), floor)
        for n, g in grads.items()
    )


class _with_loss:
    def __init__(self, model: Any) -> None:
        self.model, model.loss_function = model, causal_lm_loss

    def disable(self) -> None:
        del self.model._loss_function


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser_of("huggingface", __doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    options.add_csv(parser)
    args = parser.parse_args(arguments)
    table = Table(args.csv, Difference._fields)
    print(f"{'':14}{'':16}{'loss':>10}{'gradients':>11}{'logits made':>13}")
    for name in args.only:
        for row in differences(name):
            table.add(**row._asdict())
            print(f"{row.model:14}{row.way:16}{row.loss:10.1e}{row.gradient:11.1e}{row.tensors:13}")
    table.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
