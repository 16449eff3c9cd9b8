"""Benchmarks of chunked_ce: speed, memory and what the compiler makes of the kernels.

python -m bench COMMAND [OPTION ...]
python -m bench COMMAND --help
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {  # command: (module, its function, what it does)
    "quick": ("suites", "quick", "every provider that needs no compiler, small sizes: seconds"),
    "full": ("suites", "full", "every provider over vocabularies: minutes"),
    "cpu": ("cpu", "main", "the losses from logits on the CPU beside their bounds; --busy N"),
    "linear": ("linear", "main", "head and loss together on the CPU beside their bounds"),
    "distillation": ("distillation", "main", "two heads and their divergence beside eager's"),
    "weight_traffic": ("weight_traffic", "main", "bytes of the weight gradient, counted"),
    "perplexity": ("perplexity", "main", "peak memory of scoring text"),
    "log_probabilities": ("log_probabilities", "main", "peak memory of a policy-gradient step"),
    "huggingface": ("huggingface", "main", "loss and gradients of 20 models beside their own"),
    "architectures": ("architectures", "main", "every causal model of transformers"),
    "gpu": ("gpu.runner", "main", "check and measure the kernels on a GPU; --dry-run without one"),
    "audit": ("audit", "main", "instructions, registers and bounds of the compiled kernels"),
    "compile": ("compile", "main", "compile every kernel for GPUs that are not here"),
    "providers": ("providers", "main", "who is compared, and why one cannot run here"),
    "plan": ("plan_figure", "main", "draw the planner's peak memory, README's figure: seconds"),
    "figures": ("figures", "main", "draw every figure from the CSV files"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Return its exit code; 2, after one line, where the input is wrong."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        for name, (_, _, text) in COMMANDS.items():
            print(f"    {name:17} {text}")
        return 0
    if command not in COMMANDS:
        said = f"no command {command!r}, expected one of {', '.join(COMMANDS)}"
        print(f"python -m bench: {said}", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[command]
    try:
        run = getattr(importlib.import_module(f"bench.{module}"), function)
        return int(run(rest))
    except (ValueError, ImportError) as error:
        print(f"python -m bench {command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
