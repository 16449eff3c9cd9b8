"""Perplexity as a meter: ranks and errors, merging, saving, and the process groups of several ranks."""

import json
import math
import os
import tempfile
from pathlib import Path

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import batch
from language_models import CONTEXT, VOCAB, causal_lm

from chunked_ce import Perplexity, PerplexityReport, evaluate_perplexity


def test_standard_error_and_ranks():
    x, target = batch(200, 50)
    meter = Perplexity()
    for logits, labels in zip(x.split(30), target.split(30), strict=True):
        meter.update(logits, labels, rank=True)
    losses = oracle.cross_entropy(x, target, reduction="none")[target != -100]
    rank = oracle.token_stats(x, target)["rank"][target != -100].double()
    report = meter.report()
    stderr = float(losses.std() / math.sqrt(len(losses)))
    assert report.mean_nll_stderr == pytest.approx(stderr, rel=1e-6)
    assert report.accuracy == pytest.approx(float((rank == 0).double().mean()), rel=1e-12)
    assert report.mean_reciprocal_rank == pytest.approx(float((1 / (1 + rank)).mean()), rel=1e-12)
    for part in (f"± {stderr:.4f} nats", "top-1 accuracy", "mean reciprocal rank"):
        assert part in str(report)
    meter.update(*batch(3, 50))
    assert meter.report().accuracy is None and meter.report().mean_nll_stderr is not None
    meter.update_nll(2.0, 1)
    assert meter.report().mean_nll_stderr is None


def test_standard_error_of_equal_losses():
    report = PerplexityReport(0.1 * 3000, 3000, nll_square_sum=0.1**2 * 3000)
    assert 0 <= report.mean_nll_stderr < 1e-8
    assert math.isnan(PerplexityReport(1.0, 1, nll_square_sum=1.0).mean_nll_stderr)
    # Of losses 1 and 2.
    assert PerplexityReport(3.0, 2, nll_square_sum=5.0).mean_nll_stderr == pytest.approx(0.5)


def test_device_of_sums():
    there = dict(device="meta")
    meter = Perplexity()
    meter.update_nll(2.0, 1)
    elsewhere = meter.state_dict() | {
        "nll_sum": torch.zeros((), dtype=torch.float64, **there),
        "tokens": torch.zeros((), dtype=torch.int64, **there),
    }
    meter._add(elsewhere)
    meter.update_nll(torch.tensor(2.0), torch.tensor(1))
    assert meter.nll_sum.device.type == meter.tokens.device.type == "meta"
    assert meter.nll_sum.dtype == torch.float64 and meter.tokens.dtype == torch.int64


def test_json_of_infinity():
    report = PerplexityReport(nll_sum=1e6, tokens=10, nll_square_sum=1e12)
    known = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert known["perplexity"] == "inf" and known["mean_nll"] == 1e5
    assert known["bits_per_byte"] is None


def test_call():
    meter = Perplexity()
    first, second = batch(20, 50), batch(30, 50)
    alone = [meter(*first), meter(*second)]
    for value, (x, target) in zip(alone, (first, second), strict=True):
        expected = oracle.cross_entropy(x, target).exp()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    both = Perplexity()
    both.update(*first)
    both.update(*second)
    assert meter.compute() == both.compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_torchmetrics(dtype):
    text = pytest.importorskip("torchmetrics.text")
    x, target = batch((4, 50), 60, dtype)
    ours, theirs = Perplexity(), text.Perplexity(ignore_index=-100).to(torch.float64)
    theirs.set_dtype(torch.float64)
    for rows in (slice(0, 1), slice(1, 4)):
        ours.update(x[rows], target[rows])
        theirs.update(x[rows], target[rows])
    torch.testing.assert_close(ours.compute(), theirs.compute().double(), rtol=2e-6, atol=0)


def test_clone_and_to(device):
    meter = Perplexity(ignore_index=7)
    meter.update(*batch(20, 50, ignored=0), n_bytes=3, rank=True)
    before = meter.report()
    other = meter.clone()
    assert other.report() == before and other.ignore_index == 7
    other.update(*batch(5, 50, ignored=0), n_bytes=4, rank=True)
    assert meter.report() == before and other.report().tokens > before.tokens
    assert meter.to(device) is meter and meter.report() == before
    tensors = [v for v in meter.state_dict().values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 5 and all(t.device.type == torch.device(device).type for t in tensors)
    meter.update_nll(1.0, 1)
    assert meter.to("cpu").report().words is None and meter.compute().device.type == "cpu"
    with pytest.raises(ValueError, match="device is 'meta', which cannot be used here"):
        meter.to("meta")
    assert meter.report().tokens == before.tokens + 1


def test_merge_and_state():
    parts = [batch(20, 50) for _ in range(3)]
    whole, meters = Perplexity(), [Perplexity() for _ in parts]
    for meter, (x, target) in zip(meters, parts, strict=True):
        meter.update(x, target, n_bytes=7, rank=True)
        whole.update(x, target, n_bytes=7, rank=True)
    merged = Perplexity()
    for meter in meters:
        merged.merge(meter)
    assert merged.report() == whole.report() == sum(meters[1:], meters[0]).report()
    assert merged.report().words is None and merged.report().bytes == 21

    with tempfile.TemporaryFile() as file:
        torch.save(whole.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    again = Perplexity()
    again.update(*parts[0])  # forgotten
    again.load_state_dict(saved)
    assert again.report() == whole.report()
    again.update(*parts[0])
    assert again.report().tokens > whole.report().tokens and whole.report() == merged.report()
    assert whole.sync().report() == whole.report()  # no process group: alone


def test_state_as_json_and_sum():
    meter = Perplexity(ignore_index=None)
    meter.update(*batch(20, 50), n_bytes=7, rank=True)
    plain = {
        name: value.item() if isinstance(value, torch.Tensor) else value
        for name, value in meter.state_dict().items()
    }
    again = Perplexity()
    again.load_state_dict(json.loads(json.dumps(plain)))
    assert again.report() == meter.report() and again.tokens.dtype == torch.int64
    assert sum([meter, again]).report() == (meter + again).report()
    assert sum([meter]).report() == meter.report()
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + meter


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(tokens=None), TypeError, "tokens must be an int or .*, got NoneType"),
        (dict(nll_sum="3"), TypeError, "nll_sum must be a number .* got str"),
        (dict(nll_sum=torch.ones(2)), ValueError, r"nll_sum has shape \[2\]"),
        (dict(top1=1.5), TypeError, "top1 must be an int .* got float"),
        (dict(top1=-1), ValueError, "top1 is -1, expected at least 0"),
        (dict(bytes="9"), TypeError, "bytes must be an int or None, got str"),
    ],
    ids=str,
)
def test_bad_state(change, error, message):
    meter = Perplexity()
    meter.update(*batch(20, 50), n_bytes=7, rank=True)
    before = meter.report()
    with pytest.raises(error, match=message):
        meter.load_state_dict(meter.state_dict() | change)
    assert meter.report() == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.merge(3), TypeError, "other must be a Perplexity, got int"),
        (lambda m: m.load_state_dict([1]), TypeError, "state_dict must be a mapping, got list"),
        (lambda m: m.load_state_dict({"loss": 1}), ValueError, "has keys loss, expected nll_sum"),
        (lambda m: m.update(*batch(3, 20), rank=1), TypeError, "rank must be True or False"),
        (lambda m: m.update(*batch(3, 20), words=2.0), TypeError, "words must be an int or None"),
        (lambda m: m.update(*batch(3, 20), n_bytes=-1), ValueError, "n_bytes is -1"),
        (lambda m: m.update_nll(1.0, 1, nll_square_sum="x"), TypeError, "nll_square_sum must be"),
    ],
)  # fmt: skip
def test_mistakes(call, error, message):
    meter = Perplexity()
    with pytest.raises(error, match=message):
        call(meter)
    assert meter.report() == PerplexityReport(0.0, 0), "nothing was counted"


# Several processes


def meter_of(rank: int, size: int) -> Perplexity:
    """Of every `size`-th of 10 batches."""
    torch.manual_seed(0)
    meter = Perplexity()
    for i, (x, target) in enumerate([batch(9, 50) for _ in range(10)]):
        if i % size == rank:
            meter.update(x, target, n_bytes=2**40 + i, words=None, rank=True)
    return meter


def evaluated(group=None):
    torch.manual_seed(0)
    documents = [torch.randint(3, VOCAB, (n,)) for n in (150, 3, 90, 41)]
    return evaluate_perplexity(
        causal_lm(), documents, context_length=CONTEXT, stride=11, batch_size=4, rank=True,
        per_document=True, per_position=True, per_window=True, group=group,
    )  # fmt: skip


def one_rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    collectives = []
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    for name in (gather, "all_reduce"):
        call = getattr(dist, name)
        setattr(dist, name, lambda *a, call=call, **k: (collectives.append(1), call(*a, **k)))
    meter = meter_of(rank, size)
    before = meter.report()
    synced = meter.sync()
    assert len(collectives) == 1 and meter.report() == before
    assert meter.sync().report() == synced.report(), "nothing is counted twice"
    without_first = (Perplexity() if rank == 0 else meter).sync()
    assert without_first.report().tokens < synced.report().tokens
    report = evaluated(dist.group.WORLD)
    torch.save([vars(synced.report()), report.to_dict()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_ranks_report(tmp_path):
    size = 4
    pytest.importorskip("transformers")
    if not dist.is_available():
        pytest.skip("torch without distributed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(one_rank, (size, str(tmp_path)), nprocs=size)
    meter, report = vars(meter_of(0, 1).report()), evaluated().to_dict()
    torch.set_num_threads(threads)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    assert all(r == ranks[0] for r in ranks[1:]), "all ranks have the same bits"
    synced, together = ranks[0]
    for name, value in meter.items():
        if isinstance(value, float):
            assert synced[name] == pytest.approx(value, rel=1e-12)
        else:
            assert synced[name] == value
    positions = together.pop("per_position"), report.pop("per_position")
    assert together == report, "sums of windows are added in one order: bit for bit"
    for ours, alone in zip(*positions, strict=True):
        assert ours["tokens"] == alone["tokens"] and ours["top1"] == alone["top1"]
        assert ours["nll_sum"] == pytest.approx(alone["nll_sum"], rel=1e-12)
