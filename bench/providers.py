"""The one table of providers: name, form, how each is loaded, what it computes.

`load(device)` returns a loss that is called with (logits, target) or (input, weight, target), see
`cases`. Devices are "cpu", "cuda", and "interpreter": the CPU, with our kernels in Triton's
interpreter. Where a provider cannot run, `load` raises Unavailable with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import chunked_ce

from . import options
from .cases import BOTH, LINEAR, LOGITS, MODES, Case, Loss

EAGER, COMPILED, OURS = "eager", "torch.compile", "chunked_ce"
INPLACE = "chunked_ce inplace_backward"
ONE_PASS, ONE_PASS_INPLACE = (
    "chunked_ce grad_in_forward",
    "chunked_ce grad_in_forward inplace_backward",
)
STATS, ALL_STATS = f"{OURS} return_stats", f"{OURS} return_stats of all"
TORCH, CUT, LIGER = "F.linear_cross_entropy", "cut-cross-entropy", "liger"
CUT_FILTER = "cut-cross-entropy (filter)"
QUACK, FLASH = "quack", "flash-attn"
HEAD = "head + "  # the last layer by F.linear, then the loss from logits
BACKEND = "triton"  # of the kernels that `python -m bench gpu` measures


class Unavailable(Exception):
    """A provider cannot run here, with the reason."""


class Provider(NamedTuple):
    name: str
    form: str
    load: Callable[[str], Loss]
    computes: str
    exact: bool = False  # loss and gradients are rounded once
    compiles: bool = False  # its first call takes long
    overwrites: bool = False  # the logits, by their gradient
    passes: int = 3  # times that the logits are moved by forward and backward
    modes: tuple[str, ...] = MODES
    rests_on: tuple[str, ...] = ()  # kernels of `python -m bench gpu check`


def find(form: str, names: Iterable[str]) -> list[Provider]:
    """Return the providers of a form that have one of the names, in the table's order."""
    names = set(names)
    return [p for p in TABLE if p.form == form and p.name in names]


def why_not(provider: Provider, device: str) -> str:
    """Return why the provider cannot run on that kind of device, or "" where it can."""
    try:
        provider.load(device)
    except Unavailable as why:
        return str(why)
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and why a provider cannot run here."""
    options.parser_of("providers", __doc__).parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for p in TABLE:
        print(f"{p.name:52} {p.form:7} {p.computes:46} {why_not(p, device)}".rstrip())
    return 0


def bytes_needed(case: Case, provider: Provider) -> float:
    """Return the bytes of a step and its batch, from above."""
    parameters = 3 * (case.V + case.N) * case.D * 4  # themselves, gradients, sums
    stores_logits = provider.name in (EAGER, COMPILED) or provider.name.startswith(HEAD)
    if stores_logits or case.form == LOGITS:
        return parameters + 3 * case.logits_bytes  # log-softmax and two gradients
    if provider.name in (CUT, CUT_FILTER):  # float32, whatever the dtype
        return parameters + 4 * case.N * case.V * 4
    return parameters + (1 << 30)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error


def _plain(loss: Loss) -> Callable[[str], Loss]:
    return lambda device: loss


def _compiled(loss: Loss) -> Callable[[str], Loss]:
    """Compile, but in the interpreter, where the compiler's time is left out."""
    return lambda device: loss if device == "interpreter" else torch.compile(loss)


def _ours(loss: Loss, **options: Any) -> Callable[[str], Loss]:
    def load(device: str) -> Loss:
        return partial(loss, **options, **({} if device == "cpu" else {"backend": BACKEND}))

    return load


def _on_gpu(module: str, loss: str, **options: Any) -> Callable[[str], Loss]:
    def load(device: str) -> Loss:
        if device != "cuda":
            raise Unavailable("its kernels need a GPU")
        return partial(getattr(_module(module), loss), **options)

    return load


def _flash_attn(device: str) -> Loss:
    create: Any = _on_gpu("flash_attn.losses.cross_entropy", "CrossEntropyLoss")(device)
    return partial(create())


def _cut(device: str, **options: Any) -> Loss:
    if device != "cuda" and not options:
        raise Unavailable("its filter needs a GPU")
    implementation = "cce" if device == "cuda" else "torch_compile"
    loss = _module("cut_cross_entropy").linear_cross_entropy
    return partial(loss, impl=implementation, **options)


def _torch_linear(device: str) -> Loss:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has none with options")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, target: F.linear_cross_entropy(x, weight, target, options=options)


def _eager_linear(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def _eager_float32(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def _our_loss(*schedule: str) -> Provider:
    """Describe `cross_entropy` with some of `inplace_backward` and `grad_in_forward`."""
    one_pass = "grad_in_forward" in schedule
    kernel = " ".join(["cross_entropy", *schedule])
    return Provider(
        " ".join([OURS, *schedule]), LOGITS,
        _ours(chunked_ce.cross_entropy, **dict.fromkeys(schedule, True)),
        "gradient in one read of the logits" if one_pass else "statistics, then the gradient",
        exact=True, overwrites="inplace_backward" in schedule, passes=2 if one_pass else 3,
        modes=(BOTH,) if schedule else MODES,
        rests_on=(kernel,) if one_pass else ("token_stats", "cross_entropy", kernel),
    )  # fmt: skip


def _our_linear(name: str, computes: str, exact: bool = True, **options: Any) -> Provider:
    return Provider(
        name, LINEAR, _ours(chunked_ce.linear_cross_entropy, **options), computes, exact=exact,
        rests_on=("token_stats", "cross_entropy", "linear_cross_entropy"),
    )  # fmt: skip


def _with_stats(provider: Provider, name: str, wanted: bool | tuple[str, ...]) -> Provider:
    """Describe the loss that returns the statistics of its pass too."""

    def load(device: str) -> Loss:
        loss: Any = provider.load(device)
        return lambda *batch: loss(*batch, return_stats=wanted)[0]

    return provider._replace(name=name, load=load, computes=f"{provider.computes}; returns them")


def _behind_head(provider: Provider) -> Provider:
    """Describe the loss from logits after F.linear."""

    def load(device: str) -> Loss:
        loss = provider.load(device)
        return lambda x, weight, target: loss(F.linear(x, weight), target)

    return provider._replace(
        name=HEAD + provider.name, form=LINEAR, load=load, overwrites=False, modes=(BOTH,)
    )


_LIGER = "liger_kernel.transformers.functional"
_FROM_LOGITS = (
    Provider(EAGER, LOGITS, _plain(F.cross_entropy), "F.cross_entropy", passes=6),
    Provider(f"{EAGER} float32", LOGITS, _plain(_eager_float32), "the same in float32",
             exact=True, passes=14),
    Provider(COMPILED, LOGITS, _compiled(F.cross_entropy), "eager, compiled", compiles=True),
    Provider(LIGER, LOGITS, _on_gpu(_LIGER, "liger_cross_entropy"), "gradient over the logits",
             overwrites=True, modes=(BOTH,)),
    Provider(QUACK, LOGITS, _on_gpu("quack.cross_entropy", "cross_entropy", reduction="mean"),
             "statistics, then the gradient"),
    Provider(FLASH, LOGITS, _flash_attn, "statistics, then the gradient"),
    _our_loss(), _our_loss("inplace_backward"), _our_loss("grad_in_forward"),
    _our_loss("grad_in_forward", "inplace_backward"),
)  # fmt: skip
_LINEAR = (
    Provider(EAGER, LINEAR, _plain(_eager_linear), "F.linear, F.cross_entropy"),
    Provider(COMPILED, LINEAR, _compiled(_eager_linear), "eager, compiled", compiles=True),
    Provider(TORCH, LINEAR, _torch_linear, "torch's own chunks"),
    Provider(CUT, LINEAR, partial(_cut, filter_eps=None), "all gradients, logits never stored",
             compiles=True),
    Provider(CUT_FILTER, LINEAR, _cut, "small gradients left out", compiles=True),
    Provider(LIGER, LINEAR, _on_gpu(_LIGER, "liger_fused_linear_cross_entropy"),
             "chunks of tokens"),
    Provider(QUACK, LINEAR, _on_gpu("quack.linear_cross_entropy", "chunked_linear_cross_entropy",
             reduction="mean"), "chunks of tokens"),
    _our_linear(OURS, "chunks of tokens"),
    _our_linear(f"{OURS} sums in bfloat16", "weight's gradient added up in bfloat16", False,
                acc_dtype=torch.bfloat16),
    _our_linear(f"{OURS} 1 GiB chunks", "larger chunks of tokens", chunk_bytes=1 << 30),
)  # fmt: skip
_LOGGED = ("entropy", "rank", "argmax")
_STATS = tuple(
    _with_stats(provider, name, wanted)
    for provider in (_our_loss(), _our_linear(OURS, "chunks of tokens and their statistics"))
    for name, wanted in ((STATS, True), (ALL_STATS, _LOGGED))
)
_HEADED = (LIGER, QUACK, FLASH, OURS, INPLACE, ONE_PASS_INPLACE)
TABLE = (
    *_FROM_LOGITS, *_LINEAR, *_STATS, *(_behind_head(p) for p in _FROM_LOGITS if p.name in _HEADED)
)  # fmt: skip
