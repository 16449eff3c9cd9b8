"""Scoring parts of documents, groups of documents, and the error with documents as clusters."""

import json
import math
import warnings

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from language_models import CONTEXT, END, TEXTS, VOCAB, byte_tokenizer, causal_lm
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from chunked_ce import evaluate_perplexity
from chunked_ce.evaluation import token_starts as module
from chunked_ce.evaluation.token_starts import token_starts


@pytest.fixture(scope="module")
def model():
    return causal_lm(bos_token_id=0, eos_token_id=0).double()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@torch.no_grad()
def token_losses(model, ids, context=CONTEXT):
    """The loss of each token but the first, in disjoint windows."""
    parts = []
    for start in range(0, len(ids) - 1, context):
        target = torch.tensor(ids[start + 1 : start + context + 1])
        logits = model(torch.tensor(ids[start : start + len(target)])[None]).logits[0]
        parts.append(F.cross_entropy(logits.double(), target, reduction="none"))
    return torch.cat(parts)


# Parts


QUESTIONS = [
    "What is a cat? Answer: an animal.",
    "Two and two? Answer: four; it is four. Answer: 4",
]


def test_after_a_marker(model, tokenizer):
    """The oracle counts bytes of the tokens' own text, which joined are the document."""
    report = evaluate_perplexity(
        model, text=QUESTIONS, tokenizer=tokenizer, after="Answer:", bos=True, per_document=True
    )
    n_bytes = 0
    for text, document in zip(QUESTIONS, report.per_document, strict=True):
        ids = [0, *tokenizer(text)["input_ids"]]
        pieces = [tokenizer.decode([i]) for i in ids[1:]]
        assert "".join(pieces) == text
        boundary = text.index("Answer:") + len("Answer:")
        starts = [len("".join(pieces[:i])) for i in range(len(pieces))]
        scored = torch.tensor([start >= boundary for start in starts])
        expected = token_losses(model, ids)[scored]
        assert document.tokens == len(expected)
        assert document.nll_sum == pytest.approx(float(expected.sum()), rel=1e-10)
        tail = text[min(s for s in starts if s >= boundary) :]
        assert (document.bytes, document.words) == (len(tail.encode()), len(tail.split()))
        n_bytes += document.bytes
    assert report.bytes == n_bytes


def test_a_token_that_spans_the_boundary_is_context(model, tokenizer):
    """ " cat" is one token: a boundary after its space leaves it out, one before lets it in."""
    text = "The cat sat"
    starts = token_starts(text, tokenizer(text)["input_ids"], tokenizer)
    inside = next(s + 1 for s, e in zip(starts, [*starts[1:], 11], strict=True) if e - s > 1 and s)
    counts = {
        place: evaluate_perplexity(
            model, text=text, tokenizer=tokenizer, spans=[[(place, len(text))]], bos=True
        ).tokens
        for place in (inside - 1, inside)
    }
    assert counts[inside - 1] == counts[inside] + 1


def test_spans_against_a_mask(model, tokenizer):
    """Several spans, text of several windows, and characters of several bytes."""
    texts = [TEXTS[0], TEXTS[2]]
    spans = [[(5, 30), (60, 90), (200, 201)], [(0, 7), (100, len(TEXTS[2]))]]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    masks = []
    for text, ids, own in zip(texts, rows, spans, strict=True):
        # Bytes of a token: its characters in the byte-level alphabet, one for each.
        starts, place = [], 0
        for token in tokenizer.convert_ids_to_tokens(ids):
            starts.append(place)
            place += len(token)
        bounds = [[len(text[:c].encode()) for c in span] for span in own]
        masks.append([any(a <= start < b for a, b in bounds) for start in starts])
    for bos in (False, True):
        by_spans = evaluate_perplexity(model, text=texts, tokenizer=tokenizer, spans=spans, bos=bos)
        by_mask = evaluate_perplexity(model, rows, mask=masks, bos=bos and 0)
        expected = 0.0
        for ids, mask in zip(rows, masks, strict=True):
            losses = token_losses(model, [0, *ids] if bos else ids)
            expected += float(losses[torch.tensor(mask if bos else mask[1:])].sum())
        assert by_spans.nll_sum == by_mask.nll_sum == pytest.approx(expected, rel=1e-10)
        assert by_spans.tokens == by_mask.tokens and by_mask.bytes is None
        assert by_spans.windows == by_mask.windows


def test_windows_without_a_scored_token_are_not_shown(model):
    ids = torch.randint(3, VOCAB, (200,), generator=torch.manual_seed(0))
    mask = torch.arange(200) >= 190
    report = evaluate_perplexity(model, ids, mask=mask, per_window=True)
    assert report.windows == 2 and report.tokens == 10
    expected = token_losses(model, ids.tolist())[189:].sum()
    assert report.nll_sum == pytest.approx(float(expected), rel=1e-10)


def test_everything_marked_is_no_mark(model, tokenizer):
    plain = dict(text=TEXTS, tokenizer=tokenizer)
    marked = plain | dict(spans=[[(0, len(text))] for text in TEXTS])
    for settings in (dict(bos=True), dict(bos=False), dict(bos=True, eos=True)):
        a, b = (evaluate_perplexity(model, **kind, **settings) for kind in (plain, marked))
        assert (a.nll_sum, a.tokens, a.bytes, a.words) == (b.nll_sum, b.tokens, b.bytes, b.words)


def test_end_of_text_goes_with_what_is_before_it(model, tokenizer):
    """EOS is scored where the part reaches the end, and has no bytes, added or in the text."""
    text = "a question and an answer"
    counts = dict(tokenizer=tokenizer, bos=True, eos=True)
    to_end = evaluate_perplexity(model, text=text, after="an ", **counts)
    before = evaluate_perplexity(model, text=text, spans=[[(18, 24)]], **(counts | dict(eos=False)))
    inner = [
        evaluate_perplexity(model, text=text, spans=[[(2, 10)]], **(counts | dict(eos=eos)))
        for eos in (True, False)
    ]
    assert to_end.tokens == before.tokens + 1 and to_end.bytes == before.bytes
    assert inner[0].tokens == inner[1].tokens and inner[0].nll_sum == inner[1].nll_sum
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = evaluate_perplexity(model, text=text + END, after="an ", **counts)
    assert (own.tokens, own.bytes) == (to_end.tokens, to_end.bytes)


@pytest.mark.parametrize(("last", "tokens"), [(True, 3), (False, 1)])
def test_end_of_text_goes_with_the_last_token_of_a_mask(model, last, tokens):
    report = evaluate_perplexity(model, [[3, 4, 5, 6]], mask=[[0, 0, 1, last]], eos=2)
    assert report.tokens == tokens


def test_padded_ids_and_their_mask(model):
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    attention, mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]), torch.zeros(2, 5)
    mask[0, 3:], mask[1, 2:] = 1, 1
    padded = evaluate_perplexity(model, ids, attention_mask=attention, mask=mask)
    rows = evaluate_perplexity(
        model, [[3, 4, 5, 6, 7], [8, 9, 10]], mask=[[0, 0, 0, 1, 1], [0, 0, 1]]
    )
    assert padded.nll_sum == rows.nll_sum and padded.tokens == rows.tokens == 3


def wordpiece():
    words = "[UNK] the cat sat on mat ##s .".split()
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def metaspace():
    words = "▁The ▁cat ▁sat s ▁ é".split()
    vocab = {word: i for i, word in enumerate([*words, *"Thecatsatonmat."])}
    tokenizer = Tokenizer(models.Unigram([(word, -len(vocab) + 0.0) for word in vocab], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_starts_of_tokens(monkeypatch):
    """Lower case, whose tokens are found by offsets; a prefix space; bytes, without offsets."""
    text = "The cats sat."
    lower, spaces, of_bytes = wordpiece(), metaspace(), ByT5Tokenizer()
    assert token_starts(text, lower(text)["input_ids"], lower) == [0, 4, 7, 9, 12]
    monkeypatch.setattr(module, "_from_offsets", lambda *args: pytest.fail("bytes are enough"))
    ids = spaces(text)["input_ids"]
    starts = token_starts(text, ids, spaces)
    pieces = spaces.convert_ids_to_tokens(ids)
    assert "".join(pieces).replace("▁", " ") == " " + text and pieces[0] == "▁The"
    ends = [sum(map(len, pieces[: i + 1])) - 1 for i in range(len(pieces))]
    assert starts == [0, *ends[:-1]]
    ids = of_bytes("é b", add_special_tokens=False)["input_ids"]
    assert token_starts("é b", ids, of_bytes) == [0, 1, 2, 3]


class Slow(ByT5Tokenizer):
    """Rewrites the text, and cannot say where its tokens are."""

    def _tokenize(self, text):
        return super()._tokenize(text.lower())


# Groups


def test_groups(model, tokenizer):
    texts, groups = [*TEXTS, TEXTS[1] + " More."], ["prose", "short", "code", "short"]
    report = evaluate_perplexity(
        model,
        text=texts,
        tokenizer=tokenizer,
        bos=True,
        groups=groups,
        per_document=True,
        rank=True,
    )
    assert list(report.per_group) == ["prose", "short", "code"]
    for name, group in report.per_group.items():
        own = [d for d, g in zip(report.per_document, groups, strict=True) if g == name]
        alone = evaluate_perplexity(
            model, text=[t for t, g in zip(texts, groups, strict=True) if g == name],
            tokenizer=tokenizer, bos=True,
        )  # fmt: skip
        assert group.nll_sum == pytest.approx(alone.nll_sum, rel=1e-12)
        assert (group.tokens, group.bytes, group.words) == (alone.tokens, alone.bytes, alone.words)
        assert group.top1 == sum(document.top1 for document in own)
    bits = [group.bits_per_byte for group in report.per_group.values()]
    sizes = [group.bytes for group in report.per_group.values()]
    assert report.mean_group_bits_per_byte == pytest.approx(sum(bits) / 3)
    by_bytes = sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)
    assert report.bits_per_byte == pytest.approx(by_bytes)
    perplexities = [group.perplexity for group in report.per_group.values()]
    assert report.mean_group_perplexity == pytest.approx(sum(perplexities) / 3)
    written = json.loads(report.to_json())
    assert written["per_group"]["code"]["bits_per_byte"] == pytest.approx(bits[2])
    assert written["mean_group_bits_per_byte"] == pytest.approx(sum(bits) / 3)


def test_groups_of_token_ids_have_no_bytes(model):
    report = evaluate_perplexity(model, [[3, 4, 5], [6, 7]], groups=["a", "b"])
    assert report.mean_group_bits_per_byte is None and report.mean_group_perplexity > 1
    assert report.per_group["b"].tokens == 1
    assert evaluate_perplexity(model, [[3, 4, 5]]).per_group is None


# Errors


def test_document_error_against_its_definition(model):
    """Miller 2024, arXiv:2411.00640: a sum over all pairs of tokens of the same document."""
    generator = torch.manual_seed(0)
    rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (5, 12, 40, 3)]
    losses = [token_losses(model, row) for row in rows]
    every = torch.cat(losses)
    n, mean = len(every), every.mean()
    pairs = sum(
        float((d[i] - mean) * (d[j] - mean))
        for d in losses
        for i in range(len(d))
        for j in range(len(d))
        if i != j
    )
    of_tokens = float(every.var() / n)
    report = evaluate_perplexity(model, rows)
    assert report.mean_nll_stderr == pytest.approx(math.sqrt(of_tokens), rel=1e-9)
    expected = math.sqrt(of_tokens + pairs / n**2)
    assert report.mean_nll_document_stderr == pytest.approx(expected, rel=1e-9)
    assert report.to_dict()["mean_nll_document_stderr"] == report.mean_nll_document_stderr


def test_document_error_of_copies(model):
    """The same documents again add no information: the error of tokens shrinks, this one less."""
    rows = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14]]
    long = [row * 10 for row in rows]
    report = evaluate_perplexity(model, long)
    assert report.mean_nll_document_stderr > report.mean_nll_stderr
    assert math.isnan(evaluate_perplexity(model, rows[:1]).mean_nll_document_stderr)


# Mistakes


TEXT = dict(text=QUESTIONS, tokenizer="own")
ROWS = dict(input_ids=[[3, 4, 5], [6, 7]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (TEXT | dict(after="Reply:"), ValueError, "document 0 does not contain the marker 'Reply:'"),
        (TEXT | dict(after="four"), ValueError, "document 0 does not contain the marker 'four'"),
        (TEXT | dict(after="."), ValueError, "document 0 ends with the marker '.': nothing is after"),
        (TEXT | dict(after=""), TypeError, "after must be a str that is not empty"),
        (TEXT | dict(after=3), TypeError, "after must be a str that is not empty, got 3"),
        (TEXT | dict(after="a", spans=[]), TypeError, "expected one of mask, spans and after, got spans and after"),
        (TEXT | dict(mask=[[1]]), TypeError, "mask marks tokens of input_ids: for text pass spans or after"),
        (ROWS | dict(after="a"), TypeError, "after marks characters of text: for input_ids pass mask"),
        (ROWS | dict(spans=[[(0, 1)]]), TypeError, "spans marks characters of text"),
        (TEXT | dict(spans=[[(0, 3)]]), ValueError, "spans is of 1 documents, but there are 2"),
        (TEXT | dict(spans=[[(0, 3)], [(5, 99)]]), ValueError, r"spans of document 1 are .*stop <= 48"),
        (TEXT | dict(spans=[[(3, 3)], [(0, 1)]]), ValueError, "spans of document 0 are .*start < stop"),
        (TEXT | dict(spans=[[3], [4]]), TypeError, "spans of document 0 are .*expected a list of"),
        (TEXT | dict(spans="ab"), TypeError, "spans must be a sequence of lists"),
        (TEXT | dict(spans=[[], [(0, 9)]]), ValueError, "document 0 has no token that is scored"),
        (ROWS | dict(mask=[[1, 1, 1]]), ValueError, "mask is of 1 documents, but there are 2"),
        (ROWS | dict(mask=[[1, 1, 1], [1]]), ValueError, "mask of document 1 has 1 values, but the document has 2 tokens"),
        (ROWS | dict(mask=[[1, 2, 1], [1, 1]]), ValueError, "mask of document 0 is .*True or False"),
        (ROWS | dict(mask=[[0, 0, 1], [1, 0]]), ValueError, "document 1 has no token that is scored: .* only the first"),
        (ROWS | dict(mask="abc"), TypeError, "mask must be a Tensor or a sequence"),
        (ROWS | dict(mask=[["a", "b", "c"], [1, 1]]), TypeError, "mask of document 0 is"),
        (dict(input_ids=torch.ones(2, 5, dtype=torch.long), mask=torch.ones(2, 4)), ValueError, r"mask has shape \[2, 4\], expected that of input_ids, \[2, 5\]"),
        (TEXT | dict(after="Answer:", tokenizer=Slow()), ValueError, "tokenizer Slow changes the text and has no offsets.*fast tokenizer"),
        (ROWS | dict(mask=[[1, 1, 1], [1, 1]], recipe="hf-stride"), ValueError, "recipe hf-stride decides what is scored, and so would mask"),
        (ROWS | dict(groups=["a"]), ValueError, "groups has 1 names, expected one for each of 2 documents"),
        (ROWS | dict(groups="ab"), TypeError, "groups must be a sequence of names"),
        (ROWS | dict(groups=["a", ""]), TypeError, r"groups\[1\] is '', expected a name that is not empty"),
        (ROWS | dict(groups=["a", 1]), TypeError, r"groups\[1\] is 1"),
        (dict(input_ids=[list(range(3, 203))] * 6, groups=["a"] * 6, recipe="llama.cpp-512", model=600), ValueError, "recipe llama.cpp-512 joins the documents, so they form no groups"),
    ],
)  # fmt: skip
def test_mistakes(model, tokenizer, arguments, error, message):
    arguments = dict(arguments)
    if (size := arguments.pop("model", None)) is not None:
        model = causal_lm(max_position_embeddings=size)
    if arguments.get("tokenizer") == "own":
        arguments["tokenizer"] = tokenizer
    if isinstance(arguments.get("tokenizer"), Slow):
        model = causal_lm(vocab_size=len(arguments["tokenizer"]))
    with pytest.raises(error, match=message) as caught:
        evaluate_perplexity(model, **arguments)
    assert "\n" not in str(caught.value)
