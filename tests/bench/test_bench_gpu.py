"""python -m bench gpu: what it finds wrong, what it then leaves out, what stops it."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import chunked_ce
from bench import __main__ as bench
from bench import providers
from bench.cases import LOGITS, MODES, Case, own
from bench.gpu import (
    cases,
    check,
    check_cases,
    check_system,
    counters,
    machine,
    runner,
    speed,
    train,
    tune,
    versions,
)  # fmt: skip
from bench.gpu.stage import Context
from bench.providers import Provider, Unavailable
from bench.records import read_table
from chunked_ce.backends import gpu
from chunked_ce.kernels import launch

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is the CPU's"),
]
CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path, time.perf_counter() + 600, dry=True)


def some_cases(monkeypatch, *texts):
    """Only cases whose input is one of the texts."""
    for module in (check_cases, check_system):
        every = module.cases
        monkeypatch.setattr(
            module, "cases",
            lambda context, every=every: (c for c in every(context) if c.input in texts),
        )  # fmt: skip


def test_a_right_kernel_is_said_to_be_right(context, monkeypatch, capsys):
    some_cases(monkeypatch, "bfloat16 V=31 plain", "a row alone and among others")
    assert check.run(context) == 0
    rows = read_table(context.out / "check.csv")
    assert len(rows) == 1 + 4 + 2 and {r["result"] for r in rows} == {"right"}
    assert all(float(r["error"]) < 2.0**-7 for r in rows)
    assert "7 right, 0 wrong, 0 not run" in capsys.readouterr().out


@pytest.mark.long
def test_what_is_wrong_is_named_and_not_timed(context, monkeypatch, capsys):
    some_cases(monkeypatch, "float32 V=31 plain")
    right = chunked_ce.cross_entropy

    def wrong(*arguments, **options):
        loss = right(*arguments, **options)
        return loss * 1.25 if options.get("grad_in_forward") else loss

    monkeypatch.setattr(chunked_ce, "cross_entropy", wrong)
    assert check.run(context) == 1
    rows = {r["kernel"]: r for r in read_table(context.out / "check.csv")}
    faulty = rows["cross_entropy grad_in_forward"]
    assert faulty["result"] == "wrong" and faulty["input"] == "float32 V=31 plain"
    assert float(faulty["error"]) == pytest.approx(0.25, rel=1e-3)
    assert faulty["detail"].startswith("loss: 1 of 1 are off")
    assert rows["cross_entropy"]["result"] == rows["token_stats"]["result"] == "right"
    runner._say_what_is_wrong(context.out)
    assert "WRONG cross_entropy grad_in_forward float32 V=31 plain" in capsys.readouterr().out

    monkeypatch.setattr(chunked_ce, "cross_entropy", right)  # so that only the finding counts
    monkeypatch.setattr(speed, "TINY", speed.TINY[:1])
    assert speed.run(context) == 0
    rows = read_table(context.out / "speed.csv")
    timed = timed_of(context)
    assert {"eager", "chunked_ce", "chunked_ce inplace_backward"} <= {p for p, _ in timed}
    assert not any("grad_in_forward" in provider for provider, _ in timed)
    notes = {r["provider"]: r["note"] for r in rows if r["note"]}
    said = "check found cross_entropy grad_in_forward wrong"
    assert notes["chunked_ce grad_in_forward"] == said


def timed_of(context):
    """[(provider, mode)] in the order of the file."""
    rows = read_table(context.out / "speed.csv")
    return [(r["provider"], r["mode"]) for r in rows if r["metric"] == "seconds"]


def only(monkeypatch, **losses):
    """Only providers of logits with these losses, on one tiny case."""

    def loader(loss):
        def load(device):
            if isinstance(loss, Exception):
                raise loss
            return loss

        return load

    table = [
        Provider(name, LOGITS, loader(loss), "a mean", overwrites=name == "in_place",
                 modes=MODES[1:] if name == "in_place" else MODES)
        for name, loss in losses.items()
    ]  # fmt: skip
    monkeypatch.setattr(providers, "TABLE", table)
    monkeypatch.setitem(speed.NAMES, LOGITS, tuple(losses))
    monkeypatch.setattr(speed, "TINY", speed.TINY[:1])


def test_peers_that_fail_or_are_wrong_are_rows(context, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image")

    def nearly(x, target):
        return 1.1 * fine(x, target)

    fine = torch.nn.functional.cross_entropy
    missing = Unavailable("not installed (No module named 'peer')")
    only(monkeypatch, missing=missing, broken=broken, nearly=nearly, fine=fine, in_place=fine)
    assert speed.run(context) == 0
    rows = read_table(context.out / "speed.csv")
    notes = {r["provider"]: r["note"] for r in rows}
    assert notes["missing"] == "not installed (No module named 'peer')"
    assert notes["broken"] == "RuntimeError: no kernel image"
    assert "so it is not timed: off by 0.1 relatively" in notes["nearly"]
    both = "forward+backward"
    assert timed_of(context) == [("fine", both), ("in_place", both), ("fine", "forward")]
    errors = [r["value"] for r in rows if r["metric"] == "loss_error"]
    assert len(errors) == 3 and all(float(e) < 1e-6 for e in errors)


def test_who_fails_while_timed_does_not_stop_the_others(context, monkeypatch):
    calls = []

    def tired(x, target):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("tired")
        return torch.nn.functional.cross_entropy(x, target)

    only(monkeypatch, tired=tired, fine=torch.nn.functional.cross_entropy)
    assert speed.run(context) == 0
    assert {p for p, _ in timed_of(context)} == {"fine"}
    rows = read_table(context.out / "speed.csv")
    assert {r["note"] for r in rows if r["provider"] == "tired"} == {"RuntimeError: tired"}


def test_rates_are_shares_of_the_machines(context, monkeypatch):
    (context.out / "machine.csv").write_text("quantity,value,unit\ncopy bandwidth,2,GB/s\n")
    only(monkeypatch, fine=torch.nn.functional.cross_entropy)
    monkeypatch.setattr(speed, "TINY", (Case(LOGITS, 4, 0, 300, torch.float32),))
    assert speed.run(context) == 0
    found = {
        (r["mode"], r["metric"]): float(r["value"]) for r in read_table(context.out / "speed.csv")
    }
    for mode, passes in (("forward", 1), ("forward+backward", 3)):
        rate = passes * 4 * 300 * 4 / 1e9 / found[mode, "seconds"]
        assert found[mode, "GB_per_s"] == pytest.approx(rate, rel=1e-4)
        assert found[mode, "of_copy_bandwidth"] == pytest.approx(rate / 2, rel=1e-4)


def test_what_overwrites_the_logits_is_in_place():
    x = torch.randn(3, 5)
    given, grads = own(x)
    torch.nn.functional.cross_entropy(given, torch.tensor([0, 1, 2])).backward()
    assert given.data_ptr() == x.data_ptr() and grads[0].shape == x.shape


def test_a_case_says_where_and_by_how_much():
    with pytest.raises(cases.Wrong, match=r"lse: 1 of 3 are off, the first at \[1\]: 3, expect"):
        cases.near("lse", torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1.0, 2.0, 5.0]), 1e-6)
    for value in (float("nan"), float("inf")):
        with pytest.raises(cases.Wrong):
            cases.near("lse", torch.tensor([value]), torch.tensor([2.0]), 1e-6)
        with pytest.raises(cases.Wrong):
            cases.near_norm("gradient", torch.tensor([value]), torch.tensor([2.0]), 1e-2)
    assert cases.near("lse", torch.tensor([2.002]), torch.tensor([2.0]), 1e-2) == pytest.approx(
        1e-3, rel=1e-3
    )


@pytest.mark.long
def test_what_cannot_run_and_what_is_late(context, monkeypatch):
    some_cases(monkeypatch, "tensors on a second GPU, which is not the current one")
    assert check.run(context) == 0
    (row,) = read_table(context.out / "check.csv")
    assert row["result"] == "not run" and row["detail"] == "there is no second GPU"
    late = context._replace(deadline=0.0)
    assert check.run(late) == 0 and speed.run(late) == 0 and tune.run(late) == 0
    (row,) = read_table(context.out / "check.csv")
    assert row["detail"] == "out of time"
    rows = read_table(context.out / "speed.csv")
    late_notes = {r["note"] for r in rows if r["provider"] == "eager"}
    assert late_notes == {"out of time"} and not timed_of(context)


def test_a_lost_context_ends_the_cases(context, monkeypatch):
    def lose():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    two = [cases.Case("token_stats", "bfloat16", text, lose) for text in ("first", "second")]
    monkeypatch.setattr(check_cases, "cases", lambda context: two)
    monkeypatch.setattr(check_system, "cases", lambda context: [])
    assert check.run(context) == 1
    first, second = read_table(context.out / "check.csv")
    assert first["result"] == "wrong" and "illegal memory access" in first["detail"]
    assert second["result"] == "not run" and second["detail"] == "the GPU's context is lost"


def test_a_stage_is_stopped_at_its_limit(tmp_path):
    start = time.perf_counter()
    assert runner.run_stage("machine", tmp_path, 0.2, dry=True) == runner.STOPPED
    assert time.perf_counter() - start < 10


def test_the_command_runs_its_stages(tmp_path, monkeypatch, capsys):
    codes = dict(machine=0, check=1, speed=runner.STOPPED)
    ran = []

    def run_stage(stage, out, limit, dry):
        ran.append((stage, limit, dry))
        return codes[stage]

    monkeypatch.setattr(runner, "run_stage", run_stage)
    (tmp_path / "check.csv").write_text("of an earlier run")
    command = ["gpu", "speed", "check", "--dry-run", "--limit", "9", "--out", str(tmp_path)]
    assert bench.main(command) == 1
    assert ran == [("machine", 9, True), ("check", 9, True), ("speed", 9, True)]
    results = {r["stage"]: r["result"] for r in read_table(tmp_path / "stages.csv")}
    assert results == dict(machine="done", check="found faults", speed="stopped after 9 s")
    assert not (tmp_path / "check.csv").exists()
    codes = dict.fromkeys(codes, 0)
    assert bench.main(command) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "gpu: there is no GPU here; --dry-run tries the programs on the CPU"),
        (["fly", "--dry-run"], "gpu: no stage 'fly', expected one of check, speed"),
        (["--dry-run", "--limit", "-1"], "expected a positive number of seconds, got '-1'"),
        (["--dry-run", "--out", "a_file"], "--out a_file is a file, expected a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("")
    try:
        code = bench.main(["gpu", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_versions_that_do_not_work_together(monkeypatch, tmp_path, capsys):
    fault = versions.interpreter_fault
    assert "install 'numpy<2.4'" in fault("3.6.0", "2.4.1") and fault("3.5.1", "2.5.0")
    assert not fault("3.6.0", "2.3.5") and not fault("3.7.0", "2.5.0")
    assert not fault("3.10.0", "2.10.0") and fault("3.6.0", "2.10.0")
    monkeypatch.setattr(runner, "installed_interpreter_fault", lambda: fault("3.6.0", "2.4.1"))
    assert bench.main(["gpu", "--dry-run", "--out", str(tmp_path)]) == 2
    assert "does not work with numpy 2.4.1" in capsys.readouterr().err


def test_the_machine_s_rates_are_read_by_others(context, capsys):
    assert machine.measured(context, "copy bandwidth") is None
    assert machine.run(context) == 0
    (line,) = capsys.readouterr().out.splitlines()
    for what in ("torch", "triton", "copy bandwidth", "read bandwidth", "matrix rate"):
        assert f"; {what} " in line
    assert machine.measured(context, "copy bandwidth") > 0


@pytest.mark.parametrize("kernel", ["statistics", "gradient", "one pass"])
def test_candidates_reach_the_launch(kernel, monkeypatch):
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")
    found = tune.candidates(kernel, CPU)
    assert sum(c.in_table for c in found) == 1 and len(found) > 10
    assert len({c.text for c in found}) == len(found)
    layout = dict(contiguous=True, plain=True)
    one = next(c for c in found if c.text.startswith("Row(1024, 32)"))

    def chosen():
        if kernel != "one pass":
            return launch.tile("sm_90", 128256, 2, **layout)
        rows = dict(rows=9000, processors=132, l2_bytes=50 << 20, clusters=False)
        return launch.one_pass("sm_90", 128256, 2, **layout, **rows).tile

    before = chosen()
    during = tune._patched(one, chosen)()
    assert (during.GROUPS, during.num_warps) == (1024, 32) != (before.GROUPS, before.num_warps)
    assert chosen() == before


NCU = """==PROF== Connected to process 7
loss 11.7
"ID","Process ID","Kernel Name","dram__bytes_read.sum","smsp__inst_executed.sum"
"","","","byte","inst"
"0","7","token_stats_kernel","2,101,346,304","246,251,520"
"1","7","token_grad_kernel","2101346304","172376064"
==PROF== Disconnected
"""


def test_counters_are_read():
    rows = list(counters.parse(NCU.splitlines()))
    found = {(r["launch"], r["metric"]): r for r in rows}
    assert found["0", "bytes read"]["value"] == "2101346304"
    assert found["0", "bytes read"]["unit"] == "byte"
    assert found["0", "instructions per logit"]["value"] == "7.500"
    assert found["1", "instructions per logit"]["value"] == "5.250"
    assert found["1", "bytes read"]["kernel"] == "token_grad_kernel" and len(rows) == 6
    assert list(counters.parse(["==ERROR== no permission"])) == []


def test_without_ncu_a_row_says_so(context, monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    assert counters.run(SimpleNamespace(**context._asdict() | dict(dry=False))) == 0
    assert [r["note"] for r in read_table(context.out / "counters.csv")] == ["ncu is not here"]


def test_numbers_of_a_report():
    report = {"loss": [3.0, 2.5], "torch": {"ms": 7, "same": True}, "name": "x", "none": []}
    assert train.numbers(report) == {"loss": 2.5, "torch.ms": 7}
