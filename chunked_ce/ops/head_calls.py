"""The calls of a head on chunks of hidden states, and what autograd says about each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..core.head import Head
from ..core.reduction import is_scored
from .chunks import Index, chunk_indices

AnyHead = Callable[[Tensor], Tensor]


class HeadCalls:
    """The calls of one head on all chunks of hidden states [N, D], the same whenever repeated."""

    def __init__(
        self, head: AnyHead, input: Tensor, target: Tensor, width: int, shared: Any
    ) -> None:
        ignore_index, self.vocab_size, softcap, logit_scale, self.backend, *chunking = shared
        rows, drop_ignored, self.acc_dtype, _ = chunking
        self.head, self.input, self.target, self.width = head, input, target, width
        self.ignore_index, self.transforms = ignore_index, Head(softcap, logit_scale)
        on_host = target.device.type == "cpu"
        backends.check_targets(target, self.vocab_size, ignore_index, on_host=on_host)
        self.indices = chunk_indices(target, ignore_index, rows, drop_ignored)
        self.ignored = None if drop_ignored else ~is_scored(target, ignore_index)
        self.with_grad, self.random = torch.is_grad_enabled(), RandomState(input.device)
        device = input.device.type
        enabled = torch.is_autocast_enabled(device)
        self.autocast = dict(dtype=torch.get_autocast_dtype(device), enabled=enabled)
        self.parameters: list[Tensor] = []
        self.dtype = input.dtype
        self._first: Chunk | None = None
        # Where no token counts, a row of zeros tells what wants a gradient, of zeros.
        index = self.indices[0] if self.indices else slice(0, 0)
        x = self._hidden_states(index) if self.indices else input.new_zeros(1, input.shape[1])
        state = checks.state_of_head(head)
        first = self._call(index, x)
        checks.unchanged_head(state, head)
        self._first = first if self.indices else None
        self.dtype = first.logits.dtype
        leaves = leaves_of(first.logits, getattr(head, "gathered", ()))
        self.parameters = [leaf for leaf in leaves if leaf is not first.x]
        self.sees_input = len(leaves) > len(self.parameters)  # not where the head detaches it
        if self.with_grad and input.requires_grad and not first.logits.requires_grad:
            checks.head_without_gradient()

    def __iter__(self) -> Iterator[Chunk]:
        first, self._first = self._first, None
        if first is None:
            self.random.restore()
        for i, index in enumerate(self.indices):
            if i == 0 and first is not None:
                yield first
                first = None
            else:
                yield self._call(index, self._hidden_states(index))

    def _hidden_states(self, index: Index) -> Tensor:
        x = self.input.detach()[index]
        return x if self.ignored is None else x.masked_fill(self.ignored[index][:, None], 0.0)

    def _call(self, index: Index, x: Tensor) -> Chunk:
        saved: list[int] = []

        def note(t: Tensor) -> Tensor:
            saved.append(_memory(t))
            return t

        with torch.autocast(x.device.type, **self.autocast), torch.set_grad_enabled(self.with_grad):  # type: ignore[arg-type]
            if self.with_grad:
                x = x.detach().requires_grad_(self.input.requires_grad)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                logits = self.head(x)
        checks.head_logits(logits, x, self.width)
        own = logits.grad_fn is not None and logits._base is None
        return Chunk(index, x, logits, own and _memory(logits) not in saved)


class Chunk:
    """A chunk's hidden states and logits, and whether its graph may lose what these hold."""

    def __init__(self, index: Index, x: Tensor, logits: Tensor, writable: bool) -> None:
        self.index, self.x, self.logits, self.writable = index, x, logits, writable

    def values(self) -> tuple[Tensor, bool]:
        """Return logits that kernels can read, and whether to write the gradient over them."""
        values = self.logits.detach()
        if values.stride(-1) == 1:
            return values, self.writable
        return values.contiguous(), True


class RandomState:
    """The random numbers of a device and of the CPU as they were, for a head with dropout."""

    def __init__(self, device: torch.device) -> None:
        module = getattr(torch, device.type, None)
        self.modules: list[Any] = [torch]
        if hasattr(module, "get_rng_state"):
            self.modules.append(module)
        self.states = [m.get_rng_state() for m in self.modules]

    def restore(self) -> None:
        for module, state in zip(self.modules, self.states, strict=True):
            module.set_rng_state(state)


class HeadGradients:
    """What chunks say about hidden states and parameters, added up."""

    def __init__(self, calls: HeadCalls, wanted: list[bool]) -> None:
        self.calls, (self.for_input, *self.for_parameters) = calls, wanted
        self.input = torch.zeros_like(calls.input) if self.for_input else None
        self.sums: list[Tensor | None] = [None for _ in calls.parameters]
        self.several = len(calls.indices) > 1

    def add(self, chunk: Chunk, grad: Tensor) -> None:
        parameters = zip(self.calls.parameters, self.for_parameters, strict=True)
        leaves = [chunk.x] * self.for_input + [p for p, wanted in parameters if wanted]
        if not chunk.logits.requires_grad or not leaves:
            return
        # What lies before the head may be shared by all chunks: it stays.
        found = iter(
            torch.autograd.grad(chunk.logits, leaves, grad, retain_graph=True, allow_unused=True)
        )
        if self.input is not None:
            of_input = next(found)
            if of_input is not None:
                self.input[chunk.index] = of_input
            elif self.calls.sees_input:
                checks.head_without_gradient()
        for i, wanted in enumerate(self.for_parameters):
            one = next(found) if wanted else None
            sum = self.sums[i]
            if one is None:
                continue
            if sum is not None:
                sum.add_(one)
            elif self.several:
                wide = torch.promote_types(one.dtype, self.calls.acc_dtype)
                self.sums[i] = one.to(wide, copy=True)
            else:
                self.sums[i] = one

    def finish(self) -> list[Tensor | None]:
        """Each rounded once, in memory of its own."""
        rounded: list[Tensor | None] = [self.input]
        memories: set[int] = set()
        given = zip(self.calls.parameters, self.sums, self.for_parameters, strict=True)
        for p, sum, wanted in given:
            if sum is None and wanted and not self.calls.indices:
                sum = torch.zeros_like(p, memory_format=torch.contiguous_format)
            if sum is not None:
                sum = sum.to(p.dtype)
                if _memory(sum) in memories or not sum.is_contiguous():
                    sum = sum.clone(memory_format=torch.contiguous_format)
                memories.add(_memory(sum))
            rounded.append(sum)
        return rounded


def _memory(t: Tensor) -> int:
    address: int = t.untyped_storage()._cdata
    return address


def leaves_of(logits: Tensor, gathered: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return the tensors that want a gradient and that the logits were computed from.

    Those that were `gathered` for all chunks are in the place of what they were gathered from.
    """
    found: dict[int, Tensor] = {}
    whole = {t.grad_fn: t for t in gathered if t.grad_fn is not None}
    seen, nodes = set(), [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        checks.head_of_fsdp(node.name() == "RegisterPostBackwardFunctionBackward")
        leaf = whole.get(node, getattr(node, "variable", None))
        if isinstance(leaf, Tensor):
            checks.head_of_fsdp(_is_freed(leaf))
            found[id(leaf)] = leaf
        if node not in whole:
            nodes += [following for following, _ in node.next_functions]
    return list(found.values())


def _is_freed(t: Tensor) -> bool:
    """Return whether FSDP2 has freed a gathered weight after the head's call."""
    plain = type(t) in (Tensor, torch.nn.Parameter)  # others may have no memory of their own
    return plain and t.numel() > 0 and not t.untyped_storage().size()
