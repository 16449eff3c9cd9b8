"""What several test files need: batches, gradients of ours and of the oracle, tolerances from dtypes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
# Relative step of each dtype's rounding; the interpreter truncates where a GPU rounds to nearest.
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2e-6, torch.float64: 1e-12}


def batch(
    rows: int | tuple[int, ...],
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    ignored: float = 0.2,
    scale: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Logits [rows, vocab] and targets [rows], some ignored and the first row always among them."""
    shape = (rows,) if isinstance(rows, int) else rows
    x = (torch.randn(*shape, vocab, dtype=torch.float64) * scale).to(dtype)
    target = torch.randint(0, vocab, shape)
    if ignored:
        target = torch.where(torch.rand(shape) < ignored, -100, target)
        if target.numel() > 1:
            target.view(-1)[0] = -100
            target.view(-1)[-1] = vocab - 1
    return x.to(device), target.to(device)


def gradient(loss: Callable[..., Tensor], x: Tensor, *args: Any, upstream: Any = None) -> Tensor:
    """Gradient in a fresh leaf with x's values. `upstream`: a tensor, or a function of the loss."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = loss(leaf, *args)
    if callable(upstream):
        upstream(out).backward()
    else:
        out.backward(None if upstream is None else upstream.to(out))
    assert leaf.grad is not None
    return leaf.grad


def assert_gradient(
    ours: Tensor, truth: Tensor, dtype: torch.dtype, largest: float | Tensor | None = None
) -> None:
    """Within one ulp of the dtype element by element, or fp32's noise on the largest of all.

    `largest`: of the gradient before softcap's derivative 1 - tanh^2, which cancels as eager's does.
    """
    assert ours.dtype == dtype
    truth = truth.double()
    if largest is None:
        largest = truth.abs().nan_to_num(0.0).amax() if truth.numel() else 0.0
    noise = 1e-14 if dtype == torch.float64 else 2e-7
    if dtype == torch.float16:
        noise = max(noise, 6e-8 / max(float(largest), 1e-30))  # fp16's smallest subnormal
    torch.testing.assert_close(
        ours.double(), truth, rtol=ULP[dtype], atol=float(largest * noise), equal_nan=True
    )


class AdaptedHead(nn.Module):
    """A frozen layer and an adapter; without out_features."""

    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__()
        self.base = nn.Linear(hidden, vocab).requires_grad_(False)
        self.a, self.b = nn.Linear(hidden, 4, bias=False), nn.Linear(4, vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.b(self.a(x))


def blocks_of(page: str) -> list[str]:
    """Return the pieces of Python of README.md or of a page of docs/."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.M | re.S)


def block_of(page: str, containing: str) -> str:
    """Return the page's one piece of Python that contains a text."""
    (block,) = (b for b in blocks_of(page) if containing in b)
    return block


def run_block(page: str, containing: str) -> dict[str, Any]:
    """Execute a page's piece of Python in a fresh namespace, and return that."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block_of(page, containing), page, "exec"), names)
    return names
