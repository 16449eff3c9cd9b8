"""chunked-ce doctor: what it says, and that it notices what is wrong."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from chunked_ce import backends
from chunked_ce.backends import cpu_library
from chunked_ce.backends import torch as backend_torch
from chunked_ce.cli import main
from chunked_ce.cli.doctor import load, losses, others, self_check, statistics
from chunked_ce.cli.doctor import machine as doctor
from chunked_ce.cli.doctor.verdict import summary

CPU = torch.device("cpu")


def test_nothing_is_wrong_here(monkeypatch, capsys):
    monkeypatch.setattr(backends, "INTERPRETED", False)  # the kernels have tests of their own
    assert main(["doctor", "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert f"torch: {importlib.metadata.version('torch')}" in printed
    backend = backends.choose_backend("auto", CPU)
    assert f"device cpu\n  backend: {backend}: " in printed
    if backend == "cpu":
        used = cpu_library.path().stem.removeprefix("cpu_")
        assert "kernels in C built for " in printed and f"; in use: {used}; " in printed
    checks = [line for line in printed.splitlines() if ": ok, off by " in line]
    assert len(checks) == 2 * expected_checks()
    assert printed.startswith(f"Nothing is wrong: {len(checks)} checks agree with eager torch.\n")
    assert "  busy cores: " in printed and "  memory: " in printed and "OMP_WAIT" not in printed


def test_the_short_report_has_the_verdict_the_machine_and_what_is_wrong():
    machine = doctor.Finding("device cpu", "backend", "cpu")
    good = doctor.Finding("operators, cpu, cpu", "token_stats", "ok", is_check=True)
    bad = doctor.Finding("operators, cpu, cpu", "perplexity", "FAILED: x", ok=False, is_check=True)
    printed = summary([machine, good, good], verbose=False).splitlines()
    assert printed[0] == "Nothing is wrong: 2 checks agree with eager torch."
    assert "  backend: cpu" in printed and not any("token_stats" in line for line in printed)
    printed = summary([machine, good, bad], verbose=False).splitlines()
    assert printed[0] == "1 finding is wrong:"
    assert printed[2] == "  operators, cpu, cpu: perplexity: FAILED: x"


def test_busy_cores_and_free_memory_without_proc(monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(load.Path, "read_text", missing)
    monkeypatch.setattr(load, "_SAMPLE_SECONDS", 0.0)
    assert load.busy_cores() == load.free_memory() == "not known here"
    monkeypatch.undo()
    seconds = iter((10.0, 10.5))
    monkeypatch.setattr(load, "_seconds_of_others", lambda: next(seconds))
    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    busy = float(re.fullmatch(r"other processes use (.*) of 2 cores;.*own", load.busy_cores())[1])
    assert 0.5 < busy <= 1.0


@pytest.mark.long
def test_the_kernels_are_checked_where_they_can_run(device):
    """Interpreted, or on a GPU."""
    pytest.importorskip("triton")
    where = torch.device(device)
    assert "triton" in doctor._backends(where)
    checks = list(self_check.checks_of(where, "triton").values())
    for check in checks[:3] if device == "cpu" else checks:  # the interpreter takes minutes
        assert check(where, "triton", torch.float32).startswith("ok")


def test_a_backend_is_asked_for_what_it_has():
    names = {b: set(self_check.checks_of(CPU, b)) for b in ("cpu", "torch", "triton")}
    auto = backends.choose_backend("auto", CPU)
    assert names.pop(auto) == set(self_check.CHECKS)
    for some in names.values():
        assert set(self_check.CHECKS) - some == {"perplexity, Perplexity"}


def expected_checks():
    """Of all backends that run on this machine's CPU, in this process's child."""
    names = ["torch", *(["cpu"] if cpu_library.IS_AVAILABLE else [])]
    return sum(len(self_check.checks_of(CPU, name)) for name in names)


def without(function, option):
    def forgetful(*arguments, **options):
        if option is not None:
            return function(*arguments, **{k: v for k, v in options.items() if k != option})
        value = function(*arguments, **options)
        return value * 1.001

    return forgetful


FORGOTTEN = {
    "cross_entropy": [
        (None, "cross_entropy, [N, V, d1, d2]"),
        ("label_smoothing", "cross_entropy"),
        ("z_loss_weight", "cross_entropy"),
        *((option, "cross_entropy, softcap") for option in ("softcap", "logit_scale", "vocab_size")),
        *((option, "cross_entropy, token weights") for option in ("token_weight", "num_items")),
        ("weight", "cross_entropy, class weights"),
        ("label_smoothing", "cross_entropy, probabilities"),
        (None, "cross_entropy, top k"),
        ("spread_rest", "cross_entropy, top k and the rest"),
    ],
    "linear_cross_entropy": [
        ("linear_bias", "linear_cross_entropy"),
        ("softcap", "linear_cross_entropy, softcap"),
        ("token_weight", "linear_cross_entropy, token weights"),
        ("weight", "linear_cross_entropy, class weights"),
        ("label_smoothing", "linear_cross_entropy, probabilities"),
        (None, "linear_cross_entropy, top k"),
        ("spread_rest", "linear_cross_entropy, top k and the rest"),
    ],
    "binary_cross_entropy_with_logits": [
        ("pos_weight", "binary_cross_entropy_with_logits"),
        ("reduction", "binary_cross_entropy_with_logits, indices"),
    ],
    "perplexity": [(None, "perplexity, Perplexity")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "option", "check"),
    [(function, *case) for function, cases in FORGOTTEN.items() for case in cases],
)
def test_a_check_notices_what_it_is_named_for(function, option, check, monkeypatch):
    """Of a function that forgets the option, or (None) is a thousandth off."""
    where = others if function.startswith(("binary", "perplexity")) else losses
    monkeypatch.setattr(where, function, without(getattr(where, function), option))
    with pytest.raises((ArithmeticError, RuntimeError)):  # a bias that is not used: no gradient
        self_check.CHECKS[check](CPU, "torch", torch.float32)


def test_ranks_and_the_best_class_are_checked(monkeypatch):
    token_stats = statistics.token_stats
    for name in ("rank", "argmax"):

        def spoiled(*arguments, name=name, **options):
            stats = token_stats(*arguments, **options)
            return stats._replace(**{name: getattr(stats, name) + 1})

        monkeypatch.setattr(statistics, "token_stats", spoiled)
        with pytest.raises(ArithmeticError, match=f"{name} is not eager's"):
            self_check.CHECKS["token_stats"](CPU, "torch", torch.float32)
    update = others.Perplexity.update
    monkeypatch.setattr(
        others.Perplexity, "update", lambda self, z, t, **o: update(self, z.neg(), t, **o)
    )
    with pytest.raises(ArithmeticError):
        self_check.CHECKS["perplexity, Perplexity"](CPU, "torch", torch.float32)


def doctor_in_a_process(code, path="", **variables):
    """(exit code, what it printed)"""
    root = str(ROOT)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, (path, root))), **variables}
    program = (
        f"{code}\nfrom chunked_ce.cli import main\nraise SystemExit(main(['doctor', '--verbose']))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_without_triton_and_transformers_and_gpu():
    hidden = "import sys; sys.modules['triton'] = sys.modules['transformers'] = None"
    code, printed, errors = doctor_in_a_process(
        hidden, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1"
    )
    assert code == 0, printed + errors
    assert "CUDA_VISIBLE_DEVICES: empty: no GPU is visible" in printed
    assert "kernels: " not in printed and "operators, cpu, torch" in printed
    assert "ernels need a GPU\n" in printed  # not: or interpreted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise ImportError('libtriton.so: undefined symbol')", "ImportError: libtriton.so: undefined symbol"),
        pytest.param("__version__ = '3.9.0'", "Error: ", marks=pytest.mark.long),  # not Triton
    ],
)  # fmt: skip
def test_a_broken_triton_is_said(content, said, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(content)
    code, printed, errors = doctor_in_a_process("", str(tmp_path))
    assert code == 1 and "Traceback" not in errors
    (line,) = (x for x in printed.splitlines() if x.startswith("  kernels: FAILED: "))
    assert said in line and "1 finding is wrong" in printed
    assert printed.count(": ok, off by ") == 2 * expected_checks()


def test_a_package_without_metadata_is_no_traceback(monkeypatch):
    def version(package):
        raise KeyError("Version")

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert doctor._version("torch") == "unknown (KeyError)"
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda package: None)
    assert doctor._version("torch") == "unknown"


def test_a_gpu_that_fails_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "_properties", broken)
    monkeypatch.setattr(doctor.gpu, "processors", broken)
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    findings = {f.what: f for f in doctor._device(torch.device("cuda", 0))}
    for what in ("name", "memory", "processors"):
        assert not findings[what].ok and "no kernel image" in findings[what].result


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
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setattr(cpu_library, "IS_AVAILABLE", False)
    monkeypatch.setattr(backend_torch, function, instead)
    assert main(["doctor", "--verbose"]) == 1
    printed = capsys.readouterr().out
    assert said in printed and "findings are wrong" in printed
    assert "\n  linear_token_stats, bfloat16: " in printed  # the rest is still checked


def test_why_a_backend_runs(monkeypatch):
    on_gpu, on_cpu = torch.device("cuda", 0), torch.device("cpu")
    for installed, backend in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(backends, "TRITON_INSTALLED", installed)
        assert backends.choose_backend("auto", on_gpu) == backend
        assert ("is not installed" in doctor._reason(on_gpu, backend)) != installed
        assert doctor._backends(on_gpu) == ["triton", "torch"][not installed :]
    assert doctor._backends(on_cpu)[-1] == "torch"
