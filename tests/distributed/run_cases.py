"""What every rank runs in test_distributed.py, started by torchrun: all cases in one go."""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import distributed_cases
import evaluation_cases
import group_mean_cases
import head_cases
import pair_cases
import torch
import torch.distributed as dist

FILES = distributed_cases, pair_cases, group_mean_cases, head_cases, evaluation_cases
CASES = {name: run for file in FILES for name, run in file.CASES.items()}


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
