"""A plan as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

from ..planner import GPUS, Estimate, HeadShape, Recommendation, predicted_seconds

_GIB = 1 << 30
_MUCH_LESS = 0.9  # of the recommended peak: a way that takes so little is named too


class Plan(NamedTuple):
    """What was asked, and the answer."""

    head: HeadShape
    tokens: int
    device: str
    memory: int | None
    gpu: str | None
    of_config: bool  # of Hugging Face, so that its models' lines of code are shown
    estimates: list[Estimate]
    recommendation: Recommendation


def as_text(plan: Plan) -> str:
    """Return the table, the recommendation, and the code of each row."""
    head = plan.head
    hidden_bytes = plan.tokens * head.hidden_size * head.dtype.itemsize
    lines = [
        f"Head and loss, forward + backward: N = {plan.tokens:,} tokens, "
        f"D = {head.hidden_size:,}, V = {head.vocab_size:,}, {_dtype(head)}, {plan.device}.",
        f"Peak on top of the weight ({_gib(head.weight_bytes)} GiB) and the hidden states "
        f"({_gib(hidden_bytes)} GiB); both gradients included.",
        "",
        *_table(plan),
        "",
        *_notes(plan),
        *_recommended(plan),
        "",
        *_code(plan),
    ]
    return "\n".join(lines)


def _table(plan: Plan) -> Iterator[str]:
    header = ["", "peak, GiB", "of eager's"]
    if plan.memory is not None:
        header.append("largest batch")
    if plan.gpu is not None:
        header.append("predicted, ms")
    rows = [header]
    for e in plan.estimates:
        share = e.peak_bytes / plan.estimates[0].peak_bytes
        row = [e.name, _gib(e.peak_bytes), f"{share:.0%}"]
        if e.largest_batch is not None:
            row.append(f"{e.largest_batch:,}")
        if plan.gpu is not None:
            row.append(f"{_milliseconds(plan, e):.1f}")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers in rows:
        cells = (n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))
        yield "  ".join((name.ljust(widths[0]), *cells)).rstrip()


def _notes(plan: Plan) -> Iterator[str]:
    if plan.memory is not None:
        yield (
            f"Largest batch: tokens that fit {_gib(plan.memory)} GiB with head and loss alone. "
            "Give --memory what the rest of the"
        )
        yield "model, its optimizer and its activations leave."
    if plan.gpu is not None:
        gpu = GPUS[plan.gpu]
        yield (
            f"Predicted: products and loss traffic at the peak rates of one {gpu.name} "
            f"({gpu.half_flops / 1e12:.0f} TFLOP/s in half"
        )
        yield (
            f"precision, {gpu.float32_flops / 1e12:.0f} in float32, "
            f"{gpu.bytes_per_second / 1e12:.2f} TB/s). Not measured; real kernels take longer."
        )
    if plan.memory is not None or plan.gpu is not None:
        yield ""


def _recommended(plan: Plan) -> Iterator[str]:
    chosen, reason = plan.recommendation
    if chosen is None:
        assert plan.memory is not None
        yield (
            f"No recommendation: {reason}. {_gib(plan.memory)} GiB are given, and the weight alone "
            f"takes {_gib(plan.head.weight_bytes)}."
        )
        return
    yield f"Recommended: {chosen.name}."
    yield f"Rule: {reason}."
    if chosen.fits is False:
        yield (
            f"{plan.tokens:,} tokens do not fit in {_gib(plan.memory or 0)} GiB; "
            f"{chosen.largest_batch:,} do."
        )
    for e in plan.estimates:
        if e.code and not e.default and e.peak_bytes < _MUCH_LESS * chosen.peak_bytes:
            price = "rounds the sums of the weight's gradient" if "acc_dtype" in e.code else ""
            price = price or "takes more time for its smaller chunks"
            yield f"Less memory: {e.name}, {_gib(e.peak_bytes)} GiB; it {price}."
    if "inplace_backward" in chosen.code:
        yield "It overwrites the logits in backward."


def _code(plan: Plan) -> Iterator[str]:
    chosen = plan.recommendation.estimate
    for_model = plan.of_config and chosen is not None and bool(chosen.huggingface)
    if for_model:
        assert chosen is not None
        yield "Use, for a model of transformers that trains with labels:"
        yield ""
        yield f"    {chosen.huggingface}"
        yield ""
        yield "In a training loop of your own:"
    elif chosen is not None:
        yield "Use:"
    if chosen is not None:
        yield ""
        yield f"    loss = {chosen.code}"
        yield ""
    yield "Code of every way. hidden [B, T, D] is what lm_head takes; with shift=True hidden[:, i]"
    yield "is scored against labels[:, i + 1]."
    yield ""
    for e in plan.estimates:
        if e.code:
            yield f"    {e.name}"
            if plan.of_config and e.huggingface:
                yield f"        {e.huggingface}"
            yield f"        loss = {e.code}"


def as_json(plan: Plan) -> str:
    """Return the plan as JSON: bytes, tokens and seconds."""
    head, (chosen, reason) = plan.head, plan.recommendation
    contents = {
        "tokens": plan.tokens,
        "device": plan.device,
        "memory_bytes": plan.memory,
        "gpu": plan.gpu,
        "head": head._asdict() | {"dtype": _dtype(head), "weight_bytes": head.weight_bytes},
        "ways": [_way_for_json(plan, e) for e in plan.estimates],
        "recommended": None if chosen is None else chosen.name,
        "reason": reason,
    }
    return json.dumps(contents, indent=1, allow_nan=False) + "\n"


def _way_for_json(plan: Plan, e: Estimate) -> dict[str, object]:
    seconds = None if plan.gpu is None else _milliseconds(plan, e) / 1e3
    texts = {"code": e.code or None, "huggingface": e.huggingface or None}
    return e._asdict() | texts | {"predicted_seconds": seconds}


def _milliseconds(plan: Plan, estimate: Estimate) -> float:
    assert plan.gpu is not None
    return 1e3 * predicted_seconds(estimate, plan.head.dtype, GPUS[plan.gpu])


def _dtype(head: HeadShape) -> str:
    return str(head.dtype).removeprefix("torch.")


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"
