"""Train a small student on the predictions of the model that `make train` saved.

    make train                                      # the teacher: runs/train_gpt/model
    python examples/distill.py                      # some minutes on two CPU cores
    python examples/distill.py --teacher runs/tolstoy/model --text war.txt peace.txt
    python examples/distill.py --kind jsd --beta 0.5 --temperature 2 --cross-entropy-weight 0.5

`chunked_ce.huggingface.distill(student, teacher)` makes `student(input_ids=..., labels=...)` return
the divergence of the student from the teacher. Neither model's logits exist; the hidden sizes
differ. The student has the teacher's tokenizer, half its width and one layer.

Prints the loss, the student's perplexity on held-out text before and after beside the teacher's,
and the peak memory and the time of the loss beside eager: `F.kl_div` of two log-softmaxes. The
student is saved in runs/<name>/model.

Bad input is one line on stderr and exits with 2; Ctrl-C exits with 130.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import machine
import text_data
import torch
import torch.nn.functional as F
import transformers
from text_data import IGNORE, InputError, Windows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import chunked_ce
from chunked_ce.huggingface import distill

LINE_EVERY = 25  # steps
VALIDATION_BYTES = 1 << 16
CHUNK_BYTES = 16 << 20  # the default would hold all of this small batch's logits


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else minimum - 1
        if value < minimum:
            expected = f"expected an integer of at least {minimum}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
        return value

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="distill",
        description="Train a small student on a teacher's predictions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--teacher", type=Path, default=Path("runs/train_gpt/model"), metavar="DIR",
        help="model and tokenizer, as train_gpt.py or save_pretrained writes them")  # fmt: skip
    add("--steps", type=at_least(1), default=300, metavar="N", help="updates of the student")
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="windows per step")
    add("--layers", type=at_least(1), default=1, metavar="N", help="of the student")
    add("--width", type=at_least(2), default=128, metavar="N", help="of the student")
    add("--heads", type=at_least(1), default=4, metavar="N", help="of the student")
    add("--lr", type=float, default=2e-3, help="learning rate")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of weights and batches")
    add("--kind", default="forward", choices=("forward", "reverse", "jsd"), help="divergence")
    add("--beta", type=float, default=0.5, help="the teacher's share of the mixture of jsd")
    add("--temperature", type=float, default=1.0, help="of both models")
    add("--cross-entropy-weight", type=float, default=0.0, help="of the text itself")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE",
        help="UTF-8 text (default: Python's standard library)")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--name", default="distill", help="folder of this run")
    add("--out", type=Path, default=Path("runs"), help="folder of all runs")
    args = parser.parse_args(argv)
    if not 0 < args.lr < math.inf:
        raise InputError(f"argument --lr: expected a positive number, got {args.lr}")
    if args.width % args.heads:
        raise InputError(f"argument --width: expected a multiple of {args.heads}, got {args.width}")
    return args


def load_teacher(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Return the teacher and its tokenizer."""
    if not (folder / "config.json").exists():
        raise InputError(
            f"argument --teacher: there is no model in {folder}; run `make train` first, which "
            "saves one in runs/train_gpt/model, or give the folder of another"
        )
    teacher: Any
    try:
        teacher = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"argument --teacher: {folder} cannot be loaded: {said}") from error
    if getattr(tokenizer, "eos_token_id", None) is None or not hasattr(
        tokenizer, "backend_tokenizer"
    ):
        raise InputError(
            f"argument --teacher: the tokenizer of {folder} has no end of text or is not a fast "
            "one; give a model that train_gpt.py saved"
        )
    return teacher.to(device), tokenizer


def windows_of(documents: list[str], tokenizer: Any, context: int) -> Windows:
    """Return inputs and the next tokens, cut as `train_gpt.py` cuts them."""
    backend = tokenizer.backend_tokenizer
    if backend.token_to_id(text_data.END) is None:
        raise InputError(
            f"argument --teacher: its tokenizer has no {text_data.END}; give a model that "
            "train_gpt.py saved"
        )
    return text_data.cut_into_windows(documents, backend, context)


def perplexity(model: Any, documents: list[str], tokenizer: Any, context: int) -> float:
    report = chunked_ce.evaluate_perplexity(
        model, text=documents, tokenizer=tokenizer, bos=True, eos=True, context_length=context,
        progress=False,
    )  # fmt: skip
    return float(report.perplexity)


def labels_of(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return labels that the model shifts itself: those of position 0 are not read.

    The last position's target has no input after it, so this token is not learned.
    """
    return torch.cat([torch.full_like(inputs[:, :1], IGNORE), targets[:, :-1]], 1)


def train(student: Any, windows: Windows, args: argparse.Namespace) -> list[float]:
    """Return the loss of each step. `student` is being distilled already."""
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, betas=(0.9, 0.95))
    generator, losses = torch.Generator().manual_seed(args.seed), []
    student.train()
    for step in range(1, args.steps + 1):
        rows = torch.randint(len(windows.inputs), (args.batch_size,), generator=generator)
        inputs, targets = (tensor[rows].to(args.device) for tensor in windows)
        loss = student(input_ids=inputs, labels=labels_of(inputs, targets)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise InputError(f"argument --lr: the loss became {losses[-1]}; give less")
        if step % LINE_EVERY == 0 or step in (1, args.steps):
            print(f"step {step} of {args.steps}: loss {losses[-1]:.4f}", flush=True)
    return losses


# The loss alone, beside eager


def hidden_states(model: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a GPT-2's hidden states and head, in the graph of nothing."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    return hidden.detach(), model.get_output_embeddings().weight.detach()


def ours(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return chunked_ce.linear_kl_div(*student, *teacher, target=target, chunk_bytes=CHUNK_BYTES)


def eager(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    log_p, log_q = ((hidden @ w.T).log_softmax(-1) for hidden, w in (student, teacher))
    loss = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    scored = target != IGNORE
    return loss.masked_fill(~scored, 0.0).sum() / scored.sum()


def compare(student: Any, teacher: Any, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """Measure the loss and its gradients, and print them beside eager's."""
    leaves, fixed = hidden_states(student, inputs), hidden_states(teacher, inputs)
    for leaf in leaves:
        leaf.requires_grad_()

    def step(loss: Callable[..., Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(leaves, fixed, targets)
        return value.detach(), torch.autograd.grad(value, leaves)

    calls = {"eager": partial(step, eager), "linear_kl_div": partial(step, ours)}
    (one, theirs), (two, grads) = calls["eager"](), calls["linear_kl_div"]()
    seconds = machine.seconds_in_turns(calls, inputs.device)
    memory = {name: machine.extra_bytes(call, inputs.device) for name, call in calls.items()}
    pairs = zip(grads, theirs, strict=True)
    found = {
        "loss_difference": float((one - two).abs()),
        "gradient_difference": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        "seconds": seconds,
        "extra_bytes": memory,
    }
    size = f"{targets.numel()} tokens, {leaves[1].shape[0]} classes"
    print(f"the loss and its gradients alone, {size}, on {machine.device_name(inputs.device)}:")
    for name in calls:
        extra = memory[name]
        said = "not measured" if extra is None else f"{extra / 2**20:.0f} MiB"
        print(f"{name:16}{seconds[name]!s:>24}, peak extra memory {said}")
    print(f"difference of the losses {found['loss_difference']:.1e}, of the gradients "
          f"{found['gradient_difference']:.1e} of the largest")  # fmt: skip
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = machine.usable_device(args.device)
    machine.make_repeatable(args.seed, device)
    teacher, tokenizer = load_teacher(args.teacher, device)
    context = teacher.config.n_positions if hasattr(teacher.config, "n_positions") else 128
    documents, held_out = text_data.split(text_data.read_documents(args.text))
    scored = text_data.choose(held_out, VALIDATION_BYTES)
    windows = windows_of(documents, tokenizer, context)
    config = GPT2Config(
        vocab_size=teacher.config.vocab_size, n_positions=context, n_layer=args.layers,
        n_head=args.heads, n_embd=args.width, bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with device:
        student = GPT2LMHeadModel(config)
    print(f"teacher {teacher.num_parameters():,} parameters, student {student.num_parameters():,}")
    score = partial(perplexity, documents=scored, tokenizer=tokenizer, context=context)
    before, of_teacher = score(student), score(teacher)
    try:
        handle = distill(
            student, teacher, kind=args.kind, beta=args.beta, temperature=args.temperature,
            cross_entropy_weight=args.cross_entropy_weight,
        )  # fmt: skip
    except ValueError as error:  # the options of the loss
        raise InputError(str(error)) from error
    with handle:
        losses = train(student, windows, args)
        print(handle)
    after = score(student)
    print(f"perplexity on held-out text: student {before:.1f} before, {after:.1f} after; "
          f"teacher {of_teacher:.1f}")  # fmt: skip
    batch = [tensor[: args.batch_size].to(device) for tensor in windows]
    found = compare(student, teacher, *batch)
    folder = args.out / args.name / "model"
    transformers.utils.logging.disable_progress_bar()
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"student saved in {folder}")
    return found | {"losses": losses, "before": before, "after": after, "teacher": of_teacher}


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse_arguments(argv))
        return 0
    except InputError as error:
        print(f"distill: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distill: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
