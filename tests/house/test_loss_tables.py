"""The tables and the explained loss of docs/losses.md do what they say."""

import contextlib
import io
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch import nn

import chunked_ce
from chunked_ce.checks import mistakes

PAGE = (ROOT / "docs/losses.md").read_text("utf-8")


def table(heading: str) -> list[list[str]]:
    """Return the cells of the calls in the table below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in row] for row in rows]


CALLS = [(row[0], row[1]) for row in table("Which call replaces mine?")]
MISTAKES = [tuple(row) for row in table("Which mistakes are caught?")]


def names() -> dict:
    """What the tables' expressions are about: 6 rows, 7 classes."""
    top = torch.tensor([[0, 3], [6, 1], [2, 5], [4, 3], [1, 0], [5, 6]])
    hot = (torch.rand(6, 7) < 0.5).float()
    hot[0] = 1.0
    return {
        "torch": torch, "F": F, "nn": nn, **vars(chunked_ce),
        "x": torch.randn(6, 7, requires_grad=True), "y": torch.tensor([1, 2, 0, 4, 5, 6]),
        "p": torch.rand(6, 7), "w": torch.rand(7), "hot": hot, "top": top, "q": torch.rand(6, 2),
        "zeros": torch.zeros(6, 7), "btv": torch.randn(2, 3, 7, requires_grad=True),
        "bt": torch.tensor([[1, 2, 0], [-100, 5, 6]]),
        "h": torch.randn(6, 4, requires_grad=True), "head": torch.randn(7, 4, requires_grad=True),
    }  # fmt: skip


def test_the_tables_are_found() -> None:
    assert len(CALLS) == 10 and len(MISTAKES) == 8


@pytest.mark.filterwarnings("ignore::UserWarning")  # p's rows sum to what they sum to
@pytest.mark.parametrize(("theirs", "ours"), CALLS)
def test_our_call_is_torchs(theirs: str, ours: str) -> None:
    known = names()
    leaves = [known[name] for name in ("x", "btv", "h", "head")]
    results = []
    for call in (theirs, ours):
        loss = eval(call, known)
        results.append((loss, *torch.autograd.grad(loss, leaves, allow_unused=True)))
    assert sum(t is not None for t in results[1]) > 1
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("call", "kind", "says"), MISTAKES)
def test_mistakes_are_named(
    call: str, kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mistakes, "_said", set())
    named = pytest.warns if kind == "UserWarning" else pytest.raises
    kinds = {"UserWarning": UserWarning} | {
        e.__name__: e for e in (TypeError, ValueError, IndexError)
    }
    with named(kinds[kind], match=re.escape(says)):
        eval(call, names())


MEANING = PAGE.split("\n## What does a loss mean?\n")[1]


def test_explain_loss_prints_what_stands_there() -> None:
    code, said = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", MEANING, re.DOTALL).groups()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue().split() == said.split()
