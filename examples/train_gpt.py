"""Train a small GPT-2 with chunked_ce's loss, on Python's own source unless given other text.

    python examples/train_gpt.py                    # minutes on two CPU cores; uses a CUDA GPU
    python examples/train_gpt.py --fused            # the lm_head and the loss in one
    python examples/train_gpt.py --fused --compile  # model and loss through torch.compile
    python examples/train_gpt.py --text war.txt peace.txt --steps 1000 --name tolstoy
    python examples/train_gpt.py --layers 12 --heads 12 --width 768 --context 1024 --dtype bfloat16
    python examples/train_gpt.py --resume           # goes on after Ctrl-C, with the same numbers

Writes to runs/<name>/:

    checkpoint.pt every --checkpoint-every steps and at Ctrl-C; removed at the end
    metrics.csv   loss, perplexity, learning rate and tokens per second of every step
    loss.png      the loss against the step
    report.json   arguments, versions, losses, validation, comparison with torch's cross-entropy
    model/        model and tokenizer for transformers' from_pretrained
    held_out/     the text of the validation; `chunked-ce perplexity runs/<name>/model --bos yes
                  --eos yes --text runs/<name>/held_out/*` scores it again

text_data.py holds the text, machine.py the measurements. Bits per byte divide the bits of
the scored tokens by the UTF-8 bytes of the text; a document's end is scored and has no bytes.

Ctrl-C saves what there is and exits with 130. Bad input is one line on stderr and exits with 2.
"""

from __future__ import annotations

import sys

try:
    import argparse
    import csv
    import hashlib
    import json
    import math
    import os
    import platform
    import time
    from collections.abc import Callable, Sequence
    from functools import partial
    from pathlib import Path
    from statistics import fmean
    from typing import Any, NamedTuple, NoReturn

    import machine
    import text_data
    import tokenizers
    import torch
    import torch.nn.functional as F
    import transformers
    from matplotlib.figure import Figure
    from text_data import END, IGNORE, InputError, Windows
    from tokenizers import Tokenizer
    from torch import Tensor, nn
    from tqdm import tqdm
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    import chunked_ce
except KeyboardInterrupt:
    print("train_gpt: interrupted", file=sys.stderr)
    sys.exit(130)

VALIDATION_BYTES = 1 << 17  # some seconds on two CPU cores
AVERAGED_STEPS = 10
LINE_EVERY = 50  # steps, where stderr is a file and a bar would be one long line
MAY_CHANGE = {"out", "name", "resume", "checkpoint_every"}  # when a run is resumed

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states, head, targets


class Step(NamedTuple):
    """A row of metrics.csv; the loss, in nats per token, is that before the step's update."""

    step: int
    loss: float
    perplexity: float
    lr: float
    tokens_per_second: float


# Arguments


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
    parser = Parser(prog="train_gpt", description="Train a small GPT-2 with chunked_ce's loss.")

    def number(name: str, default: int, minimum: int, meaning: str) -> None:
        help = f"{meaning} (default: {default})"
        parser.add_argument(name, type=at_least(minimum), default=default, metavar="N", help=help)

    number("--steps", 600, 1, "updates of the model")
    number("--batch-size", 8, 1, "windows per step")
    number("--context", 128, 2, "tokens per window, and positions of the model")
    number("--vocab-size", 16384, 258, "tokens: 256 bytes, the end of a text, merges")
    number("--layers", 2, 1, "transformer blocks")
    number("--heads", 4, 1, "attention heads per block")
    number("--width", 256, 1, "size of the hidden states, a multiple of --heads")
    number("--seed", 0, 0, "of the weights and of the order of the windows")
    number("--checkpoint-every", 100, 1, "steps between checkpoints")
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--lr", type=float, default=7e-4, help="highest learning rate (default: 7e-4)")
    add("--fused", action="store_true", help="lm_head and loss in one, no logits (default: off)")
    add("--compile", action="store_true", help="torch.compile model and loss (default: off)")
    add("--resume", action="store_true", help="go on from the run's checkpoint (default: off)")
    add(
        "--device",
        default="cuda" if gpu else "cpu",
        help="cpu or cuda (default: cuda if there is a GPU)",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="bfloat16: under autocast (default: float32)")  # fmt: skip
    add("--text", type=Path, nargs="+", default=[], metavar="FILE",
        help="UTF-8 text, a document a file (default: Python's standard library)")  # fmt: skip
    add("--name", default="train_gpt", help="folder of this run (default: train_gpt)")
    add("--out", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    args = parser.parse_args(argv)
    if not 0 < args.lr < math.inf:
        raise InputError(f"argument --lr: expected a positive number, got {args.lr}")
    if args.width % args.heads:
        raise InputError(f"argument --width: expected a multiple of {args.heads}, got {args.width}")
    return args


# Model and losses


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


# Training


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Rise over a twentieth of the steps, then fall along half a cosine. Steps count from 1."""
    rise = max(1, steps // 20)
    if step <= rise:
        return highest * step / rise
    return highest * (1 + math.cos(math.pi * (step - rise) / (steps - rise + 1))) / 2


class Training:
    """A model in training, and everything that a checkpoint must hold."""

    def __init__(
        self, args: argparse.Namespace, model: GPT2LMHeadModel, windows: Windows, file: Path
    ) -> None:
        self.args, self.model, self.windows, self.file = args, model, windows, file
        self.steps: list[Step] = []
        self.optimizer = torch.optim.AdamW(
            model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def run(self) -> None:
        """Do the steps that are left, in an order of the windows that the seed gives."""
        args, model = self.args, self.model
        generator, needed = torch.Generator().manual_seed(args.seed), args.steps * args.batch_size
        count = len(self.windows.inputs)
        passes = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
        batches = torch.cat(passes)[:needed].split(args.batch_size)[len(self.steps) :]
        # One graph from tokens to loss, and one back; AdamW is one operator as it is.
        loss_in_steps = torch.compile(loss_of, fullgraph=True) if args.compile else loss_of
        loss_function = fused_loss if args.fused else chunked_ce_loss
        model.train()
        progress = tqdm(batches, "train", unit="step", initial=len(self.steps), total=args.steps,
                        disable=not sys.stderr.isatty())  # fmt: skip
        for rows in progress:
            start, step = time.perf_counter(), len(self.steps) + 1
            inputs, targets = (tensor[rows].to(args.device) for tensor in self.windows)
            loss = loss_in_steps(model, inputs, targets, loss_function, args.dtype)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            nats = loss.item()
            if not math.isfinite(nats):
                raise InputError(f"argument --lr: the loss became {nats} in step {step}; give less")
            with machine.without_interruption():
                lr = self.update(step)
                speed = int((targets != IGNORE).sum()) / (time.perf_counter() - start)
                self.steps.append(Step(step, nats, math.exp(nats), lr, speed))
            status = f"loss {nats:.3f}, perplexity {math.exp(nats):.1f}, {speed:.0f} tokens/s"
            progress.set_postfix_str(status)
            if progress.disable and (step % LINE_EVERY == 0 or step == args.steps):
                print(f"step {step} of {args.steps}: {status}", file=sys.stderr, flush=True)
            if step % args.checkpoint_every == 0:
                self.save()

    def update(self, step: int) -> float:
        lr = learning_rate(step, self.args.steps, self.args.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return lr

    def save(self) -> None:
        """Write the checkpoint beside the last one, then put it in its place in one go."""
        state = {
            "arguments": {name: str(value) for name, value in vars(self.args).items()},
            "windows": digest(self.windows),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "gpu_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "steps": [tuple(step) for step in self.steps],
        }
        unfinished = self.file.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, self.file)

    def load(self) -> None:
        """Take up the checkpoint of a run with the same arguments on the same text."""
        try:
            state = torch.load(self.file, map_location=self.args.device, weights_only=True)
        except FileNotFoundError:
            raise InputError(f"argument --resume: there is no {self.file}") from None
        for name, value in vars(self.args).items():
            if name not in MAY_CHANGE and str(value) != state["arguments"].get(name):
                was = state["arguments"].get(name)
                option = "--" + name.replace("_", "-")
                raise InputError(f"argument {option}: the checkpoint has {was}, got {value}")
        if state["windows"] != digest(self.windows):
            raise InputError(f"argument --text: not what {self.file} was trained on")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        if state["gpu_random"]:
            torch.cuda.set_rng_state_all([random.cpu() for random in state["gpu_random"]])
        self.steps = [Step(*step) for step in state["steps"]]


def digest(windows: Windows) -> str:
    return hashlib.sha256(windows.targets.numpy().tobytes()).hexdigest()


# Validation, and the comparison with torch's loss


def validate(
    model: GPT2LMHeadModel,
    documents: list[str],
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Score held-out documents in the same windows as in training."""
    with precision(torch.device(args.device), args.dtype):
        report = chunked_ce.evaluate_perplexity(
            model, text=documents, tokenizer=tokenizer, bos=True, eos=True, rank=True,
            context_length=args.context, batch_size=args.batch_size, progress=sys.stderr.isatty(),
        )  # fmt: skip
    print(f"validation: loss {report.mean_nll:.3f} nats per token, perplexity "
          f"{report.perplexity:.1f} per token, {report.bits_per_byte:.3f} bits per byte, "
          f"{report.accuracy:.1%} of the tokens guessed right")  # fmt: skip
    # JSON has no NaN, such as the error over a single document.
    return {k: None if v != v else v for k, v in report.to_dict().items()}


def compare(model: GPT2LMHeadModel, batch: Sequence[Tensor], dtype: str) -> dict[str, Any]:
    """Compare torch's loss and ours in a training step, and in head and loss alone."""
    losses = {
        "F.cross_entropy": torch_loss,
        "chunked_ce.cross_entropy": chunked_ce_loss,
        "linear_cross_entropy": fused_loss,
    }
    inputs, targets = batch
    weight = model.lm_head.weight
    model.train()
    with precision(inputs.device, dtype):
        hidden = model.transformer(input_ids=inputs, use_cache=False).last_hidden_state
    hidden = hidden.detach().requires_grad_()

    def step(loss_function: Loss) -> tuple[float, list[Tensor]]:
        model.zero_grad()
        loss = loss_of(model, inputs, targets, loss_function, dtype)
        loss.backward()
        return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]

    def head_and_loss(loss_function: Loss) -> None:
        with precision(inputs.device, dtype):
            loss = loss_function(hidden, weight, targets)
        torch.autograd.grad(loss, (hidden, weight))

    (torch_nats, torch_grads), *others = map(step, losses.values())
    pairs = [pair for _, grads in others for pair in zip(torch_grads, grads, strict=True)]
    comparison = {
        "logits_bytes": targets.numel() * weight.shape[0] * hidden.element_size(),
        "loss_difference": max(abs(torch_nats - nats) for nats, _ in others),
        "gradient_difference": max((a - b).abs().max().item() for a, b in pairs),
        "largest_gradient": max(grad.abs().max().item() for grad in torch_grads),
    }
    steps, alone = ({name: partial(call, loss) for name, loss in losses.items()}
                    for call in (step, head_and_loss))  # fmt: skip
    comparison |= machine.measure(steps, alone, inputs.device)
    print(machine.table(comparison))
    print("largest difference of a parameter's gradient {gradient_difference:.1e} (largest "
          "gradient {largest_gradient:.1e}), difference of the losses "
          "{loss_difference:.1e}".format(**comparison))  # fmt: skip
    return comparison


# What is kept


def draw(path: Path, steps: list[Step], validation: dict[str, Any] | None, vocab_size: int) -> None:
    losses, numbers = [step.loss for step in steps], [step.step for step in steps]
    means = [fmean(losses[max(0, n - AVERAGED_STEPS) : n]) for n in numbers]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(numbers, losses, color="tab:blue", alpha=0.3, label="training")
    axes.plot(numbers, means, color="tab:blue", label=f"training, mean of {AVERAGED_STEPS} steps")
    if validation:
        nats = validation["mean_nll"]
        axes.axhline(nats, color="tab:orange", ls="--", label=f"validation at the end, {nats:.2f}")
    uniform = math.log(vocab_size)
    axes.axhline(uniform, color="gray", ls=":", label=f"uniform guess, ln {vocab_size}")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    device = machine.usable_device(args.device)
    machine.make_repeatable(args.seed, device)
    documents, held_out = text_data.split(text_data.read_documents(args.text))
    scored = text_data.choose(held_out, VALIDATION_BYTES)
    print(f"reading {len(documents):,} documents, {sum(map(len, documents)):,} characters")
    tokenizer = text_data.train_tokenizer(documents, args.vocab_size)
    windows = text_data.cut_into_windows(documents, tokenizer, args.context)
    model = build_model(args, tokenizer)
    saved_tokenizer = text_data.for_transformers(tokenizer, args.context)
    folder = args.out / args.name
    training = Training(args, model, windows, folder / "checkpoint.pt")
    if args.resume:
        training.load()
        print(f"resumed after step {len(training.steps)} of {args.steps}")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "parameters": model.num_parameters(),
        "vocabulary": tokenizer.get_vocab_size(),
        "training_tokens": windows.tokens,
        "training_documents": len(documents),
        "held_out_documents": len(held_out),
        "scored_documents": len(scored),
    }
    print(", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in sizes.items()))
    validation = comparison = None
    interrupted = False
    try:
        training.run()
        print(f"scoring {len(scored)} of {len(held_out)} held-out documents")
        validation = validate(model, scored, saved_tokenizer, args)
        batch = [tensor[: args.batch_size].to(device) for tensor in windows]
        comparison = compare(model, batch, args.dtype)
        training.file.unlink(missing_ok=True)
    except KeyboardInterrupt:
        interrupted = True
        training.save()
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Step._fields, *training.steps])
    draw(folder / "loss.png", training.steps, validation, tokenizer.get_vocab_size())
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder / "model")
    saved_tokenizer.save_pretrained(folder / "model")
    text_data.save_texts(folder / "held_out", scored)
    losses = [step.loss for step in training.steps]
    last = losses[-AVERAGED_STEPS:]
    libraries = (chunked_ce, torch, transformers, tokenizers)
    report = sizes | {
        "interrupted": interrupted,
        "steps_done": len(losses),
        "loss_of_first_step": losses[0] if losses else None,
        f"mean_loss_of_last_{AVERAGED_STEPS}_steps": fmean(last) if last else None,
        "validation": validation,
        "comparison": comparison,
        "arguments": vars(args),
        "device_name": machine.device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {library.__name__: library.__version__ for library in libraries}
        | {"python": platform.python_version()},
        "seconds": time.perf_counter() - start,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"saved in {folder}" + ("; go on with --resume" if interrupted else ""))
    return 130 if interrupted else 0


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(parse_arguments(argv))
    except (InputError, OSError) as error:
        print(f"train_gpt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_gpt: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
