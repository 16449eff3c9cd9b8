"""Every causal language model of transformers: loss, gradients and perplexity against its own.

    python -m bench architectures --csv architectures.csv       some ten minutes on a CPU
    python -m bench architectures --only llama gpt2

Each with a small configuration and random weights, in float32 and without dropout. The loss's
difference is relative, a gradient's to the largest of its parameter; the perplexity's is from exp
of the mean of float64 losses of the model's own logits. What cannot be built is listed with the
reason. Each model is tried in a process of its own, which a failure or SECONDS end.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

import chunked_ce
from chunked_ce.huggingface import enable

from . import options
from .huggingface import largest_difference, step
from .records import Table, one_line

VOCAB, LENGTH, SECONDS, LARGEST = 211, 24, 60, 30_000_000
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, d_model=32, n_embd=32, intermediate_size=48, ffn_dim=48,
    d_ff=48, n_inner=48, num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, decoder_layers=2,
    encoder_layers=1, num_attention_heads=4, n_head=4, n_heads=4, num_heads=4,
    decoder_attention_heads=4, encoder_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, n_positions=64, word_embed_proj_dim=32, num_local_experts=2,
    num_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    decoder_ffn_dim=48, encoder_ffn_dim=48, embedding_size=32, rotary_dim=4, kv_lora_rank=16,
    q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    n_group=1, topk_group=1, n_shared_experts=1, shared_expert_intermediate_size=32,
    dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    attn_pdrop=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layerdrop=0.0,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, is_decoder=True, use_cache=False,
)  # fmt: skip


class Result(NamedTuple):
    """Of one architecture; differences are empty where it could not be built or run."""

    model_type: str
    status: str  # same, different, failed, own loss (`enable` refuses it), not causal, not built
    loss: float | str = ""
    gradient: float | str = ""
    perplexity: float | str = ""
    logits_stored: bool | str = ""
    reason: str = ""


def small_config(config_class: Any) -> Any:
    """Return the default configuration with SMALL sizes, and lists of an entry per layer cut."""
    default = config_class()
    values = {k: v for k, v in SMALL.items() if hasattr(default, k)}
    for key in list(values):
        if getattr(getattr(config_class, key, None), "fset", 0) is None:  # a property that is read
            del values[key]
    if "qk_rope_head_dim" in values:  # the head's size is made of these
        values.pop("head_dim", None)
    layers = getattr(default, "num_hidden_layers", None)
    for key, value in vars(default).items():
        if isinstance(value, list) and len(value) == layers and not key.startswith("_"):
            values[key] = value[:2]
    for name, kind in (getattr(config_class, "sub_configs", None) or {}).items():
        if name == "text_config" and hasattr(kind, "model_type"):
            values[name] = small_config(kind).to_dict()
    return config_class(**values)


def build(model_type: str) -> Any:
    """Return a small model with random weights, in training."""
    name = NAMES[model_type]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    config = small_config(model_class.config_class)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters with a small configuration")
    torch.manual_seed(0)
    return model_class(config).float().train()


@torch.no_grad()
def mean_nll(model: Any, ids: Tensor) -> float:
    """Return the mean loss of the model's own logits, a row at a time."""
    losses = [
        F.cross_entropy(model(input_ids=row[None]).logits[0, :-1].double(), row[1:]) for row in ids
    ]
    return float(sum(losses) / len(losses))


def compare(model_type: str) -> Result:
    try:
        model = build(model_type)
        ids = torch.randint(3, VOCAB, (2, LENGTH))
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
        inputs = dict(input_ids=ids, labels=labels)
        expected, gradients, _ = step(model, inputs)
    except Exception as error:  # of any model, for any reason
        return Result(model_type, "not built", reason=one_line(error, 180))
    try:
        loss_apart, gradient_apart, reason = of_training(model, inputs, expected, gradients)
        model.eval()
        report = chunked_ce.evaluate_perplexity(model, ids, context_length=LENGTH)
        perplexity = abs(report.perplexity / math.exp(mean_nll(model, ids)) - 1)
    except Exception as error:
        status = "not causal" if "model is not causal" in str(error) else "failed"
        return Result(model_type, status, reason=one_line(error, 180))
    same = perplexity < 1e-5 and (reason or loss_apart < 1e-5 and gradient_apart < 1e-3)
    status = "different" if not same else "own loss" if reason else "same"
    training: tuple[Any, Any] = ("", "") if reason else (loss_apart, gradient_apart)
    return Result(model_type, status, *training, perplexity, report.logits_stored, reason)


def of_training(
    model: Any, inputs: dict[str, Tensor], expected: Tensor, gradients: dict[str, Tensor]
) -> tuple[float, float, str]:
    """Return the differences of loss and gradients, and why `enable` refuses the model or ""."""
    try:
        handle = enable(model)
    except ValueError as error:
        return 0.0, 0.0, one_line(error, 180)
    loss, ours, _ = step(model, inputs)
    handle.disable()
    return abs(float(loss / expected) - 1), largest_difference(ours, gradients), ""


def _child(model_type: str, results: Any) -> None:
    signal.alarm(SECONDS)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results.send(compare(model_type))


def measure_difference(model_type: str) -> Result:
    """Run `compare` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, send))
    process.start()
    send.close()
    try:
        result: Result = receive.recv()
    except EOFError:
        process.join()
        result = Result(model_type, "not built", reason=f"ended with {process.exitcode}")
    process.join()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where a model differs or fails."""
    parser = options.parser_of("architectures", __doc__)
    parser.add_argument("--only", nargs="+", choices=sorted(NAMES), default=list(NAMES))
    options.add_csv(parser)
    args = parser.parse_args(arguments)
    table, counts = Table(args.csv, Result._fields), Counter[str]()
    for model_type in args.only:
        result = measure_difference(model_type)
        counts[result.status] += 1
        table.add(**result._asdict())
        print(*("" if v == "" else f"{v:.1e}" if isinstance(v, float) else v for v in result))
    table.close()
    for status in ("same", "own loss", "not causal", "different", "failed", "not built"):
        print(f"{counts[status]} {status}")
    return int(counts["different"] + counts["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
