"""Turn the docstrings' Sphinx roles, such as :func:`cross_entropy`, into links of the API page."""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|mod|meth):`([\w.]+)`")
API = (Path(__file__).parent / "api.md").read_text(encoding="utf-8")
PATHS = {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)$", API, re.MULTILINE)}


def linked(match: re.Match[str]) -> str:
    """Return a link to a name on the page, or the name alone."""
    name = match[1].rpartition(".")[2]
    return f"[`{name}`][{PATHS[name]}]" if name in PATHS else f"`{match[1]}`"


class References(Extension):
    """Rewrite each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = ROLE.sub(linked, obj.docstring.value)
            obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")  # code, not prose
