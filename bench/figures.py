"""Draw every figure, from the tidy CSV alone.

python -m bench figures                    of every run under runs/bench/
python -m bench figures linear.csv --out folder
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from . import options, records
from .cases import BOTH, FORWARD
from .providers import (
    COMPILED,
    CUT,
    CUT_FILTER,
    EAGER,
    FLASH,
    HEAD,
    INPLACE,
    LIGER,
    OURS,
    QUACK,
    TORCH,
)

Row = dict[str, str]
Point = tuple[float, float, float, float]  # x, value, q20, q80
Panel = tuple[str, str, float, str]  # mode, metric, unit, label
RUNS = Path("runs/bench")
PEAK, PREDICTED = "peak_extra_bytes", "predicted_peak_extra_bytes"
COLORS = {
    EAGER: "#7f7f7f", COMPILED: "#e69f00", TORCH: "#b58900", CUT: "#56b4e9", LIGER: "#cc79a7",
    CUT_FILTER: "#2b6c99",
    QUACK: "#8c564b", FLASH: "#9467bd", OURS: "#0072b2", INPLACE: "#d55e00",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser_of("figures", __doc__)
    add = parser.add_argument
    add("csv", nargs="*", type=Path, help=f"default: every results.csv and speed.csv under {RUNS}")
    add("--out", type=Path, metavar="DIR", help="default: beside each CSV")
    args = parser.parse_args(arguments)
    files = args.csv or sorted([*RUNS.glob("*/results.csv"), *RUNS.glob("*/speed.csv")])
    if not files:
        raise ValueError(f"nothing to draw under {RUNS}: python -m bench full first")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, expected a folder")
    if args.out and len(files) > 1:
        raise ValueError(
            f"--out takes the figures of one CSV, got {len(files)}: name one, or omit it"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"figures needs matplotlib: pip install -e '.[bench]' ({error})"
        ) from error
    tables = {path: records.read_measurements(path) for path in files}  # all before one is drawn
    for path, rows in tables.items():
        folder = args.out or path.parent
        picture = None
        try:
            for picture in draw_all(rows, folder):
                print(picture)
        except OSError as error:
            raise ValueError(f"{folder} cannot be written: {error.strerror or error}") from error
        if picture is None:
            print(f"{path}: no figure shows its rows")
    return 0


def color_of(provider: str) -> str:
    return COLORS.get(provider.removeprefix(HEAD), "black")


class Line(NamedTuple):
    label: str
    color: str
    style: str
    points: list[Point]


def draw_all(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Draw the pictures of one CSV; one for each device, dtype, N and D that it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    names: Counter[str] = Counter()
    for device, dtype, n in _distinct(rows, "device", "dtype", "N"):
        selected = [r for r in rows if (r["device"], r["dtype"], r["N"]) == (device, dtype, n)]
        end = "_predicted" if device.startswith("predicted") else ""
        heads = [r for r in selected if r["D"] and r["mode"] == BOTH]
        sizes = [d for (d,) in _distinct(heads, "D")]
        for d in sizes:
            head_rows = [r for r in heads if r["D"] == d]
            name = f"vocabulary_{dtype}_N{n}{f'_D{d}' if len(sizes) > 1 else ''}{end}"
            title = f"head and loss, {BOTH}: N = {n}, D = {d}, {dtype}\n{device}"
            yield _draw(
                head_rows,
                _training_panels(head_rows),
                "V",
                title,
                folder / _unused_name(name, names),
            )
        logits_rows = [r for r in selected if not r["D"] and r["metric"] == "seconds"]
        if logits_rows:
            title = f"the loss alone, from logits: N = {n}, {dtype}\n{device}"
            path = folder / _unused_name(f"logits_{dtype}_N{n}{end}", names)
            panels = [(m, "seconds", 1e-3, f"time of {m}, ms") for m in (FORWARD, BOTH)]
            yield _draw(logits_rows, panels, "V", title, path)
    for device, d, v in _distinct([r for r in rows if r["D"]], "device", "D", "V"):
        size_rows = [r for r in rows if (r["device"], r["D"], r["V"]) == (device, d, v)]
        if len(_distinct(size_rows, "N")) > 2:
            title = f"head and loss, {BOTH}: D = {d}, V = {v}\n{device}"
            path = folder / _unused_name(f"tokens_D{d}_V{v}", names)
            yield _draw(size_rows, _training_panels(size_rows), "N", title, path)


def _unused_name(name: str, names: Counter[str]) -> str:
    """Return the file's name: of another device the same one would be taken."""
    names[name] += 1
    return f"{name}.png" if names[name] == 1 else f"{name}_{names[name]}.png"


def _training_panels(rows: Sequence[Row]) -> list[Panel]:
    """Return the panels of time, where it was measured, and of peak memory."""
    metrics = {r["metric"] for r in rows}
    panels = [(BOTH, "seconds", 1e-3, "time, ms")] if "seconds" in metrics else []
    peak = PEAK if PEAK in metrics else PREDICTED
    source = "measured" if peak == PEAK else "predicted, exact tensor bytes"
    most = max((float(r["value"]) for r in rows if r["metric"] == peak), default=0.0)
    unit, name = (2.0**30, "GiB") if most >= 2**30 else (2.0**20, "MiB")
    return [*panels, (BOTH, peak, unit, f"peak extra memory, {name}\n({source})")]


def _draw(rows: Sequence[Row], panels: Sequence[Panel], x: str, title: str, path: Path) -> Path:
    """Draw a panel for each mode and metric against N or V."""
    figure, axes = _figure(len(panels), title)
    ticks = sorted({int(r[x]) for r in rows})
    for ax, (mode, metric, unit, label) in zip(axes, panels, strict=True):
        for line in _lines([r for r in rows if r["mode"] == mode], metric, x, unit):
            _plot(ax, line)
        _axes(ax, ticks, {"V": "vocabulary V", "N": "tokens N"}[x], label)
    return _save(figure, axes, path)


def _distinct(rows: Iterable[Row], *columns: str) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(r[c] for c in columns) for r in rows))


def _lines(rows: Sequence[Row], metric: str, x: str, unit: float) -> Iterator[Line]:
    """Yield lines that join what differs in `x` alone; labels say what else differs."""
    rows = [r for r in rows if r["metric"] == metric]
    fixed = [c for c in ("N", "D", "V", "dtype", "device") if c != x]
    differing = [c for c in fixed if len(_distinct(rows, c)) > 1]
    others = _distinct(rows, *differing)
    for provider, mode, *of in _distinct(rows, "provider", "mode", *differing):
        key = (provider, mode, *of)
        own = [r for r in rows if (r["provider"], r["mode"], *(r[c] for c in differing)) == key]
        points = [_point([r for r in own if r[x] == at], x, unit) for (at,) in _distinct(own, x)]
        behind_head = provider.startswith(HEAD)
        label = provider
        label += "".join(f", {c} = {v}" for c, v in zip(differing, of, strict=True))
        style = ":" if behind_head else ("-", "--", "-.")[others.index(tuple(of)) % 3]
        yield Line(label, color_of(provider), style, sorted(points))


def _point(rows: Sequence[Row], x: str, unit: float) -> Point:
    """Return the point of some rows: the median of their values, with the widest spread."""
    return (
        float(rows[0][x]),
        median(float(r["value"]) for r in rows) / unit,
        min(float(r["q20"] or r["value"]) for r in rows) / unit,
        max(float(r["q80"] or r["value"]) for r in rows) / unit,
    )


def _figure(panels: int, title: str) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels + 0.6, 4.8), layout="constrained")
    figure.suptitle(_plain(title), fontsize="medium")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    return figure, list(axes)


def _plain(text: str) -> str:
    """Escape what would be a formula."""
    return text.replace("$", r"\$")


def _plot(ax: Any, line: Line) -> None:
    x, value, low, high = zip(*line.points, strict=True)
    ax.plot(
        x, value, line.style, marker="o", markersize=4, color=line.color, label=_plain(line.label)
    )
    ax.fill_between(x, low, high, color=line.color, alpha=0.15, linewidth=0)


def _axes(ax: Any, ticks: Sequence[int], x_label: str, y_label: str) -> None:
    ax.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.tick_params(axis="x", rotation=30)
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_locator(_decades())
    ax.grid(alpha=0.3)


def _decades() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1.0, 2.0, 5.0))


def _save(figure: Any, axes: Sequence[Any], path: Path) -> Path:
    """Write the figure with one legend below all panels."""
    handles = {
        label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center",
            ncols=min(len(handles), 2 * len(axes)), fontsize="small", frameon=False,
        )  # fmt: skip
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
