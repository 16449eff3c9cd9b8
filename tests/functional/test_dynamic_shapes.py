"""Tests of torch.compile with any number of tokens and classes: one graph for all sizes."""

import inspect

import pytest
import torch

import chunked_ce as c

pytestmark = pytest.mark.framework
N, V, D, K = 0, 1, 8, 3  # tokens and classes by their place in the sizes below
SHAPES = {
    "x": (N, V), "y": (N,), "weight": (V,), "h": (N, D), "head": (V, D), "bias": (V,),
    "prob": (N, V), "labels": (N, V), "top": (N, K), "top_prob": (N, K), "token_weight": (N,),
    "teacher": (N, V), "teacher_h": (N, K), "teacher_head": (V, K),
}  # fmt: skip


def _sum(stats):
    return sum(s.float().square().sum() for s in stats if s is not None)


ALL = dict(entropy=True, mean_logprob=True, rank=True, argmax=True)
FUNCTIONS = {
    "plain": lambda x, y: c.cross_entropy(x, y),
    "each token": lambda x, y: c.cross_entropy(x, y, reduction="none").square().sum(),
    "options": lambda x, y, weight: c.cross_entropy(
        x, y, weight, label_smoothing=0.1, z_loss_weight=0.1, softcap=20.0, logit_scale=0.5
    ),
    "token weight": lambda x, y, token_weight: c.cross_entropy(
        x, y, token_weight=token_weight, grad_in_forward=True
    ),
    "probabilities": lambda x, prob, weight: c.cross_entropy(x, prob, weight, label_smoothing=0.1),
    "top k": lambda x, top, top_prob, weight: c.cross_entropy(
        x, (top, top_prob), weight, label_smoothing=0.1, spread_rest=True
    ),
    "statistics": lambda x, y, weight: _sum(c.token_stats(x, y, weight=weight, **ALL)),
    "head": lambda h, head, bias, y, token_weight: c.linear_cross_entropy(
        h, head, y, linear_bias=bias, token_weight=token_weight, z_loss_weight=0.1
    ),
    "head, weights": lambda h, head, y, weight: c.linear_cross_entropy(
        h, head, y, weight=weight, label_smoothing=0.1, token_chunk_size=4
    ),
    "head, probabilities": lambda h, head, prob: c.linear_cross_entropy(h, head, prob),
    "head, top k": lambda h, head, top, top_prob: c.linear_cross_entropy(h, head, (top, top_prob)),
    "head, statistics": lambda h, head, y, weight: _sum(
        c.linear_token_stats(h, head, y, weight=weight, **ALL)
    ),
    "distillation": lambda x, teacher, y, token_weight: c.kl_div(
        x, teacher, kind="jsd", target=y, token_weight=token_weight
    ),
    "distillation, heads": lambda h, head, teacher_h, teacher_head, bias, y: c.linear_kl_div(
        h, head, teacher_h, teacher_head, linear_bias=bias, target=y, cross_entropy_weight=0.5
    ),
    "binary": lambda x, labels, weight: c.binary_cross_entropy_with_logits(
        x, labels, weight, pos_weight=weight
    ),
    "binary by index": lambda x, top, weight: c.binary_cross_entropy_with_logits(
        x, top, pos_weight=weight
    ),
}


def _arguments(names, tokens, classes):
    generator = torch.Generator().manual_seed(tokens)
    arguments = []
    for name in names:
        dynamic = [i for i, size in enumerate(SHAPES[name]) if size in (N, V)]
        shape = [(tokens, classes)[s] if s in (N, V) else s for s in SHAPES[name]]
        if name == "y":
            t = torch.randint(0, classes, shape, generator=generator)
            t[0] = -100
        elif name == "top":
            t = torch.rand(tokens, classes, generator=generator).topk(K).indices
        else:
            t = torch.rand(shape, generator=generator)
        t = t / t.sum(-1, keepdim=True) if name in ("prob", "top_prob") else t
        if name in ("x", "h", "head", "bias"):
            t.sub_(0.5).requires_grad_()
        for i in dynamic:
            torch._dynamo.mark_dynamic(t, i)
        arguments.append(t)
    return arguments


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dynamic_tokens_and_classes(name):
    function = FUNCTIONS[name]
    names = list(inspect.signature(function).parameters)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens, classes, stance in ((6, 11, "default"), (9, 23, "fail_on_recompile")):
        arguments = _arguments(names, tokens, classes)
        leaves = [t for t in arguments if t.requires_grad]
        with torch.compiler.set_stance(stance):
            loss = compiled(*arguments)
        expected = function(*arguments)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
        )
