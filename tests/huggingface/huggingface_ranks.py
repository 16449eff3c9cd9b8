"""One rank of test_huggingface_ranks.py: a training step of an enabled model, against one process."""

import contextlib
import functools
import sys
import tempfile
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from test_trainer import trainer_of, use
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from bench.huggingface import BATCH, VOCAB, LogitsMade, batch, build
from chunked_ce import evaluate_perplexity
from chunked_ce.huggingface import DeferredLogits, enable


def whole(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of all rows, transformers' own."""
    loss = model(**rows(slice(None))).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def rows(which: slice) -> dict[str, torch.Tensor]:
    """Four rows of labels, of which the ranks have two each."""
    return {n: torch.cat([t, t[:1]])[which] for n, t in batch().items()}


def check(gradients, model, loss, expected) -> None:
    """Ranks' gradients are averaged: each loss is a share of the mean times the ranks."""
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / dist.get_world_size(), expected)
    for n, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        name = n.removeprefix("module.")
        torch.testing.assert_close(grad, gradients[name], rtol=1e-5, atol=1e-6)


def step(model, rank: int, after: str = "whole", called: bool = False) -> torch.Tensor:
    """The loss times the ranks. `after`: whether the weight still exists after backward.

    called: whether the head makes the logits of its one chunk itself.
    """
    size = (BATCH + 1) // dist.get_world_size()
    mine = rows(slice(size * rank, size * (rank + 1)))
    items = (mine["labels"][:, 1:] != -100).sum()
    dist.all_reduce(items)
    with LogitsMade(rows=1) as made:
        outputs = model(**mine, num_items_in_batch=items)
        assert isinstance(outputs.logits, DeferredLogits)
        loss = outputs.loss * dist.get_world_size()
        loss.backward()
    assert made.count == 0 or called
    try:
        assert outputs.logits.argmax(-1).shape == mine["labels"].shape and after == "whole"
    except RuntimeError as error:
        assert "read it before" in str(error) and after == "freed"
    return loss.detach()


def evaluated(way: str) -> float:
    """Of ten rows as one batch, whose tokens the ranks count together."""
    model = build("Llama")
    use(way, model, **({"evaluation": True} if way == "enable" else {}))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        trainer = trainer_of(model, folder, per_device_eval_batch_size=10 // dist.get_world_size())
        return float(trainer.evaluate()["eval_loss"])


def perplexity_of_sharded() -> None:
    """Whether a group keeps the head's weight after forward or frees it, the NLL is the same."""
    ids = torch.arange(3, 40)[None] % VOCAB
    for name in ("Llama", "Gemma2"):
        expected = evaluate_perplexity(build(name), ids, context_length=8)
        for reshard in (True, False):
            model = build(name)
            for layer in model.model.layers:
                fully_shard(layer)
            if name == "Llama":
                fully_shard(model.lm_head, reshard_after_forward=reshard)
            fully_shard(model, reshard_after_forward=reshard)
            report = evaluate_perplexity(model, ids, context_length=8)
            assert abs(report.nll_sum / expected.nll_sum - 1) < 1e-6
            assert report.logits_stored or not reshard


def kept_head(gradients, rank: int, expected) -> None:
    """A head in a group that keeps its weight after forward, as accelerate makes it: two steps."""
    for enable_first in (True, False):
        model = build("Gemma2")
        if enable_first:
            enable(model)
        for layer in model.model.layers:
            fully_shard(layer)
        tail = [model.model.norm, model.model.embed_tokens, model.lm_head]
        fully_shard(tail, reshard_after_forward=False)
        fully_shard(model)
        if not enable_first:
            enable(model)
        for _ in range(2):
            model.zero_grad()
            check(gradients, model, step(model, rank, after="freed"), expected)


def with_head(called: bool):
    """Return a model with a linear head, or with one that is called and has no out_features."""
    model = build("Llama")
    if called:
        model.lm_head = torch.nn.Sequential(model.lm_head)
    return model


def head_of_its_own_group(rank: int) -> None:
    """Gathered once in a step, for forward and backward: FSDP2 would free it before the loss."""
    for called in (False, True):
        expected, gradients = whole(with_head(called))
        for enable_first in (True, False):
            model = with_head(called)
            handle = enable(model) if enable_first else None
            fully_shard(model.lm_head, reshard_after_forward=True)
            fully_shard(model)
            handle = handle or enable(model)
            for _ in range(2):
                model.zero_grad()
                with Gathers() as gathers:
                    check(gradients, model, step(model, rank, "freed", called), expected)
                groups = 2  # the model's and the head's; one rank has nothing to gather
                assert gathers.count == groups * (dist.get_world_size() > 1)
            handle.disable()
            with torch.no_grad():
                model(**rows(slice(2)))
            assert isinstance(next(model.lm_head.parameters()), DTensor)  # freed again


class Gathers(TorchDispatchMode):
    """Count the collectives that gather the pieces of a group's parameters."""

    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "allgather" in str(function)
        return function(*args, **(kwargs or {}))


def prepared(gradients, rank: int, expected) -> None:
    """By accelerate, whose FSDP2 groups are its own choice; enabled before and after."""
    for enable_first in (True, False):
        model = build("Gemma2")
        if enable_first:
            enable(model)
        parallel = Accelerator(cpu=True).prepare(model)
        if not enable_first:
            enable(model)
        check(gradients, parallel, step(parallel, rank), expected)

        model = build("Gemma2")
        if enable_first:
            enable(model)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Gemma2DecoderLayer"], cpu_ram_efficient_loading=False,
        )  # fmt: skip
        # An Accelerator asks for FSDP on a GPU alone; what it then calls runs on a CPU too.
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=None, is_fsdp2=True,
            device=torch.device("cpu"), mixed_precision="no", is_main_process=rank == 0,
            parallelism_config=None,
        )  # fmt: skip
        model = fsdp2_prepare_model(accelerator, model)
        if not enable_first:
            enable(model)
        check(gradients, model, step(model, rank, after="freed"), expected)


def step_without_labels(model, rank: int) -> torch.Tensor:
    """The same loss, by log-probabilities of the logits that the model returns."""
    size = (BATCH + 1) // dist.get_world_size()
    mine = rows(slice(size * rank, size * (rank + 1)))
    labels = mine["labels"][:, 1:]
    mask = labels != -100
    items = mask.sum()
    dist.all_reduce(items)
    logits = model(input_ids=mine["input_ids"]).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss = -(chosen * mask).sum() / items * dist.get_world_size()
    loss.backward()
    assert isinstance(logits, torch.Tensor) or logits._real is None
    return loss.detach()


class Outside(torch.nn.Module):
    """A module around a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs):
        return self.model(**kwargs)


def without_labels(rank: int) -> None:
    """DDP and FSDP2 find no loss among the outputs, and notice backward all the same."""

    def wrap_head(model):
        fully_shard(model.lm_head, reshard_after_forward=True)
        return fully_shard(model)

    def wrap_layers(model):
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    def wrap_outside(model):  # PEFT's models are such a group, around the enabled one
        return fully_shard(Outside(model))

    wraps = {
        "Llama": DistributedDataParallel,
        "Qwen2": functools.partial(DistributedDataParallel, find_unused_parameters=True),
        "Granite": functools.partial(DistributedDataParallel, static_graph=True),
        "Gemma2": fully_shard, "Mistral": wrap_head, "Qwen3": wrap_layers,
        "Cohere": wrap_outside,
    }  # fmt: skip
    for name, wrap in wraps.items():
        expected, gradients = whole(build(name))
        model = build(name)
        enable(model, without_labels=True)
        wrapped = wrap(model)
        for _ in range(2):
            model.zero_grad()
            check(gradients, model, step_without_labels(wrapped, rank), expected)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    expected, gradients = whole(build("Gemma2"))

    model = build("Gemma2")
    enable(model)
    parallel = DistributedDataParallel(model)
    check(gradients, parallel, step(parallel, rank), expected)

    for enable_first in (True, False):
        model = build("Gemma2")
        if enable_first:
            enable(model)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        if not enable_first:
            enable(model)
        check(gradients, model, step(model, rank, after="freed"), expected)

    without_labels(rank)
    head_of_its_own_group(rank)
    perplexity_of_sharded()
    kept_head(gradients, rank, expected)
    prepared(gradients, rank, expected)
    losses = [evaluated(way) for way in ("transformers", "causal_lm_loss", "enable")]
    torch.testing.assert_close(torch.tensor(losses), torch.full((3,), losses[0]), rtol=1e-6, atol=0)
    dist.destroy_process_group()
    said = f"eval_loss {losses[0]}\n" if rank == 0 else ""
    sys.stdout.write(f"{said}rank {rank} agrees\n")  # at once: the ranks share one output


if __name__ == "__main__":
    sys.exit(main())
