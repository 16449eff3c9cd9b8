"""A GPT in plain PyTorch, in one file, that learns Python's own source byte by byte.

    python examples/nanogpt.py                       # under a minute on two CPU cores
    python examples/nanogpt.py --steps 2000 --text war.txt peace.txt
    python examples/nanogpt.py --device cuda --layers 8 --width 512 --context 512 --steps 5000

What to look at is `GPT.forward(idx, targets)`: the head's logits, capped and of a vocabulary padded
to a multiple of 64, are never stored; `linear_cross_entropy` takes hidden states and weight, and
leaves out the targets that are -1. Prints the loss, bits per byte of text that was held out, and a
sample. Bad input is one line on stderr and exits with 2.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chunked_ce

BYTES = 256
END = 256  # the token between documents
IGNORED = -1
ENOUGH = 4 << 20  # bytes of text, for a run of minutes


class InputError(Exception):
    """The user gave something that cannot work. The message is one line."""


@dataclass(frozen=True)
class Config:
    vocab_size: int = BYTES + 1
    context: int = 64
    layers: int = 2
    heads: int = 4
    width: int = 128
    softcap: float = 15.0  # logits stay within it, as in Gemma 2 and nanochat

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head: matrix products like multiples of 64."""
        return -(-self.vocab_size // 64) * 64


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(config.width), nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        result: Tensor = x + self.mlp(self.norm_2(x))
        return result


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.padded_vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.padded_vocab_size, bias=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, loss_reduction: str = "mean"
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss) of tokens [B, T].

        With `targets` [B, T], -1 where nothing is scored, the loss and no logits. Without, the
        capped logits [B, 1, vocab_size] of the last position, and no loss.
        """
        x = self.tokens(idx) + self.positions.weight[: idx.shape[1]]
        x = self.norm(self.blocks(x))
        if targets is None:
            logits = self.lm_head(x[:, [-1]])[..., : self.config.vocab_size].float()
            return self.config.softcap * torch.tanh(logits / self.config.softcap), None
        loss = chunked_ce.linear_cross_entropy(
            x,
            self.lm_head.weight,
            targets,
            ignore_index=IGNORED,
            softcap=self.config.softcap,
            vocab_size=self.config.vocab_size,
            reduction=loss_reduction,
        )
        return None, loss

    @torch.no_grad()
    def generate(self, idx: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
        """`idx` [B, T] and so many sampled tokens after it."""
        for _ in range(tokens):
            logits, _ = self(idx[:, -self.config.context :])
            p = logits[:, -1].softmax(-1).cpu()
            idx = torch.cat((idx, torch.multinomial(p, 1, generator=generator).to(idx.device)), 1)
        return idx


# Text


def read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"argument --text: {path}: {error.strerror}; expected a file") from error
    if not data:
        raise InputError(f"argument --text: {path}: empty; expected a file with text")
    return data


def standard_library() -> list[bytes]:
    """Python's own modules, in the order of their names."""
    documents, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        documents.append(path.read_bytes())
        size += len(documents[-1])
        if size > ENOUGH:
            break
    if size < 1 << 16:
        raise InputError("no source of the standard library was found: give files with --text")
    return documents


def encode(documents: list[bytes]) -> Tensor:
    """[n] int64 bytes, END before and after each document."""
    pieces = [torch.tensor([END])]
    for text in documents:
        pieces += [torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), torch.tensor([END])]
    return torch.cat(pieces)


def windows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(idx, targets) [B, T]. The first byte of a document is not foretold by the one before it."""
    tokens = data[starts[:, None] + torch.arange(context + 1)]
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    return idx, targets.masked_fill(idx == END, IGNORED)


# Training


def train(model: GPT, data: Tensor, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    began, seen, noted = time.perf_counter(), 0, 0.0
    every = max(1, args.steps // 10)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(data) - args.context, (args.batch_size,), generator=generator)
        idx, targets = (t.to(args.device) for t in windows(data, starts, args.context))
        _, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen += idx.numel()
        if step % every == 0 or step == 1:
            noted = loss.item()
            speed = seen / (time.perf_counter() - began)
            print(f"step {step}: loss {noted:.3f}, {speed:.0f} tokens/s", flush=True)
            if not math.isfinite(noted):
                raise InputError(f"argument --lr: the loss became {noted}; give less")


@torch.no_grad()
def evaluate(model: GPT, data: Tensor, args: argparse.Namespace) -> chunked_ce.PerplexityReport:
    """Of windows side by side: each byte is scored once, with what its window holds before it."""
    meter = chunked_ce.Perplexity(ignore_index=IGNORED)
    model.eval()
    for starts in torch.arange(0, len(data) - args.context, args.context).split(args.batch_size):
        idx, targets = windows(data, starts, args.context)
        _, nll = model(idx.to(args.device), targets.to(args.device), loss_reduction="sum")
        scored = targets != IGNORED
        n_bytes = int((scored & (targets != END)).sum())
        meter.update_nll(nll, scored.sum(), n_bytes=n_bytes)
    return meter.report()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise InputError(message)

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
        return int(text)

    parser = Parser(
        prog="nanogpt",
        description="A GPT in one file that learns bytes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=count, default=600)
    add("--batch-size", type=count, default=16, help="windows per step")
    add("--context", type=count, default=Config.context, help="bytes per window")
    add("--layers", type=count, default=Config.layers)
    add("--heads", type=count, default=Config.heads)
    add("--width", type=count, default=Config.width)
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--sample", type=count, default=200, help="bytes to write in the end")
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="files to learn")
    args = parser.parse_args(argv)
    if not 0 < args.lr < math.inf:
        raise InputError(f"argument --lr: expected a positive number, got {args.lr}")
    if args.width % args.heads:
        raise InputError(f"argument --width: expected a multiple of {args.heads}, got {args.width}")
    try:
        torch.zeros(1, device=args.device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"argument --device: {args.device!r} cannot be used here") from error
    return args


def run(args: argparse.Namespace) -> chunked_ce.PerplexityReport:
    torch.manual_seed(args.seed)
    data = encode([read(path) for path in args.text] or standard_library())
    held_out = min(len(data) // 10, 1 << 16)
    training, unseen = data[:-held_out], data[-held_out:]
    if len(unseen) <= args.context:
        raise InputError(
            f"argument --context: {args.context}, but a tenth of the text, which is held out, has "
            f"{len(unseen)} bytes; give more text or a shorter context"
        )
    config = Config(context=args.context, layers=args.layers, heads=args.heads, width=args.width)
    model = GPT(config).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(training):,} bytes of training text")
    train(model, training, args)
    report = evaluate(model, unseen, args)
    print(f"held out: {report}")
    start = torch.tensor([[END]], device=args.device)
    sample = model.generate(start, args.sample, torch.Generator().manual_seed(args.seed))
    print(bytes(t for t in sample[0].tolist() if t != END).decode(errors="replace"))
    return report


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse_arguments(argv))
        return 0
    except InputError as error:
        print(f"nanogpt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nanogpt: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
