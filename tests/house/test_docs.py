"""The API reference and the pages: built, complete, and no link leads nowhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from helpers import ROOT

import chunked_ce

PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
]


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.hrefs, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and found.get("href"):
            self.hrefs.append(found["href"])


def command():
    """Of `make docs`."""
    (line,) = (x for x in (ROOT / "Makefile").read_text().splitlines() if "-m pdoc" in x)
    return line.split("python", 1)[1].split()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    pytest.importorskip("pdoc")
    folder = tmp_path_factory.mktemp("docs")
    words = [str(folder) if word == "build/docs" else word for word in command()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.html")}


def test_every_public_name_is_in_the_reference(reference):
    ids = Links(reference["chunked_ce.html"].read_text()).ids
    assert set(chunked_ce.__all__) <= ids
    for name in chunked_ce.__all__:
        assert (getattr(chunked_ce, name).__doc__ or "").strip(), f"{name} has no docstring"
    assert "plan" in Links(reference["chunked_ce/planner.html"].read_text()).ids


def test_no_link_of_the_reference_leads_nowhere(reference):
    pages = {name: Links(path.read_text()) for name, path in reference.items()}
    for name, page in pages.items():
        for href in page.hrefs:
            if re.match(r"[a-z]+:", href):
                continue  # another site's
            target, _, anchor = href.partition("#")
            where = (
                os.path.normpath(os.path.join(os.path.dirname(name), target)) if target else name
            )
            assert where in pages, f"{name} links to {href}"
            assert not anchor or anchor in pages[where].ids, f"{name} links to {href}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_link_of_a_page_leads_nowhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_example_is_in_the_index():
    index = (ROOT / "examples/README.md").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f"[{example.name}]({example.name})" in index


def test_every_install_is_from_the_clone_with_extras_that_exist():
    """The project is on no package index."""
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    existing = set(re.findall(r"^(\w+) = \[", extras.split("\n[")[0], flags=re.MULTILINE))
    found = [
        what
        for page in PAGES
        for what in re.findall(r"pip install (-e \.|-e '[^']+'|[^\s`]+)", page.read_text())
    ]
    assert len(found) > 5
    for what in set(found) - {"-e ."}:
        named = re.fullmatch(r"-e '\.\[([\w,]+)\]'", what)
        assert named and set(named[1].split(",")) <= existing, what
