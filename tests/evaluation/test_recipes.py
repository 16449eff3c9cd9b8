"""Each recipe against its tool's own definition, written here from stored logits in fp64."""

import math
import random
import re

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from language_models import END, TEXTS, byte_tokenizer, causal_lm, tokenizer_with_bos

from chunked_ce import evaluate_perplexity
from chunked_ce.evaluation.recipes import RECIPES, describe
from chunked_ce.evaluation.windows import Window, discount_overlapped, whole_windows

CLOSE = 1e-10


def words(count, seed):
    source = " ".join(TEXTS).split(" ")
    return " ".join(random.Random(seed).choices(source, k=count)) + "\n"


# Two windows of gptq-2048, five of llama.cpp-512 and a remainder of each; the short ones fill none.
LONG = [words(2200, 0), words(150, 1), words(200, 2)]
SHORT = ["A short one.", " Another; also short.\n"]


def tokenizer_with(bos):
    return tokenizer_with_bos() if bos else byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return causal_lm(max_position_embeddings=2048, bos_token_id=0, eos_token_id=0).double()


@pytest.fixture(scope="module")
def model_700():
    """A context that neither is the stride of 512 nor a multiple."""
    return causal_lm(max_position_embeddings=700, bos_token_id=0, eos_token_id=0).double()


@torch.no_grad()
def losses(model, inputs, targets):
    """Each target's loss after as many inputs, in fp64."""
    logits = model(torch.tensor(inputs)[None]).logits[0].double()
    return F.cross_entropy(logits[-len(targets) :], torch.tensor(targets), reduction="none")


# The tools' definitions


def gptq(model, tokenizer, texts, seqlen=2048):
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    nlls = []
    for i in range(len(ids) // seqlen):
        window = ids[i * seqlen : (i + 1) * seqlen]
        # All of the window is shown; the last position's logits are not used.
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0, :-1].double()
        nlls.append(F.cross_entropy(logits, torch.tensor(window[1:])) * seqlen)
    return math.exp(sum(nlls) / (len(nlls) * seqlen)), len(nlls) * (seqlen - 1)


def llama_cpp(model, tokenizer, texts, n_ctx=512):
    """Perplexity, its "+/-", and the number of tokens."""
    prompt = "".join(texts).removesuffix("\n")
    add_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    bos = [tokenizer.bos_token_id] * add_bos
    tokens = bos + tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids
    first, nll, nll2, count = n_ctx // 2, 0.0, 0.0, 0
    for start in range(0, len(tokens) // n_ctx * n_ctx, n_ctx):
        chunk = bos + tokens[start + len(bos) : start + n_ctx]
        for loss in losses(model, chunk[:-1], chunk[first + 1 :]).tolist():
            nll, nll2, count = nll + loss, nll2 + loss * loss, count + 1
    mean = nll / count
    return math.exp(mean), math.exp(mean) * math.sqrt((nll2 / count - mean**2) / (count - 1)), count


def hf_stride(model, tokenizer, texts, stride=512):
    """The page's loop: a mean over the labels, times one less than their number."""
    ids = torch.tensor([tokenizer("\n\n".join(texts))["input_ids"]])
    nll_sum, n_tokens, prev_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + model.config.n_positions, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : end - begin - (end - prev_end)] = -100
        with torch.no_grad():
            logits = model(ids[:, begin:end]).logits.double()
        mean = F.cross_entropy(logits[0, :-1], labels[0, 1:])
        n = int((labels != -100).sum()) - 1
        nll_sum, n_tokens, prev_end = nll_sum + float(mean) * n, n_tokens + n, end
        if end == ids.shape[1]:
            break
    return math.exp(nll_sum / n_tokens), n_tokens


def rolling(model, tokenizer, texts, context=None):
    """Log-likelihood of each text, after the prefix token, in blocks; the last block is full."""
    context, logliks = context or model.config.n_positions, []
    for text in texts:
        begins = text.startswith(tokenizer.decode([tokenizer.bos_token_id]))
        own = tokenizer(text, add_special_tokens=not begins)["input_ids"]
        sequence, total = [tokenizer.bos_token_id, *own], 0.0
        for done in range(0, len(own), context):
            block = own[done : done + context]
            last_input = done + len(block)
            inputs = sequence[max(0, last_input - context) : last_input]
            total -= losses(model, inputs, block).sum().item()
        logliks.append(total)
    return logliks


BOS = pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])


@BOS
def test_gptq(model, bos):
    tokenizer = tokenizer_with(bos)
    theirs, tokens = gptq(model, tokenizer, LONG)
    ours = evaluate_perplexity(model, text=LONG, tokenizer=tokenizer, recipe="gptq-2048")
    assert ours.perplexity == pytest.approx(theirs, rel=CLOSE)
    assert (ours.tokens, ours.bytes, ours.bos) == (tokens, None, 0 if bos else None)
    assert ours.windows == 2 and ours.documents == 1 and ours.context_length == 2048


@BOS
def test_gptq_with_empty_documents(model, bos):
    """Every other line of wikitext is empty: leaving them out changes what the join gives."""
    texts = [LONG[0], "", "", LONG[1], ""]
    theirs, _ = gptq(model, tokenizer_with(bos), texts)
    arguments = dict(tokenizer=tokenizer_with(bos), recipe="gptq-2048")
    assert evaluate_perplexity(model, text=texts, **arguments).perplexity == pytest.approx(
        theirs, rel=CLOSE
    )


@BOS
@pytest.mark.parametrize("text", [LONG, [LONG[0] + END + LONG[1] + "\n\n"]], ids=["", "special"])
def test_llama_cpp(model, bos, text):
    """Text that spells a special token is characters there, and one last newline is dropped."""
    tokenizer = tokenizer_with(bos)
    theirs, error, tokens = llama_cpp(model, tokenizer, text)
    ours = evaluate_perplexity(model, text=text, tokenizer=tokenizer, recipe="llama.cpp-512")
    assert ours.perplexity == pytest.approx(theirs, rel=CLOSE)
    assert ours.perplexity_stderr == pytest.approx(error, rel=1e-8)
    assert ours.tokens == tokens == 255 * ours.windows and ours.bos == (0 if bos else None)


def test_llama_cpp_drops_one_last_newline(model):
    """Each "q" is a token and so is the newline: without it there are too few for two windows."""
    arguments = dict(tokenizer=byte_tokenizer(), recipe="llama.cpp-512")
    with pytest.raises(ValueError, match="at least 1024 tokens of text, got 1023"):
        evaluate_perplexity(model, text="q" * 1023 + "\n", **arguments)
    assert evaluate_perplexity(model, text="q" * 1023 + "\n\n", **arguments).windows == 2


@BOS
@pytest.mark.parametrize("texts", [LONG, SHORT], ids=["long", "short"])
def test_hf_stride(model, model_700, bos, texts):
    for causal in (model, model_700):
        tokenizer = tokenizer_with(bos)
        theirs, tokens = hf_stride(causal, tokenizer, texts)
        ours = evaluate_perplexity(causal, text=texts, tokenizer=tokenizer, recipe="hf-stride")
        assert ours.perplexity == pytest.approx(theirs, rel=CLOSE) and ours.tokens == tokens
        assert ours.context_length == causal.config.n_positions and ours.stride == 512


@pytest.mark.parametrize("tokens", [513, 700, 701, 702, 1212, 1213])
def test_hf_stride_at_borders(model_700, tokens):
    """One token past a window: its mean loss counts as no token at all."""
    ids = torch.randint(3, 300, (tokens,), generator=torch.manual_seed(0))
    tokenizer = lambda text: {"input_ids": ids.tolist()}  # noqa: E731
    theirs, count = hf_stride(model_700, tokenizer, ["a"])
    ours = evaluate_perplexity(model_700, ids, recipe="hf-stride", batch_size=2, rank=True)
    assert ours.perplexity == pytest.approx(theirs, rel=CLOSE) and ours.tokens == count
    assert 0 <= ours.accuracy <= 1


@BOS
@pytest.mark.parametrize("texts", [LONG, SHORT, [END + SHORT[0], LONG[1]]], ids=["long", "short", "prefix"])  # fmt: skip
def test_lm_eval_rolling(model, bos, texts):
    """BOS of the tokenizer's own is scored after the prefix, as it is there."""
    tokenizer = tokenizer_with(bos)
    for context in (None, 40):
        logliks = rolling(model, tokenizer, texts, context)
        ours = evaluate_perplexity(
            model, text=texts, tokenizer=tokenizer, recipe="lm-eval-rolling",
            context_length=context, per_document=True,
        )  # fmt: skip
        expected = pytest.approx([-loglik for loglik in logliks], rel=CLOSE)
        assert [report.nll_sum for report in ours.per_document] == expected
        n_bytes = sum(len(text.encode()) for text in texts)
        n_words = sum(len(re.split(r"\s+", text)) for text in texts)
        nats = -sum(logliks)
        assert ours.bits_per_byte == pytest.approx(nats / n_bytes / math.log(2), rel=CLOSE)
        assert ours.byte_perplexity == pytest.approx(math.exp(nats / n_bytes), rel=CLOSE)
        assert ours.word_perplexity == pytest.approx(math.exp(nats / n_words), rel=1e-8)


def test_lm_eval_without_bos_takes_eos(model):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    report = evaluate_perplexity(model, text=SHORT, tokenizer=tokenizer, recipe="lm-eval-rolling")
    assert report.bos == tokenizer.eos_token_id
    ids = [[3, 4, 5]]  # of a model whose BOS is 1 and EOS is 2
    assert evaluate_perplexity(causal_lm(), ids, recipe="lm-eval-rolling").bos == 1
    without = causal_lm(bos_token_id=None)
    assert evaluate_perplexity(without, ids, recipe="lm-eval-rolling").bos == 2


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=[pytest.mark.long] * (r == "hf-stride")) for r in RECIPES],
)
def test_token_ids(model, recipe):
    """Token ids are joined as they are; BOS is put before them where it is given."""
    tokenizer = tokenizer_with(False)
    ids = tokenizer("".join(LONG).removesuffix("\n"))["input_ids"]
    cut = [ids[:1000], ids[1000:]] if RECIPES[recipe].joined_by is not None else [ids]
    text = dict(text=["".join(LONG).removesuffix("\n")], tokenizer=tokenizer)
    for bos in (None, 5):
        by_text = evaluate_perplexity(model, **text, recipe=recipe, bos=bos)
        by_ids = evaluate_perplexity(model, cut, recipe=recipe, bos=bos)
        assert (by_text.nll_sum, by_text.bos) == (by_ids.nll_sum, by_ids.bos)
        assert by_ids.bos == (bos if bos is None or bos == 5 else 0) or recipe == "lm-eval-rolling"


@pytest.mark.long
def test_batch_size_changes_nothing(model):
    tokenizer = tokenizer_with(True)
    for recipe in RECIPES:
        one, many = (
            evaluate_perplexity(
                model, text=LONG, tokenizer=tokenizer, recipe=recipe, batch_size=size
            )
            for size in (1, 5)
        )
        assert one.perplexity == pytest.approx(many.perplexity, rel=1e-12)


def test_whole_windows():
    """Ten tokens, windows of four: the last token of each is only a target."""
    assert whole_windows(10, 4, 4) == [Window(0, 0, 3, 3), Window(0, 4, 7, 3), Window(0, 8, 9, 1)]
    assert whole_windows(10, 4, 4, drop_remainder=True) == [Window(0, 0, 3, 3), Window(0, 4, 7, 3)]
    assert whole_windows(9, 4, 4) == [Window(0, 0, 3, 3), Window(0, 4, 7, 3)]
    assert whole_windows(8, 4, 4, context=3) == [Window(0, 0, 3, 1), Window(0, 4, 7, 1)]
    assert whole_windows(7, 4, 2) == [Window(0, 0, 3, 3), Window(0, 2, 5, 2), Window(0, 4, 6, 1)]
    counts = [window.counted_as for window in discount_overlapped(whole_windows(7, 4, 2))]
    assert counts == [None, 1, 0]
    assert discount_overlapped(whole_windows(8, 4, 4)) == whole_windows(8, 4, 4)


def test_the_report_names_the_recipe(model):
    report = evaluate_perplexity(
        model, text=LONG, tokenizer=tokenizer_with(True), recipe="llama.cpp-512"
    )
    assert repr(report).endswith("recipe llama.cpp-512)")
    assert report.to_dict()["recipe"] == "llama.cpp-512"
    assert describe("llama.cpp-512", report.bos) == (
        "recipe llama.cpp-512: windows of 512, second half scored, BOS 0 at the start of each"
    )
    assert describe("llama.cpp-512", None).endswith("second half scored, no BOS")


def test_a_file_name_as_text_warns(model, tmp_path):
    (tmp_path / "a.txt").write_text("what the file holds")
    text, tokenizer = [str(tmp_path / "a.txt")], byte_tokenizer()
    with pytest.warns(UserWarning, match="names a file") as caught:
        evaluate_perplexity(model, text=text, tokenizer=tokenizer, recipe="lm-eval-rolling")
    assert caught[0].filename == __file__


IDS = list(range(3, 203)) * 6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(recipe="gptq"), ValueError, "recipe is 'gptq', expected one of gptq-2048, llama.cpp-512, hf-stride, lm-eval-rolling"),
        (dict(recipe=2048), TypeError, "recipe must be a str or None, got int"),
        (dict(recipe="gptq-2048", stride=512), ValueError, "stride is 512, but recipe gptq-2048 has stride 2048: leave out one"),
        (dict(recipe="gptq-2048", context_length=1024), ValueError, "context_length is 1024, but recipe gptq-2048 has context_length 2048"),
        (dict(recipe="llama.cpp-512", full_last_window=True), ValueError, "full_last_window is True, but recipe llama.cpp-512"),
        (dict(recipe="hf-stride", eos=True), ValueError, "eos is True, but recipe hf-stride has eos False"),
        (dict(recipe="hf-stride", context_length=511), ValueError, "context_length is 511, but recipe hf-stride has context_length at least 512"),
        (dict(recipe="lm-eval-rolling", stride=8), ValueError, "stride is 8, but recipe lm-eval-rolling has stride the context"),
        (dict(recipe="lm-eval-rolling", bos=False), ValueError, "bos is False, but recipe lm-eval-rolling has bos True"),
        (dict(recipe="gptq-2048"), ValueError, "recipe gptq-2048 needs at least 2048 tokens of text, got 1200"),
        (dict(recipe="llama.cpp-512", input_ids=IDS[:1023]), ValueError, "recipe llama.cpp-512 needs at least 1024 tokens of text, got 1023"),
        (dict(recipe="hf-stride", input_ids=[[3], [], [4]][:1]), ValueError, "document 0 has 1 token"),
        (dict(recipe="lm-eval-rolling", input_ids=[[3], []]), ValueError, "document 1 has no tokens"),
    ],
)  # fmt: skip
def test_mistakes(model, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        evaluate_perplexity(model, **(dict(input_ids=IDS) | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
@pytest.mark.parametrize(("recipe", "tokens"), [("gptq-2048", 2048), ("llama.cpp-512", 512), ("hf-stride", 512)])  # fmt: skip
def test_a_model_with_a_shorter_context(family, recipe, tokens):
    with pytest.raises(ValueError, match=f"{recipe} needs a context of {tokens} tokens, but .* 32"):
        evaluate_perplexity(causal_lm(family), IDS, recipe=recipe)
