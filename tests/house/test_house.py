"""The measures that CONTRIBUTING.md gives for the house: short walks, short files, few parameters."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import chunked_ce
from chunked_ce.backends import cpu_library
from chunked_ce.evaluation import documents as evaluation_documents

LIBRARY = [p for p in sorted((ROOT / "chunked_ce").rglob("*.py")) if "kernels" not in p.parts]
# What the interpreter executes in Python and a GPU does not: only their addresses are the host's.
ON_DEVICE = {
    f"kernels/{name}.py"
    for name in ("rows", "online_softmax", "token_stats", "merge_parts", "token_grad")
}
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def files_crossed(call: Callable[[], object]) -> set[str]:
    """Which of the library's files run something, in every thread of this process."""
    seen: set[str] = set()

    def note(frame, event, argument):
        name = frame.f_code.co_filename
        if event == "call" and frame.f_code.co_name != "<module>":
            seen.add(name)

    call()  # what is imported or built at first use is no part of the walk
    import threading

    threading.setprofile_all_threads(note) if sys.version_info >= (3, 12) else None
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        if sys.version_info >= (3, 12):
            threading.setprofile_all_threads(None)
    ours = {Path(name) for name in seen if not name.startswith("<")}
    return {
        str(p.resolve().relative_to(ROOT))
        for p in ours
        if p.resolve().is_relative_to(ROOT) and "tests" not in p.parts and ".venv" not in str(p)
    }


def forward_backward(
    loss: Callable[..., torch.Tensor], *leaves: torch.Tensor, **options
) -> Callable[[], object]:
    target = torch.tensor([1, 2, -100, 4])

    def call() -> None:
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        loss(*given, target, **options).backward()

    return call


@pytest.mark.real_sizes
@pytest.mark.parametrize("backend, most", [("cpu", 9), ("triton", 12)])
def test_walk_of_cross_entropy(backend, most, request):
    if backend == "triton":
        pytest.importorskip("triton")
    elif not cpu_library.IS_AVAILABLE:
        pytest.skip("no C compiler built the CPU kernels")
    x = torch.randn(4, 100)
    crossed = files_crossed(forward_backward(chunked_ce.cross_entropy, x, backend=backend))
    assert len(crossed - ON_DEVICE) <= most, sorted(crossed)


def test_walk_of_linear_cross_entropy():
    x, w = torch.randn(4, 8), torch.randn(100, 8)
    crossed = files_crossed(forward_backward(chunked_ce.linear_cross_entropy, x, w))
    assert len(crossed) <= 12, sorted(crossed)


def test_entries():
    entries = {p.name for p in (ROOT / "chunked_ce").iterdir()} - {"__pycache__"}
    assert len(entries) <= 14, sorted(entries)


def test_files_are_short():
    long = {
        str(p.relative_to(ROOT)): n
        for p in [*LIBRARY, *KERNELS]
        if (n := len(p.read_text().splitlines())) > 300
    }
    assert not long


def test_functions_are_short():
    long = {}
    for path in [*LIBRARY, *KERNELS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                first = node.body[0]
                if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                    lines -= first.end_lineno - first.lineno + 1
                if lines > 50:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert not long


def test_calls_have_few_positional_booleans():
    many = []
    for path in [*LIBRARY, *KERNELS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                booleans = [
                    a
                    for a in node.args
                    if isinstance(a, ast.Constant) and isinstance(a.value, bool)
                ]
                if len(booleans) > 2:
                    many.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not many


def test_documents_former_import_path():
    module = importlib.import_module("chunked_ce.documents")
    assert module.from_text is evaluation_documents.from_text


@pytest.mark.long
def test_documents_former_import_path_before_torch():
    program = "from chunked_ce.documents import from_text; import chunked_ce; chunked_ce.documents"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
