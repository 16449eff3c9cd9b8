"""Every kernel built for the GPUs it is meant for, on this machine, which needs none: it compiles, and spills nothing.

In processes of their own, for an interpreted Triton cannot compile.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
PROGRAM = """
import json, sys
import compiled
print(json.dumps(compiled.build_all(sys.argv[1])))
"""


@pytest.fixture(scope="module", params=TARGETS)
def built(request):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, request.param], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_variant_compiles(built):
    assert len(built) >= 40
    assert all(b["size"] > 0 for b in built)


def test_nothing_spills(built):
    spilled = [b for b in built if b["spills"]]
    assert not spilled, spilled
