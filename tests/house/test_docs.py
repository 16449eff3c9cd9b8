"""The pages and the API reference: built, complete, README short, and no link leads nowhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from helpers import ROOT

import chunked_ce
import chunked_ce.distributed
import chunked_ce.huggingface
import chunked_ce.planner

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *(ROOT / name for name in ("DEPENDENCIES.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the files of the site, built as `make docs` builds it; a warning is an error."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    assert "-m mkdocs build --strict" in (ROOT / "Makefile").read_text()
    folder = tmp_path_factory.mktemp("docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WARNING" not in done.stderr
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}


def test_every_public_name_is_in_the_reference(site):
    ids = Links(site["api.html"].read_text()).ids
    for module in (chunked_ce, chunked_ce.distributed, chunked_ce.huggingface):
        names = {f"{module.__name__}.{name}" for name in module.__all__}
        assert names <= ids, names - ids
        for name in module.__all__:
            assert (getattr(module, name).__doc__ or "").strip(), f"{name} has no docstring"
    planner = {n for n in chunked_ce.planner.__all__ if callable(getattr(chunked_ce.planner, n))}
    assert {f"chunked_ce.planner.{name}" for name in planner} <= ids


def test_the_reference_has_no_markup_left(site):
    text = site["api.html"].read_text()
    assert not re.search(r":(func|class|mod|meth):", text)
    assert "Initialize internal Module state" not in text


def test_losses_come_first_in_the_reference():
    order = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert order[:2] == ["chunked_ce.cross_entropy", "chunked_ce.linear_cross_entropy"]
    assert len(order) == len(set(order))


def test_no_link_of_the_site_leads_nowhere(site):
    pages = {name: Links(path.read_text()) for name, path in site.items() if name[-5:] == ".html"}
    assert len(pages) >= len(list((ROOT / "docs").glob("*.md")))
    for name, page in pages.items():
        if name == "404.html":
            continue  # its links start at the site's root
        for href in page.hrefs:
            if re.match(r"[a-z]+:", href):
                continue  # another site's
            target, _, anchor = href.partition("#")
            where = os.path.normpath(os.path.join(os.path.dirname(name), target or name))
            if where == ".":
                where = "index.html"
            assert where in site, f"{name} links to {href}"
            assert not anchor or anchor in pages[where].ids, f"{name} links to {href}"


def anchors(page):
    """Return the ids of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text("utf-8")), re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_link_of_a_page_leads_nowhere(page):
    for target, anchor in re.findall(
        r"\]\(([^)#\s]*)(?:#([^)]+))?\)", FENCED.sub("", page.read_text("utf-8"))
    ):
        if target.startswith(("http:", "https:")):
            continue
        where = page.parent / target if target else page
        assert where.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(where), f"{page.name} links to {target}#{anchor}"


def test_every_page_is_in_the_contents():
    """Of README, of the site's first page and of its menu."""
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= {t.removeprefix("docs/") for t in links_of(ROOT / "README.md")}
    assert pages <= links_of(ROOT / "docs/index.md")
    assert pages <= set(re.findall(r"^  - .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))


def links_of(page):
    return set(re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")))


def sentences(page):
    """Return the words of each sentence of prose: no code, tables, lists of links or headings."""
    text = FENCED.sub("", page.read_text("utf-8"))
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", text)
    prose = [p for p in paragraphs if not p.lstrip().startswith(("|", "#"))]
    found = [s.split() for p in prose for s in re.split(r"(?<=[.!?])\s+", p.strip()) if s]
    return [words for words in found if len(words) > 2]


def test_readme_is_short():
    readme = ROOT / "README.md"
    assert len(readme.read_text("utf-8").split()) <= 1500
    words = [len(s) for s in sentences(readme)]
    assert len(words) > 40
    assert sum(words) / len(words) <= 18


def test_pictures_are_what_their_programs_drew():
    copied = "vocabulary_bfloat16_N1024.png"
    drawn = (ROOT / "bench/results/cpu" / copied).read_bytes()
    assert (ROOT / "docs/images" / copied).read_bytes() == drawn


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
