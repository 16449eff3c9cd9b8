"""What every rank runs in test_distributed.py, started by torchrun: all cases in one go."""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import distributed_cases
import group_mean_cases
import head_cases
import pair_cases
import torch
import torch.distributed as dist

CASES = distributed_cases.CASES | pair_cases.CASES | group_mean_cases.CASES | head_cases.CASES


def main():
    results = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    done = {}
    for name, run in CASES.items():
        torch.manual_seed(0)
        try:
            run()
            done[name] = "passed"
        except BaseException:
            done[name] = traceback.format_exc()
            (results / f"{rank}.json").write_text(json.dumps(done))
            sys.exit(1)  # torchrun ends the others, which may wait for this one
    (results / f"{rank}.json").write_text(json.dumps(done))
    dist.destroy_process_group()
    sys.stdout.flush()
    # Threads of gloo may outlive the group: torch then aborts at times while Python ends.
    os._exit(0)


if __name__ == "__main__":
    main()
