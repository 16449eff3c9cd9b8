"""Every public name shows a short example in its docstring, and the example runs."""

import doctest
import inspect
import sys

import pytest

import chunked_ce
from chunked_ce import planner


def public_names(module):
    return {f"{module.__name__}.{name}": getattr(module, name) for name in module.__all__}


NAMES = {
    name: value
    for name, value in public_names(chunked_ce).items()
    if not value.__module__.startswith("chunked_ce.evaluation")
} | {name: value for name, value in public_names(planner).items() if inspect.isroutine(value)}


def examples(name, value):
    scope = dict(vars(sys.modules[value.__module__]))
    return doctest.DocTestParser().get_doctest(inspect.getdoc(value) or "", scope, name, None, 0)


@pytest.mark.parametrize(("name", "value"), NAMES.items(), ids=NAMES)
def test_example_of_public_name(name, value):
    test = examples(name, value)
    assert test.examples, f"{name} shows no example"
    failed, tried = doctest.DocTestRunner(verbose=False).run(test)
    assert tried and not failed


def arguments_of(value):
    parameters = inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters
    return [name for name in parameters if name != "self"]


LOSSES = {
    name: value
    for name, value in NAMES.items()
    if (value.__module__ or "").startswith(("chunked_ce.functional", "chunked_ce.modules"))
}


@pytest.mark.parametrize(("name", "value"), LOSSES.items(), ids=LOSSES)
def test_each_argument_has_a_line(name, value):
    """No "others: see ...": a reader finds each argument where it is."""
    documented = inspect.getdoc(value).split("Args:")[1].split("Returns:")[0].split("Raises:")[0]
    lines = [line.strip().partition(":")[0] for line in documented.splitlines()]
    assert [a for a in arguments_of(value) if a not in lines] == []
