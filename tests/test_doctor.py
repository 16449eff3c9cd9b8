"""chunked-ce doctor: what it says, and that it notices what is wrong."""

import pytest
import torch

from chunked_ce import backend_torch, doctor, functional, self_check
from chunked_ce.cli import main


def test_nothing_is_wrong_here(monkeypatch, capsys):
    monkeypatch.setattr(functional, "_INTERPRETED", False)  # the kernels have tests of their own
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in printed
    assert "device cpu\n  backend: torch: the kernels need a GPU" in printed
    checks = [line for line in printed.splitlines() if ": ok, off by " in line]
    assert len(checks) == 2 * len(self_check.CHECKS)
    assert printed.endswith("nothing is wrong\n")


@pytest.mark.long
def test_the_kernels_are_checked_where_they_can_run(device):
    """Interpreted, or on a GPU."""
    pytest.importorskip("triton")
    where = torch.device(device)
    assert "triton" in doctor._backends(where, False)
    for check in self_check.CHECKS.values():
        assert check(where, "triton", torch.float32).startswith("ok")


def spoil_statistics(*arguments, **wanted):
    rows = row_statistics(*arguments, **wanted)
    return rows._replace(stats=rows.stats._replace(logprob=rows.stats.logprob * 1.001))


def spoil_gradient(*arguments, **options):
    return logits_gradient(*arguments, **options).mul_(1.1)


def broken(*arguments, **options):
    raise RuntimeError("no kernel image\nis available")


row_statistics, logits_gradient = backend_torch.row_statistics, backend_torch.logits_gradient


@pytest.mark.parametrize(
    ("function", "instead", "said"),
    [
        ("row_statistics", spoil_statistics, "token_stats, float32: FAILED: ArithmeticError: logprob is off by"),
        ("logits_gradient", spoil_gradient, "gradient is off by"),
        ("logits_gradient", broken, "FAILED: RuntimeError: no kernel image"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_exit_code_1(function, instead, said, monkeypatch, capsys):
    monkeypatch.setattr(functional, "_INTERPRETED", False)
    monkeypatch.setattr(backend_torch, function, instead)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert said in printed and "findings are wrong" in printed
    assert "\n  linear_token_stats, bfloat16: " in printed  # the rest is still checked


def test_why_a_backend_runs(monkeypatch):
    on_gpu, on_cpu = torch.device("cuda", 0), torch.device("cpu")
    for installed, backend in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(functional, "_TRITON_INSTALLED", installed)
        assert functional.choose_backend("auto", on_gpu) == backend
        assert ("is not installed" in doctor._reason(on_gpu, backend)) != installed
        assert doctor._backends(on_gpu, False) == ["triton", "torch"][not installed :]
    assert doctor._backends(on_cpu, True)[-2:] == ["torch", "inductor"]


def test_no_command_is_exit_code_2(capsys):
    for arguments in ([], ["diagnose"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("chunked-ce: error: ")
