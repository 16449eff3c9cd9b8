"""Clipped policy gradients with an entropy bonus, and no [B, T, V] logits.

    python examples/policy_gradient.py              # about half a minute on two CPU cores
    python examples/policy_gradient.py --vocab-size 50257 --steps 20

The objective is that of GRPO (arXiv:2402.03300, eq. 3) with an entropy bonus in the place of its
KL penalty. Of a prompt's G sampled completions, the i-th with reward r_i,

    A_i  = (r_i - mean r) / std r
    w_it = exp(logprob_it - old logprob_it)
    loss = -mean_it [ min(w_it A_i, clip(w_it, 1 - 0.2, 1 + 0.2) A_i) + c entropy_it ]

It needs two numbers a token, log p(token) and -sum p log p, both of a softmax over the vocabulary.
`linear_token_stats` has them from the hidden states and the head's weight, a chunk of logits at a
time in forward and again in backward.

The reward can be verified: the fraction of a completion's tokens that are even, 0.5 by chance.
After training, the last batch's loss and gradients are compared with those from all the logits.

Bad input is one line on stderr and exits with 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chunked_ce

IGNORE = -100
PROMPTS = 16  # a step
PROMPT_TOKENS = 4
COMPLETION_TOKENS = 16
WIDTH = 64
UPDATES = 2  # on each batch; in the first the policy is still the one that sampled
CLIP = 0.2
ENTROPY_BONUS = 1e-2
LR = 1e-2
CHUNK_BYTES = 4 << 20  # the default, 256 MiB, would hold all of this small batch's logits


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def integer(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not minimum <= value < 2**31:
            expected = f"expected an integer from {minimum} to {2**31 - 1}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
        return value

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("policy_gradient", description="GRPO on a tiny model, without the logits.")
    parser.add_argument("--steps", type=integer(1), default=40)
    parser.add_argument("--group", type=integer(2), default=8, help="completions per prompt")
    parser.add_argument("--vocab-size", type=integer(2), default=8192)
    parser.add_argument("--seed", type=integer(0), default=0)
    return parser.parse_args(argv)


# Policy and samples


class Policy(nn.Module):
    """A GRU whose head is applied by whoever needs it."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(hidden states [B, T, D], the GRU's state) of tokens [B, T]"""
        hidden, state = self.gru(self.embedding(tokens), state)
        return hidden, state


class Batch(NamedTuple):
    tokens: Tensor  # [B, T], the completions of a prompt in consecutive rows
    targets: Tensor  # [B, T - 1], the next token of each but the last, IGNORE in the prompt
    logprob: Tensor  # [B, T - 1], under the policy that sampled
    reward: Tensor  # [B]
    advantage: Tensor  # [B]


@torch.no_grad()
def sample(policy: Policy, prompts: Tensor) -> Tensor:
    """[B, T]: each prompt with its completion, whose tokens need but [B, V] logits at a time."""
    tokens, state = [prompts], None
    for _ in range(COMPLETION_TOKENS):
        hidden, state = policy(tokens[-1], state)
        probabilities = policy.head(hidden[:, -1]).softmax(-1)
        tokens.append(probabilities.multinomial(1))
    return torch.cat(tokens, 1)


def rewards(tokens: Tensor) -> Tensor:
    """[B]: the fraction of a completion's tokens that are even."""
    return (tokens[:, PROMPT_TOKENS:] % 2 == 0).float().mean(1)


def advantages(reward: Tensor, group: int) -> Tensor:
    """[B]: rewards standardised within each group; 0 where a group's are all the same."""
    grouped = reward.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-6)).flatten()


def collect(policy: Policy, vocab_size: int, group: int) -> Batch:
    prompts = torch.randint(vocab_size, (PROMPTS, PROMPT_TOKENS))
    tokens = sample(policy, prompts.repeat_interleave(group, 0))
    targets = tokens[:, 1:].clone()
    targets[:, : PROMPT_TOKENS - 1] = IGNORE
    with torch.no_grad():
        logprob, _ = streamed_stats(policy, tokens, targets)
    reward = rewards(tokens)
    return Batch(tokens, targets, logprob, reward, advantages(reward, group))


# Objective


def streamed_stats(policy: Policy, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) [B, T - 1], 0 in the prompt; no logits but a chunk's."""
    hidden, _ = policy(tokens[:, :-1])
    stats = chunked_ce.linear_token_stats(
        hidden, policy.head.weight, targets,
        entropy=True, ignore_index=IGNORE, chunk_bytes=CHUNK_BYTES,
    )  # fmt: skip
    assert stats.entropy is not None
    return stats.logprob, stats.entropy


def stock_stats(policy: Policy, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same from all the logits at once."""
    hidden, _ = policy(tokens[:, :-1])
    logprobs = F.log_softmax(policy.head(hidden), -1)  # [B, T - 1, V]
    scored = targets != IGNORE
    logprob = logprobs.gather(-1, targets.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprob.where(scored, 0.0), entropy.where(scored, 0.0)


def policy_loss(logprob: Tensor, entropy: Tensor, batch: Batch) -> Tensor:
    """The objective of the module's docstring, averaged over the completions' tokens."""
    ratio = (logprob - batch.logprob).exp()  # 1 in the prompt
    advantage = batch.advantage.unsqueeze(1)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    objective = torch.minimum(ratio * advantage, clipped * advantage) + ENTROPY_BONUS * entropy
    scored = batch.targets != IGNORE
    return -(objective * scored).sum() / scored.sum()


def train(policy: Policy, args: argparse.Namespace) -> tuple[list[float], Batch]:
    """(mean reward of each step's samples, the last step's batch)"""
    optimizer = torch.optim.Adam(policy.parameters(), LR)
    means: list[float] = []
    for step in range(1, args.steps + 1):
        batch = collect(policy, args.vocab_size, args.group)
        means.append(batch.reward.mean().item())
        for _ in range(UPDATES):
            logprob, entropy = streamed_stats(policy, batch.tokens, batch.targets)
            optimizer.zero_grad()
            policy_loss(logprob, entropy, batch).backward()
            optimizer.step()
        if step in (1, args.steps) or step % 10 == 0:
            nats = entropy.detach().sum() / (batch.targets != IGNORE).sum()
            print(f"step {step:4}: mean reward {means[-1]:.3f}, entropy {nats:.2f} nats a token")
    return means, batch


# Comparison with the stock computation


class Comparison(NamedTuple):
    loss_difference: float
    gradient_difference: float  # the largest, over all elements of all parameters
    largest_gradient: float
    clipped: float  # the fraction of the ratios beyond the clip, on which the gradients hang


def compare(policy: Policy, batch: Batch) -> Comparison:
    losses, gradients = [], []
    for stats in (streamed_stats, stock_stats):
        logprob, entropy = stats(policy, batch.tokens, batch.targets)
        loss = policy_loss(logprob, entropy, batch)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(policy.parameters())))
    ratio = (logprob.detach() - batch.logprob).exp()[batch.targets != IGNORE]
    return Comparison(
        abs(losses[0] - losses[1]),
        max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True)),
        max(gradient.abs().max().item() for gradient in gradients[1]),
        ((ratio - 1).abs() > CLIP).float().mean().item(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    policy = Policy(args.vocab_size)
    means, batch = train(policy, args)
    print(f"mean reward: {means[0]:.3f} in the first step, {means[-1]:.3f} in the last")
    found = compare(policy, batch)
    print(
        f"streamed against stock, {found.clipped:.0%} of the ratios beyond the clip: losses differ "
        f"by {found.loss_difference:.1e},\ngradients by at most {found.gradient_difference:.1e} "
        f"(largest gradient {found.largest_gradient:.1e})"
    )
    n_bytes = batch.targets.numel() * args.vocab_size * policy.head.weight.element_size()
    print(f"{n_bytes:,} bytes of logits avoided, at most {CHUNK_BYTES:,} held at a time")


if __name__ == "__main__":
    main()
