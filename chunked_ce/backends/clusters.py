"""Decide whether the one-pass kernel may spread a row over a cluster of CTAs on a GPU.

Triton's reductions across CTAs are new in 3.8. So clusters are used only on a GPU where `check`
found that they agree with the streamed form. `chunked-ce doctor` runs `check`.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..core.head import Head


def record_path() -> Path:
    """Return the path of the recorded results, in $CHUNKED_CE_CACHE or the user's cache folder."""
    home = os.environ.get("CHUNKED_CE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "chunked_ce"
    )
    return Path(home) / "clusters.json"


@cache
def is_verified(device: torch.device) -> bool:
    """Return whether clusters are recorded as correct on this GPU with these versions."""
    if not is_supported(device):
        return False
    return _read().get(_key(device)) is True


def is_supported(device: torch.device) -> bool:
    """Return whether GPU and Triton support clusters: sm_90 and Triton 3.8, or later."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return triton_supports_clusters() and torch.cuda.get_device_capability(device) >= (9, 0)


def triton_supports_clusters() -> bool:
    """Return whether Triton can reduce across CTAs. Up to 3.7 its compiler fails."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version >= (3, 8)


def check(device: torch.device) -> bool:
    """Compare clusters of 2, 4 and 8 CTAs with the streamed form, and record whether they agree."""
    if not is_supported(device):
        return False
    right = all(
        _agrees(columns, dtype, device)
        for columns in (32000, 50257, 131072)
        for dtype in (torch.bfloat16, torch.float16)
    )
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_read() | {_key(device): right}, indent=1))
    is_verified.cache_clear()
    return right


def _agrees(columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    from . import triton as backend_triton

    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(300, columns, generator=generator)).to(dtype).to(device)
    target = torch.randint(columns, (300,), generator=generator).to(device)
    target[::7] = -100

    def run(on_clusters: bool) -> tuple[Tensor, Tensor]:
        return backend_triton.loss_and_gradient(
            x, target, None, None, 0.0, 0.0, -100, columns, Head(None, 1.0),
            inplace=False, on_clusters=on_clusters,
        )  # fmt: skip

    (loss, grad), (true_loss, true_grad) = run(True), run(False)
    rtol = torch.finfo(dtype).eps
    return torch.allclose(loss, true_loss, rtol=1e-5, atol=1e-6) and torch.allclose(
        grad.float(), true_grad.float(), rtol=rtol, atol=1e-7
    )


def _key(device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def _read() -> dict[str, bool]:
    try:
        record = json.loads(record_path().read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
