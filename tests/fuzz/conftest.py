"""How many cases a test here tries, from which seed, and how many it has tried.

`make test` and `make long` try the same cases every time. `make fuzz N=20000 SEED=7` tries N others, shared out
among the tests as their `cases` are; those that failed are kept in .hypothesis/fuzz, and tried first the next time.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.strategies import SearchStrategy

N, SEED = (int(os.environ.get(name) or 0) for name in ("FUZZ_CASES", "FUZZ_SEED"))
AT_LENGTH = 10  # times what the fast slice tries
TRIED: Counter[str] = Counter()
SHARES = pytest.StashKey[int]()


def pytest_report_header() -> str | None:
    return f"fuzz: {N} cases from seed {SEED}" if N else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "explore" in metafunc.fixturenames:
        slices = ["fuzz"] if N else ["fast", pytest.param("long", marks=pytest.mark.long)]
        metafunc.parametrize("explore", slices, indirect=True)


def _share(item: pytest.Item) -> int:
    marker = item.get_closest_marker("cases")
    return marker.args[0] if marker else 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[SHARES] = sum(map(_share, items))


@pytest.fixture
def explore(
    request: pytest.FixtureRequest,
) -> Callable[[SearchStrategy[Any], Callable[[Any], None]], None]:
    """Runs a check on so many cases of a strategy as this run has for the test."""
    share = _share(request.node)
    if N:
        cases = -(-N * share // request.config.stash[SHARES])
    else:
        cases = share * (AT_LENGTH if request.param == "long" else 1)
    name = re.sub(r"\W+", "_", request.node.name).strip("_")

    def run(strategy: SearchStrategy[Any], check: Callable[[Any], None]) -> None:
        def test(case: Any) -> None:
            TRIED[name] += 1
            check(case)

        test.__name__ = test.__qualname__ = name  # under which the failures are kept
        how = settings(
            max_examples=cases,
            deadline=None,
            derandomize=not N,
            database=DirectoryBasedExampleDatabase(".hypothesis/fuzz") if N else None,
            print_blob=bool(N),
            phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        hypothesis.seed(SEED)(how(hypothesis.given(strategy)(test)))()

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = dict(TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    TRIED.update(node.workeroutput.get("tried", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TRIED:
        terminalreporter.section("fuzz: cases tried")
        for name, count in sorted(TRIED.items()):
            terminalreporter.line(f"{count:8} {name}")
        terminalreporter.line(f"{TRIED.total():8} in all, seed {SEED}")
