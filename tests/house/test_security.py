"""No network, no code and no pickle of a user's file, no other process: Python's own audit says so.

And what is written about it: licences of what is depended on, the table of faults."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

WATCH = """
import sys
FORBIDDEN = (
    "socket.", "urllib.", "http.", "ssl.", "ftplib.", "smtplib.", "subprocess.", "os.system",
    "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class", "webbrowser.",
)
seen = []
def watch(event, args):
    if event.startswith(FORBIDDEN):
        seen.append(event)
        raise PermissionError(f"{event} {args}")
sys.addaudithook(watch)
"""

IMPORTS = """
import importlib, pkgutil
import chunked_ce
for module in pkgutil.walk_packages(chunked_ce.__path__, "chunked_ce."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""

USES = """
import torch
from chunked_ce import *
from chunked_ce.cli import main
x, target = torch.randn(9, 50, requires_grad=True), torch.arange(9)
hidden, head = torch.randn(9, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
for options in ({}, dict(grad_in_forward=True), dict(label_smoothing=0.1, reduction="sum")):
    cross_entropy(x, target, **options).backward()
for reduction in ("mean", "sum"):
    linear_cross_entropy(hidden, head, target, reduction=reduction).backward()
linear_token_stats(hidden, head, target, entropy=True).entropy.sum().backward()
binary_cross_entropy_with_logits(x, target[:, None]).backward()
CrossEntropyLoss()(x, target), LinearCrossEntropyLoss(8, 50)(hidden, target)
meter = Perplexity()
meter.update(x, target)
meter.load_state_dict(meter.sync().state_dict())
print(meter.report(), perplexity(x, target))
assert main("plan --vocab 50257 --hidden 768".split()) == 0
assert main(["doctor"]) == 0
"""

OF_TRANSFORMERS = """
import torch, tqdm, transformers
from pathlib import Path
from chunked_ce import evaluate_perplexity, loglikelihood
from chunked_ce.cli import main
from chunked_ce.huggingface import enable
folder = Path(sys.argv[1])
text = folder / "text.txt"
argv = ["perplexity", str(folder), "--text", str(text), "--device", "cpu", "--json", str(folder / "out.json")]
assert main([*argv, "--plot", str(folder / "out.png")]) == 0
assert main(["compare", str(folder), *argv[1:], "--plot", str(folder / "out.png")]) == 0
assert main(["plan", "--config", str(folder)]) == 0
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
ids = torch.randint(3, 300, (2, 20))
with enable(model.train()):
    model(input_ids=ids, labels=ids).loss.backward()
evaluate_perplexity(model, ids, progress=True)
loglikelihood(model, [([5, 6], [7, 8])])
assert main(["perplexity", "someone/some-model", "--text", str(text)]) == 2
(folder / "pytorch_model.bin").write_bytes((folder / "evil.pickle").read_bytes())
(folder / "model.safetensors").unlink()
assert main(argv[:-2]) == 2
"""

# matplotlib asks for fonts once after it was installed, by a process.
FIRST = "import matplotlib.font_manager, torch, transformers\n"

SAW_NOTHING = """
assert not seen, seen
print("nothing seen")
"""


def run(*code, argv=()):
    program = [sys.executable, "-c", "".join(code), *map(str, argv)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # slow
    # What transformers' hub package asks for when the test itself loads a model is not ours.
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.endswith("nothing seen\n"), done.stderr[-3000:]


def test_the_watch_sees():
    """Each of the four kinds, so that the tests below can fail."""
    attempts = ("import socket; socket.socket()", "import os; os.system('true')",
                "import subprocess; subprocess.run(['true'])",
                "import pickle, operator; pickle.loads(pickle.dumps(operator.add))")  # fmt: skip
    for attempt in attempts:
        done = subprocess.run(
            [sys.executable, "-c", WATCH + attempt], capture_output=True, text=True
        )
        assert "PermissionError" in done.stderr, attempt


def test_no_network_and_no_process():
    """From the first import on, torch's own included."""
    run(WATCH, IMPORTS, USES, SAW_NOTHING)


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.long
def test_a_models_folder_is_data(tmp_path):
    """Read without a network; its pickle is not."""
    for needed in ("matplotlib", "tokenizers", "tqdm", "transformers"):
        pytest.importorskip(needed)
    from language_models import TEXTS, byte_tokenizer, causal_lm

    folder, trace = tmp_path / "model", tmp_path / "trace"
    causal_lm().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXTS[0])
    torch.save(Evil(trace), folder / "evil.pickle")
    torch.load(folder / "evil.pickle", weights_only=False)
    assert trace.exists(), "it does what it says"
    trace.unlink()
    run(FIRST, WATCH, OF_TRANSFORMERS, SAW_NOTHING, argv=[folder])
    assert not trace.exists()


def test_nothing_unpickles_or_executes():
    """Nor could it: the library imports no means to, and calls none of the built-in ones."""
    means = {"pickle", "marshal", "shelve", "subprocess", "socket", "urllib", "http", "requests"}
    files = [*ROOT.glob("chunked_ce/**/*.py"), *ROOT.glob("kernels/*.py")]
    assert len(files) > 60
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "torch.load", "os.system")
            assert not means & {name.split(".")[0] for name in names}, (file, names)


def requirements() -> set[str]:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in listed}
    return names - {"chunked-ce"}


def test_every_dependency_is_listed_with_its_licence():
    page = (ROOT / "DEPENDENCIES.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| ([\w-]+) \| ([^|]+?) \|", page, re.M))
    rows.pop("package", None)
    assert set(rows) == requirements()
    for name, licence in rows.items():
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
        said = " ".join(
            [metadata.get("License-Expression") or metadata.get("License") or "", *classifiers]
        )
        family = re.match("[A-Z]+", licence, re.I)[0]  # MIT, Apache, BSD, PSF, MPL
        assert re.search("Python Software" if family == "PSF" else family, said), (name, said[:200])


def test_each_fault_in_the_table_has_its_test():
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| .+ \| .+ \| `(tests/[\w/]+\.py)::(\w+)` \|$", page, re.M)
    assert len(rows) >= 15
    for file, test in rows:
        assert f"def {test}(" in (ROOT / file).read_text("utf-8"), (file, test)
