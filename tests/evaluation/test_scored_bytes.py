"""Bytes and words of the scored text, for tokenizers of every kind.

Each oracle is how the tokenizer was built: how many bytes its pieces are, never its offsets.
"""

import warnings

import pytest

pytest.importorskip("transformers")
pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from language_models import TEXTS, VOCAB, byte_tokenizer, causal_lm
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from chunked_ce import evaluate_perplexity
from chunked_ce.evaluation.documents import from_ids, from_text

STARTS = [
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    "e\u0301",
    "\u0301",
    "é",
    "😀",
    "👩‍👩‍👧",
    "日本",
    "▁",
    "Ġ",
    "Ã",
    "a",
    "The",
]
PARTS = [*STARTS, "the", " cat", "<s>", "\r\n", "ﬁ", "Ⅷ", "\u200b", "b", "ß"]
TEXT = st.builds("".join, st.lists(st.sampled_from(PARTS), min_size=1, max_size=6))
EOS = 10**6  # no tokenizer's here: texts of one token are scored too
EVERY_TEXT = settings(max_examples=150, deadline=None)


def fast(tokenizer, **options):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_level(trim=False, prefix=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "日本語 😀 the cat"] * 3, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return fast(tokenizer)


def pieces(prepend="never", byte_fallback=True, normalizer=None):
    """SentencePiece's kind: pieces of characters, and the bytes of characters that it lacks."""
    known = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcehtéT",
        "th",
        "the",
        "▁the",
    ]
    ids = {piece: i for i, piece in enumerate(known)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    tokenizer = Tokenizer(models.BPE(ids, merges, byte_fallback=byte_fallback, unk_token="<unk>"))
    if normalizer is None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    else:
        tokenizer.normalizer = normalizer
    return fast(tokenizer, unk_token="<unk>")


def word_piece(lowercase=True):
    words = ["[UNK]", "the", "cat", "sat", "elan", "日", "##s"]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return fast(tokenizer, unk_token="[UNK]")


class NoOffsets:
    """A tokenizer written in Python."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer, self.unk_token_id = tokenizer, tokenizer.unk_token_id
        self.convert_ids_to_tokens = tokenizer.convert_ids_to_tokens
        self.decode = tokenizer.decode

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return {"input_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}


def scored(text, tokenizer):
    """Of each of the tokenizer's two forms, which must agree."""
    found = [from_text(text, t, None, EOS)[0] for t in (tokenizer, NoOffsets(tokenizer))]
    assert found[0][1:] == found[1][1:]
    return found[0].n_bytes


def first_piece(text, tokenizer):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.convert_ids_to_tokens(ids[0])


NO_YES = (False, True)
BYTE_LEVEL = {(trim, prefix): byte_level(trim, prefix) for trim in NO_YES for prefix in NO_YES}


@EVERY_TEXT
@given(TEXT, st.sampled_from(list(BYTE_LEVEL)))
def test_byte_level(text, kind):
    """A character of a piece is a byte; the prefix space is put where there is none."""
    tokenizer = BYTE_LEVEL[kind]
    added = kind[1] and not text.startswith(" ")
    first = first_piece(text, tokenizer)
    assert scored(text, tokenizer) == len(text.encode()) - (len(first) - added)


PIECES = {scheme: pieces(scheme) for scheme in ("never", "first", "always")}


def piece_bytes(piece):
    return 1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode())


@EVERY_TEXT
@given(TEXT.filter(lambda text: "▁" not in text), st.sampled_from(list(PIECES)))
def test_sentence_pieces(text, scheme):
    added = scheme != "never" and not text.startswith(" ")
    first = piece_bytes(first_piece(text, PIECES[scheme]))
    assert scored(text, PIECES[scheme]) == len(text.encode()) - (first - added)


LLAMA = pieces(
    normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
)


@EVERY_TEXT
@given(TEXT.filter(lambda text: "▁" not in text))
def test_prefix_space_before_space(text):
    """Llama 2's: always one more space, also where the text begins with one."""
    first = piece_bytes(first_piece(text, LLAMA))
    assert scored(text, LLAMA) == len(text.encode()) - (first - 1)


@pytest.mark.parametrize("text", ["▁the", "▁ a", " ▁a"])
def test_space_character_in_text(text):
    expected = len(text.encode()) - (3 if text[0] == "▁" else 1)
    if first_piece(text, PIECES["never"]) == "▁the":
        expected = len(text.encode()) - len("▁the".encode())
    assert scored(text, PIECES["never"]) == expected


WORDS = ["the", "The", "CAT", "élan", "e\u0301lan", "日", "xyz", "Xé", "😀"]
SPACES = [" ", "   ", "\n", "\n\n", "\t", "\u00a0", " \u3000"]


@EVERY_TEXT
@given(
    st.sampled_from(["", *SPACES]),
    st.lists(st.sampled_from(WORDS), min_size=2, max_size=4),
    st.sampled_from(SPACES),
)
def test_word_pieces(before, words, between):
    """What lies before the second token but after the first is scored: no tokenizer keeps it."""
    text = before + between.join(words)
    expected = len(text.encode()) - len((before + words[0]).encode())
    assert scored(text, word_piece()) == expected


@pytest.mark.parametrize("text", ["thes cat", "The\n\ncats", "catss the"])
def test_word_pieces_within_a_word(text):
    assert scored(text, word_piece()) == len(text.encode()) - 3


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("before", ["", " ", "\n"])
def test_words_with_metaspace(space, before):
    """XLM-RoBERTa's: the spaces of words are cut off, and put again."""
    ids = {"<unk>": 0, "▁the": 1, "▁cat": 2}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    text = f"{before}the{space}cat"
    assert scored(text, fast(tokenizer, unk_token="<unk>")) == len(f"{space}cat".encode())


@pytest.mark.parametrize("text", ["THE cat", " THE cat", "  THE cat", "\u00a0\n日本", "the"])
def test_dropped_space_before_unknown_word(text):
    """T5's: leading white space goes, and a prefix space is put, here a token of its own."""
    ids = {"<unk>": 0, "▁": 1, "t": 2, "h": 3, "e": 4}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    assert scored(text, fast(tokenizer, unk_token="<unk>")) == len(text.lstrip().encode())


@EVERY_TEXT
@given(TEXT.filter(lambda text: "<s>" not in text))
def test_byt5(text):
    tokenizer = ByT5Tokenizer()
    (document,) = from_text(text, tokenizer, None, EOS)
    assert document.n_bytes == len(document.ids) - 2  # but for the first and EOS
    assert document.words == len(text[1:].split()) + (len(text[0].encode()) > 1) * (
        not text[0].isspace() and (len(text) == 1 or text[1].isspace())
    )


@EVERY_TEXT
@given(TEXT)
def test_tokenizer_without_vocabulary(text):
    class Characters:
        def __call__(self, text, **options):
            return {"input_ids": list(map(ord, text))}

        def decode(self, ids):
            return "".join(map(chr, ids))

    (document,) = from_text(text, Characters(), None, EOS)
    assert document.n_bytes == len(text[1:].encode()) and document.words == len(text[1:].split())


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("ﬁ the", 4), ("THE a", 2), ("Ａ b", 2), ("日本 a", 2), ("①b", 1)]
)
def test_rewritten_text(text, n_bytes):
    """NFKC and lower case: the first token's text is its own, however it is written."""
    names = {"fi": 0, "the": 1, "a": 2, "▁": 3, "b": 4, "1": 5, "<unk>": 6}
    rewrite = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        rewrite,
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits()]),
    )
    assert scored(text, fast(tokenizer, unk_token="<unk>")) == n_bytes


@pytest.mark.parametrize("text", ["e\u0301a", "e\u0301 the"])
def test_part_of_rewritten_character(text):
    """NFC makes two bytes of three: the first is context, the others are scored."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert scored(text, tokenizer) == len(text.encode()) - 1


# A document that has BOS or EOS already


@pytest.fixture(scope="module")
def marked():
    """(tokenizer that puts <s>, model)"""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer, causal_lm(vocab_size=len(tokenizer))


def test_bos_in_text(marked):
    tokenizer, model = marked
    once = evaluate_perplexity(model, text=["a cat", "b cats"], tokenizer=tokenizer)
    for texts in (["<s>a cat", "b cats"], ["<s>a cat", "<s>b cats"]):
        with pytest.warns(
            UserWarning, match="document 0.* begins with the BOS token, id .*bos=Fal"
        ):
            twice = evaluate_perplexity(model, text=texts, tokenizer=tokenizer)
        assert twice == once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = evaluate_perplexity(model, text="<s>a cat", tokenizer=tokenizer, bos=False)
    assert (own.bytes, own.words, own.bos) == (5, 2, None)


def test_eos_in_text(marked):
    tokenizer, model = marked
    once = evaluate_perplexity(model, text="a cat", tokenizer=tokenizer, eos=True)
    says = "document 0 ends with the EOS token, id .*eos=False"
    with pytest.warns(UserWarning, match=says) as caught:
        twice = evaluate_perplexity(model, text="a cat</s>", tokenizer=tokenizer, eos=True)
    assert twice == once and caught[0].filename == __file__
    text = evaluate_perplexity(model, text="a cat</s>", tokenizer=tokenizer)
    assert text.bytes == 9 and text.tokens == once.tokens


def test_bos_and_eos_among_ids():
    with pytest.warns(UserWarning, match=r"document 1 \(and 1 more\) begins with the BOS token"):
        documents = from_ids([[4, 5], [1, 4, 5], [1, 4, 5, 2]], None, 1, 9)
    assert [d.ids.tolist() for d in documents] == [[1, 4, 5, 9], [1, 4, 5, 9], [1, 4, 5, 2, 9]]
    with pytest.warns(UserWarning, match="document 0 ends with the EOS token"):
        (document,) = from_ids([[4, 5, 2]], None, 1, 2)
    assert document.ids.tolist() == [1, 4, 5, 2]


def test_one_token_for_both_ends():
    tokenizer = byte_tokenizer()
    end = tokenizer.bos_token_id
    assert end == tokenizer.eos_token_id and len(tokenizer) == VOCAB
    with pytest.warns(UserWarning, match="BOS"):
        (document,) = from_text(f"{tokenizer.bos_token}ab", tokenizer, end, end)
    ids = document.ids.tolist()
    assert ids[0] == ids[-1] == end and ids.count(end) == 2 and document.n_bytes == 2
