"""Where the first token of a text ends, in UTF-8 bytes.

Offsets do not tell. Tokenizers trim spaces off them, count a prefix space that the text does not
have, give a part of a character the whole character, or have none. The tokens' own bytes do. When
joined, they are the text, but for a prefix space or white space that the tokenizer dropped.
Where the tokenizer rewrites the text (lower case, unknown words), the shortest prefix of the text
that gives the first token alone is used instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

COMPARED_TOKENS = 1024  # enough to tell a prefix space from a space of the text
LONGEST_TOKEN = 256  # characters of the text that are tried


def first_token_bytes(text: str, ids: Sequence[int], tokenizer: Any) -> int:
    """Return how many of the UTF-8 bytes of `text` lie before the end of its first token."""
    kept = _without_dropped_space(text, tokenizer)
    dropped, text = len(text.encode()) - len(kept.encode()), kept
    pieces = pieces_of(ids[:COMPARED_TOKENS], tokenizer)
    end = _end_in_joined(text, pieces)
    if end is None:
        prefix = _prefix_of_token(text, ids[0], tokenizer)
        end = len(prefix.encode()) if prefix else _end_within_character(text, pieces[0])
    return dropped + end


def after_bytes(text: str, n_bytes: int) -> str:
    """Return `text` without its first `n_bytes`; a character that is cut stays whole."""
    return text[len(text.encode()[:n_bytes].decode(errors="ignore")) :]


def token_text(token: int, tokenizer: Any) -> str:
    """Return how the tokenizer writes a special token."""
    piece = pieces_of([token], tokenizer)[0]
    return piece.decode(errors="replace") if isinstance(piece, bytes) else piece


def pieces_of(ids: Sequence[int], tokenizer: Any) -> list[str | bytes]:
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        pieces = tokenizer.convert_ids_to_tokens(list(ids))
        return [piece if isinstance(piece, (str, bytes)) else "" for piece in pieces]
    return [tokenizer.decode([token]) for token in ids]


def _end_in_joined(text: str, pieces: Sequence[str | bytes]) -> int | None:
    """Return the end of the first piece where the joined pieces follow the text beyond it.

    Of the ways to read pieces as bytes, and of the text with and without a prefix space, the one
    that follows the text to the end is right, or else furthest.
    """
    best, furthest = None, (False, 0)
    for read in READINGS:
        parts = [piece if isinstance(piece, bytes) else read(piece) for piece in pieces]
        joined, first = b"".join(parts), len(parts[0])
        shown = text.replace("▁", " ") if read is _with_spaces else text
        for start, shift in ((shown.encode(), 0), (b" " + shown.encode(), -1)):
            common = len(os.path.commonprefix([joined, start[: len(joined)]]))
            reached = (common == len(joined), common)
            if 0 < first <= common and reached > furthest:
                best, furthest = _bytes_in(text, shown, max(0, first + shift)), reached
    return best


def _bytes_in(text: str, shown: str, end: int) -> int:
    """Return where `end` bytes of `shown` end in `text`, which has as many characters."""
    whole = shown.encode()[:end].decode(errors="ignore")
    return len(text[: len(whole)].encode()) + end - len(whole.encode())


def _without_dropped_space(text: str, tokenizer: Any) -> str:
    """Return `text` without its leading white space, if that changes no token."""
    kept = text.lstrip()
    if not kept or kept == text:
        return text
    start = text[: len(text) - len(kept) + LONGEST_TOKEN]
    same = _ids(start, tokenizer) == _ids(start.lstrip(), tokenizer)
    return kept if same else text


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _prefix_of_token(text: str, token: int, tokenizer: Any) -> str | None:
    """Return the shortest prefix whose only token is `token`; of an unknown token the longest.

    White space at its end is none of the token's.
    """
    unknown = token == getattr(tokenizer, "unk_token_id", None)
    found = 0
    for end in range(1, len(text) + 1):
        if _ids(text[:end], tokenizer) == [token]:
            found = end
            if not unknown:
                break
        elif end - found > LONGEST_TOKEN:
            break
    return text[:found].rstrip() or None


def _end_within_character(text: str, piece: str | bytes) -> int:
    """Return the bytes of a token that is a part of the first character, which was rewritten."""
    part = piece if isinstance(piece, bytes) else _byte_level(piece)
    if isinstance(piece, str) and _BYTE_TOKEN.fullmatch(piece):
        part = _with_spaces(piece)
    if not text[0].isspace():
        part = part.removeprefix(b" ").removeprefix("▁".encode())
    return min(len(part), len(text[0].encode()))


# How a piece of the vocabulary is read as bytes

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_characters() -> dict[str, bytes]:
    """Return GPT-2's character for each byte: itself if printable, or one from U+0100 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    characters = {chr(byte): bytes([byte]) for byte in printed}
    return characters | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _byte_level(piece: str) -> bytes:
    """Return the bytes of a token of GPT-2's kind; others are added tokens, taken literally."""
    return b"".join(_BYTE_OF.get(character) or character.encode() for character in piece)


def _with_spaces(piece: str) -> bytes:
    """Return the bytes of a SentencePiece token: U+2581 is a space, <0xF0> a byte."""
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _one_byte_each(piece: str) -> bytes:
    """Return the bytes of a token of ByT5; others are added tokens, taken literally."""
    return piece.encode("latin-1") if all(ord(c) < 256 for c in piece) else piece.encode()


READINGS: tuple[Callable[[str], bytes], ...] = (
    _byte_level,
    _with_spaces,
    _one_byte_each,
    str.encode,
)
