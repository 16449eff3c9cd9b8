"""The command line itself: help, version, Ctrl-C, and outputs that cannot be written."""

import ast
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

import chunked_ce
from chunked_ce import cli
from chunked_ce.cli import main

COMMAND = [sys.executable, "-m", "chunked_ce.cli"]
PLAN = ["plan", "--vocab", "50257", "--hidden", "768"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("TRITON_INTERPRET", None)  # it makes doctor warn of NaN


def run(*argv, **options):
    return subprocess.run([*COMMAND, *argv], env=ENVIRONMENT, text=True, **options)


def test_help_without_a_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: chunked-ce")
    for command in ("perplexity", "plan", "doctor", "python -m bench"):
        assert command in " ".join(shown.split())


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"chunked-ce {chunked_ce.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["--version"], ["--help"], ["plan", "--help"], ["plan", "--tokens", "0"]])  # fmt: skip
def test_torch_is_not_imported_for_help_version_and_mistakes(argv):
    program = (
        "import sys, chunked_ce\nfrom chunked_ce.cli import main\n"
        f"try:\n    main({argv})\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argv", [["diagnose"], ["plan", "--unknown"]])
def test_a_mistake_is_one_line_that_points_to_the_help(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("chunked-ce: ") and "--help`" in line


def test_bench_says_where_it_is(capsys):
    assert main(["bench", "quick"]) == 2
    assert "run `python -m bench` in a clone of the repository" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0.15, 0.4, 1.0, 2.0])
def test_ctrl_c_while_torch_is_imported(seconds):
    """At moments that fall into imports and checks, which are repeated until then."""
    program = (
        "import os, sys; from chunked_ce.cli import main; print('up', flush=True); code = 0\n"
        "os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n"
        "while code == 0: code = main(['doctor'])\n"
        "sys.exit(code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "chunked-ce: interrupted\n")


def test_a_reader_that_leaves(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = run(*PLAN, stdout=closed, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        done = run(*PLAN, stdout=full, stderr=subprocess.PIPE)
    said = "chunked-ce: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_another_error_is_not_hidden(monkeypatch):
    def broken(argv):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(PermissionError):
        main([])


def test_public_names_are_loaded_at_first_use():
    program = """
import sys, chunked_ce
assert "torch" not in sys.modules
assert set(chunked_ce.__all__) <= set(dir(chunked_ce))
try:
    chunked_ce.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
assert chunked_ce.perplexity.__module__ == "chunked_ce.evaluation.meter"
assert all(name in vars(chunked_ce) for name in chunked_ce.__all__)
assert chunked_ce.huggingface.enable and chunked_ce.distributed
import torch
from chunked_ce import *
x, target = torch.zeros(2, 4), torch.tensor([0, 1])
compiled = torch.compile(lambda x, t: chunked_ce.cross_entropy(x, t), fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(x, target), torch.tensor(4.0).log())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_any_module_can_be_imported_first():
    """Before torch, when no other module of the library is loaded: no import goes in a circle."""
    program = """
import importlib, os, pkgutil, sys
import torch, transformers
torch = sys.modules.pop("torch")  # as before its import
import chunked_ce
sys.modules["torch"] = torch
failed = []
for module in pkgutil.walk_packages(chunked_ce.__path__, "chunked_ce.", onerror=print):
    child = os.fork()
    if not child:
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(module.name)
assert not failed, failed
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_names_for_type_checkers_are_the_public_ones():
    (block,) = (
        node for node in ast.parse((ROOT / "chunked_ce/__init__.py").read_text()).body
        if isinstance(node, ast.If) and isinstance(node.body[0], ast.ImportFrom)
    )  # fmt: skip
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(homes) == sorted(chunked_ce.__all__)
    assert set(homes.values()) == set(chunked_ce._MODULES)
