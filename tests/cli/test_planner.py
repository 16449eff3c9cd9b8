"""chunked_ce.planner against the exact count of tensor bytes, that against the process, and the command."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

import chunked_ce
from bench import measure
from bench.tensor_bytes import predicted_peak
from chunked_ce import planner
from chunked_ce.cli import main
from chunked_ce.cli import plan as plan_command
from chunked_ce.planner import head as head_of

MIB, GIB = 1 << 20, 1 << 30
LLAMA = planner.HeadShape(128256, 4096)
GEMMA = planner.HeadShape(256000, 4608, softcap=30.0)


def make(head, tokens, device):
    def of(*shape):
        return torch.empty(shape, dtype=head.dtype, device=device, requires_grad=True)

    def batch():
        target = torch.zeros(tokens, dtype=torch.int64, device=device)
        return of(tokens, head.hidden_size), of(head.vocab_size, head.hidden_size), target

    return batch


def loss_of(name, head):
    """The function that an estimate speaks of."""
    cap = {} if head.softcap is None else {"softcap": head.softcap}

    def capped(z):
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    def linear(x, w, t):
        size = None if "MiB" not in name else int(name.split()[1]) * MIB
        sums = head.dtype if "sums in" in name else torch.float32
        return chunked_ce.linear_cross_entropy(x, w, t, chunk_bytes=size, acc_dtype=sums, **cap)

    def logits(x, w, t):
        inplace = "in place" in name
        return chunked_ce.cross_entropy(F.linear(x, w), t, inplace_backward=inplace, **cap)

    if name.startswith("linear"):
        return linear
    if name.startswith("cross_entropy"):
        return logits
    return lambda x, w, t: F.cross_entropy(capped(F.linear(x, w)), t)


def step_of(name, head):
    def transformers(x, w, t):
        logits = F.linear(x, w)
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        grads = torch.autograd.grad(F.cross_entropy(logits.float(), t), (x, w))
        return grads, logits  # the model's output holds them

    loss = loss_of(name, head)
    if name.startswith("eager, float32"):
        return transformers
    return lambda x, w, t: torch.autograd.grad(loss(x, w, t), (x, w))


@pytest.mark.parametrize(
    ("head", "tokens", "device"),
    [
        (LLAMA, 8192, "cuda"),
        (LLAMA._replace(dtype=torch.float32), 8192, "cuda"),
        (GEMMA, 8192, "cuda"),
        (planner.HeadShape(50257, 768, torch.float16), 2048, "cuda"),  # one chunk
        (planner.HeadShape(50257, 768), 2048, "cpu"),
        (planner.HeadShape(50257, 768, torch.float32, softcap=30.0), 2048, "cpu"),
    ],
)  # fmt: skip
def test_agrees_with_the_tensors_that_the_code_makes(head, tokens, device):
    if device == "cuda":
        pytest.importorskip("triton")
    batch = make(head, tokens, "meta" if device == "cuda" else device)
    for estimate in planner.plan(head, tokens, device=device):
        if estimate.name != "torch.compile":  # made by no code that can be entered
            exact = predicted_peak(batch, step_of(estimate.name, head))
            assert estimate.peak_bytes == pytest.approx(exact, rel=0.05), estimate.name


def extra_of(name, head, tokens):
    torch.set_num_threads(1)
    loss = loss_of(name, head)
    if name == "torch.compile":
        loss = torch.compile(loss)
    for n in (4, 8):
        small = [t.detach().uniform_().requires_grad_() for t in make(head, n, "cpu")()[:2]]
        loss(*small, torch.zeros(n, dtype=torch.int64)).backward()
    x, w = (
        t.detach().uniform_(-0.1, 0.1).requires_grad_() for t in make(head, tokens, "cpu")()[:2]
    )
    target = torch.arange(tokens)
    extra, _ = measure.extra_peak_memory(lambda: torch.autograd.grad(loss(x, w, target), (x, w)))
    return extra


@pytest.mark.long
@pytest.mark.skipif(not measure.memory_is_measurable(), reason="needs /proc")
@pytest.mark.parametrize(
    "name", ["cross_entropy", "cross_entropy, in place", "linear_cross_entropy, 64 MiB"]
)
def test_agrees_with_what_the_process_takes(name):
    # In bf16 the product for the weight's gradient takes an fp32 copy of it besides.
    dtype = torch.bfloat16 if name in ("eager", "cross_entropy") else torch.float32
    head, tokens = planner.HeadShape(50257, 64, dtype), 700
    estimates = {e.name: e for e in planner.plan(head, tokens, device="cpu")}
    measured = measure.in_fresh_process(extra_of, name, head, tokens)
    assert measured == pytest.approx(estimates[name].peak_bytes, rel=0.05)


@pytest.mark.long
def test_compiled_agrees_with_what_the_process_takes():
    # In bf16 the product for the weight's gradient takes an fp32 copy of it on some CPUs.
    head, tokens = planner.HeadShape(50257, 64, torch.float32), 700
    estimates = {e.name: e for e in planner.plan(head, tokens, device="cpu")}
    measured = measure.in_fresh_process(extra_of, "torch.compile", head, tokens)
    assert measured == pytest.approx(estimates["torch.compile"].peak_bytes, rel=0.05)


def test_the_tracer_counts_what_is_alive_at_once():
    def step(x):
        y = x + 1  # 4 KiB
        z = y.view(-1) * 2  # 8
        del y
        return z + x.view(-1), z  # 8

    assert predicted_peak(lambda: (torch.empty(32, 32),), step) == 8 << 10


def test_the_largest_batch_fits_and_no_more():
    for memory in (3 * GIB, 24 * GIB):
        for e in planner.plan(LLAMA, 8192, memory=memory):
            n = e.largest_batch
            if n == 0:
                continue
            of_token = LLAMA.hidden_size * 2
            (same,) = (s for s in planner.plan(LLAMA, n) if s.name == e.name)
            assert LLAMA.weight_bytes + n * of_token + same.peak_bytes <= memory
            more = range(n + 1, n + n // 3 + 4096, 61)  # chunks of like size may save on some
            assert any(
                LLAMA.weight_bytes + m * of_token + s.peak_bytes > memory
                for m in more
                for s in planner.plan(LLAMA, m)
                if s.name == e.name
            )
    assert planner.plan(LLAMA, 1, memory=1)[0].largest_batch == 0


CONFIGS = {
    "gpt2": ({"vocab_size": 50257, "n_embd": 768}, (50257, 768, torch.bfloat16, None, 1.0)),
    "gemma2": (
        {"vocab_size": 256000, "hidden_size": 4608, "torch_dtype": "float32", "final_logit_softcapping": 30.0},
        (256000, 4608, torch.float32, 30.0, 1.0),
    ),
    "nested": (
        {"dtype": "float16", "text_config": {"vocab_size": 7, "hidden_size": 3}},
        (7, 3, torch.float16, None, 1.0),
    ),
    "granite": ({"vocab_size": 7, "hidden_size": 3, "logits_scaling": 8.0}, (7, 3, torch.bfloat16, None, 0.125)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_gives_the_head(name, tmp_path):
    config, head = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert planner.head_of_config(config) == head
    assert (
        planner.head_of_config(tmp_path) == planner.head_of_config(tmp_path / "config.json") == head
    )


def test_what_is_given_goes_before_the_config_and_completes_it():
    whole = {
        "vocab_size": "many",
        "hidden_size": 0,
        "dtype": "int4",
        "final_logit_softcapping": 30.0,
    }
    given = {"vocab_size": 7, "hidden_size": 3, "dtype": torch.float32}
    head = planner.HeadShape(7, 3, torch.float32, 30.0)
    assert planner.head_of_config(whole, **given) == head
    assert planner.head_of_config({"final_logit_softcapping": 30.0}, **given) == head
    assert planner.head_of_config({"hidden_size": 3}, vocab_size=7) == planner.HeadShape(7, 3)
    assert planner.head_of_config({"vocab_size": 7}, hidden_size=3) == planner.HeadShape(7, 3)


@pytest.mark.parametrize("config", [{}, {"vocab_size": 9, "hidden_size": 9, "dtype": "int4"}])
def test_the_command_completes_a_config(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**config, "logits_scaling": 3.0}))
    sizes = ["--vocab", "7000", "--hidden", "30", "--dtype", "float32"]
    assert main(["plan", "--config", str(tmp_path), *sizes]) == 0
    printed = capsys.readouterr().out
    assert "D = 30, V = 7,000, float32" in printed
    assert f"logit_scale={1 / 3}" in printed  # every digit of it


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("24 gb", 24 * 10**9),
        ("24B", 24),
        ("0.5KiB", 512),
        ("1.5TB", 15 * 10**11),
    ],
)
def test_sizes_with_their_unit(text, size):
    assert plan_command._bytes(text) == size


@pytest.mark.parametrize(
    ("text", "count"),
    [("8192", 8192), ("8k", 8192), ("0.5K", 512), ("1M", 1 << 20), ("10,000,000", 10**7)],
)
def test_counts_of_tokens(text, count):
    assert plan_command._count(text) == count


@pytest.mark.parametrize(
    ("values", "said"),
    [({"softcap": -1.0}, "softcap is -1.0"), ({"logit_scale": float("nan")}, "logit_scale is nan"),
     ({"softcap": "30"}, "softcap must be a number")],
)  # fmt: skip
def test_a_plan_checks_the_heads_factors(values, said):
    with pytest.raises((TypeError, ValueError), match=said):
        planner.plan(planner.HeadShape(9, 9)._replace(**values), 9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((planner.HeadShape(0, 9), 9), "vocab_size is 0, expected at least 1"), ((LLAMA, 0), "tokens is 0"),
     ((LLAMA, 9, "tpu"), "device is 'tpu', expected one of"), ((LLAMA._replace(dtype=torch.int8), 9), "dtype is torch.int8")],
)  # fmt: skip
def test_a_plan_checks_sizes_device_and_dtype(arguments, said):
    head, tokens, *device = arguments
    with pytest.raises(ValueError, match=said):
        planner.plan(head, tokens, **dict(zip(["device"], device, strict=False)))


def test_tokens_that_fit_nowhere(capsys):
    sizes = ["--vocab", "128256", "--hidden", "4096", "--tokens", "99999999", "--memory", "24GiB"]
    assert main(["plan", *sizes]) == 0
    printed = capsys.readouterr().out
    largest = max(e.largest_batch for e in planner.plan(LLAMA, 99999999, memory=24 * GIB))
    assert f"99,999,999 tokens do not fit in 24.00 GiB; {largest:,} do." in printed
    assert "Recommended: linear_cross_entropy, 64 MiB, sums in bfloat16." in printed


def test_a_config_of_transformers():
    transformers = pytest.importorskip("transformers")
    head = planner.head_of_config(transformers.Gemma2Config(hidden_size=64).to_dict())
    assert (head.vocab_size, head.hidden_size, head.softcap) == (256000, 64, 30.0)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"model_type": "gemma3", "text_config": {"hidden_size": 2560}}, (262208, 2560)),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}, (32064, 4096)),
        ({"model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "word_embed_proj_dim": 512}, (50272, 512)),
    ],
    ids=["gemma3", "llava", "opt-350m"],
)  # fmt: skip
def test_a_config_that_leaves_a_size_to_its_class(config, sizes):
    pytest.importorskip("transformers")
    assert planner.head_of_config(config)[:2] == sizes


def test_a_size_that_no_class_has(monkeypatch):
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 2560}}
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(head_of.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="no vocabulary size.*pass --vocab"):
        planner.head_of_config(config)


def test_the_recommendation_and_its_rule():
    """Default options where the batch fits, then the ways that fit, then the one that fits most."""
    cohere = planner.HeadShape(256000, 8192, torch.float16)
    assert planner.recommend(planner.plan(cohere, 8192)).estimate.name == "cross_entropy"
    for memory, name, reason in (
        (24 * GIB, "linear_cross_entropy", "least peak of this library's ways with float32 sums"),
        (
            7 * GIB // 2,
            "linear_cross_entropy, 64 MiB, sums in bfloat16",
            "none with default options does",
        ),
        (2 * GIB, "cross_entropy", "fits most tokens"),
    ):
        estimates = planner.plan(LLAMA, 8192, memory=memory)
        chosen, why = planner.recommend(estimates)
        assert chosen.name == name and reason in why, (memory, chosen, why)
        assert chosen.fits == (memory >= 7 * GIB // 2)
    assert planner.recommend(planner.plan(LLAMA, 8192, memory=GIB // 2)).estimate is None


def test_the_command_without_a_batch_that_fits(capsys):
    sizes = ["--vocab", "128256", "--hidden", "4096", "--memory", "0.5GiB"]
    assert main(["plan", *sizes]) == 0
    printed = capsys.readouterr().out
    assert "No recommendation" in printed and "weight alone takes 0.98" in printed
    assert "Recommended" not in printed and "Use:" not in printed


def test_time_from_peak_rates():
    """6 N D V operations and the passes over the logits, by hand."""
    gpu = planner.Gpu("made up", half_flops=1e12, float32_flops=1e11, bytes_per_second=1e9)
    n, d, v = 1000, 64, 10000  # one chunk
    products, logits = 6 * n * d * v, 2 * n * v
    expected = {
        "eager": (products, 6 * logits),
        "eager, float32 loss (transformers)": (products, 8 * 2 * logits + 2 * logits),
        "cross_entropy": (products, 3 * logits),
        "linear_cross_entropy": (products, 2 * logits),
    }
    estimates = {e.name: e for e in planner.plan(planner.HeadShape(v, d), n)}
    for name, (flops, traffic) in expected.items():
        seconds = planner.predicted_seconds(estimates[name], torch.bfloat16, gpu)
        assert seconds == pytest.approx(flops / 1e12 + traffic / 1e9), name
    half = planner.plan(planner.HeadShape(v, d, torch.float16), n)
    linear = next(e for e in half if e.name == "linear_cross_entropy")
    assert (linear.product_flops, linear.traffic_bytes) == (products * 8 // 6, 3 * logits)
    # Chunks of 64 MiB of Llama 3's logits have 261 rows: 32 sums of 8192 tokens.
    chunks = {e.name: e for e in planner.plan(LLAMA, 8192)}
    weight, logits = 128256 * 4096, 2 * 8192 * 128256
    in_float32 = chunks["linear_cross_entropy, 64 MiB"].traffic_bytes - 2 * logits
    assert in_float32 == weight * (4 + 31 * 8 + 6)
    rounded = chunks["linear_cross_entropy, sums in bfloat16"].traffic_bytes - 2 * logits
    assert rounded == 2 * 2 * weight  # of two chunks


def test_the_command_predicts_time_and_says_from_what(capsys):
    sizes = ["--vocab", "128256", "--hidden", "4096", "--gpu", "h100"]
    assert main(["plan", *sizes]) == 0
    printed = capsys.readouterr().out
    assert "predicted, ms" in printed and "Not measured" in printed and "3.35 TB/s" in printed
    (eager,) = (line.split() for line in printed.splitlines() if line.startswith("eager  "))
    assert float(eager[-1]) == pytest.approx(1e3 * (6 * 8192 * 4096 * 128256 / 989e12
                                             + 12 * 8192 * 128256 / 3.35e12), abs=0.1)  # fmt: skip


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_json_and_short_names_of_dtypes(name, tmp_path, capsys):
    sizes = ["--vocab", "50257", "--hidden", "768", "--dtype", name, "--tokens", "8k"]
    assert main(["plan", *sizes, "--json", "-", "--memory", "24GiB", "--gpu", "a100"]) == 0
    printed = json.loads(capsys.readouterr().out)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    estimates = planner.plan(planner.HeadShape(50257, 768, dtype), 8192, memory=24 * GIB)
    assert [way["peak_bytes"] for way in printed["ways"]] == [e.peak_bytes for e in estimates]
    assert all(way["predicted_seconds"] > 0 for way in printed["ways"])
    assert printed["head"]["dtype"] == str(dtype).removeprefix("torch.")
    assert printed["recommended"] == planner.recommend(estimates).estimate.name
    assert main(["plan", *sizes, "--json", str(tmp_path / "plan.json")]) == 0
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["ways"][0]["predicted_seconds"] is written["memory_bytes"] is None


def test_the_command(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gemma2"][0]))
    command = ["plan", "--config", str(tmp_path), "--dtype", "bfloat16", "--memory", "24GiB"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    estimates = planner.plan(GEMMA, 8192, memory=24 * GIB)
    for e in estimates:
        (line,) = (x for x in printed.splitlines() if x.startswith(e.name + "  "))
        peak, _, largest = line.removeprefix(e.name).split()
        assert peak == f"{e.peak_bytes / GIB:.2f}" and largest == f"{e.largest_batch:,}"
    assert all(f"        loss = {e.code}\n" in f"{printed}\n" for e in estimates if e.code)
    assert "    chunked_ce.huggingface.enable(model)\n" in printed and "softcap=30.0" in printed


@pytest.mark.parametrize("sizes", [(1000, 32, 64), (256000, 512, 4096), (50257, 4096, 512)])
def test_the_line_of_code_runs_as_printed(sizes):
    """On a small batch, whatever batch it was printed for."""
    vocab, hidden_size, tokens = sizes
    estimates = planner.plan(planner.HeadShape(vocab, hidden_size, softcap=9.0), tokens)
    code = planner.recommend(estimates).estimate.code
    lm_head = torch.nn.Linear(16, 100, bias=False)
    names = {
        "lm_head": lm_head,
        "hidden": torch.randn(2, 3, 16, requires_grad=True),
        "labels": torch.randint(100, (2, 3)),
        "cross_entropy": chunked_ce.cross_entropy,
        "linear_cross_entropy": chunked_ce.linear_cross_entropy,
    }
    eval(code, names).backward()
    assert lm_head.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --config, or --vocab and --hidden"),
        (["--vocab", "1.5"], "expected a positive whole number, such as 8192 or 8k, got '1.5'"),
        (["--vocab", "0"], "expected a positive whole number, such as 8192 or 8k, got '0'"),
        (["--vocab", "9", "--hidden", "9", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--vocab", "9", "--hidden", "9", "--memory", "much"], "a size such as 24GiB, got 'much'"),
        (["--vocab", "9", "--hidden", "9", "--memory", "24"], "24 has no unit: write 24GiB, or 24B for bytes"),
        (["--vocab", "9", "--hidden", "9", "--memory", "9" * 400 + "GiB"], "expected a number of 64 bits"),
        (["--vocab", "9" * 30, "--hidden", "9"], "expected a number of 64 bits"),
        (["--config", "{softcap}"], "config has final_logit_softcapping 'thirty', expected a finite number above 0"),
        (["--config", "{negative}"], "config has final_logit_softcapping -3, expected a finite number"),
        (["--config", "{scale}"], "config has logit_scale nan, expected"),
        (["--config", "{zero}"], "config has logit_scale 0, expected"),
        (["--config", "{divisor}"], "config has logits_scaling True, expected"),
        (["--config", "no/such/folder"], "cannot be read (No such file or directory)"),
        (["--config", "{hidden_size}"], "config has no vocabulary size, expected one of vocab_size"),
        (["--config", "{vocab_size}"], "config has no hidden size"),
        (["--config", "{hidden_size}"], "pass --vocab (vocab_size= in Python)"),
        (["--config", "{vocab_size}"], "pass --hidden (hidden_size= in Python)"),
        (["--vocab", "9", "--hidden", "9", "--gpu", "h100", "--device", "cpu"], "--gpu goes with --device cuda"),
        (["--vocab", "9", "--hidden", "9", "--gpu", "h100", "--dtype", "fp64"], "no other rate is known"),
        (["--vocab", "9", "--hidden", "9", "--json", "no/such.json"], "--json: the folder 'no' does not exist"),
        (["--config", "{text}"], "it holds no JSON"),
        (["--config", "{wrong}"], "config has vocab_size 'many', expected a positive int"),
        (["--config", "{dtype}"], "config has dtype 'int4'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, tmp_path, capsys):
    contents = {
        "{hidden_size}": '{"hidden_size": 3}',
        "{vocab_size}": '{"vocab_size": 3}',
        "{text}": "vocab_size = 3",
        "{softcap}": '{"vocab_size": 3, "hidden_size": 3, "final_logit_softcapping": "thirty"}',
        "{negative}": '{"vocab_size": 3, "hidden_size": 3, "final_logit_softcapping": -3}',
        "{scale}": '{"vocab_size": 3, "hidden_size": 3, "logit_scale": NaN}',
        "{zero}": '{"vocab_size": 3, "hidden_size": 3, "logit_scale": 0}',
        "{divisor}": '{"vocab_size": 3, "hidden_size": 3, "logits_scaling": true}',
        "{wrong}": '{"vocab_size": "many", "hidden_size": 3}',
        "{dtype}": '{"vocab_size": 3, "hidden_size": 3, "dtype": "int4"}',
    }
    for name, content in contents.items():
        (tmp_path / "config.json").write_text(content)
        if name in arguments:
            arguments = [a if a != name else str(tmp_path) for a in arguments]
            break
    try:
        code = main(["plan", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("chunked-ce") and said in error


def test_code_names_every_option_of_its_way():
    codes = {e.name: e.code for e in planner.plan(LLAMA, 8192) if e.code}
    for name, code in codes.items():
        assert ("chunk_bytes=64 << 20" in code) == ("64 MiB" in name)
        assert ("acc_dtype=torch.bfloat16" in code) == ("sums in bfloat16" in name)
    assert len(set(codes.values())) == len(codes)
