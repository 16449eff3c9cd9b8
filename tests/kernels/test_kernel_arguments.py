"""Tests of the kernels' arguments: their number, and the kinds for which Triton compiles anew."""

import ast
import inspect
import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
from helpers import ROOT

pytest.importorskip("triton")
from chunked_ce.kernels.arguments import NOT_SPECIALIZED, encode
from chunked_ce.kernels.rows import decode

KERNELS = (
    "token_stats", "merge_parts", "token_grad", "loss_and_grad", "binary", "scale",
    "pair_stats", "pair_grad",
)  # fmt: skip
FILES = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "chunked_ce/backends").glob("triton*.py")]
# Prints, for each kernel, what Triton keeps compiled code under: of launches that differ in the
# number of rows, in V, in strides and in where the logits start; with --dtypes also in the dtype.
PROGRAM = """
import json, sys
from unittest import mock
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from bench.compiled import launches
from chunked_ce.backends import gpu, triton, triton_binary, triton_pair
from chunked_ce.core.divergence import Divergence, PairStats
from chunked_ce.core.gradient import Coefficients
from chunked_ce.core.head import Head
from chunked_ce.core.row_stats import ClassWeights

backend = make_backend(GPUTarget("cuda", 90, 32))
found = {}

def record(call):
    for launch in launches(call):
        kernel = launch.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, key, options = bind(**launch.arguments)
        found.setdefault(launch.name, set()).add(str((key, options)))

def calls(x, ignore_index):
    rows, vocab = x.numel() // x.shape[-1], x.shape[-1]
    target = torch.empty(rows, dtype=torch.int64)
    v = torch.empty(rows)
    head = Head(30.0, 0.5)
    everything = dict.fromkeys(("entropy", "mean_logprob", "rank", "argmax"), True)
    weights = ClassWeights(torch.empty(vocab), x, 0.9, 0.1)
    arguments = (ignore_index, vocab, head)
    record(lambda: triton.row_statistics(x, target, *arguments, weights, **everything))
    numbers = Coefficients(v, v, v, v)
    record(lambda: triton.logits_gradient(
        x, target, v, v, v, numbers, *arguments, weights, inplace=True))
    record(lambda: triton.loss_and_gradient(
        x, target, v, v[0], 0.1, 1e-4, *arguments, inplace=True, on_clusters=False))
    record(lambda: triton.scale_(x, v))
    left_out = torch.empty(rows, 5, dtype=torch.int32)
    record(lambda: triton_binary.loss_sum(x, x, x, x, left_out))
    how, stats = Divergence("jsd", 0.3, 2.0), PairStats(*[v] * len(PairStats._fields))
    record(lambda: triton_pair.pair_stats(x, x, target == 0, how, vocab))
    record(lambda: triton_pair.pair_gradient(x, x, target == 0, stats, v, how, vocab, inplace=True))

for dtype in (torch.bfloat16, torch.float32) if "--dtypes" in sys.argv else (torch.bfloat16,):
    memory = torch.empty(40 * 60000, dtype=dtype)
    with mock.patch.object(gpu, "architecture", lambda device: "sm_90"):
        calls(memory[: 16 * 50304].view(16, 50304), -100)
        calls(memory[: 3 * 50257].view(3, 50257), -1)
        calls(memory[: 2 * 51200].view(2, 51200), 1)
        calls(memory[5 : 5 + 32 * 50001].view(32, 50001), 0)
        calls(memory[: 2 * 8 * 50016].view(2, 8, 50016)[:, :-1], 16)
print(json.dumps({name: len(keys) for name, keys in found.items()}))
"""


def kernel(name):
    file = "pair" if name.startswith("pair") else name
    return getattr(import_module(f"chunked_ce.kernels.{file}"), f"{name}_kernel")


@pytest.mark.parametrize("name", KERNELS)
def test_parameter_count(name):
    assert 1 <= len(inspect.signature(kernel(name).fn).parameters) <= 20


def test_parameter_count_covers_all_kernels():
    found = [
        node.name
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    ]
    assert sorted(found) == sorted(f"{name}_kernel" for name in KERNELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_and_function_length(path):
    source = path.read_text()
    assert source.count("\n") <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            docstring = ast.get_docstring(node) is not None
            lines = node.end_lineno - node.lineno + 1
            lines -= first.end_lineno - first.lineno + 1 if docstring else 0
            assert lines <= 50, f"{node.name}: {lines} lines"


def test_tuple_integers_specialization():
    """Check that no encoded integer is 1 or a multiple of 16, for which Triton compiles anew."""
    numbers = (0, 1, -1, 3, 4, 16, -100, 128256, 2**31 - 1, 2**31, 2**40)
    for number, encoded in zip(numbers, encode(*numbers), strict=True):
        assert encoded != 1 and encoded % 16 != 0
        assert decode.fn(encoded) == number


def test_not_specialized_names():
    names = {p for name in KERNELS for p in inspect.signature(kernel(name).fn).parameters}
    assert set(NOT_SPECIALIZED) <= names


def compiled_kinds(*arguments):
    """Run in its own process, because an interpreted Triton has no such keys."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.long
def test_compilation_count_other_sizes():
    """Vary rows, V, strides, the start of the logits and ignore_index: one compilation for all."""
    one = {f"{name}_kernel": 1 for name in KERNELS}
    assert compiled_kinds() == one
    assert all(n == 2 for n in compiled_kinds("--dtypes").values())  # what does compile anew
