"""Draw the planner's peak memory of head and loss as bars: the picture at the top of README.

python -m bench plan                      Llama 3 8B's head, bfloat16, 8192 and 32768 tokens
python -m bench plan --hidden 8192 --tokens 4096 --out plan.png

Nothing is measured: every number comes from `chunked_ce.planner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from chunked_ce.planner import HeadShape, plan

from . import options
from .figures import COLORS
from .providers import COMPILED, EAGER, OURS

OUT = Path("docs/images/peak_memory.png")


class Bar(NamedTuple):
    label: str
    gib: float
    color: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser_of("plan", __doc__)
    options.add_sizes(parser, vocab=128256, hidden=4096)
    add = parser.add_argument
    add("--tokens", nargs="+", type=options.positive, default=[8192, 32768], metavar="N")
    add("--name", default="Llama 3 8B", help="title of the model; default: %(default)s")
    add("--out", type=options.writable, default=OUT, metavar="FILE", help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(f"plan needs matplotlib: pip install -e '.[bench]' ({error})") from error
    head = HeadShape(args.vocab, args.hidden)
    panels = {tokens: bars(head, tokens) for tokens in args.tokens}
    for tokens, found in panels.items():
        for bar in found:
            print(f"{tokens:>9,} tokens  {bar.gib:6.2f} GiB  {' '.join(bar.label.split())}")
    try:
        draw(args.name, head, panels, args.out)
    except (OSError, ValueError) as error:
        raise ValueError(f"{args.out} cannot be written: {error}") from error
    print(args.out)
    return 0


def bars(head: HeadShape, tokens: int) -> list[Bar]:
    """Return what torch takes, what this library takes by default, and the least it can take."""
    estimates = plan(head, tokens)
    peaks = {e.name: e.peak_bytes / 2**30 for e in estimates}
    (transformers,) = (name for name in peaks if "float32" in name)
    ours = [e for e in estimates if "cross_entropy" in e.name]
    smallest = min(ours, key=lambda e: e.peak_bytes)
    return [
        Bar("eager, loss in float32\n(transformers)", peaks[transformers], COLORS[EAGER]),
        Bar("eager", peaks["eager"], COLORS[EAGER]),
        Bar("torch.compile", peaks["torch.compile"], COLORS[COMPILED]),
        Bar("chunked_ce, default", peaks["linear_cross_entropy"], COLORS[OURS]),
        Bar(
            f"chunked_ce, smallest\n({smallest.name.partition(', ')[2]})",
            smallest.peak_bytes / 2**30,
            COLORS[OURS],
        ),
    ]


def draw(name: str, head: HeadShape, panels: dict[int, list[Bar]], path: Path) -> None:
    """Draw one panel for each number of tokens, all on the same scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels) + 1.2, 3.6), layout="constrained")
    dtype = str(head.dtype).removeprefix("torch.")
    figure.suptitle(
        f"{name}: peak memory of lm_head and loss in training, GiB (predicted by the planner)\n"
        f"D = {head.hidden_size}, V = {head.vocab_size}, {dtype}; gradients included",
        fontsize="medium",
    )
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True, sharex=True)[0]
    most = max(bar.gib for found in panels.values() for bar in found)
    for ax, (tokens, found) in zip(axes, panels.items(), strict=True):
        drawn = ax.barh(
            [bar.label for bar in found],
            [bar.gib for bar in found],
            color=[bar.color for bar in found],
        )
        ax.bar_label(drawn, [f"{bar.gib:.1f}" for bar in found], padding=4, fontweight="bold")
        ax.set_title(f"{tokens:,} tokens", fontsize="medium")
        ax.set_xlim(0, 1.12 * most)
        ax.set_xlabel("GiB")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=150)
