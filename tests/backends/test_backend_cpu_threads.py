"""Tests of the C kernels' threads: forks, signals, concurrent callers, failing starts, bad libraries.

Each case runs in its own process. A deadlock ends after a minute.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from chunked_ce import backends, cross_entropy
from chunked_ce.backends import cpu_library
from chunked_ce.core.gradient import Coefficients
from chunked_ce.core.head import Head

pytestmark = [
    pytest.mark.skipif(not cpu_library.IS_AVAILABLE, reason="no C compiler built them"),
    pytest.mark.skipif(sys.platform != "linux", reason="/proc, fork"),
]

PRELUDE = """
import ctypes, multiprocessing, os, resource, signal, sys, threading, time
import torch
from chunked_ce import cross_entropy, token_stats
from chunked_ce.backends import cpu

def batch(seed, rows=24, vocab=30_000):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=generator) * 4
    return x, torch.randint(vocab, (rows,), generator=generator)

BATCHES = {}  # torch's own threads do not survive a fork: none of them in a child

def results(seed):
    if seed not in BATCHES:
        BATCHES[seed] = batch(seed)
    x, target = BATCHES[seed]
    stats = token_stats(x, target, entropy=True, backend="cpu")
    return torch.stack([stats.lse, stats.logprob, stats.entropy])

def is_right(seed, expected):
    return all(torch.equal(results(seed), expected) for _ in range(5))

def most_threads(call, wanted=0):
    "How many more threads there are during a call than before it; on busy cores one looks again."
    for _ in range(40):
        most = threads_seen(call)
        if most >= wanted:
            break
        time.sleep(0.25)
    return most

def threads_seen(call):
    count = lambda: len(os.listdir("/proc/self/task"))
    most, stop = [0], threading.Event()
    def watch():
        while not stop.is_set():
            most[0] = max(most[0], count())
    watcher = threading.Thread(target=watch)
    watcher.start()
    before = count()
    call()
    stop.set()
    watcher.join()
    return most[0] - before

# Rows that are one in memory: a call of a second or so, of no size
large = torch.randn(1, 200_000).expand(1000, -1)
classes = torch.zeros(1000, dtype=torch.long)
def large_call():
    return token_stats(large, classes, softcap=30.0, entropy=True, backend="cpu")
"""


def run(tmp_path, program, root=ROOT, **environment):
    file = tmp_path / "program.py"
    body = "".join(f"    {line}\n" for line in program.strip().splitlines())
    file.write_text(f'{PRELUDE}\nif __name__ == "__main__":\n{body}')
    done = subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


FORK = """
torch.set_num_threads(4)
expected = results(1)
if {busy}:
    threading.Thread(target=lambda: [large_call() for _ in range(9)], daemon=True).start()
    time.sleep(0.1)
children = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if is_right(1, expected) else 1)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children], is_right(1, expected))
sys.stdout.flush()
os._exit(0)  # the other call is not waited for
"""


@pytest.mark.parametrize("busy", [False, True], ids=["after a call", "in the midst of another's"])
def test_fork(tmp_path, busy):
    assert run(tmp_path, FORK.format(busy=busy)) == "[0, 0, 0, 0, 0] True"


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_worker_processes(tmp_path, method):
    program = f"""
torch.set_num_threads(3)
expected = [results(seed) for seed in range(3)]
with multiprocessing.get_context("{method}").Pool(2) as pool:
    print(pool.starmap(is_right, enumerate(expected)))
"""
    assert run(tmp_path, program) == "[True, True, True]"


def test_concurrent_callers(tmp_path):
    program = """
torch.set_num_threads(3)
expected, right = [results(seed) for seed in range(4)], [False] * 4
def check(seed):
    right[seed] = is_right(seed, expected[seed])
callers = [threading.Thread(target=check, args=(seed,)) for seed in range(4)]
[c.start() for c in callers], [c.join() for c in callers]
print(right)
"""
    assert run(tmp_path, program) == "[True, True, True, True]"


def test_ctrl_c_during_call(tmp_path):
    """Send SIGINT after the first row is written and before the last; then all rows are written."""
    program = """
from chunked_ce.core.gradient import Coefficients
from chunked_ce.core.head import Head
torch.set_num_threads(2)
x, target = batch(1, 400, 50_000)
stats = token_stats(x, target, softcap=30.0, backend="cpu")
arguments = (target, stats.lse, stats.logprob, torch.zeros(400))
arguments += (Coefficients(torch.ones(400), None, None, None), -100, 50_000, Head(30.0, 1.0))
expected = cpu.logits_gradient(x, *arguments, inplace=False)
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
in_midst = False
for _ in range(20):
    y = x.clone()
    memory = (ctypes.c_float * y.numel()).from_address(y.data_ptr())
    def interrupt(first=memory[0], last=memory[len(memory) - 1]):
        global in_midst
        while memory[0] == first:
            pass
        in_midst = memory[len(memory) - 1] == last
        os.kill(os.getpid(), signal.SIGINT)
    other = threading.Thread(target=interrupt)
    other.start()
    try:
        cpu.logits_gradient(y, *arguments, inplace=True)
        other.join()
        time.sleep(1)  # one that came between the call's end and here
    except KeyboardInterrupt:
        assert torch.equal(y, expected)
    else:
        raise AssertionError("no KeyboardInterrupt")
    other.join()
    if in_midst:
        break
print(in_midst)
"""
    assert run(tmp_path, program) == "True"


def test_number_of_threads(tmp_path):
    program = """
for threads in (1, 2, 5):
    torch.set_num_threads(threads)
    print(most_threads(large_call, threads - 1), end=" ")
"""
    assert run(tmp_path, program) == "0 1 4"


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.long), 2])
def test_number_of_threads_from_the_environment(tmp_path, threads):
    """Compare with torch, which uses at most as many threads as there are cores."""
    program = (
        "wanted = torch.get_num_threads() - 1; print(wanted, most_threads(large_call, wanted))"
    )
    wanted, found = map(int, run(tmp_path, program, OMP_NUM_THREADS=str(threads)).split())
    assert found == wanted < threads


def test_number_of_threads_small_calls(tmp_path):
    program = """
torch.set_num_threads(4)
x, target = batch(1, 8, 1000)
print(most_threads(lambda: [token_stats(x, target, backend="cpu") for _ in range(2000)]))
"""
    assert run(tmp_path, program) == "0"


def test_thread_start_failure(tmp_path):
    """Leave no address space for stacks: then the caller's own thread does all the work."""
    program = """
torch.set_num_threads(1)
expected = results(1)
torch.set_num_threads(4)
x, target = batch(1)
def call():
    for _ in range(20):
        stats = token_stats(x, target, entropy=True, backend="cpu")
        found = torch.stack([stats.lse, stats.logprob, stats.entropy])
        assert torch.equal(found, expected)
token_stats(x[:1, :100], target[:1] % 100, entropy=True, backend="cpu")
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
threading.stack_size(1 << 18)  # of the watcher
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
limited = most_threads(call)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(limited, most_threads(call, 3) >= 3)
"""
    assert run(tmp_path, program) == "0 True"


def damage(file: Path, damage_kind: str) -> None:
    content = file.read_bytes()
    if damage_kind == "of another architecture":
        assert content[:4] == b"\x7fELF"
        other = b"\xf3\x00" if content[18:20] != b"\xf3\x00" else b"\x3e\x00"  # RISC-V, x86-64
        content = content[:18] + other + content[20:]
    elif damage_kind == "cut off":
        content = content[: len(content) // 3]
    else:
        content = b"#!/bin/sh\n"
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage_kind",
    [
        pytest.param("of another architecture", marks=pytest.mark.long),
        "cut off",
        pytest.param("no library", marks=pytest.mark.long),
    ],
)
def test_library_load_failure(tmp_path, damage_kind):
    """Expect one warning with the file name; "auto" uses plain PyTorch, and "cpu" raises."""
    shutil.copytree(ROOT / "chunked_ce", tmp_path / "chunked_ce", dirs_exist_ok=True)
    for file in (tmp_path / "chunked_ce" / "backends").glob("cpu_*.bin"):
        damage(file, damage_kind)
    program = f"""
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from chunked_ce import cross_entropy
    from chunked_ce import backends
    from chunked_ce.backends import cpu_library
texts = [str(w.message) for w in caught if "CPU kernels" in str(w.message)]
assert len(texts) == 1 and {str(tmp_path)!r} in texts[0], texts
x, target = torch.randn(3, 50), torch.tensor([1, 2, 49])
assert backends.choose_backend("auto", x.device) == "torch"
loss = cross_entropy(x, target)
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, target))
try:
    cross_entropy(x, target, backend="cpu")
except ValueError as error:
    print(error)
"""
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "install a C compiler" in done.stdout


def test_fake_tensors_error():
    x, target = torch.empty(3, 5, device="meta"), torch.empty(3, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match="on the CPU, but input is on meta"):
        cross_entropy(x, target, backend="cpu")


def test_gradient_keeps_saved_inputs():
    x, target = torch.randn(3, 50), torch.tensor([1, -100, 4])
    arguments = [torch.full((3,), 7.0) for _ in range(4)]
    grad = backends.logits_gradient(
        "cpu", x, target, *arguments[:3], Coefficients(None, None, arguments[3], None), -100, 50,
        Head(None, 1.0), inplace=False,
    )  # fmt: skip
    assert all((t == 7.0).all() for t in arguments) and (grad[1] == 0).all()
