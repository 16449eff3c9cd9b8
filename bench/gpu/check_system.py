"""Stage `check`, what is round the kernels: large offsets, graphs, compilers, streams, models.

On the CPU the same programs run; what only a GPU has is left out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import chunked_ce

from ..cases import own
from ..providers import BACKEND
from .cases import Case, NotHere, demand, logits, near, near_norm
from .stage import Context

HALF = torch.bfloat16
NORM_LIMIT = 1e-2  # of a bf16 gradient behind a product
SUMS = dict(label_smoothing=0.1, z_loss_weight=1e-3)
LOSS_LIMIT = 1e-4  # loss after a bf16 product, which may sum in another order


def cases(context: Context) -> Iterator[Case]:
    def case(kernel: str, text: str, run: Callable[..., float], *arguments: Any) -> Case:
        return Case(kernel, "bfloat16", text, partial(run, context, *arguments))

    for schedule in ({}, dict(grad_in_forward=True)):
        name = " ".join(["cross_entropy", "inplace_backward", *schedule])
        yield case(name, "more than 2^31 logits that exist", many_logits, schedule)
    yield case("token_stats", "rows 2^31 logits apart", far_rows)
    for kernel, options in (
        ("cross_entropy", {}),
        ("cross_entropy grad_in_forward", dict(grad_in_forward=True)),
        ("linear_cross_entropy", {}),
    ):
        yield case(kernel, "a CUDA graph replayed on new data", graph, kernel, options)
    for kernel in ("cross_entropy", "linear_cross_entropy"):
        text = "torch.compile, fullgraph, three numbers of tokens"
        yield case(kernel, text, compiled, kernel)
    yield case("all", 'no launch waits for the host: set_sync_debug_mode("error")', no_wait)
    yield case("token_stats", "four streams at once", streams)
    yield case("cross_entropy", "tensors on a second GPU, which is not the current one", second_gpu)
    for model in ("GPT2", "Llama"):
        yield case("huggingface.enable", f"{model} in training", enable, model)


def _vocab(context: Context) -> int:
    return 300 if context.dry else 50257


def many_logits(context: Context, schedule: dict[str, Any]) -> float:
    """Check logits with equal rows. So a few rows tell what all rows must be."""
    rows, vocab = (6, 300) if context.dry else (43_000, 50_000)
    _demand_memory(context, 2 * rows * vocab * 2.1)
    x = torch.randn(vocab, device=context.device).to(HALF).expand(rows, vocab).contiguous()
    target = torch.arange(rows, device=context.device) % vocab
    target[-2] = -100
    few = [0, 1, rows // 2, rows - 2, rows - 1]
    small = x[few].clone().requires_grad_()
    chunked_ce.cross_entropy(small, target[few], reduction="sum", backend=BACKEND).backward()
    expected = chunked_ce.token_stats(small.detach(), target[few], backend=BACKEND)
    stats = chunked_ce.token_stats(x, target, backend=BACKEND)
    near("lse", stats.lse[few], expected.lse, 1e-6)
    near("logprob", stats.logprob[few], expected.logprob, 1e-6)
    logits, grads = own(x)
    chunked_ce.cross_entropy(
        logits, target, reduction="sum", inplace_backward=True, backend=BACKEND, **schedule
    ).backward()  # fmt: skip
    demand(grads[0].data_ptr() == x.data_ptr(), "the gradient is not in place")
    demand(not grads[0][-2].any(), "the gradient of an ignored row is not 0")
    assert small.grad is not None
    return near("gradient", grads[0][few], small.grad, 2.0**-7, 1e-9)


def _demand_memory(context: Context, needed: float) -> None:
    if not context.dry and (free := torch.cuda.mem_get_info()[0]) < needed:
        raise NotHere(f"needs {needed / 2**30:.1f} GiB of {free / 2**30:.1f}")


def far_rows(context: Context) -> float:
    rows, vocab, row_stride = 3, 100, 1000 if context.dry else 2**31 + 8
    _demand_memory(context, 2.0 * (2 * row_stride + vocab))
    store = torch.empty(2 * row_stride + vocab, dtype=HALF, device=context.device)
    x = store.as_strided((rows, vocab), (row_stride, 1))
    x.copy_(torch.randn(rows, vocab, device=context.device))
    # Rows that start alike in 16 bytes: the order of a sum follows that.
    small = torch.empty(rows, 104, dtype=HALF, device=context.device)[:, :vocab].copy_(x)
    target = torch.tensor([0, 50, 99], device=context.device)
    got, expected = (chunked_ce.token_stats(rows, target, backend=BACKEND) for rows in (x, small))
    demand(torch.equal(got.lse, expected.lse), f"lse {got.lse}, expected {expected.lse}")
    return 0.0


def _problem(context: Context, tokens: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states [N, D] and weight [V, D] that want gradients, and targets."""
    n, d, v = (6, 8, 300) if context.dry else (256, 256, 50257)
    n = tokens or n
    h = torch.randn(n, d, device=context.device, dtype=HALF).requires_grad_()
    w = (torch.randn(v, d, device=context.device) * d**-0.5).to(HALF).requires_grad_()
    return h, w, torch.randint(v, (n,), device=context.device)


def _loss(kernel: str, h: Tensor, w: Tensor, target: Tensor, **options: Any) -> Tensor:
    loss: Tensor
    if kernel == "linear_cross_entropy":
        loss = chunked_ce.linear_cross_entropy(h, w, target, backend=BACKEND, **options)
    else:
        loss = chunked_ce.cross_entropy(F.linear(h, w), target, backend=BACKEND, **options)
    return loss


def _compare(h: Tensor, w: Tensor, target: Tensor, loss: Tensor, grad: Tensor) -> float:
    """Compare with eager in fp32 from the same logits on."""
    eager = h.detach().clone().requires_grad_()
    truth = F.cross_entropy(F.linear(eager, w.detach()).float(), target)
    (expected,) = torch.autograd.grad(truth, eager)
    near("loss", loss, truth, LOSS_LIMIT)
    return near_norm("input's gradient", grad, expected, NORM_LIMIT)


def graph(context: Context, kernel: str, options: dict[str, Any]) -> float:
    h, w, target = _problem(context)
    held: list[Tensor] = []

    def step() -> None:
        h.grad = w.grad = None
        loss = _loss(kernel, h, w, target, **options)
        loss.backward()
        assert h.grad is not None
        held[:] = loss.detach(), h.grad

    replay = step if context.dry else _captured(step)
    errors = []
    for _ in range(2):
        with torch.no_grad():
            h.normal_()
            target.random_(w.shape[0])
        replay()
        errors.append(_compare(h, w, target, *held))
    return max(errors)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def compiled(context: Context, kernel: str) -> float:
    torch.compiler.reset()
    function = torch.compile(
        partial(_loss, kernel), fullgraph=True, backend="aot_eager" if context.dry else "inductor"
    )
    errors = []
    for tokens in (3, 5, 6) if context.dry else (128, 200, 333):
        h, w, target = _problem(context, tokens)
        loss = function(h, w, target)
        (grad,) = torch.autograd.grad(loss, h)
        errors.append(_compare(h, w, target, loss, grad))
    return max(errors)


def no_wait(context: Context) -> float:
    x, target = logits(context, 4 if context.dry else 64, _vocab(context), HALF)
    h, w, labels = _problem(context)

    def everything() -> None:
        for options in ({}, SUMS, dict(grad_in_forward=True)):
            leaf = x.detach().requires_grad_()
            chunked_ce.cross_entropy(leaf, target, backend=BACKEND, **options).backward()  # type: ignore[arg-type]
        _loss("linear_cross_entropy", h, w, labels).backward()
        leaf, index = x.detach().requires_grad_(), target[:, None].clamp(min=0)
        chunked_ce.binary_cross_entropy_with_logits(leaf, index, backend=BACKEND).backward()

    everything()  # compiles
    if context.dry:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0


def streams(context: Context) -> float:
    x, target = logits(context, 4 if context.dry else 512, _vocab(context), HALF)
    expected = chunked_ce.token_stats(x, target, backend=BACKEND).lse
    context.synchronize()
    several: list[AbstractContextManager[Any]] = [
        nullcontext() if context.dry else torch.cuda.stream(torch.cuda.Stream()) for _ in range(4)
    ]
    found = []
    for _ in range(1 if context.dry else 5):
        for stream in several:
            with stream:
                found.append(chunked_ce.token_stats(x, target, backend=BACKEND).lse)
    context.synchronize()
    differing = sum(not torch.equal(lse, expected) for lse in found)
    demand(not differing, f"{differing} of {len(found)} launches differ")
    return 0.0


def second_gpu(context: Context) -> float:
    if context.dry or torch.cuda.device_count() < 2:
        raise NotHere("there is no second GPU")
    x, target = logits(context, 64, _vocab(context), HALF)
    results = []
    for device in ("cuda:0", "cuda:1"):  # cuda:0 stays the current one
        leaf = x.to(device).requires_grad_()
        loss = chunked_ce.cross_entropy(leaf, target.to(device), backend=BACKEND)
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach().cpu(), leaf.grad.cpu()))
    demand(torch.equal(results[0][0], results[1][0]), "another loss than on the first GPU")
    return near("gradient", results[1][1], results[0][1], 0.0)


def enable(context: Context, name: str) -> float:
    """Compare a step with the model's own loss and one with ours."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        from chunked_ce import huggingface
    except ImportError as error:
        raise NotHere(f"transformers cannot be imported: {error}") from error
    width, length = (16, 8) if context.dry else (256, 128)
    vocab = _vocab(context)
    sizes: dict[str, dict[str, Any]] = {
        "GPT2": dict(n_positions=128, n_layer=2, n_head=4, n_embd=width,
                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "Llama": dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=4),
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name.lower(), vocab_size=vocab, bos_token_id=0, eos_token_id=0, **sizes[name]
    )
    model = AutoModelForCausalLM.from_config(config).to(context.device).train()
    ids = torch.randint(vocab, (2, length), device=context.device)
    results = []
    for ours in (False, True):
        model.zero_grad()
        handle = huggingface.enable(model) if ours else None
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        if handle is not None:
            handle.disable()
    (loss, grad), (our_loss, our_grad) = results
    near("loss", our_loss, loss, LOSS_LIMIT)
    return near_norm("gradient", our_grad, grad, 1e-3)
