"""How many cases a test here tries, from which seed, and how many it has tried.

`make test` and `make long` try the same cases every time. `make fuzz N=20000 SEED=7` tries N others, shared out
among the tests as their `cases` are; those that failed are kept in .hypothesis/fuzz, and tried first the next time.
The kernels run where the `device` fixture says: on a GPU where there is one, else in Triton's interpreter.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import cases
import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.strategies import SearchStrategy

from chunked_ce.backends import cpu_library

N, SEED = (int(os.environ.get(name) or 0) for name in ("FUZZ_CASES", "FUZZ_SEED"))
AT_LENGTH = 4  # times what the fast slice tries, where `cases` does not say how many
TRIED: Counter[str] = Counter()
SHARES = pytest.StashKey[int]()


def pytest_report_header() -> str | None:
    return f"fuzz: {N} cases from seed {SEED}" if N else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "explore" in metafunc.fixturenames:
        slices = ["fuzz"] if N else ["fast", pytest.param("long", marks=pytest.mark.long)]
        metafunc.parametrize("explore", slices, indirect=True)


def _share(item: pytest.Item, at_length: bool) -> int:
    marker = item.get_closest_marker("cases")
    if marker is None:
        return 0
    return marker.kwargs.get("long", marker.args[0] * AT_LENGTH) if at_length else marker.args[0]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[SHARES] = sum(_share(item, at_length=True) for item in items)


@pytest.fixture
def explore(request: pytest.FixtureRequest, device: str) -> Callable[..., None]:
    """Runs a check on so many cases of a strategy as this run has for the test."""
    at_length = request.param != "fast"
    tried = _share(request.node, at_length)
    if N:
        tried = -(-N * tried // request.config.stash[SHARES])
    name = re.sub(r"\W+", "_", request.node.name).strip("_")
    backend = request.node.callspec.params.get("backend")
    if backend == "triton":
        pytest.importorskip("triton")
    if backend == "cpu" and not cpu_library.IS_AVAILABLE:
        pytest.skip("the CPU kernels are not built")

    def run(strategy: SearchStrategy[Any], check: Callable[..., None]) -> None:
        def test(case: Any) -> None:
            TRIED[name] += 1
            if backend == "triton":
                with torch.device(device):
                    check(cases.on(device, case), backend)
            elif backend == "cpu":
                check(case, backend)
            else:
                check(case)

        test.__name__ = test.__qualname__ = name
        profile = settings(
            max_examples=tried,
            deadline=None,
            derandomize=not N,
            database=DirectoryBasedExampleDatabase(f".hypothesis/fuzz/{name}") if N else None,
            print_blob=bool(N),
            phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        profile(
            hypothesis.seed(SEED)(hypothesis.given(strategy)(test))
        )()  # seed() forgets the database

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = dict(TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    TRIED.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TRIED:
        terminalreporter.section("fuzz: cases tried")
        for name, count in sorted(TRIED.items()):
            terminalreporter.line(f"{count:8} {name}")
        terminalreporter.line(f"{TRIED.total():8} in all, seed {SEED}")
