"""Where tests run. Without a GPU the kernels run in Triton's interpreter; under ttsem's sanitizer, and
on a GPU, compiled. The `device` fixture says where tensors go, so that one test serves all three."""

import contextlib
import importlib
import os
import sys
from importlib.util import find_spec

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # the workers share the cores: a spinning thread is in the way
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
import triton_interpreter

SANITIZED = "ttsem" in sys.modules
ON_GPU = torch.cuda.is_available() and not SANITIZED
if not (SANITIZED or ON_GPU):
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None

USERS_OF_LOSSES = ("bench", "cli", "evaluation", "examples", "huggingface")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        action="store_true",
        help="only tests whose tensors are on the GPU, if there is one",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Versions that do not work together are no fault of a kernel: say so before a test fails."""
    from bench.gpu.versions import installed_interpreter_fault

    if INTERPRETED and (fault := installed_interpreter_fault()):
        raise pytest.UsageError(fault)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A GPU and the sanitizer execute kernels, so other backends are left out.

    The sanitizer models neither torch's own tracers nor tiles of the real sizes."""
    if not (SANITIZED or config.getoption("--kernels")):
        return
    beyond_it = {"framework", "real_sizes"} if SANITIZED else set()
    kernels = [
        item
        for item in items
        if "device" in item.fixturenames
        and (not SANITIZED or getattr(item, "callspec", None))
        and not (SANITIZED and item.path.parent.name in USERS_OF_LOSSES)
        and _parameter(item, "backend", "triton") not in ("torch", "cpu")
        and not beyond_it & set(item.keywords)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kernels])
    items[:] = kernels


def _parameter(item: pytest.Item, name: str, default: str) -> str:
    return item.callspec.params.get(name, default) if hasattr(item, "callspec") else default


@pytest.fixture
def device() -> str:
    """Where a kernel's tensors live."""
    return "cuda" if SANITIZED or ON_GPU else "cpu"


@pytest.fixture(params=["torch", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        from chunked_ce.backends import cpu_library

        if ON_GPU or not cpu_library.IS_AVAILABLE:
            pytest.skip("the CPU kernels are not built, or tensors are on a GPU")
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and blocks so small that a row of 100 logits spans several; real ones where users of losses are tested."""
    if "real_sizes" in request.keywords or request.path.parent.name in USERS_OF_LOSSES:
        return
    from chunked_ce.backends import torch_blocks

    monkeypatch.setattr(torch_blocks, "WIDTH", 60)
    monkeypatch.setattr(torch_blocks, "ELEMENTS", 150)
    try:
        from chunked_ce.backends import gpu
        from chunked_ce.kernels import launch
    except ImportError:
        return
    row = launch.Row(groups=16, num_warps=1)
    monkeypatch.setattr(launch, "GENERIC", row)
    monkeypatch.setattr(launch, "TABLE", dict.fromkeys(launch.TABLE, row))
    monkeypatch.setattr(launch, "STREAMED_TABLE", {})
    monkeypatch.setattr(launch, "SMALLEST_GROUPS", 16)
    monkeypatch.setattr(launch, "SEGMENT", 256)
    monkeypatch.setattr(launch, "SPAN_TILES", 2)
    monkeypatch.setattr(launch, "MERGE_ROWS", 4)
    monkeypatch.setattr(launch, "SCALE_BLOCK", 64)
    monkeypatch.setattr(gpu, "architecture", lambda device: "generic")


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    if INTERPRETED:
        # Now, and not within a test that leaves TRITON_INTERPRET out: kernels are decorated once.
        with contextlib.suppress(ImportError):
            for module in ("triton", "triton_binary", "triton_pair", "triton_shard"):
                importlib.import_module(f"chunked_ce.backends.{module}")
        triton_interpreter.prepare()
