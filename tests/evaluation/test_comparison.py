"""compare_models against a loop over stored logits in fp64."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

pytest.importorskip("transformers")

from language_models import CONTEXT, TEXTS, VOCAB, Tiny, byte_tokenizer, causal_lm

from chunked_ce import ComparisonInterrupted, TokenComparison, compare_models, evaluate_perplexity
from chunked_ce.evaluation import comparison, language_model, pair_scoring
from chunked_ce.evaluation.comparison_estimates import compare_tokens
from chunked_ce.ops import chunks

FAMILIES = {  # head transforms of the field: none, a cap, a factor, a bias
    "GPT2": {},
    "Gemma2": dict(final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "Cohere": dict(logit_scale=0.5),
    "Phi": {},
}
COLUMNS = ("kl", "logprob", "base_logprob", "same_top")


def documents(*lengths, highest=VOCAB):
    return [torch.randint(3, highest, (n,)) for n in lengths]


@torch.no_grad()
def oracle(model, base, ids, context, stride, classes=VOCAB):
    """The twenty-line loop: one window at a time, both models' logits stored, each target once."""
    parts, done, start = [], 0, 0
    while done < len(ids) - 1:
        stop = min(start + context, len(ids) - 1)
        logits = [m(ids[None, start:stop]) for m in (model, base)]
        z, y = (getattr(x, "logits", x)[0, done - start :, :classes].double() for x in logits)
        p, q = z.log_softmax(-1), y.log_softmax(-1)
        target = ids[done + 1 : stop + 1, None]
        kl = (q.exp() * (q - p)).sum(-1)
        same = (z.argmax(-1) == y.argmax(-1)).double()
        parts.append(torch.stack([kl, p.gather(1, target)[:, 0], q.gather(1, target)[:, 0], same]))
        start, done = start + stride, stop
    return torch.cat(parts, 1)  # [4, tokens]


def near(model, by=0.05):
    """Return a copy whose weights differ a little."""
    import copy

    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * parameter.std() * by)
    return other


def untied(family="GPT2", **config):
    """A tied one of random weights repeats its input: it has next to no second choice."""
    model = causal_lm(family, tie_word_embeddings=False, **config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.6)
    return model


@pytest.fixture(scope="module")
def gpt2():
    return untied()


@pytest.fixture(scope="module")
def other(gpt2):
    return near(gpt2)


def assert_tokens(report, expected, rtol, atol=1e-7):
    for name, column in zip(COLUMNS, expected, strict=True):
        ours = getattr(report.per_token, name).double()
        torch.testing.assert_close(ours, column, rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("context", "stride"), [(CONTEXT, CONTEXT), (10, 3)])
def test_tokens_against_stored_logits(family, context, stride):
    base = untied(family, **FAMILIES[family])
    model, ids = near(base), documents(100, 7)
    report = compare_models(model, base, ids, context_length=context, stride=stride)
    assert not report.logits_stored and not report.base_logits_stored
    each = [oracle(model, base, d, context, stride) for d in ids]
    assert_tokens(report, torch.cat(each, 1), rtol=2e-5)
    assert report.tokens == 99 + 6 and report.documents == 2
    assert report.per_token.document.tolist() == [0] * 99 + [1] * 6
    assert report.per_token.position[-6:].tolist() == [1, 2, 3, 4, 5, 6]
    assert 0.001 < report.mean_kl.value < 1 and 0.5 < report.same_top.value < 1


def test_two_families_with_other_hidden_sizes(gpt2):
    base, ids = untied("Llama", hidden_size=48), documents(70)
    report = compare_models(gpt2, base, ids, context_length=16)
    assert_tokens(report, oracle(gpt2, base, ids[0], 16, 16), rtol=2e-5)


def test_measures_and_errors_against_their_definitions(gpt2, other):
    ids = documents(90, 40, 66)
    report = compare_models(gpt2, other, ids, stride=5)
    kl, logp, logq, same = torch.cat([oracle(gpt2, other, d, CONTEXT, 5) for d in ids], 1)
    n, delta = len(kl), logp.exp() - logq.exp()

    def check(measure, value, error=None, rel=1e-4):
        assert measure.value == pytest.approx(float(value), rel=rel)
        if error is not None:
            assert measure.stderr == pytest.approx(float(error), rel=rel)

    check(report.mean_kl, kl.mean(), kl.std() / n**0.5)
    check(report.same_top, same.mean(), same.std() / n**0.5)
    perplexities = [(-x.mean()).exp() for x in (logp, logq)]
    check(report.perplexity, perplexities[0], perplexities[0] * logp.std() / n**0.5)
    check(report.base_perplexity, perplexities[1], perplexities[1] * logq.std() / n**0.5)
    paired = (logp - logq).std() / n**0.5
    check(report.log_perplexity_ratio, (perplexities[0] / perplexities[1]).log(), paired, 1e-3)
    check(report.correlation, torch.corrcoef(torch.stack([logp, logq]))[0, 1])
    assert report.correlation.stderr is None
    check(report.mean_delta_p, delta.mean(), delta.std() / n**0.5, 1e-3)
    rms = delta.square().mean().sqrt()
    check(report.rms_delta_p, rms, delta.square().std() / n**0.5 / (2 * rms))
    for share, value in report.kl_quantiles.items():
        assert value == pytest.approx(float(torch.quantile(kl, share)), rel=1e-4)
    assert list(report.kl_quantiles) == [0.5, 0.9, 0.95, 0.99, 0.999, 1.0]
    for model, ours in ((gpt2, report.perplexity), (other, report.base_perplexity)):
        alone = evaluate_perplexity(model, ids, stride=5)
        assert ours.value == pytest.approx(alone.perplexity, rel=1e-6)


def test_a_model_against_itself(gpt2):
    report = compare_models(gpt2, gpt2, documents(80, 40))
    assert not report.per_token.kl.any() and report.per_token.same_top.all()
    assert report.mean_kl == (0, 0, 0) and report.same_top == (1, 0, 0)
    assert report.log_perplexity_ratio == (0, 0, 0) and report.perplexity == report.base_perplexity
    assert report.mean_delta_p == (0, 0, 0) and report.rms_delta_p == (0, 0, 0)
    assert report.correlation.value == pytest.approx(1, abs=1e-12)
    assert set(report.kl_quantiles.values()) == {0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_against_itself_in_half_precision(gpt2, dtype):
    ids = documents(5 * CONTEXT + 1)
    half = untied().to(dtype)
    report = compare_models(half, gpt2, ids)
    expected = oracle(half, gpt2, ids[0], CONTEXT, CONTEXT)
    assert_tokens(report, expected, rtol=1e-3, atol=1e-6)
    assert 0 < report.mean_kl.value < 0.05 and report.correlation.value > 0.99
    with torch.autocast("cpu", dtype):
        cast = compare_models(half, gpt2, ids)
    assert cast.mean_kl.value < 0.05 and not cast.base_logits_stored


def test_fp64_keeps_its_digits(gpt2):
    """Divergences of 1e-12, of which float32 logits would leave nothing."""
    (ids,) = documents(40)
    base = untied().double()
    model = near(base, 1e-6)
    (kl, *_), report = oracle(model, base, ids, CONTEXT, CONTEXT), compare_models(model, base, ids)
    assert 1e-13 < kl.max() < 1e-8
    torch.testing.assert_close(report.per_token.kl, kl, rtol=1e-5, atol=2e-15)  # of the loop


def test_logits_that_must_be_stored(monkeypatch):
    torch.manual_seed(2)
    model, base = Tiny(lambda z: z + torch.linspace(0, 1, 160)), Tiny()
    with torch.no_grad():
        base.head.weight.add_(torch.randn(160, 16) * 0.1)
    ids = documents(100, 31, highest=150)
    shapes = []
    model.register_forward_hook(lambda m, given, out: shapes.append(tuple(out.shape)))
    monkeypatch.setattr(language_model, "_LOGITS_BYTES", 2 * 16 * 160 * 4)
    for first, second, stored in ((model, base, (True, False)), (base, model, (False, True))):
        report = compare_models(first, second, ids, context_length=16)
        assert (report.logits_stored, report.base_logits_stored) == stored
        expected = torch.cat([oracle(first, second, d, 16, 16, 160) for d in ids], 1)
        assert_tokens(report, expected, rtol=2e-5)
    assert max(shape[0] for shape in shapes) == 2, "no more windows than their logits may take"


def test_no_logits_of_all_tokens(gpt2, other, monkeypatch):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    monkeypatch.setattr(chunks, "_CPU_CHUNK_BYTES", 2 * 16 * 4 * VOCAB)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * 16 * 4 * VOCAB)
    with Largest() as largest:
        compare_models(gpt2, other, documents(8 * CONTEXT + 1), batch_size=8)
    assert largest.numel < 8 * CONTEXT * VOCAB / 2


def test_batch_size_does_not_matter(gpt2, other):
    torch.manual_seed(3)
    ids = documents(50, 3, 47, 2, 30)
    one, *others = (
        compare_models(gpt2, other, ids, stride=9, batch_size=size) for size in (1, 3, 8)
    )
    for report in others:
        torch.testing.assert_close(report.per_token, one.per_token, rtol=1e-4, atol=1e-7)


def test_padded_vocabularies(gpt2):
    """Classes that one model has beside the other's do not exist, in the perplexity neither."""
    padded, ids = untied(vocab_size=VOCAB + 20), documents(60)
    report = compare_models(padded, gpt2, ids, vocab_size=VOCAB)
    assert report.vocab_size == VOCAB
    assert_tokens(report, oracle(padded, gpt2, ids[0], CONTEXT, CONTEXT), rtol=2e-5)
    tokenizer = byte_tokenizer()
    by_text = compare_models(gpt2, padded, text=TEXTS, tokenizer=tokenizer)
    assert by_text.vocab_size == VOCAB
    narrow = compare_models(gpt2, gpt2, [ids[0].clamp(max=199)], vocab_size=200)
    assert narrow.base_perplexity.value < 1e9 and narrow.vocab_size == 200


def test_documents_resampled(gpt2, other):
    ids = documents(40, 12, 90, 33, 70)
    report = compare_models(gpt2, other, ids, per_document=True, seed=3, resamples=400)
    generator, tokens = torch.Generator().manual_seed(3), report.per_token
    drawn = torch.randint(5, (400, 5), generator=generator)
    each = [TokenComparison(*(column[tokens.document == i] for column in tokens)) for i in range(5)]
    found = {"mean_kl": [], "correlation": [], "log_perplexity_ratio": [], "rms_delta_p": []}
    for chosen in drawn.tolist():
        joined = TokenComparison(
            *(torch.cat(c) for c in zip(*(each[i] for i in chosen), strict=True))
        )
        measures = compare_tokens(joined._replace(document=joined.document * 0), 0, 1)
        for name, values in found.items():
            values.append(getattr(measures, name).value)
    for name, values in found.items():
        expected = float(torch.tensor(values, dtype=torch.float64).std())
        assert getattr(report, name).document_stderr == pytest.approx(expected, rel=1e-9)
    again = compare_models(gpt2, other, ids, per_document=True, seed=3, resamples=400)
    assert again.to_dict() == report.to_dict()
    another = compare_models(gpt2, other, ids, seed=4, resamples=400)
    assert another.mean_kl.document_stderr != report.mean_kl.document_stderr
    assert another.mean_kl.document_stderr == pytest.approx(report.mean_kl.document_stderr, rel=0.3)
    assert all(part.mean_kl.document_stderr is None for part in report.per_document)


def test_documents_of_like_tokens_have_a_larger_error():
    """Tokens of a document that are all alike are one observation, and not fifty."""
    kl = torch.arange(8.0, dtype=torch.float64).repeat_interleave(50)
    document = torch.arange(8).repeat_interleave(50)
    zeros = torch.zeros_like(kl)
    tokens = TokenComparison(document, document + 1, kl, zeros, zeros, kl > 3)
    measures = compare_tokens(tokens, 0, 4000)
    exact = float(torch.arange(8.0).std(correction=0)) / 8**0.5  # of a mean of 8 drawn
    assert measures.mean_kl.document_stderr == pytest.approx(exact, rel=0.05)
    assert measures.mean_kl.document_stderr > 6 * measures.mean_kl.stderr
    assert math.isnan(measures.correlation.value), "log-probabilities that do not vary"


def test_parts_add_up(gpt2, other):
    ids = documents(40, 12, 90, 33)
    groups = ["prose", "code", "prose", "code"]
    report = compare_models(gpt2, other, ids, per_document=True, groups=groups)
    assert [part.tokens for part in report.per_document] == [39, 11, 89, 32]
    assert list(report.per_group) == ["prose", "code"]
    for name, members in (("prose", (0, 2)), ("code", (1, 3))):
        part = report.per_group[name]
        assert part.documents == 2 and part.tokens == sum(len(ids[i]) - 1 for i in members)
        alone = compare_models(gpt2, other, [ids[i] for i in members])
        assert part.mean_kl.value == pytest.approx(alone.mean_kl.value, rel=1e-5)
        assert part.mean_kl.document_stderr == pytest.approx(
            alone.mean_kl.document_stderr, rel=1e-4
        )
    kl = sum(part.tokens * part.mean_kl.value for part in report.per_document)
    assert kl / report.tokens == pytest.approx(report.mean_kl.value, rel=1e-9)
    contents = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert contents["per_group"]["code"]["mean_kl"]["value"] > 0
    assert len(contents["per_document"]) == 4 and "per_token" not in contents
    assert contents["kl_quantiles"]["0.99"] == report.kl_quantiles[0.99]


def test_turns_give_the_same_bits(gpt2, other, monkeypatch):
    ids = documents(30, 7, 20)
    together = compare_models(gpt2, other, ids, context_length=10, batch_size=2)
    moves = []
    move = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, d: (moves.append(self), move(self, d))[1])
    before = [(p, p.data_ptr()) for m in (gpt2, other) for p in m.parameters()]
    for size, turns_taken in ((1 << 30, 1), (1, 3)):
        monkeypatch.setattr(pair_scoring, "TURN_BYTES", size)
        moves.clear()
        turns = compare_models(
            gpt2, other, ids, context_length=10, batch_size=2, take_turns=True, device="cpu"
        )
        assert len(moves) == 2 + 2 * turns_taken, "both are tried on a few tokens first"
        assert all(map(torch.equal, turns.per_token, together.per_token)) and turns.took_turns
    assert before == [(p, p.data_ptr()) for m in (gpt2, other) for p in m.parameters()]


def test_a_module_is_put_back_as_it_was():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with pair_scoring.on_device(module, torch.device("meta")):
        assert all(p.is_meta for p in (*module.parameters(), *module.buffers()))
    after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert after.keys() == tensors.keys()
    assert all(after[name] is t and t.device.type == "cpu" for name, t in tensors.items())


def interrupt_at(monkeypatch, call, error=KeyboardInterrupt):
    compare, calls = pair_scoring.PairScoring._compare, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == call:
            raise error
        return compare(self, *arguments)

    monkeypatch.setattr(pair_scoring.PairScoring, "_compare", interrupted)


@pytest.mark.parametrize("take_turns", [False, True])
def test_interruption_report(gpt2, other, monkeypatch, take_turns):
    ids = documents(6 * CONTEXT + 1, 50)
    whole = compare_models(gpt2, other, ids, batch_size=2)
    interrupt_at(monkeypatch, 3)
    with pytest.raises(ComparisonInterrupted) as caught:
        compare_models(
            gpt2, other, ids, batch_size=2, per_document=True, take_turns=take_turns, device="cpu"
        )
    report = caught.value.report
    assert report.partial and report.tokens == 4 * CONTEXT and report.windows_scored == 4
    assert (report.windows, report.documents, report.documents_given) == (8, 1, 2)
    assert [part.tokens for part in report.per_document] == [4 * CONTEXT, 0]
    assert math.isnan(report.per_document[1].mean_kl.value)
    torch.testing.assert_close(report.per_token.kl, whole.per_token.kl[: 4 * CONTEXT])
    assert isinstance(caught.value, KeyboardInterrupt) and str(caught.value) == str(report)
    json.loads(report.to_json(), parse_constant=pytest.fail)


def test_an_interruption_before_anything_was_scored(gpt2, monkeypatch):
    interrupt_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt) as caught:
        compare_models(gpt2, gpt2, documents(40))
    assert not isinstance(caught.value, ComparisonInterrupted)


def test_an_interrupted_rank(gpt2, monkeypatch):
    """The others wait for it: no report of its own may pass for theirs."""
    interrupt_at(monkeypatch, 2)
    monkeypatch.setattr(comparison, "process_group", lambda group: group)
    monkeypatch.setattr(pair_scoring, "rank_and_size", lambda group: (0, 2))
    with pytest.raises(KeyboardInterrupt) as caught:
        compare_models(gpt2, gpt2, documents(200), batch_size=1, group=object())
    assert not isinstance(caught.value, ComparisonInterrupted)


def compared(group=None):
    torch.manual_seed(0)
    ids, model = documents(150, 3, 90, 41), untied()
    return compare_models(
        model, near(model), ids, stride=11, batch_size=4, per_document=True, group=group
    )


def one_rank(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    scored = []
    keep = pair_scoring.PairScoring._keep
    pair_scoring.PairScoring._keep = lambda self, *a: (scored.append(1), keep(self, *a))[1]
    report = compared(dist.group.WORLD)
    torch.save([report.to_json(), tuple(report.per_token), len(scored)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_ranks_report(tmp_path):
    if not dist.is_available():
        pytest.skip("torch without distributed")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mp.spawn(one_rank, (2, str(tmp_path)), nprocs=2)
    alone = compared()
    torch.set_num_threads(threads)
    (first, tokens, own), (second, _, others) = (
        torch.load(Path(tmp_path) / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert first == second == alone.to_json(), "all ranks have the same bits"
    assert all(map(torch.equal, tokens, alone.per_token))
    assert {own, others} == {3, 4} or own == others


def test_progress(gpt2, other, capfd):
    pytest.importorskip("tqdm")
    compare_models(gpt2, other, documents(100), progress=True)
    err = capfd.readouterr().err
    assert "scoring 100 tokens in 4 windows" in err and "KL=" in err and "99.0/99.0" in err


IDS = [[5, 6, 7, 8, 9]]


class Words:
    """A tokenizer of single characters that knows its vocabulary."""

    def __init__(self, vocab):
        self.vocab = vocab

    def __call__(self, text, **options):
        return {"input_ids": [self.vocab[character] for character in text]}

    def __len__(self):
        return len(self.vocab)

    def decode(self, ids):
        return "".join(map(chr, ids))

    def get_vocab(self):
        return self.vocab


ABC, ACB = Words({"a": 5, "b": 6, "c": 7}), Words({"a": 5, "b": 7, "c": 6})
BAD = [
    ("no model", dict(model="gpt2"), TypeError, "^model must be a module"),
    ("no base", dict(base="gpt2"), TypeError, "^base: model must be a module"),
    ("text by position", dict(positional=["some"]), TypeError, "compare_models takes model, base"),
    ("no documents", dict(input_ids=[]), ValueError, "holds no document"),
    ("both sources", dict(text="a"), TypeError, "input_ids, or text and its tokenizer, got both"),
    ("empty text", dict(input_ids=None, text=["ab", ""], tokenizer=ABC), ValueError,
     "document 1 of text is empty"),
    ("one token", dict(input_ids=[[5]]), ValueError, "document 0 has 1 token"),
    ("too long a context", dict(context_length=33), ValueError, "^context_length is 33"),
    ("context of the base", dict(base=dict(max_position_embeddings=8), context_length=9),
     ValueError, "^base: context_length is 9, but the model has positions for 8"),
    ("ids of the model", dict(input_ids=[[5, 300]]), ValueError, "^document 0 has token id 300"),
    ("ids of the base", dict(base=dict(vocab_size=200), input_ids=[[5, 250]]), ValueError,
     "^base: document 0 has token id 250, but the model's are 0 to 199"),
    ("vocabularies", dict(base=dict(vocab_size=310)), ValueError,
     "vocabularies differ: the model has 300 classes and the base 310; pass vocab_size=300"),
    ("classes", dict(vocab_size=301), ValueError, "vocab_size is 301, expected more than the"),
    ("classes below ids", dict(vocab_size=9), ValueError, "the highest token id, 9, and at most"),
    ("classes as a float", dict(vocab_size=9.5), TypeError, "vocab_size must be an int or None"),
    ("tokenizers", dict(input_ids=None, text="abc", tokenizer=ABC, base_tokenizer=ACB), ValueError,
     "tokenizers differ: 'b' is 6 in the model's and 7 in the base's"),
    ("tokenizer by name", dict(input_ids=None, text="abc", tokenizer=ABC, base_tokenizer="gpt2"),
     TypeError, "base_tokenizer: tokenizer must be a transformers tokenizer, got str"),
    ("tokenizer without text", dict(base_tokenizer=ABC), TypeError, "base_tokenizer goes with text"),
    ("groups", dict(groups=["a", "b"]), ValueError, "groups has 2 names, expected one for each of 1"),
    ("one group", dict(groups="a"), TypeError, "groups must be a sequence of names"),
    ("seed", dict(seed=-1), ValueError, "seed is -1, expected at least 0"),
    ("resamples", dict(resamples=1), ValueError, "resamples is 1, expected at least 2"),
    ("take_turns", dict(take_turns=1), TypeError, "take_turns must be True or False"),
    ("a base that looks ahead", dict(base=lambda ids: torch.eye(VOCAB)[ids.flip(1)]), ValueError,
     "^base: model is not causal"),
    ("device", dict(device="nonsense"), ValueError, "device is 'nonsense'"),
    ("group", dict(group="world"), TypeError, "group must be .* got str"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(gpt2, given, error, says):
    arguments = dict(model=gpt2, base=gpt2, input_ids=IDS) | given
    if isinstance(arguments["base"], dict):
        arguments["base"] = causal_lm(**arguments["base"])
    models = [arguments.pop(name) for name in ("model", "base", "input_ids")]
    with pytest.raises(error, match=says) as caught:
        compare_models(*models, *arguments.pop("positional", ()), **arguments)
    assert "\n" not in str(caught.value)


def test_a_warning_names_the_line_of_the_caller(gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cab").write_text("not this")
    with pytest.warns(UserWarning, match="document 0 of text is 'cab', which names a file") as seen:
        compare_models(gpt2, gpt2, text="cab", tokenizer=ABC, bos=False)
    assert seen[0].filename == __file__


def test_a_base_of_stored_logits_cannot_take_turns(gpt2):
    base = Tiny(lambda z: z + torch.linspace(0, 1, 160))
    with pytest.raises(ValueError, match="take_turns needs the base's hidden states and head"):
        compare_models(Tiny(), base, IDS, context_length=4, take_turns=True)
    report = compare_models(base, Tiny(), IDS, context_length=4, take_turns=True)
    assert report.logits_stored and not report.base_logits_stored


@pytest.mark.parametrize("place", [0, 1])
def test_turns_begin_on_the_host(place):
    models = [Tiny(), Tiny()]
    models[place].to("meta")
    name = "^base: " if place else "^"
    with pytest.raises(ValueError, match=name + "take_turns moves models from the host, but model"):
        compare_models(*models, IDS, context_length=4, take_turns=True, device="cpu")


def test_a_model_that_cannot_be_moved(gpt2):
    class Fixed(Tiny):
        def to(self, *_):
            raise ValueError("`.to` is not supported for 4-bit models")

    with pytest.raises(ValueError, match="take_turns cannot move a model to cpu: `.to` is not"):
        compare_models(Fixed(), Tiny(), IDS, context_length=4, take_turns=True)


def test_more_tokens_in_one_tokenizer_are_no_difference(gpt2, other):
    """As after a fine-tuning that added one: the texts have the same ids."""
    more = Words(ABC.vocab | {"<pad>": 8})
    for own, of_base in ((ABC, more), (more, ABC)):
        report = compare_models(
            gpt2, other, text="abcab", tokenizer=own, base_tokenizer=of_base, bos=False
        )
        assert report.tokens == 4
