"""examples/nanogpt.py, and losses as training loops other than ours call them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, run_block
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPT = ROOT / "examples" / "nanogpt.py"
SMALL = "--steps 30 --batch-size 4 --context 16 --layers 1 --heads 2 --width 16 --sample 5".split()


@pytest.fixture(scope="module")
def nanogpt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text"
    path.write_bytes(b"ab" * 1000)
    return str(path)


class Created(TorchDispatchMode):
    """Shapes of all tensors that a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.shapes.add(tuple(out.shape))
        return out


def test_the_loss_is_that_of_capped_logits_without_them(nanogpt: ModuleType) -> None:
    torch.manual_seed(0)
    config = nanogpt.Config(context=8, layers=1, heads=2, width=16)
    model = nanogpt.GPT(config)
    torch.nn.init.normal_(model.lm_head.weight, std=3.0)  # where the cap is felt
    idx, targets = torch.randint(0, 257, (2, 3, 8))
    targets[:, -2:] = -1
    with Created() as created:
        _, loss = model(idx, targets)
        loss.backward()
    assert config.padded_vocab_size == 320 and (3, 8, 320) not in created.shapes
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden = model.norm(model.blocks(model.tokens(idx) + model.positions.weight))
    logits = (hidden @ model.lm_head.weight.T)[..., :257]
    expected = oracle.cross_entropy(logits, targets, ignore_index=-1, softcap=15.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    expected.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)
    last, _ = model(idx)
    capped = 15 * torch.tanh(logits[:, -1:] / 15)
    torch.testing.assert_close(last, capped, rtol=1e-5, atol=1e-5)


def test_it_learns(nanogpt: ModuleType, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert nanogpt.main([*SMALL, "--lr", "0.01", "--text", text]) == 0
    out = capfd.readouterr().out
    losses = [
        float(line.split("loss ")[1].split(",")[0]) for line in out.splitlines() if "loss" in line
    ]
    assert losses[0] > 5 and losses[-1] < 2
    bits = float(out.split("bits per byte")[0].split()[-1])
    assert 0 < bits < 3


def test_documents_are_not_foretold_by_those_before(nanogpt: ModuleType) -> None:
    data = nanogpt.encode([b"ab", b"c"])
    assert data.tolist() == [256, 97, 98, 256, 99, 256]
    idx, targets = nanogpt.windows(data, torch.tensor([0, 1]), 4)
    assert idx.tolist() == [[256, 97, 98, 256], [97, 98, 256, 99]]
    assert targets.tolist() == [[-1, 98, 256, -1], [98, 256, -1, 256]]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("--steps 0", "--steps: expected an integer of at least 1, got '0'"),
        ("--lr nan", "--lr: expected a positive number"),
        ("--width 17", "--width: expected a multiple of 2, got 17"),
        ("--context 1000", "--context: 1000, but a tenth of the text"),
        ("--device nonsense", "--device: 'nonsense' cannot be used here"),
        ("--text missing", "missing: No such file or directory"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    nanogpt: ModuleType, text: str, bad: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert nanogpt.main([*SMALL, "--text", text, *bad.split()]) == 2
    err = capfd.readouterr().err
    assert err.startswith("nanogpt: ") and err.count("\n") == 1 and says in err


def test_a_loss_of_predictions_and_labels_as_torchtitan_calls_it() -> None:
    """Micro-batches of unequal padding, each a sum over its tokens, by the tokens of all of them."""
    torch.manual_seed(0)
    names = run_block("docs/training.md", "global_valid_tokens")
    pred, labels = names["pred"].detach()[0], names["labels"][0]  # [T, V], as torchtitan packs
    loss, metrics = names["loss_fn"](pred, labels)
    torch.testing.assert_close(loss, F.cross_entropy(pred, labels, reduction="sum"))
    assert metrics == {}
    logits = names["pred"].detach().requires_grad_()
    F.cross_entropy(logits.flatten(0, 1), names["labels"].flatten()).backward()
    torch.testing.assert_close(names["pred"].grad, logits.grad, rtol=1e-5, atol=1e-7)


def test_the_line_for_nanogpt() -> None:
    torch.manual_seed(0)
    names = run_block("docs/training.md", "ignore_index=-1")
    head, x, targets = names["lm_head"], names["x"], names["targets"]
    assert (targets == -1).any() and head.weight.shape[0] == 50304
    expected = oracle.cross_entropy(
        head(x), targets, ignore_index=-1, softcap=15.0, vocab_size=50257
    )
    torch.testing.assert_close(names["loss"].double(), expected, rtol=1e-6, atol=0)
