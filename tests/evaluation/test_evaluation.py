"""evaluate_perplexity and loglikelihood against loops over stock cross-entropy in fp64."""

import json
import math
import random
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from language_models import CONTEXT, TEXTS, VOCAB, brute_force, byte_tokenizer, causal_lm

from chunked_ce import EvaluationInterrupted, PerplexityReport, evaluate_perplexity, loglikelihood
from chunked_ce.evaluation import evaluate as module
from chunked_ce.evaluation.documents import from_text
from chunked_ce.evaluation.language_model import examine


@pytest.fixture(scope="module")
def gpt2():
    return causal_lm()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def documents(*lengths):
    return [torch.randint(3, VOCAB, (n,)) for n in lengths]


# Head transforms of the field: none, a cap, a factor and a divisor of the logits, a bias.
FAMILIES = {
    "GPT2": {},
    "Gemma2": dict(final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "Granite": dict(logits_scaling=3.7),
    "Cohere": dict(logit_scale=0.0625),
    "Phi": {},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("context", "stride"), [(CONTEXT, CONTEXT), (10, 3)])
def test_heads_against_logits(family, context, stride):
    model = causal_lm(family, **FAMILIES[family])
    ids = documents(100, 7)
    report = evaluate_perplexity(model, ids, context_length=context, stride=stride)
    assert not report.logits_stored
    expected = sum(brute_force(model, d, context, stride) for d in ids)
    assert report.nll_sum == pytest.approx(expected, rel=1e-6)
    assert report.tokens == 99 + 6


@pytest.mark.parametrize("wide", [VOCAB, VOCAB + 52])
def test_deferred_weight_beside_wide_layers(wide):
    model = causal_lm("Gemma2", intermediate_size=wide, query_pre_attn_scalar=8)
    cpu = torch.device("cpu")
    examined = examine(model, "document", [torch.arange(3, 12)], CONTEXT, cpu, "auto")
    assert examined.head_weight is model.lm_head.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_softcap_in_half_precision(dtype):
    """A cap of 30 changes logits by 2 %, as half precision may; no configuration need tell of it."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    settings = RecurrentGemmaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        lru_width=32, attention_window_size=CONTEXT, num_hidden_layers=3,
    )  # fmt: skip
    torch.manual_seed(1)
    model = RecurrentGemmaForCausalLM(settings).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.2)
    model, ids = model.to(dtype), torch.arange(3, 3 + CONTEXT)
    for given in (model, lambda x: model(input_ids=x)):
        report = evaluate_perplexity(given, ids, context_length=CONTEXT)
        assert not report.logits_stored
        expected = brute_force(model, ids, CONTEXT, CONTEXT)
        assert report.nll_sum == pytest.approx(
            expected, rel=1e-6 if dtype == torch.float32 else 2e-3
        )


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bert_refused_in_half_precision(family, dtype):
    model = causal_lm(family).to(dtype)
    for ids in (documents(40), documents(3), [torch.full((9,), 7)]):
        with pytest.raises(ValueError, match="model is not causal"):
            evaluate_perplexity(model, ids, context_length=16)


def test_roberta_maximum_context():
    model = causal_lm("Roberta", is_decoder=True)
    report = evaluate_perplexity(model, documents(3 * CONTEXT))
    assert report.context_length == CONTEXT - 1  # its padding's id is 0
    with pytest.raises(ValueError, match="the model has positions for 31 tokens"):
        evaluate_perplexity(model, documents(90), context_length=CONTEXT)


class OneFile(torch.nn.Module):
    """As nanoGPT: a config, and ids under another name."""

    def __init__(self, result):
        super().__init__()
        self.table, self.result = torch.nn.Embedding(VOCAB, VOCAB), result
        self.config = SimpleNamespace(block_size=8)

    def forward(self, idx, targets=None):
        return self.result(self.table(idx))


@pytest.mark.parametrize("result", [lambda z: (z, None), lambda z: {"loss": None, "logits": z}])
def test_module_with_config(result):
    model, ids = OneFile(result), documents(50)
    report = evaluate_perplexity(model, ids)
    expected = F.cross_entropy(model.table(ids[0][:-1]).double(), ids[0][1:], reduction="sum")
    assert report.context_length == 8
    assert report.nll_sum == pytest.approx(expected.item(), rel=1e-6)


class Shifted(torch.nn.Module):
    """A head that is no scaled product: a class is made more likely behind its back."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.get_decoder, self.get_output_embeddings = (
            model.get_decoder,
            model.get_output_embeddings,
        )
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, input_ids, use_cache=False):
        output = self.model(input_ids=input_ids, use_cache=use_cache)
        output.logits[..., 7] += 4
        return output


def test_unknown_head_stores_logits(gpt2, monkeypatch):
    model, ids = Shifted(gpt2), documents(90)
    report = evaluate_perplexity(model, ids, batch_size=3)
    assert report.logits_stored
    assert report.nll_sum == pytest.approx(brute_force(model, ids[0], CONTEXT, CONTEXT), rel=1e-6)
    from chunked_ce.evaluation import language_model

    monkeypatch.setattr(language_model, "_LOGITS_BYTES", 1)  # a row at a time
    assert evaluate_perplexity(model, ids, batch_size=3).nll_sum == pytest.approx(
        report.nll_sum, rel=1e-6
    )


def test_plain_module():
    class Bigram(torch.nn.Embedding):
        pass

    model, ids = Bigram(VOCAB, VOCAB), documents(50)
    report = evaluate_perplexity(model, ids, context_length=8)
    expected = F.cross_entropy(model(ids[0][:-1]).double(), ids[0][1:], reduction="sum")
    assert report.nll_sum == pytest.approx(expected.item(), rel=1e-6) and report.logits_stored


def test_memory_without_logits(gpt2, monkeypatch):
    """No tensor as large as [B, T, V] past the probe, whose 8 tokens do have logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from chunked_ce.ops import chunks

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    monkeypatch.setattr(chunks, "_CPU_CHUNK_BYTES", 16 * 4 * VOCAB)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 16 * 4 * VOCAB)
    with Largest() as largest:
        evaluate_perplexity(gpt2, documents(8 * CONTEXT + 1), batch_size=8)
    assert largest.numel < 8 * CONTEXT * VOCAB / 2


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("order", [1, -1])
def test_batch_size_and_order(gpt2, size, order):
    torch.manual_seed(3)
    ids = documents(100, 3, 47, 2, 70)
    alone = evaluate_perplexity(gpt2, ids, stride=9, batch_size=1, rank=True)
    report = evaluate_perplexity(gpt2, ids[::order], stride=9, batch_size=size, rank=True)
    assert report.nll_sum == pytest.approx(alone.nll_sum, rel=1e-6)
    assert (report.tokens, report.top1) == (alone.tokens, alone.top1)
    assert report.reciprocal_rank_sum == pytest.approx(alone.reciprocal_rank_sum, rel=1e-12)


def test_right_padding(gpt2):
    ids = torch.stack([torch.randint(3, VOCAB, (20,)) for _ in range(2)])
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    padded = evaluate_perplexity(gpt2, ids, attention_mask=mask)
    assert padded.nll_sum == evaluate_perplexity(gpt2, [ids[0], ids[1, :12]]).nll_sum
    assert padded.tokens == 19 + 11


def test_measures_of_each_token(gpt2):
    (ids,) = documents(60)
    report = evaluate_perplexity(
        gpt2, ids, context_length=16, rank=True, per_position=True, per_window=True
    )
    nll, ranks, positions = [], [], torch.zeros(16, dtype=torch.float64)
    for start in range(0, 59, 16):
        x, y = ids[start : start + 16][: 59 - start], ids[start + 1 : start + 17]
        z = gpt2(x[None]).logits[0].double()
        losses = F.cross_entropy(z, y, reduction="none").detach()
        positions[: len(y)] += losses
        nll.append(losses)
        ranks.append((z > z.gather(1, y[:, None])).sum(1))
    each, rank = torch.cat(nll), torch.cat(ranks)
    assert report.mean_nll_stderr == pytest.approx(float(each.std() / math.sqrt(59)), rel=1e-6)
    assert report.accuracy == pytest.approx(float((rank == 0).double().mean()))
    assert report.mean_reciprocal_rank == pytest.approx(float((1 / (1 + rank.double())).mean()))
    torch.testing.assert_close(
        torch.tensor([r.nll_sum for r in report.per_position]).double(),
        positions,
        rtol=1e-6,
        atol=0,
        check_dtype=False,
    )
    assert [r.tokens for r in report.per_position] == [4] * 11 + [3] * 5
    assert [r.tokens for r in report.per_window] == [16, 16, 16, 11]
    assert [r.nll_sum for r in report.per_window] == pytest.approx(
        [float(losses.sum()) for losses in nll], rel=1e-6
    )
    plain = report.to_dict()
    assert plain["per_document"] is None and len(plain["per_position"]) == 16
    assert [window["tokens"] for window in plain["per_window"]] == [16, 16, 16, 11]


def test_corpus_and_documents(gpt2):
    ids = documents(80, 5)
    report = evaluate_perplexity(gpt2, ids, per_document=True)
    alone = [evaluate_perplexity(gpt2, d) for d in ids]
    assert [r.nll_sum for r in report.per_document] == pytest.approx(
        [r.nll_sum for r in alone], rel=1e-6
    )
    assert report.mean_document_perplexity == pytest.approx(
        sum(r.perplexity for r in alone) / 2, rel=1e-6
    )
    assert report.perplexity == pytest.approx(
        math.exp(sum(r.nll_sum for r in alone) / 83), rel=1e-6
    )


def test_bytes_and_words_of_scored_text(gpt2, tokenizer):
    text = "→ naïve cats sat"
    with_bos = evaluate_perplexity(gpt2, text=text, tokenizer=tokenizer, bos=True, eos=True)
    assert with_bos.bos == with_bos.eos == tokenizer.bos_token_id
    assert (with_bos.bytes, with_bos.words) == (len(text.encode()), 4)
    ids = tokenizer(text)["input_ids"]
    assert with_bos.tokens == len(ids) + 1
    without = evaluate_perplexity(gpt2, text="naïve cats sat", tokenizer=tokenizer)
    first = tokenizer.decode(tokenizer("naïve cats sat")["input_ids"][:1])
    assert without.bos is None and without.bytes == len("naïve cats sat".encode()) - len(first)
    assert without.tokens == len(tokenizer("naïve cats sat")["input_ids"]) - 1
    by_id = evaluate_perplexity(gpt2, ids, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    assert by_id.nll_sum == with_bos.nll_sum and by_id.bytes is None


@pytest.mark.parametrize("text", ["😀b", " 😀b", "→", "b😀"])
def test_bytes_of_a_first_token_within_a_character(gpt2, tokenizer, text):
    """A byte of the character is context, the others are scored."""
    first = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"][0])
    report = evaluate_perplexity(gpt2, text=text, tokenizer=tokenizer, bos=False)
    assert report.bytes == len(text.encode()) - len(first)  # byte-level: a character is a byte
    whole = evaluate_perplexity(gpt2, text=text, tokenizer=tokenizer, bos=True)
    assert whole.bytes == len(text.encode())


def pieces(**options):
    """A tokenizer of whole characters and, where it does not know one, of its bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abé"]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(known)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class Characters:
    """No fast tokenizer: it knows no offsets."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("text", "n_bytes", "words"),
    [("éab a", 4, 2), ("ab", 1, 1), ("a", 0, 0), ("a b é", 5, 2), ("aé b", 4, 2), ("é b a", 4, 2)],
)
def test_bytes_after_a_first_token_of_characters(text, n_bytes, words):
    """Without a BOS the first token, of any number of bytes, is context."""
    for tokenizer in (pieces(prepend_scheme="never"), Characters()):
        (document,) = from_text(text, tokenizer, None, 0)
        assert (document.n_bytes, document.words) == (n_bytes, words)
        (whole,) = from_text(text, tokenizer, 1, 0)
        assert (whole.n_bytes, whole.words) == (len(text.encode()), len(text.split()))


@pytest.mark.parametrize("scheme", ["never", "first"])
def test_bytes_after_first_token_byte_or_space(scheme):
    """<0xF0> is a byte of the character; the space put before the text is none of its bytes."""
    first = 1 if scheme == "never" else 0
    for text in ("😀b", "😀", "😀 ", "ß"):
        (document,) = from_text(text, pieces(prepend_scheme=scheme), None, 0)
        assert document.n_bytes == len(text.encode()) - first
    (document,) = from_text(" 😀b", pieces(prepend_scheme=scheme), None, 0)
    assert document.n_bytes == 5


def test_numpy_ids(gpt2):
    (ids,) = documents(40)
    expected = evaluate_perplexity(gpt2, ids).nll_sum
    for given in (ids.numpy(), list(ids.numpy()), ids.numpy()[None], [ids.numpy()]):
        assert evaluate_perplexity(gpt2, given).nll_sum == expected


def test_bos_of_tokenizer(gpt2, tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer)
    end = tokenizer.bos_token
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.bos_token_id)]
    )
    report = evaluate_perplexity(gpt2, text=TEXTS, tokenizer=with_bos)
    assert report.bos == tokenizer.bos_token_id
    assert (
        report.nll_sum
        == evaluate_perplexity(gpt2, text=TEXTS, tokenizer=tokenizer, bos=True).nll_sum
    )
    assert evaluate_perplexity(gpt2, text=TEXTS, tokenizer=with_bos, bos=False).bos is None


def test_model_unchanged(gpt2):
    model = causal_lm(resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    ids = documents(40)
    first = evaluate_perplexity(model, ids)
    assert first.nll_sum == evaluate_perplexity(model, ids).nll_sum, "dropout was on"
    assert model.training and not model.transformer.h[0].training
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_and_autocast(gpt2):
    ids = documents(70)
    exact = evaluate_perplexity(gpt2, ids)
    half = evaluate_perplexity(causal_lm().bfloat16(), ids)
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate_perplexity(gpt2, ids)
    for report in (half, cast):
        assert not report.logits_stored
        assert report.mean_nll == pytest.approx(exact.mean_nll, rel=2e-2) and report != exact


def test_interruption_report(gpt2, monkeypatch):
    from chunked_ce.evaluation.scoring import Scoring

    score, calls = Scoring._batch, []

    def interrupted(self, chosen):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, chosen)

    monkeypatch.setattr(Scoring, "_batch", interrupted)
    ids = documents(6 * CONTEXT + 1)
    with pytest.raises(EvaluationInterrupted) as caught:
        evaluate_perplexity(gpt2, ids, batch_size=2)
    report = caught.value.report
    assert report.partial and report.tokens == 4 * CONTEXT and report.windows == 6
    assert isinstance(caught.value, KeyboardInterrupt) and str(caught.value) == str(report)
    monkeypatch.undo()
    expected = brute_force(gpt2, ids[0][: 4 * CONTEXT + 1], CONTEXT, CONTEXT)
    assert report.nll_sum == pytest.approx(expected, rel=1e-6)


def test_partial_report_counts(gpt2, monkeypatch):
    from chunked_ce.cli.perplexity_table import table
    from chunked_ce.evaluation.scoring import Scoring

    score, calls = Scoring._batch, []

    def interrupted(self, chosen):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, chosen)

    ids = documents(CONTEXT + 1, 3 * CONTEXT + 1, 20)
    whole = evaluate_perplexity(gpt2, ids, batch_size=1, per_document=True)
    assert (whole.documents, whole.documents_given) == (3, 3)
    assert whole.windows == whole.windows_scored == 5
    assert "3 documents, 5 windows of" in table(whole, "model")
    monkeypatch.setattr(Scoring, "_batch", interrupted)
    with pytest.raises(EvaluationInterrupted) as caught:
        evaluate_perplexity(gpt2, ids, batch_size=1, per_document=True)
    report = caught.value.report
    assert [document.tokens for document in report.per_document] == [CONTEXT, CONTEXT, 0]
    assert (report.documents, report.documents_given) == (2, 3)
    assert (report.windows_scored, report.windows) == (2, 5)
    shown = table(report, "model")
    assert "2 of 3 documents, 2 of 5 windows" in shown
    assert "mean of the perplexities of 2 of 3 documents, partly scored" in shown
    files = table(report, "model", ["a", "b", "c"]).splitlines()[-3:]
    assert (
        files[0].split()[:2] == ["a", f"{CONTEXT:,}"]
        and files[2].split() == "c 0 not scored".split()
    )


def test_interrupted_rank(gpt2, monkeypatch):
    """The others wait for it: no report of its own may pass for theirs."""
    from chunked_ce.evaluation import scoring

    def interrupted(self, chosen):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "process_group", lambda group: group)
    monkeypatch.setattr(scoring, "rank_and_size", lambda group: (0, 2))
    monkeypatch.setattr(scoring.Scoring, "_batch", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        evaluate_perplexity(gpt2, documents(40), group=object())
    assert not isinstance(caught.value, EvaluationInterrupted)


@pytest.mark.struck
def test_partial_report_windows_and_positions(gpt2):
    """Signals strike between any two steps of a batch."""
    ids = torch.randint(3, 300, (1, 12 * CONTEXT))

    def stop(*_):
        raise KeyboardInterrupt

    before, draw, seen = signal.signal(signal.SIGALRM, stop), random.Random(0), 0
    start = time.monotonic()
    evaluate_perplexity(gpt2, ids, batch_size=1, per_position=True)
    taken = time.monotonic() - start
    try:
        for _ in range(5):
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.1, 0.9) * taken)
            try:
                report = evaluate_perplexity(
                    gpt2, ids, batch_size=1, per_position=True, per_window=True
                )
            except EvaluationInterrupted as interruption:
                report = interruption.report
                seen += 1
            except KeyboardInterrupt:
                continue  # before the first window
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for parts in (report.per_position, report.per_window):
                assert sum(part.tokens for part in parts) == report.tokens
                assert sum(part.nll_sum for part in parts) == pytest.approx(
                    report.nll_sum, rel=1e-9
                )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen


def test_progress_bar(gpt2, capfd, monkeypatch):
    auto = pytest.importorskip("tqdm.auto")
    monkeypatch.setattr(auto, "tqdm", partial(auto.tqdm, mininterval=0))
    report = evaluate_perplexity(gpt2, documents(70), progress=True, batch_size=1)
    err = capfd.readouterr().err
    assert "69.0/69.0" in err or "69/69" in err
    assert f"perplexity={report.perplexity:.4g}" in err


# loglikelihood


@torch.no_grad()
def test_loglikelihood(gpt2):
    pairs = [
        (torch.randint(3, VOCAB, (n,)).tolist(), torch.randint(3, VOCAB, (m,)).tolist())
        for n, m in ((1, 1), (5, 3), (60, 4), (3, CONTEXT))
    ]
    prompt = [5, 9]
    greedy = list(prompt)
    for _ in range(4):
        greedy.append(int(gpt2(torch.tensor([greedy])).logits[0, -1].argmax()))
    pairs.append((prompt, greedy[2:]))
    results = loglikelihood(gpt2, pairs, batch_size=3)
    for (context, continuation), (logprob, is_greedy) in zip(pairs, results, strict=True):
        ids = torch.tensor(context + continuation)[-CONTEXT - 1 :]
        logits = gpt2(ids[None, :-1]).logits[0, -len(continuation) :].double().log_softmax(-1)
        target = ids[-len(continuation) :, None]
        assert logprob == pytest.approx(float(logits.gather(1, target).sum()), rel=1e-6)
        assert is_greedy == bool((logits.argmax(-1, keepdim=True) == target).all())
    assert results[-1].is_greedy and not results[1].is_greedy
    assert loglikelihood(gpt2, []) == []


def test_interrupted_loglikelihood(gpt2, monkeypatch):
    batch, calls = module.Scoring._batch, []

    def interrupted(self, chosen):
        calls.append(chosen)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batch(self, chosen)

    monkeypatch.setattr(module.Scoring, "_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loglikelihood(gpt2, [([1], [2]), ([3], [4]), ([5], [6])], batch_size=1)


# Mistakes

IDS = torch.arange(3, 40)


def no_maximum():
    return torch.nn.Embedding(VOCAB, VOCAB)


class Bidirectional(torch.nn.Module):
    def forward(self, ids):
        one_hot = F.one_hot(ids, VOCAB).float()
        return one_hot + one_hot.sum(1, keepdim=True)


class Pooled(torch.nn.Module):
    def forward(self, ids):
        return torch.zeros(len(ids), VOCAB)


def left_padded():
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    return dict(input_ids=torch.ones(2, 5, dtype=torch.long), attention_mask=mask)


MISTAKES = [
    ("nothing to score", {}, TypeError, "expected input_ids, or text and its tokenizer, got neither"),
    ("two sources", dict(input_ids=IDS, text="a"), TypeError, "got both"),
    ("text without a tokenizer", dict(text="abc"), TypeError, "text needs its tokenizer"),
    ("text as ids", dict(input_ids="abc"), TypeError, "input_ids must be a Tensor .* got str: pass it as text="),
    ("ids with a tokenizer", dict(input_ids=IDS, tokenizer=str), TypeError, "tokenizer goes with text"),
    ("empty text", dict(text="", tokenizer="own"), ValueError, "document 0 of text is empty"),
    ("an empty one among texts", dict(text=["ab cd", ""], tokenizer="own"), ValueError, "document 1 of text is empty"),
    ("no text", dict(text=[], tokenizer="own"), ValueError, "text holds no document"),
    ("text of one token", dict(text="a", tokenizer="own"), ValueError, "document 0 has 1 token, .*at least 2.*bos=True"),
    ("one id", dict(input_ids=[[3, 4], [5]]), ValueError, "document 1 has 1 token"),
    ("no ids", dict(input_ids=[]), ValueError, "input_ids holds no document"),
    ("ids of floats", dict(input_ids=IDS.float()), TypeError, "input_ids has dtype torch.float32"),
    ("ids of three dimensions", dict(input_ids=IDS[None, None]), ValueError, r"input_ids has shape \[1, 1, 37\]"),
    ("ragged nested lists", dict(input_ids=[[[1], [2, 3]]]), TypeError, "document 0 of input_ids is"),
    ("documents of two dimensions", dict(input_ids=[IDS[None]]), ValueError, r"document 0 of input_ids has shape \[1, 37\], expected \[T\]"),
    ("ids on meta", dict(input_ids=IDS.to("meta")), ValueError, "input_ids is on meta, where it holds no token ids"),
    ("a document on meta", dict(input_ids=[IDS.to("meta")]), ValueError, "document 0 of input_ids is on meta"),
    ("mask in a list", dict(input_ids=IDS[None], attention_mask=[[1] * 37]), TypeError, "attention_mask must be a Tensor beside input_ids .* got list"),
    ("text of bytes in a list", dict(text=[b"ab cd"], tokenizer="own"), TypeError, "document 0 of text must be a str, got bytes"),
    ("text of a path", dict(text=[Path("a.txt")], tokenizer="own"), TypeError, r"got PosixPath: pass path.read_text\(\)|got WindowsPath"),
    ("text of a number", dict(text=7, tokenizer="own"), TypeError, "text must be a str or a sequence of them, got int"),
    ("bos below 0", dict(input_ids=IDS, bos=-1), ValueError, "bos is -1, expected a token id of at least 0"),
    ("context of one", dict(input_ids=IDS, context_length=1), ValueError, "context_length is 1, expected at least 2"),
    ("context of float", dict(input_ids=IDS, context_length=8.0), TypeError, "context_length must be an int or None, got float"),
    ("context past the positions", dict(input_ids=IDS, context_length=33), ValueError, "context_length is 33, but the model has positions for 32"),
    ("no maximum, no context", dict(model=no_maximum, input_ids=IDS), ValueError, "context_length is None.*no maximum length"),
    ("stride 0", dict(input_ids=IDS, stride=0), ValueError, "stride is 0, expected 1 to context_length, 32"),
    ("stride past the context", dict(input_ids=IDS, context_length=8, stride=9), ValueError, "stride is 9"),
    ("batch of none", dict(input_ids=IDS, batch_size=0), ValueError, "batch_size is 0"),
    ("left padding", left_padded(), ValueError, "row 1 begins with padding.*position ids.*pad on the right"),
    ("mask of another shape", dict(input_ids=IDS[None], attention_mask=torch.ones(1, 3)), ValueError, "attention_mask has shape"),
    ("mask of text", dict(text="ab", tokenizer="own", attention_mask=torch.ones(1, 2)), TypeError, "goes with input_ids"),
    ("another model's tokenizer", dict(model=lambda: causal_lm(vocab_size=200), text="ab cd", tokenizer="own"), ValueError, "tokenizer has 300 tokens, but the model has embeddings for 200"),
    ("a far smaller tokenizer", dict(model=lambda: causal_lm(vocab_size=5000), text="ab cd", tokenizer="own"), ValueError, "embeddings for 5000"),
    ("an id out of range", dict(input_ids=torch.tensor([3, 300])), ValueError, "document 0 has token id 300, but the model's are 0 to 299"),
    ("a negative id", dict(input_ids=torch.tensor([3, -100])), ValueError, "document 0 has token id -100"),
    ("bos of str", dict(input_ids=IDS, bos="yes"), TypeError, "bos must be True, False or a token id, got str"),
    ("bos unknown", dict(model=lambda: causal_lm(bos_token_id=None), input_ids=IDS, bos=True), ValueError, "bos is True, but neither"),
    ("flag of int", dict(input_ids=IDS, rank=1), TypeError, "rank must be True or False"),
    ("unknown device", dict(input_ids=IDS, device="nope"), ValueError, "device is 'nope'"),
    ("meta device", dict(input_ids=IDS, device="meta"), ValueError, "device is 'meta', which cannot be used here"),
    ("model on meta", dict(model=lambda: no_maximum().to("meta"), input_ids=IDS), ValueError, "device is 'meta'"),
    ("a GPU that is none", dict(input_ids=IDS, device="cuda:99"), ValueError, "device is 'cuda:99', which cannot"),
    ("model by name", dict(model=lambda: "gpt2", input_ids=IDS), TypeError, "model must be a module .* got str: load it"),
    ("no model", dict(model=lambda: None, input_ids=IDS), TypeError, "model must be a module .* got NoneType"),
    ("tokenizer by name", dict(text="ab cd", tokenizer="gpt2"), TypeError, "tokenizer must be a transformers tokenizer, got str"),
    ("empty beside BOS", dict(input_ids=[[3, 4], []], bos=True), ValueError, "document 1 has no tokens: leave it out$"),
    ("array of floats", dict(input_ids=IDS.float().numpy()), TypeError, "input_ids has dtype torch.float32"),
    ("group by name", dict(input_ids=IDS, group="world"), TypeError, "group must be .* got str"),
    ("unknown backend", dict(input_ids=IDS, backend="cuda"), ValueError, "backend is 'cuda'"),
    ("not causal", dict(model=Bidirectional, input_ids=IDS, context_length=8), ValueError, "model is not causal"),
    ("logits of integers", dict(model=lambda: OneFile(lambda z: z.long()), input_ids=IDS), TypeError, "model returned torch.int64"),
    ("a dict without logits", dict(model=lambda: OneFile(lambda z: {"z": z}), input_ids=IDS), TypeError, "model returned dict, expected logits"),
    ("nothing returned", dict(model=lambda: OneFile(lambda z: ()), input_ids=IDS), TypeError, "model returned tuple, expected logits"),
    ("no language model", dict(model=Pooled, input_ids=IDS, context_length=8), ValueError, r"model returned \[2, 300\] for ids \[2, 8\]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_mistakes(gpt2, tokenizer, monkeypatch, arguments, error, message):
    monkeypatch.setattr(module.Scoring, "run", lambda *args: pytest.fail("work was begun"))
    arguments = dict(arguments)
    model = arguments.pop("model", lambda: gpt2)()
    if arguments.get("tokenizer") == "own":
        arguments["tokenizer"] = tokenizer
    with pytest.raises(error, match=message) as caught:
        evaluate_perplexity(model, **arguments)
    assert "\n" not in str(caught.value)


def test_text_and_tokenizer_by_position(gpt2, tokenizer):
    with pytest.raises(TypeError, match="text and its tokenizer are passed by name"):
        evaluate_perplexity(gpt2, "some text", tokenizer)


def test_a_file_name_as_text_warns(gpt2, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("what the file holds")
    with pytest.warns(UserWarning, match="names a file: the name is scored.*read_text") as caught:
        evaluate_perplexity(gpt2, text=[str(tmp_path / "a.txt")], tokenizer=tokenizer)
    assert caught[0].filename == __file__


def test_a_short_repr(gpt2):
    report = evaluate_perplexity(gpt2, IDS, per_document=True, per_position=True)
    assert repr(report) == f"EvaluationReport({report})" and len(repr(report)) < 200


def test_one_of_each_is_singular():
    report = PerplexityReport(nll_sum=1.0, tokens=1, bytes=1, words=1)
    assert " over 1 token, " in str(report) and " over 1 byte, " in str(report)
    assert str(report).endswith(" over 1 word")
    assert " 1,234 tokens" in str(PerplexityReport(nll_sum=1.0, tokens=1234))


def test_json_has_null_for_what_is_no_number():
    written = json.loads(PerplexityReport(nll_sum=0.0, tokens=0, nll_square_sum=0.0).to_json())
    assert written["perplexity"] is written["mean_nll_stderr"] is None


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ("ab", TypeError, "pairs must be a sequence"),
        ([([1], [2], [3])], TypeError, "pair 0 is .*expected .context, continuation."),
        ([("a", "b")], TypeError, r"context of pair 0 is 'a', expected a sequence of token ids: tokenizer\(text\)"),
        ([([1], [2]), ([], [2])], ValueError, "context of pair 1 is empty"),
        ([([1], [])], ValueError, "continuation of pair 0 has 0 tokens, expected 1 to context_length, 32"),
        ([([1], list(range(33)))], ValueError, "continuation of pair 0 has 33 tokens"),
        ([([1], [400])], ValueError, "pair 0 has token id 400"),
        ([([1], [0.5])], TypeError, "continuation of pair 0 has dtype torch.float32"),
    ],
)  # fmt: skip
def test_mistakes_of_pairs(gpt2, pairs, error, message):
    with pytest.raises(error, match=message):
        loglikelihood(gpt2, pairs)
