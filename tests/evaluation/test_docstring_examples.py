"""Examples in the docstrings of the evaluation and of the planner."""

import doctest
import inspect

import pytest

import chunked_ce
from chunked_ce import planner

NAMES = {
    name: getattr(module, name)
    for module in (chunked_ce, planner)
    for name in module.__all__
    if getattr(getattr(module, name), "__module__", "").startswith(
        ("chunked_ce.evaluation", "chunked_ce.planner")
    )
} | {"planner": planner}


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_has_an_example_that_runs(name):
    text = inspect.getdoc(NAMES[name])
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert example.examples, f"{name} shows no example"
    failed, tried = doctest.DocTestRunner(verbose=False).run(example)
    assert tried and not failed


def test_the_names_are_those_of_the_evaluation_and_the_planner():
    assert {"evaluate_perplexity", "loglikelihood", "perplexity", "Perplexity", "plan"} <= set(
        NAMES
    )
