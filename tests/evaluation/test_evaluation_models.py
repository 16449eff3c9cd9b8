"""evaluate_perplexity on models of unusual build, against their own logits in fp64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import transformers
from language_models import CONTEXT, VOCAB, brute_force, byte_tokenizer, causal_lm

from chunked_ce import evaluate_perplexity, loglikelihood

SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=CONTEXT,
)  # fmt: skip


def ids_of(length):
    torch.manual_seed(0)
    return torch.randint(3, VOCAB, (length,))


@torch.no_grad()
def stock_nll(model, ids, skipped=0):
    """Of a document of one window; `skipped` positions of logits come before it."""
    logits = model(input_ids=ids[None, :-1]).logits[0, skipped:].double()
    return F.cross_entropy(logits, ids[1:], reduction="sum").item()


# Models whose accessors mislead: the head is found by what their forward does


def modernbert():
    """get_decoder() is the output head there, named `decoder`."""
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    config = transformers.ModernBertDecoderConfig(**SMALL, **special)
    return transformers.ModernBertDecoderForCausalLM(config)


def llava():
    """Multimodal: a language model within, and text alone."""
    text = transformers.LlamaConfig(**SMALL)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=0)
    return transformers.LlavaForConditionalGeneration(config)


class Awkward(torch.nn.Module):
    """Accessors as given, over a GPT-2."""

    def __init__(self, **accessors):
        super().__init__()
        self.inner = causal_lm()
        self.config = self.inner.config
        for name, accessor in accessors.items():
            setattr(self, name, accessor)

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids)


def fails(*args, **kwargs):
    raise NotImplementedError("not of this model")


def of_inner(name):
    inner = causal_lm()
    return getattr(inner, name)


ODD = {
    "decoder raises": lambda: Awkward(get_decoder=fails),
    "head raises": lambda: Awkward(get_output_embeddings=fails),
    "embeddings raise": lambda: Awkward(get_input_embeddings=fails),
    "decoder takes no ids": lambda: Awkward(
        get_decoder=lambda: torch.nn.Linear(3, 4), get_output_embeddings=of_inner("get_output_embeddings")
    ),
    "decoder needs pictures": lambda: Awkward(
        get_decoder=lambda: torch.nn.Bilinear(3, 4, 5), get_output_embeddings=of_inner("get_output_embeddings")
    ),
    "another's decoder": lambda: Awkward(
        get_decoder=lambda: causal_lm("Llama").model, get_output_embeddings=of_inner("get_output_embeddings")
    ),
    "no decoder": lambda: Awkward(get_decoder=lambda: None),
    "a head of None": lambda: Awkward(get_decoder=of_inner("get_decoder"), get_output_embeddings=lambda: None),
}  # fmt: skip


@pytest.mark.parametrize("make", [modernbert, *ODD.values()], ids=["ModernBERT", *ODD])
def test_memory_for_any_accessors(make):
    model, ids = make().eval(), ids_of(CONTEXT)
    report = evaluate_perplexity(model, ids)
    assert not report.logits_stored
    assert report.nll_sum == pytest.approx(stock_nll(model, ids), rel=1e-6)


def test_multimodal():
    model, ids = llava().eval(), ids_of(CONTEXT)
    report = evaluate_perplexity(model, ids)
    assert report.context_length == CONTEXT and not report.logits_stored
    assert report.nll_sum == pytest.approx(stock_nll(model, ids), rel=1e-6)


def test_model_with_further_inputs():
    class Captions(torch.nn.Embedding):
        def forward(self, input_ids, pixel_values):
            return super().forward(input_ids)

    model, ids = Captions(VOCAB, VOCAB), ids_of(20)
    with pytest.raises(
        TypeError, match="with token ids alone .*pixel_values.*model.language_model"
    ):
        evaluate_perplexity(model, ids, context_length=20)
    report = evaluate_perplexity(lambda x: model(x, None), ids, context_length=20)
    expected = F.cross_entropy(model.weight[ids[:-1]].double(), ids[1:], reduction="sum")
    assert report.nll_sum == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_trained_prompts(kind):
    """Five positions of each window are the prompt's, whose logits are of no token."""
    peft = pytest.importorskip("peft")
    options = {"encoder_hidden_size": 8} if kind == "PromptEncoder" else {}
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=5, **options)
    torch.manual_seed(0)
    base = causal_lm(num_key_value_heads=4)  # by which PEFT sizes a prefix
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    skipped, ids = (0 if kind == "PrefixTuning" else 5), ids_of(CONTEXT - 4)
    report = evaluate_perplexity(model, ids)
    assert not report.logits_stored and report.context_length == CONTEXT - 5
    expected = stock_nll(model, ids, skipped)
    assert report.nll_sum == pytest.approx(expected, rel=1e-6)
    assert report.nll_sum != pytest.approx(stock_nll(causal_lm(), ids), rel=1e-3)
    pair = (ids[:-3].tolist(), ids[-3:].tolist())
    both = stock_nll(model, ids, skipped) - stock_nll(model, ids[:-3], skipped)
    assert loglikelihood(model, [pair])[0].logprob == pytest.approx(-both, rel=1e-5)


# Vocabularies


def test_unused_tokens():
    """One that was added for padding, and some of the vocabulary's own."""
    tokenizer = byte_tokenizer()
    model = causal_lm(vocab_size=len(tokenizer))
    before = evaluate_perplexity(model, text="the cat", tokenizer=tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([f"<more{i}>" for i in range(500)])
    assert evaluate_perplexity(model, text="the cat", tokenizer=tokenizer) == before
    with pytest.raises(ValueError, match="document 0 has token id 300, .*resize_token_embeddings"):
        evaluate_perplexity(model, text="the <pad>", tokenizer=tokenizer)
    fewer = causal_lm(vocab_size=VOCAB - 16)
    assert evaluate_perplexity(fewer, text="xyz", tokenizer=tokenizer).tokens == 2


# Positions


def bloom(**config):
    return causal_lm("Bloom", seq_length=CONTEXT, hidden_size=CONTEXT, n_head=4, **config)


def xglm():
    config = transformers.XGLMConfig(
        vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    return transformers.XGLMForCausalLM(config).eval()


@pytest.mark.parametrize("make", [bloom, xglm])
def test_context_without_position_table(make):
    """BLOOM's hidden size is its number of positions here, which makes it no table."""
    model, ids = make(), ids_of(3 * CONTEXT)
    report = evaluate_perplexity(model, ids, context_length=2 * CONTEXT)
    expected = brute_force(model, ids, 2 * CONTEXT, 2 * CONTEXT)
    assert report.nll_sum == pytest.approx(expected, rel=1e-6)
    assert evaluate_perplexity(model, ids).context_length == CONTEXT
    assert loglikelihood(model, [(ids[:50], ids[50:53])], context_length=2 * CONTEXT)


class Positions(torch.nn.Module):
    """A bigram with something for each of 32 positions, as `make` says; the models of one file."""

    def __init__(self, make):
        super().__init__()
        self.table = torch.nn.Embedding(VOCAB, VOCAB)
        self.config = SimpleNamespace(block_size=32)
        make(self)

    def forward(self, idx):
        return self.table(idx)


STORED = {
    "embedding": lambda m: setattr(m, "wpe", torch.nn.Embedding(32, 8)),
    "parameter": lambda m: setattr(m, "pos_emb", torch.nn.Parameter(torch.zeros(1, 32, 8))),
    "buffer": lambda m: m.register_buffer("embed_positions", torch.zeros(32, 8)),
    "mask": lambda m: m.register_buffer("bias", torch.zeros(1, 1, 32, 32)),
    "tensor": lambda m: setattr(m, "pos_encoding", torch.zeros(32, 8)),
}


@pytest.mark.parametrize("make", STORED.values(), ids=STORED)
def test_context_beyond_position_table(make, monkeypatch):
    """Not even tried: on a GPU an index out of range ends the process's work."""
    monkeypatch.setattr(Positions, "forward", lambda *_: pytest.fail("tried"))
    with pytest.raises(
        ValueError, match="context_length is 33, but the model has positions for 32"
    ):
        evaluate_perplexity(Positions(make), ids_of(90), context_length=33)


def test_context_beyond_maximum_of_model():
    """MPT's table of ALiBi has the size of the configuration's maximum."""
    model = causal_lm("Mpt", max_seq_len=CONTEXT, d_model=32, n_heads=4, n_layers=1)
    with pytest.raises(ValueError, match="model has positions for 32 tokens: pass 32 or fewer"):
        evaluate_perplexity(model, ids_of(90), context_length=40)
    short = evaluate_perplexity(model, ids_of(20), context_length=40)
    assert short.nll_sum == pytest.approx(stock_nll(model, ids_of(20)), rel=1e-6)


# Logits that are not [B, T, V]

LAYOUTS = {
    "last position": (lambda z: z[:, -1:], r"\[2, 1, 300\] .*last position alone.*logits_to_keep=0"),
    "one row": (lambda z: z[:, -1], r"\[2, 300\] .*one row for each document.*all positions"),
    "time first": (lambda z: z.transpose(0, 1), r"\[8, 2, 300\] .*return logits.transpose\(0, 1\)"),
    "classes second": (lambda z: z.transpose(1, 2), r"\[2, 300, 8\] .*return logits.transpose\(1, 2\)"),
    "flattened": (lambda z: z.flatten(0, 1), r"\[16, 300\] .*return logits.view\(\*ids.shape, -1\)"),
    "longer": (lambda z: torch.cat([z, z], 1), r"\[2, 16, 300\] .*wrap it to return one row for each"),
    "four dimensions": (lambda z: z[None], r"\[1, 2, 8, 300\] .*one row for each token"),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "message"), LAYOUTS.values(), ids=LAYOUTS)
def test_logits_of_another_layout(layout, message):
    table = torch.nn.Embedding(VOCAB, VOCAB)
    with pytest.raises(ValueError, match=f"model returned {message}"):
        evaluate_perplexity(lambda ids: layout(table(ids)), ids_of(40), context_length=16)
