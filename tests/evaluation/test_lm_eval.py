"""Against lm-evaluation-harness (extra `peers`): the same text, windows and continuations."""

import pytest

pytest.importorskip("lm_eval")

import torch
from language_models import CONTEXT, END, TEXTS, byte_tokenizer, causal_lm, tokenizer_with_bos

from chunked_ce import evaluate_perplexity, loglikelihood


@pytest.fixture(scope="module")
def harness():
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = causal_lm(bos_token_id=0, eos_token_id=0), byte_tokenizer()
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT, device="cpu"
    )


def requests(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_rolling_loglikelihood(harness):
    """Its windows are disjoint, begin with BOS, and a document's last one is full."""
    theirs = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in TEXTS]))
    ours = evaluate_perplexity(
        harness.model, text=TEXTS, tokenizer=harness.tokenizer, bos=True, context_length=CONTEXT,
        full_last_window=True, per_document=True, batch_size=3,
    )  # fmt: skip
    assert ours.windows > len(TEXTS) + 2
    assert [-r.nll_sum for r in ours.per_document] == pytest.approx(theirs, rel=1e-6)


def test_rolling_recipe(harness):
    """Its sums, with the tokenizer's own BOS and without, and its counts of bytes and words."""
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.api.task import PerplexityTask

    texts = [*TEXTS, END + TEXTS[1], " begins and ends with a space "]
    plain = harness.tokenizer
    for tokenizer in (plain, tokenizer_with_bos()):
        harness.tokenizer = tokenizer
        instances = requests("loglikelihood_rolling", [(t,) for t in texts])
        theirs = harness.loglikelihood_rolling(instances)
        ours = evaluate_perplexity(
            harness.model, text=texts, tokenizer=tokenizer, recipe="lm-eval-rolling",
            per_document=True,
        )  # fmt: skip
        expected = pytest.approx(theirs, rel=1e-6)
        assert [-report.nll_sum for report in ours.per_document] == expected
        by_byte = [(n, PerplexityTask.count_bytes(t)) for n, t in zip(theirs, texts, strict=True)]
        by_word = [(n, PerplexityTask.count_words(t)) for n, t in zip(theirs, texts, strict=True)]
        assert ours.bits_per_byte == pytest.approx(bits_per_byte(by_byte), rel=1e-6)
        assert ours.byte_perplexity == pytest.approx(weighted_perplexity(by_byte), rel=1e-5)
        assert ours.word_perplexity == pytest.approx(weighted_perplexity(by_word), rel=1e-4)
    harness.tokenizer = plain


def test_loglikelihood(harness):
    pairs = [(TEXTS[0][:20], TEXTS[0][20:30]), (TEXTS[0] * 2, " cat"), ("x", "y z"), ("a b", " c")]
    tokens = [(harness.tok_encode(a), harness.tok_encode(b)) for a, b in pairs]
    with torch.no_grad():
        best = int(harness.model(torch.tensor([tokens[0][0]])).logits[0, -1].argmax())
    tokens.append((tokens[0][0], [best]))
    theirs = harness._loglikelihood_tokens([(("", ""), *pair) for pair in tokens])
    ours = loglikelihood(harness.model, tokens, context_length=CONTEXT, batch_size=2)
    # Their log-softmax is rounded to float32 at the size of the logits, some 10.
    expected = pytest.approx([logprob for logprob, _ in theirs], rel=1e-6, abs=1e-6)
    assert [logprob for logprob, _ in ours] == expected
    assert [greedy for _, greedy in ours] == [t[1] for t in theirs]
    assert ours[-1].is_greedy
