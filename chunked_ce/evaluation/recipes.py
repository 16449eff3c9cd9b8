"""How other tools cut a text into windows, and what of it they score: one row of data for each.

The names are those of the tools. A recipe decides how documents are joined and tokenized, where
the windows lie, what each scores, and where BOS stands. Everything else is the evaluation's own.
This module is data alone, so that the command line has it without torch.
"""

from __future__ import annotations

from typing import NamedTuple

TOKENIZER, EACH_WINDOW, PREFIX = "tokenizer", "each window", "prefix"
"""Where BOS stands: where the tokenizer puts it, over each window's first token, or before."""


class Recipe(NamedTuple):
    """The settings of one tool; None stands for what the caller or the model says."""

    name: str
    source: str  # the tool's file that defines it
    summary: str
    bos: str  # one of the three places above
    window: int | None = None  # tokens; None: the model's context
    stride: int | None = None  # None: the window
    context: int = 1  # first tokens of each window that are never scored
    least_windows: int = 1
    drop_remainder: bool = False
    discounts_overlap: bool = False  # a mean over n tokens counts as n - 1 after an overlap
    joined_by: str | None = None  # between documents; None: each stays its own
    reads_special_text: bool = True  # "<s>" in a text is the token, not its characters
    drops_last_newline: bool = False


_ROWS = (
    Recipe(
        "gptq-2048", "IST-DASLab/gptq llama.py, IST-DASLab/sparsegpt datautils.py",
        "documents joined by an empty line, windows of 2048, remainder dropped",
        TOKENIZER, window=2048, drop_remainder=True, joined_by="\n\n",
    ),
    Recipe(
        "llama.cpp-512", "ggml-org/llama.cpp tools/perplexity/perplexity.cpp",
        "windows of 512, second half scored",
        EACH_WINDOW, window=512, context=512 // 2 + 1, least_windows=2, drop_remainder=True,
        joined_by="", reads_special_text=False, drops_last_newline=True,
    ),
    Recipe(
        "hf-stride", "huggingface/transformers docs/source/en/perplexity.md",
        "documents joined by an empty line, windows of the model's context, stride 512",
        TOKENIZER, stride=512, discounts_overlap=True, joined_by="\n\n",
    ),
    Recipe(
        "lm-eval-rolling", "EleutherAI/lm-evaluation-harness lm_eval/utils.py",
        "each document in windows of the model's context, the last one full",
        PREFIX,
    ),
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in _ROWS}


def describe(name: str, bos: int | None) -> str:
    """Return one line that says what a recipe does, and where BOS was put if it was."""
    recipe = RECIPES[name]
    places = {
        TOKENIZER: f"BOS {bos} at the beginning",
        EACH_WINDOW: f"BOS {bos} at the start of each",
        PREFIX: f"token {bos} before each document",
    }
    return f"recipe {name}: {recipe.summary}, {'no BOS' if bos is None else places[recipe.bos]}"
