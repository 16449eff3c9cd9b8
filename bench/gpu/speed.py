"""Stage `speed`: time, error and memory of each loss, beside its peers and the memory's own rate.

Each result is compared with eager's first. Who is wrong, or rests on a kernel that stage `check`
found wrong, gets a row and is not timed.
"""

from __future__ import annotations

import torch

from .. import providers
from ..cases import BOTH, FORWARD, LINEAR, LOGITS, Case, Loss, dtype_name
from ..providers import COMPILED, CUT, CUT_FILTER, EAGER, FLASH, HEAD, LIGER, OURS, QUACK, Provider
from ..records import Report, cpu_name, read_table
from ..runner import Runner, Timed
from . import machine
from .stage import Context

ROUNDS = 15
SECONDS = 5.0  # of timing a mode of a case
NAMES = {
    LOGITS: (
        EAGER, f"{EAGER} float32", COMPILED, OURS, providers.INPLACE, providers.ONE_PASS,
        providers.ONE_PASS_INPLACE, LIGER, FLASH, QUACK,
    ),
    LINEAR: (
        EAGER, COMPILED, OURS, f"{OURS} sums in bfloat16", f"{OURS} 1 GiB chunks",
        HEAD + providers.ONE_PASS_INPLACE, LIGER, CUT, CUT_FILTER, QUACK,
    ),
}  # fmt: skip
TINY = (Case(LOGITS, 4, 0, 300, torch.float32), Case(LINEAR, 4, 8, 300, torch.float32))
SIZES = (
    *(Case(LOGITS, 8192, 0, v, torch.bfloat16) for v in (128256, 50257, 32000)),
    Case(LINEAR, 8192, 4096, 128256, torch.bfloat16),
    Case(LINEAR, 8192, 2048, 50257, torch.bfloat16),
    Case(LOGITS, 4096, 0, 262144, torch.bfloat16),
    Case(LOGITS, 8192, 0, 50257, torch.float32),
    *(Case(LOGITS, n, 0, 128256, torch.bfloat16) for n in (1, 8, 64, 512)),
    Case(LINEAR, 8192, 4096, 262144, torch.bfloat16),
)
NOT_COMPILED = [s for s in SIZES if s.N < 8192 or s.dtype == torch.float32]


def run(context: Context) -> int:
    """Write speed.csv. Return 1 where eager or chunked_ce fails or is wrong."""
    device = cpu_name() if context.dry else torch.cuda.get_device_name()
    runner = SpeedRunner(context, Report(device, context.out / "speed.csv"))
    for case in TINY if context.dry else SIZES:
        runner.time(case, NAMES[case.form], (BOTH, FORWARD))
        context.release()
    runner.report.table.close()
    return runner.exit_code()


class SpeedRunner(Runner):
    """Adds rates, and leaves out what stage `check` found wrong."""

    strict = False  # a GPU's products may add up in bfloat16

    def __init__(self, context: Context, report: Report) -> None:
        rounds = 2 if context.dry else ROUNDS
        super().__init__(report, context.provider_device, rounds, SECONDS, context.deadline)
        found = read_table(context.out / "check.csv")
        self.wrong = {(r["kernel"], r["dtype"]) for r in found if r["result"] == "wrong"}
        self.copied = machine.measured(context, "copy bandwidth")

    def _load(self, case: Case, provider: Provider) -> Loss:
        if provider.name == COMPILED and case in NOT_COMPILED:
            raise providers.Unavailable("left out: to compile it takes longer than all the rest")
        for kernel in provider.rests_on:
            if (kernel, dtype_name(case.dtype)) in self.wrong:
                raise providers.Unavailable(f"check found {kernel} wrong")
        return super()._load(case, provider)

    def also(self, timed: Timed) -> None:
        """Add the errors and what share of the machine's rates a step reaches."""
        super().also(timed)
        (provider, case, *_), mode, seconds = timed.entry, timed.mode, timed.taken.median
        rates = dict(zip(("loss_error", "gradient_error"), timed.entry.errors, strict=True))
        if case.form == LOGITS:
            passes = 1 if mode == FORWARD else provider.passes
            rates["GB_per_s"] = passes * case.logits_bytes / 1e9 / seconds
            if self.copied:
                rates["of_copy_bandwidth"] = share = rates["GB_per_s"] / self.copied
                print(f"{provider.name}, {mode}: {share:.2f} of the copy bandwidth", flush=True)
        elif mode == BOTH:
            rates["TFLOP_per_s"] = 6 * case.N * case.D * case.V / seconds / 1e12
        for metric, value in rates.items():
            self.report.add(case, provider.name, mode, metric, value)
