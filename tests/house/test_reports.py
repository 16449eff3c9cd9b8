"""What users of other programs reported, in public trackers: the right value here, named by repository and number."""

import math

import pytest
import torch
import torch.nn.functional as F
from language_models import CONTEXT, VOCAB, brute_force, causal_lm
from torch import Tensor

import chunked_ce

X = torch.tensor([[0.17, 0.22], [-0.14, 0.35], [-0.22, 0.2], [-0.12, 0.22], [-0.39, 0.21]])


def masked_loss(
    x: Tensor, target: Tensor, ignored: int, weight: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in fp64 with the ignored rows taken out first."""
    z = x.double().requires_grad_()
    kept = target != ignored
    loss = F.cross_entropy(
        z[kept],
        target[kept],
        weight if weight is None else weight.double(),
        label_smoothing=smoothing,
    )
    loss.backward()
    return loss.detach(), z.grad


@pytest.mark.parametrize(
    ("report", "target", "ignored", "weight", "smoothing"),
    [
        ("pytorch/pytorch#72056", [0, -1, 0, 1, -1], -1, [1.0, 16.0], 0.1),
        ("pytorch/pytorch#69339", [-100, 1, 0, -100, 1], -100, [0.2, 0.3], 0.1),
        ("pytorch/pytorch#73205", [-100, 1, 0, -100, 1], -100, None, 0.2),
        ("pytorch/pytorch#91383", [0, 1, -100, 1, 0], -100, [1.0, 1.0], 0.3),
    ],
)
def test_smoothing_weights_and_ignored_rows(
    backend, device, report, target, ignored, weight, smoothing
):
    """Read out of bounds, or ignored rows counted in the smoothing."""
    x, t = X.clone().to(device).requires_grad_(), torch.tensor(target)
    w = None if weight is None else torch.tensor(weight)
    loss = chunked_ce.cross_entropy(
        x,
        t.to(device),
        None if w is None else w.to(device),
        ignore_index=ignored,
        label_smoothing=smoothing,
        backend=backend,
    )
    loss.backward()
    expected, grad = masked_loss(X, t, ignored, w, smoothing)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double().cpu(), grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_pytorch_12670_a_negative_class_that_is_not_ignored(reduction):
    """Gave a loss of a class that does not exist."""
    with pytest.raises(IndexError, match="-4"):
        chunked_ce.cross_entropy(
            X, torch.tensor([0, 1, -4, 1, 0]), ignore_index=-1, reduction=reduction
        )


def test_pytorch_75181_all_labels_ignored(backend, device):
    """The mean over nothing is NaN, as torch documents it; training goes on with gradients of 0."""
    x = torch.tensor([[1.0, 2.0, 3.0]], device=device, requires_grad=True)
    loss = chunked_ce.cross_entropy(
        x, torch.tensor([-1], device=device), ignore_index=-1, backend=backend
    )
    loss.backward()
    assert loss.isnan() and (x.grad == 0).all()


@pytest.mark.parametrize("linear", [False, True])
def test_liger_678_weights_over_unreduced_losses_with_most_labels_ignored(backend, device, linear):
    """All gradients were 0, or those of another weight."""
    h, w = torch.randn(12, 8, device=device), torch.randn(20, 8, device=device)
    target = torch.full((12,), -100, device=device)
    target[7:9] = torch.tensor([3, 19], device=device)
    upstream = torch.rand(12, device=device)

    def gradient(f, h, w):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        (f(h, w) * upstream.to(h.dtype)).sum().backward()
        return h.grad.double(), w.grad.double()

    def ours(h, w):
        if linear:
            return chunked_ce.linear_cross_entropy(h, w, target, reduction="none", backend=backend)
        return chunked_ce.cross_entropy(h @ w.T, target, reduction="none", backend=backend)

    truth = gradient(
        lambda h, w: F.cross_entropy(h @ w.T, target, reduction="none"), h.double(), w.double()
    )
    for mine, true in zip(gradient(ours, h, w), truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)
        assert mine.abs().max() > 0


def test_liger_507_few_classes_with_logits_that_need_no_gradient(backend, device):
    """The loss was 0."""
    x = torch.tensor(
        [[-0.1118, 0.0162, 0.0956], [-0.0944, 0.0088, 0.1046], [-0.1737, 0.1315, 0.0422]],
        device=device,
    )
    loss = chunked_ce.cross_entropy(
        x, torch.zeros(3, dtype=torch.int64, device=device), backend=backend
    )
    assert loss.item() == pytest.approx(
        F.cross_entropy(x.double(), torch.zeros(3, dtype=torch.int64, device=device)).item(),
        rel=1e-6,
    )


def test_torcheval_154_ignored_tokens_are_not_in_the_mean():
    """Sequences of 3 and 5 tokens: exp of all losses over 8 tokens, not a mean of two perplexities."""
    x, target = torch.randn(2, 5, 100), torch.randint(100, (2, 5))
    target[0, 3:] = -100
    losses = F.cross_entropy(x.double().flatten(0, 1), target.flatten(), reduction="none")
    meter = chunked_ce.Perplexity()
    meter.update(x, target)
    assert meter.tokens == 8 and meter.compute() == pytest.approx(
        math.exp(losses.sum() / 8), rel=1e-6
    )


def test_ignite_3742_batches_of_other_sizes_count_by_their_tokens():
    batches = [
        (torch.randn(2, 4, 50), torch.randint(50, (2, 4))),
        (torch.randn(3, 10, 50), torch.randint(50, (3, 10))),
    ]
    meter, total = chunked_ce.Perplexity(), 0.0
    for x, target in batches:
        meter.update(x, target)
        total += F.cross_entropy(x.double().flatten(0, 1), target.flatten(), reduction="sum").item()
    assert meter.compute() == pytest.approx(math.exp(total / 38), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchmetrics_922_half_precision_and_small_integers(dtype):
    """Were refused: predictions in half precision, targets other than int64."""
    x, target = torch.randn(2, 5, 50).to(dtype), torch.randint(50, (2, 5), dtype=torch.int32)
    meter = chunked_ce.Perplexity()
    meter.update(x, target)
    exact = F.cross_entropy(x.double().flatten(0, 1), target.long().flatten())
    assert meter.compute() == pytest.approx(math.exp(exact), rel=1e-6)


@pytest.fixture(scope="module")
def model():
    return causal_lm("GPT2")


@pytest.mark.parametrize(
    ("report", "context", "stride"),
    [
        (
            "huggingface/transformers#30975: the token between two windows was not scored",
            CONTEXT,
            CONTEXT,
        ),
        ("EleutherAI/lm-evaluation-harness#369: the most context a token can have", CONTEXT, 1),
        ("ggml-org/llama.cpp#2714: half of the tokens were skipped", CONTEXT, CONTEXT // 2),
    ],
)
def test_every_token_is_scored_once_whatever_the_windows(model, report, context, stride):
    ids = torch.randint(3, VOCAB, (3 * CONTEXT + 5,))
    report = chunked_ce.evaluate_perplexity(model, [ids], context_length=context, stride=stride)
    assert report.tokens == len(ids) - 1
    assert report.mean_nll * report.tokens == pytest.approx(
        brute_force(model, ids, context, stride), rel=1e-5
    )


def test_transformers_18887_the_first_window_is_as_long_as_the_context(model):
    """Began with a window of the stride's length, which scored its tokens with less context than there was."""
    ids = torch.randint(3, VOCAB, (CONTEXT + 1,))
    short = chunked_ce.evaluate_perplexity(
        model, [ids], context_length=CONTEXT, stride=CONTEXT // 4
    )
    whole = chunked_ce.evaluate_perplexity(model, [ids], context_length=CONTEXT)
    assert short.mean_nll == whole.mean_nll and short.tokens == CONTEXT
