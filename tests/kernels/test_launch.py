"""Tests of the launch tables. They change only speed, so only bounds are tested."""

import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from chunked_ce.backends import clusters, gpu
from chunked_ce.kernels import launch

pytestmark = pytest.mark.real_sizes
ARCHITECTURES = (*launch.TABLE, "generic", "sm_75")


def device_with(monkeypatch, **properties):
    module = SimpleNamespace(get_device_properties=lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    for cached in (gpu.architecture, gpu.processors, gpu.l2_bytes):
        cached.cache_clear()
    return torch.device("cuda", 7)


def test_unknown_architecture_warning(monkeypatch):
    device = device_with(monkeypatch, major=7, minor=5)
    with pytest.warns(UserWarning, match="no launch table for sm_75"):
        assert gpu.architecture(device) == "generic"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.architecture(device) == "generic"


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        (dict(major=9, minor=0), "sm_90"),
        (dict(major=10, minor=0), "sm_100"),
        (dict(major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-"), "gfx942"),
    ],
)
def test_known_architectures(monkeypatch, properties, name):
    assert gpu.architecture(device_with(monkeypatch, **properties)) == name


@pytest.mark.parametrize(
    ("properties", "processors", "l2_bytes"),
    [
        (dict(multi_processor_count=132, L2_cache_size=50 << 20), 132, 50 << 20),
        (dict(gpu_subslice_count=64), 64, 16 << 20),
        (dict(), 64, 16 << 20),
    ],
)
def test_device_sizes(monkeypatch, properties, processors, l2_bytes):
    device = device_with(monkeypatch, **properties)
    assert gpu.processors(device) == processors and gpu.l2_bytes(device) == l2_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_tiles(architecture, itemsize):
    for vocab in (1, 32, 1000, 50257, 1_200_000):
        for contiguous in (True, False):
            for plain in (True, False):
                tile = launch.tile(
                    architecture, vocab, itemsize, contiguous=contiguous, plain=plain
                )
                assert tile.GROUPS & (tile.GROUPS - 1) == 0 and tile.WIDTH * itemsize == 16
                assert launch.SEGMENT % tile.columns == 0
                assert tile.columns < 2 * max(vocab, launch.SMALLEST_GROUPS * tile.WIDTH)


def plan(columns, rows=4096, itemsize=2, clusters=False, contiguous=True, plain=True):
    return launch.one_pass(
        "sm_90", columns, itemsize, contiguous=contiguous, plain=plain, rows=rows,
        processors=132, l2_bytes=50 << 20, clusters=clusters,
    )  # fmt: skip


def test_one_pass_plan():
    assert plan(16000).on_chip and not plan(50257).on_chip
    assert not plan(16000, contiguous=False).on_chip and not plan(16000, plain=False).on_chip
    assert not plan(16000, itemsize=8).on_chip


def test_streamed_rows_fit_l2():
    assert plan(50257).programs * 50257 * 2 <= 25 << 20
    assert plan(128256).programs == 132  # one for each processor at least
    assert plan(50257, rows=3).programs == 3


@pytest.mark.parametrize(("columns", "ctas"), [(32000, 2), (50257, 4), (131072, 8)])
def test_clusters_verified(columns, ctas):
    with_clusters = plan(columns, clusters=True)
    assert with_clusters.on_chip and with_clusters.tile.num_ctas == ctas
    assert not plan(131073 * 2, clusters=True).on_chip


def test_clusters_record(monkeypatch, tmp_path):
    monkeypatch.setenv("CHUNKED_CE_CACHE", str(tmp_path))
    monkeypatch.setattr(clusters, "is_supported", lambda device: True)
    monkeypatch.setattr(clusters, "_key", lambda device: "a GPU")
    device = torch.device("cuda", 7)
    clusters.is_verified.cache_clear()
    assert clusters.is_verified(device) is False
    for agrees in (True, False):
        monkeypatch.setattr(clusters, "_agrees", lambda *_, agrees=agrees: agrees)
        assert clusters.check(device) is agrees
        assert clusters.is_verified(device) is agrees
    (tmp_path / "clusters.json").write_text("not json")
    clusters.is_verified.cache_clear()
    assert clusters.is_verified(device) is False
    clusters.is_verified.cache_clear()


def test_clusters_cpu():
    assert clusters.is_supported(torch.device("cpu")) is False
    assert clusters.check(torch.device("cpu")) is False
