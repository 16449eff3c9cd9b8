"""Mutation testing: a fault in one module, and whether the tests that decide about it notice.

    make mutate ARGS="chunked_ce/core/row_stats.py --count 20"

Mutants are drawn with a seed. Neither mutmut nor cosmic-ray fits: mutmut puts a dispatching copy in
the place of a function, of which @triton.jit cannot read the source, and does not see that
chunked_ce/kernels is a link to kernels/; cosmic-ray starts an interpreter for each mutant, and the
imports of torch and triton take longer than the tests that kill it. Here they are imported once and
the process is forked: each child writes its mutant into a copy of the package and runs pytest there.
The CPU kernels in C are built anew for each of their mutants, without vectors.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import c_operators
import operators
from operators import Mutant
from table import TESTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "mutation" / "results.csv"
PASSED, FAILED, NONE_RUN = 0, 1, 5  # of pytest


def copy_of_the_package(to: Path) -> None:
    """What tests need. The link chunked_ce/kernels stays one, so that both names see the mutant."""
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("chunked_ce", "kernels", "tests", "bench", "examples", "docs"):
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=junk)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, to)


def import_what_takes_long() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch.distributed  # noqa: F401
    import torch.nn.functional  # noqa: F401
    import torch.utils.checkpoint  # noqa: F401

    try:
        import triton.runtime.interpreter  # noqa: F401
    except ImportError:
        pass


def tests_fail(where: Path, tests: list[list[str]], log: Path) -> int:
    """In a child: pytest's exit code, of the first file to fail."""
    import pytest

    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(where)
    os.environ["PYTHONPATH"] = f"{where}{os.pathsep}{where / 'tests'}"
    sys.path[:0] = [str(where), str(where / "tests")]
    import chunked_ce

    assert Path(chunked_ce.__file__).is_relative_to(where), chunked_ce.__file__
    ran = False
    for arguments in tests:
        # One session after another in a process: pytest keeps the modules, so nothing is reloaded.
        code = pytest.main([*arguments, "-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"])
        if code not in (PASSED, NONE_RUN):
            return int(code)
        ran |= code == PASSED
    return PASSED if ran else NONE_RUN


def in_a_child(where: Path, tests: list[list[str]], limit: float) -> tuple[str, float]:
    """("passed", "failed" or "hung", seconds)."""
    began = time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            os._exit(tests_fail(where, tests, where / "log"))
        except BaseException:
            os._exit(FAILED)
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            assert code != NONE_RUN, f"no test was selected by {tests}"
            return "passed" if code == PASSED else "failed", time.monotonic() - began
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung", time.monotonic() - began


def is_c(module: str) -> bool:
    return module.endswith((".c", ".h"))


def build(where: Path) -> bool:
    """Return whether the CPU kernels compile."""
    backends = where / "chunked_ce" / "backends"
    for library in backends.glob("cpu_*.bin"):
        library.unlink()
    flags = "-std=gnu11 -O1 -w -fopenmp-simd -fno-math-errno -shared -fPIC -pthread"
    sources = sorted(map(str, (where / "kernels" / "cpu").glob("*.c")))
    command = ["gcc", *flags.split(), "-o", str(backends / "cpu_base.bin"), *sources, "-lm"]
    return subprocess.run(command, capture_output=True).returncode == 0


def sample(module: str, source: str, count: int, seed: int) -> list[Mutant]:
    found = (c_operators if is_c(module) else operators).mutants(source)
    chosen = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    return [found[i] for i in sorted(chosen)]


def time_without_a_fault(where: Path, module: str) -> float:
    outcome, seconds = in_a_child(where, TESTS[module], 3600)
    if outcome != "passed":
        sys.exit(f"{module}: its tests fail without a fault\n{(where / 'log').read_text('utf-8')}")
    print(f"{module}: tests take {seconds:.0f} s", flush=True)
    return seconds


def attack(
    module: str, count: int, seed: int, limit: float | None, lines: list[int]
) -> tuple[int, int]:
    """(mutants run, killed); prints what became of each."""
    source = (ROOT / module).read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder).resolve()
        copy_of_the_package(where)
        if is_c(module) and not build(where):
            sys.exit("the CPU kernels do not compile")
        if limit is None:
            limit = 3 * time_without_a_fault(where, module) + 10
        run = killed = 0
        for mutant in sample(module, source, count, seed):
            if lines and mutant.line not in lines:
                continue
            (where / module).write_text(mutant.source, "utf-8")
            if is_c(module) and not build(where):
                continue
            outcome, took = in_a_child(where, TESTS[module], limit)
            run, killed = run + 1, killed + (outcome != "passed")
            mark = "SURVIVED" if outcome == "passed" else outcome
            print(f"  {mark:8} {took:5.1f} s  {mutant}", flush=True)
    return run, killed


def record(rows: list[dict[str, object]]) -> None:
    """A row for each module, the latest run of it."""
    old = list(csv.DictReader(RESULTS.open(newline=""))) if RESULTS.exists() else []
    new = {str(row["module"]) for row in rows}
    rows = sorted(
        [*(r for r in old if r["module"] not in new), *rows], key=lambda r: str(r["module"])
    )
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["module", "seed", "mutants", "killed"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="default: all")
    parser.add_argument("--count", type=int, default=20, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, nargs="+", default=[], help="of these, those there")
    parser.add_argument(
        "--limit", type=float, help="seconds a mutant may take; default: 3 times what tests take"
    )
    parser.add_argument("--record", action="store_true", help="write results.csv")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(TESTS):
        parser.error(f"no tests are listed for {', '.join(sorted(unknown))}")
    if arguments.record and arguments.lines:
        parser.error("--record wants all mutants of a module: leave out --lines")
    import_what_takes_long()
    for module in arguments.modules:
        run, killed = attack(
            module, arguments.count, arguments.seed, arguments.limit, arguments.lines
        )
        print(f"{module}: {killed} of {run} killed", flush=True)
        if arguments.record:
            seed = arguments.seed
            record([{"module": module, "seed": seed, "mutants": run, "killed": killed}])


if __name__ == "__main__":
    main()
