"""Trains a small GPT-2 with chunked_ce's loss, on Python's own source unless given other text.

    python examples/train_gpt.py                    # minutes on two CPU cores; uses a CUDA GPU
    python examples/train_gpt.py --fused            # the lm_head and the loss in one
    python examples/train_gpt.py --fused --compile  # model and loss through torch.compile
    python examples/train_gpt.py --text war.txt peace.txt --steps 1000 --name tolstoy
    python examples/train_gpt.py --layers 12 --heads 12 --width 768 --context 1024 --dtype bfloat16

Writes to runs/<name>/:

    metrics.csv   loss, perplexity, learning rate and tokens per second of every step
    loss.png      the loss against the step
    report.json   arguments, versions, losses, validation, comparison with torch's cross-entropy
    model/        model and tokenizer for transformers' from_pretrained
    held_out/     the text of the validation; `chunked-ce perplexity runs/<name>/model --bos yes
                  --eos yes --text runs/<name>/held_out/*` scores it again

A document is <|endoftext|> text <|endoftext|>, cut into windows of --context tokens. A target is
the next token of the same document, -100 where the last window is padded: every token of the text,
and its end, is scored once. Bits per byte divide the bits of the scored tokens by the UTF-8 bytes
of the text; its end is scored and has no bytes. Of much held-out text some documents are scored.

Ctrl-C saves what there is and exits with 130. Bad input is one line on stderr and exits with 2.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import math
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, NoReturn

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

import chunked_ce

END = "<|endoftext|>"
IGNORE = -100
# `encodings` holds tables of code points, which are not text either.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
HELD_OUT_EVERY = 20
VALIDATION_TOKENS = 32768  # a few seconds on two CPU cores
AVERAGED_STEPS = 10
REPEATS = 9
BUSY_CORES = 0.2  # used by other programs: enough to be said

Call = Callable[[], object]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states, head, targets


class InputError(Exception):
    """The user gave something that cannot work. The message is one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class Step(NamedTuple):
    """A row of metrics.csv; the loss, in nats per token, is that before the step's update."""

    step: int
    loss: float
    perplexity: float
    lr: float
    tokens_per_second: float


@dataclass
class Results:
    """What there is to save, interrupted or not."""

    steps: list[Step] = field(default_factory=list)
    validation: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None
    interrupted: bool = False


# Arguments and text


def at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            expected = f"expected an integer of at least {minimum}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
        return value

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train_gpt",
        description="Trains a small GPT-2 with chunked_ce's loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=at_least(1), default=600)
    add("--batch-size", type=at_least(1), default=8, help="windows per step")
    add("--context", type=at_least(2), default=128, help="tokens per window")
    add("--vocab-size", type=at_least(258), default=16384, help="bytes, end of text and merges")
    add("--layers", type=at_least(1), default=2)
    add("--heads", type=at_least(1), default=4)
    add("--width", type=at_least(1), default=256)
    add("--fused", action="store_true", help="head and loss in one: no logits")
    add("--compile", action="store_true", help="model and loss in one graph of torch.compile")
    add("--lr", type=float, default=7e-4, help="highest learning rate")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    add("--seed", type=at_least(0), default=0)
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 text to train on")
    add("--name", default="train_gpt", help="folder of this run")
    add("--out", type=Path, default=Path("runs"), help="folder of all runs")
    args = parser.parse_args(argv)
    if not 0 < args.lr < math.inf:
        raise InputError(f"argument --lr: expected a positive number, got {args.lr}")
    if args.width % args.heads:
        raise InputError(f"argument --width: expected a multiple of {args.heads}, got {args.width}")
    return args


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros((), dtype=torch.float64, device=device).item()  # Perplexity sums in float64
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError(
            f"argument --device: {name!r} cannot be used here; expected cpu, or cuda with a GPU"
        ) from error
    return device


def make_repeatable(seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        text = data.decode()
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
    """Python's own source, in the order of the files' names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    wanted = [name for name in names if SKIPPED_FOLDERS.isdisjoint(name.split("/"))]
    documents = [(root / name).read_text("utf-8", "replace") for name in wanted]
    return [text for text in documents if text]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(to train on, held out): every 20th document but at least one; of one document the end."""
    if len(documents) == 1:
        (text,) = documents
        cut = len(text) - max(1, len(text) // HELD_OUT_EVERY)
        return [text[:cut]], [text[cut:]]
    every = min(HELD_OUT_EVERY, len(documents))
    training = [text for i, text in enumerate(documents, 1) if i % every]
    return training, documents[every - 1 :: every]


# Tokens


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text can be written in it, and a token is a known number of bytes."""
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
    tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> does not end there
    return tokenizer


def cut_into_windows(documents: list[str], tokenizer: Tokenizer, context: int) -> TensorDataset:
    """(inputs, targets), both [W, context]. Causal attention does not see padding on the right."""
    end = tokenizer.token_to_id(END)
    inputs, targets = [], []
    for encoding in tokenizer.encode_batch_fast(documents):
        tokens = torch.tensor([end, *encoding.ids, end])
        padding = (0, -(len(tokens) - 1) % context)
        inputs.append(F.pad(tokens[:-1], padding, value=end).view(-1, context))
        targets.append(F.pad(tokens[1:], padding, value=IGNORE).view(-1, context))
    return TensorDataset(torch.cat(inputs), torch.cat(targets))


def scored_tokens(windows: TensorDataset) -> int:
    return int((windows.tensors[1] != IGNORE).sum())


def check_context(windows: TensorDataset, context: int) -> None:
    longest = int((windows.tensors[1] != IGNORE).sum(1).max())
    if longest < context:
        raise InputError(
            f"argument --context: {context} is longer than the longest training document, "
            f"{longest} tokens; give longer text or a shorter context"
        )


# Model and training


def build_model(args: argparse.Namespace, tokenizer: Tokenizer) -> GPT2LMHeadModel:
    end = tokenizer.token_to_id(END)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=args.context, n_layer=args.layers,
        n_head=args.heads, n_embd=args.width, bos_token_id=end, eos_token_id=end,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,  # few windows are seen twice
    )  # fmt: skip
    with torch.device(args.device):
        return GPT2LMHeadModel(config)


def precision(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def loss_of(
    model: GPT2LMHeadModel, inputs: Tensor, targets: Tensor, loss_function: Loss, dtype: str
) -> Tensor:
    with precision(inputs.device, dtype):
        hidden = model.transformer(input_ids=inputs, use_cache=False).last_hidden_state
        return loss_function(hidden, model.lm_head.weight, targets)


def chunked_ce_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return chunked_ce.cross_entropy(F.linear(hidden, weight), targets, ignore_index=IGNORE, dim=-1)


def fused_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same without the logits [B, T, V]."""
    return chunked_ce.linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORE, chunk_bytes=16 << 20
    )


def torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float().flatten(0, 1)  # float32 as in transformers
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)


def train(
    model: GPT2LMHeadModel, windows: TensorDataset, args: argparse.Namespace, done: list[Step]
) -> None:
    """Appends each step to `done`, which outlives an interruption."""
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    order = RandomSampler(windows, num_samples=args.steps * args.batch_size, generator=generator)
    batches = DataLoader(windows, args.batch_size, sampler=order)
    model.train()
    # One graph from tokens to loss, and one back; AdamW is one operator as it is.
    loss_in_steps = torch.compile(loss_of, fullgraph=True) if args.compile else loss_of
    loss_function = fused_loss if args.fused else chunked_ce_loss
    with tqdm(batches, "train", unit="step") as progress:
        for step, (inputs, targets) in enumerate(progress, 1):
            start = time.perf_counter()
            lr = float(scheduler.get_last_lr()[0])
            inputs, targets = inputs.to(args.device), targets.to(args.device)
            loss = loss_in_steps(model, inputs, targets, loss_function, args.dtype)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            nats = loss.item()
            if not math.isfinite(nats):
                raise InputError(f"argument --lr: the loss became {nats} in step {step}; give less")
            speed = int((targets != IGNORE).sum()) / (time.perf_counter() - start)
            done.append(Step(step, nats, math.exp(nats), lr, speed))
            status = f"loss {nats:.3f}, perplexity {math.exp(nats):.1f}, {speed:.0f} tokens/s"
            progress.set_postfix_str(status)


def some_of(documents: list[str], tokens: int) -> list[str]:
    """Evenly spaced over them, of about VALIDATION_TOKENS in all where there are more."""
    return documents[:: math.ceil(tokens / VALIDATION_TOKENS)]


def validate(
    model: GPT2LMHeadModel,
    documents: list[str],
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Perplexity and bits per byte; the windows are those of training."""
    with precision(torch.device(args.device), args.dtype):
        report = chunked_ce.evaluate_perplexity(
            model, text=documents, tokenizer=tokenizer, bos=True, eos=True,
            context_length=args.context, batch_size=args.batch_size, rank=True, progress=True,
        )  # fmt: skip
    print(f"validation: {report}")
    return report.to_dict()


# Comparison with torch's loss


def compare(model: GPT2LMHeadModel, batch: Sequence[Tensor], dtype: str) -> dict[str, Any]:
    """Torch's loss and ours: in a training step, but for the optimizer, and from the head on."""
    losses = {
        "F.cross_entropy": torch_loss,
        "chunked_ce.cross_entropy": chunked_ce_loss,
        "linear_cross_entropy": fused_loss,
    }
    inputs, targets = batch
    model.train()
    with precision(inputs.device, dtype):
        hidden = model.transformer(input_ids=inputs, use_cache=False).last_hidden_state
    hidden = hidden.detach().requires_grad_()
    step = {n: partial(gradients, model, inputs, targets, f, dtype) for n, f in losses.items()}
    alone = {
        n: partial(head_gradients, model, hidden, targets, f, dtype) for n, f in losses.items()
    }
    (torch_nats, torch_grads), *others = (call() for call in step.values())
    others_start, clock_start = cpu_seconds_of_others(), time.perf_counter()
    loss_seconds = seconds_in_turns(alone, inputs.device)
    step_seconds = seconds_in_turns(step, inputs.device)
    others_took = cpu_seconds_of_others() - others_start
    return {
        "logits_bytes": targets.numel() * model.lm_head.weight.shape[0] * hidden.element_size(),
        "loss_extra_bytes": {n: extra_bytes(call, inputs.device) for n, call in alone.items()},
        "loss_seconds": loss_seconds,
        "step_seconds": step_seconds,
        "cores_used_by_others": others_took / (time.perf_counter() - clock_start),
        "loss_difference": max(abs(torch_nats - nats) for nats, _ in others),
        "gradient_difference": max(
            (a - b).abs().max().item()
            for _, grads in others
            for a, b in zip(torch_grads, grads, strict=True)
        ),
        "largest_gradient": max(grad.abs().max().item() for grad in torch_grads),
    }


def gradients(
    model: GPT2LMHeadModel, inputs: Tensor, targets: Tensor, loss_function: Loss, dtype: str
) -> tuple[float, list[Tensor]]:
    """(loss, the parameters' gradients)"""
    model.zero_grad()
    loss = loss_of(model, inputs, targets, loss_function, dtype)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def head_gradients(
    model: GPT2LMHeadModel, hidden: Tensor, targets: Tensor, loss_function: Loss, dtype: str
) -> tuple[Tensor, ...]:
    """From hidden states on: those of the hidden states and of the head's weight."""
    weight = model.lm_head.weight
    with precision(hidden.device, dtype):
        loss = loss_function(hidden, weight, targets)
    return torch.autograd.grad(loss, (hidden, weight))


class Seconds(NamedTuple):
    median: float
    fastest: float
    slowest: float


def seconds_in_turns(calls: Mapping[str, Call], device: torch.device) -> dict[str, Seconds]:
    """In turns, so that what else the machine does falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in list(calls) * REPEATS:
        start = time.perf_counter()
        calls[name]()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times[name].append(time.perf_counter() - start)
    return {name: Seconds(median(t), min(t), max(t)) for name, t in times.items()}


def cpu_seconds_of_others() -> float:
    """What all processes but this one have used since the machine started; NaN: not known."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    except OSError:
        return math.nan
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def extra_bytes(call: Call, device: torch.device) -> int | None:
    """Peak of memory during a call above what was held before; None where it is not known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or sys.platform != "linux":
        return None
    try:
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # else the heap's free memory hides a part of the peak
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = resident_bytes("VmRSS")
        call()
        return resident_bytes("VmHWM") - before
    except (OSError, KeyError):
        return None


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024


def table(comparison: dict[str, Any]) -> str:
    """Medians, with the fastest and the slowest."""
    lines = [f"{'':24}{'step':>22}{'head and loss':>25}{'its extra memory':>19}"]
    for name, step in comparison["step_seconds"].items():
        loss, extra = comparison["loss_seconds"][name], comparison["loss_extra_bytes"][name]
        memory = "not measured" if extra is None else f"{extra / 2**20:.0f} MiB"
        lines.append(f"{name:24}{milliseconds(step):>22}{milliseconds(loss):>25}{memory:>19}")
    busy = comparison["cores_used_by_others"]
    if busy > BUSY_CORES:
        lines.append(
            f"other programs used {busy:.1f} of {os.cpu_count()} cores meanwhile: "
            "compare the fastest times, or repeat on an idle machine"
        )
    lines.append(
        "largest difference of a parameter's gradient {gradient_difference:.1e} (largest gradient "
        "{largest_gradient:.1e}), difference of the losses {loss_difference:.1e}"
    )
    return "\n".join(lines).format(**comparison)


def milliseconds(seconds: Seconds) -> str:
    median, fastest, slowest = (1e3 * value for value in seconds)
    return f"{median:.0f} ms ({fastest:.0f} - {slowest:.0f})"


# What is kept


def summary(args: argparse.Namespace, results: Results) -> dict[str, Any]:
    losses = [step.loss for step in results.steps]
    last = fmean(losses[-AVERAGED_STEPS:]) if losses else None
    gpu = args.device.startswith("cuda")
    libraries = (chunked_ce, torch, transformers, tokenizers)
    versions = {library.__name__: library.__version__ for library in libraries}
    return {
        "interrupted": results.interrupted,
        "steps_done": len(losses),
        "loss_of_first_step": losses[0] if losses else None,
        f"mean_loss_of_last_{AVERAGED_STEPS}_steps": last,
        "validation": results.validation,
        "comparison": results.comparison,
        "arguments": vars(args),
        "device_name": torch.cuda.get_device_name(args.device) if gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions | {"python": platform.python_version()},
    }


def draw(path: Path, results: Results, vocab_size: int) -> None:
    losses = [step.loss for step in results.steps]
    steps = range(1, len(losses) + 1)
    means = [fmean(losses[max(0, step - AVERAGED_STEPS) : step]) for step in steps]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="training")
    axes.plot(steps, means, color="tab:blue", label=f"training, mean of {AVERAGED_STEPS} steps")
    if results.validation:
        nats = results.validation["mean_nll"]
        axes.axhline(nats, color="tab:orange", ls="--", label=f"validation at the end, {nats:.2f}")
    uniform = math.log(vocab_size)
    axes.axhline(uniform, color="gray", ls=":", label=f"uniform guess, ln {vocab_size}")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def for_transformers(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context,
        split_special_tokens=True,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END),
    )


def save_model(folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_texts(folder: Path, documents: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # those of a run before may be more
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i:03}.txt").write_bytes(text.encode())


def run(args: argparse.Namespace) -> Results:
    start = time.perf_counter()
    device = usable_device(args.device)
    make_repeatable(args.seed, device)
    documents, held_out = split([read_text(path) for path in args.text] or standard_library())
    tokenizer = train_tokenizer(documents, args.vocab_size)
    windows = cut_into_windows(documents, tokenizer, args.context)
    check_context(windows, args.context)
    unseen = scored_tokens(cut_into_windows(held_out, tokenizer, args.context))
    scored = some_of(held_out, unseen)
    saved_tokenizer = for_transformers(tokenizer, args.context)
    folder = args.out / args.name
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(args, tokenizer)
    sizes = {
        "parameters": model.num_parameters(),
        "vocabulary": tokenizer.get_vocab_size(),
        "training_documents": len(documents),
        "training_tokens": scored_tokens(windows),
        "held_out_documents": len(held_out),
        "held_out_tokens": unseen,
    }
    print(", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in sizes.items()))
    results = Results()
    try:
        train(model, windows, args, results.steps)
        results.validation = validate(model, scored, saved_tokenizer, args)
        batch = [tensor.to(device) for tensor in windows[: args.batch_size]]
        results.comparison = compare(model, batch, args.dtype)
        print(table(results.comparison))
    except KeyboardInterrupt:
        results.interrupted = True
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Step._fields, *results.steps])
    draw(folder / "loss.png", results, tokenizer.get_vocab_size())
    save_model(folder / "model", model, saved_tokenizer)
    save_texts(folder / "held_out", scored)
    report = summary(args, results) | sizes | {"seconds": time.perf_counter() - start}
    (folder / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"saved in {folder}")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return 130 if run(parse_arguments(argv)).interrupted else 0
    except (InputError, OSError) as error:
        print(f"train_gpt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_gpt: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
