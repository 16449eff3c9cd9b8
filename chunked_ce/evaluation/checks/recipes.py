"""Check what is asked for beside a recipe, and whether model and text are long enough for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .language_model import configured_context, context_length


def recipe(name: Any, recipes: Mapping[str, Any]) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"recipe must be a str or None, got {type(name).__name__}")
    if name not in recipes:
        raise ValueError(f"recipe is {name!r}, expected one of {', '.join(recipes)}")
    return recipes[name]


def recipe_agrees(
    recipe: Any, stride: int | None, full_last_window: bool, eos: bool | int | None
) -> None:
    """Check what a recipe decides itself against what the caller gave."""
    step = recipe.window if recipe.stride is None else recipe.stride
    if stride is not None and stride != step:
        own = "the context" if step is None else str(step)
        raise _contradicted(recipe, "stride", stride, own)
    if full_last_window:
        raise _contradicted(recipe, "full_last_window", True, "False")
    if eos is not None and eos is not False:
        raise _contradicted(recipe, "eos", eos, "False: the tool adds no EOS of its own")


def recipe_takes_bos(recipe: Any, bos: Any) -> None:
    if bos is False:
        raise _contradicted(recipe, "bos", False, "True: it puts a token before each document")


def recipe_window(recipe: Any, given: int | None, model: Any, tokenizer: Any) -> int:
    """Return the tokens of a window: the recipe's, or else those of the caller or the model."""
    longest = configured_context(model)
    shortest = recipe.window or recipe.stride
    if recipe.window is not None and given is not None and given != recipe.window:
        raise _contradicted(recipe, "context_length", given, str(recipe.window))
    if shortest is not None and longest is not None and longest < shortest:
        raise ValueError(
            f"recipe {recipe.name} needs a context of {shortest} tokens, but the model has "
            f"positions for {longest}: use a model with a longer context, or no recipe"
        )
    size = context_length(recipe.window or given, model, tokenizer)
    if shortest is not None and size < shortest:
        raise _contradicted(recipe, "context_length", size, f"at least {shortest}")
    return size


def recipe_length(recipe: Any, windows: int, tokens: int, size: int) -> None:
    """Check that the text fills as many windows as the tool asks for."""
    if windows < recipe.least_windows:
        least = recipe.least_windows * size if recipe.drop_remainder else 2
        raise ValueError(
            f"recipe {recipe.name} needs at least {least} tokens of text, got {tokens}: give more "
            "text, or use no recipe"
        )


def _contradicted(recipe: Any, name: str, given: Any, own: str) -> ValueError:
    return ValueError(
        f"{name} is {given}, but recipe {recipe.name} has {name} {own}: leave out one of the two"
    )
