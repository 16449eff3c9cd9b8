"""Every piece of Python in README and docs/ runs as it stands: a fresh namespace, a temporary folder."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT, block_of, blocks_of, run_block

TORCHRUN = "docs/distributed.md"  # programs: tests/distributed/test_distributed_page.py runs them
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(page, block, id=f"{page}-{i}")
    for page in PAGES
    if page != TORCHRUN
    for i, block in enumerate(blocks_of(page))
]
EXTRAS = {"transformers", "peft", "trl", "tokenizers"}


def imports_of(block: str) -> set[str]:
    """Return the top-level packages that a block imports."""
    found = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_the_blocks_are_found():
    assert len(BLOCKS) > 25
    fences = sum((ROOT / page).read_text("utf-8").count("```python") for page in PAGES)
    assert fences == sum(len(blocks_of(page)) for page in PAGES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_a_block_runs_as_it_stands(
    page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in imports_of(block) & EXTRAS:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block, page, "exec"), {"__name__": "__main__"})


def test_before_and_after_agree() -> None:
    """README's two blocks: one loss, one gradient of the hidden states and of the head."""
    found = []
    for containing in ("F.cross_entropy", "shift=True"):
        torch.manual_seed(0)
        names = run_block("README.md", containing)
        found.append((names["loss"], names["hidden"].grad, names["lm_head"].weight.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_what_numerics_prints() -> None:
    page = (ROOT / "docs/numerics.md").read_text("utf-8")
    block = block_of("docs/numerics.md", "20.0, 0.0, 0.0")
    said = re.search(re.escape(block) + r"```\n\n```\n(.*?)```", page, re.DOTALL)[1]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(block, {})
    assert printed.getvalue() == said


def test_the_plan_has_the_planners_rows() -> None:
    from chunked_ce.planner import HeadShape, plan

    page = (ROOT / "docs/planner-and-doctor.md").read_text("utf-8")
    shown = re.findall(r"^(\S.*?) {2,}\d+\.\d\d +\d+% ", page, re.M)
    assert shown == [e.name for e in plan(HeadShape(128256, 4096), 8192)]
