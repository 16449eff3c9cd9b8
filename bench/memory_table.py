"""The table of peak memory at the end of `python -m bench run`."""

from __future__ import annotations

from .records import Report


def memory_table(report: Report) -> None:
    """Print predicted and measured peaks side by side, a row a provider, mode and size."""
    found: dict[tuple[object, ...], dict[str, float]] = {}
    for m in report.measurements:
        if m.metric != "seconds":
            key = m.provider, m.mode, m.N, m.D, m.V, m.dtype, m.device
            found.setdefault(key, {})[m.metric] = m.value / 2**20
    report.title("peak memory of a step beyond its batch, MiB")
    rows = [("provider", "mode", "dtype", "N", "D", "V", "predicted", "measured", "ratio")]
    for (provider, mode, n, d, v, dtype, _), of in found.items():
        predicted, measured = of.get("predicted_peak_extra_bytes"), of.get("peak_extra_bytes")
        cells = ("" if x is None else f"{x:.0f}" for x in (predicted, measured))
        ratio = f"{measured / predicted:.2f}" if predicted and measured else ""
        shape = (str(x or "") for x in (n, d, v))
        rows.append((str(provider), str(mode), str(dtype), *shape, *cells, ratio))  # type: ignore[arg-type]
    report.table(rows, labels=3)
