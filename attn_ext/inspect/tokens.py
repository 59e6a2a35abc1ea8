"""The texts of tokens, of whatever a user has: lists, a JSON file, what a tokenizer returned, ids
with their tokenizer.  A list of texts serves all examples of a batch; several are one an example.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

KINDS = "a list of strings, a tokenizer's output, ids with tokenizer= or the path of a JSON file"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _bytes_of_signs() -> dict[str, int]:
    """The byte that each sign of byte-level BPE vocabularies stands for: printable ones of Latin-1
    stand for themselves, and those from 256 on for the others in order.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_SIGNS = _bytes_of_signs()


def readable(tokens: list[str]) -> list[str]:
    """The texts of a vocabulary's entries: bytes that have signs of their own, as spaces (U+0120,
    U+2581) and line breaks (U+010A, <0x0A>), become what they are; part of a letter becomes \\xe2.
    """
    if any("\u0120" in t or "\u010a" in t for t in tokens):
        return [
            bytes(_SIGNS[c] for c in t).decode("utf-8", "backslashreplace")
            if all(c in _SIGNS for c in t)
            else t
            for t in tokens
        ]
    return [
        bytes([int(found[1], 16)]).decode("utf-8", "backslashreplace")
        if (found := _BYTE.fullmatch(t))
        else t.replace("\u2581", " ")
        for t in tokens
    ]


def _of_ids(name: str, ids: list, tokenizer) -> list[str]:
    """The texts of ids, by the tokenizer of transformers, tokenizers or tiktoken, or a function."""
    if tokenizer is None:
        raise TypeError(f"{name} holds ids: give their tokenizer=, too, got None")
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return readable([str(t) for t in tokenizer.convert_ids_to_tokens(ids)])
    if hasattr(tokenizer, "id_to_token"):
        return readable([str(tokenizer.id_to_token(i)) for i in ids])
    if hasattr(tokenizer, "decode_single_token_bytes"):
        parts = map(tokenizer.decode_single_token_bytes, ids)
        return [part.decode("utf-8", "backslashreplace") for part in parts]
    if callable(tokenizer):
        return [str(tokenizer(i)) for i in ids]
    raise TypeError(
        "tokenizer must have convert_ids_to_tokens, id_to_token or decode_single_token_bytes, or "
        f"be a function of an id, got {type(tokenizer).__name__} {tokenizer!r:.80}"
    )


def _of_tokenizer(name: str, tokens, tokenizer):
    """Lists of texts or ids of what a tokenizer returned; anything else as it is."""
    encodings = getattr(tokens, "encodings", None)
    if encodings:  # transformers' BatchEncoding of a fast tokenizer
        return [readable(list(e.tokens)) for e in encodings]
    if isinstance(getattr(tokens, "tokens", None), list):  # tokenizers' Encoding
        return readable(list(tokens.tokens))
    if isinstance(tokens, Mapping) and "input_ids" in tokens:
        return _of_tokenizer(name, tokens["input_ids"], tokenizer)
    if callable(getattr(tokens, "tokens", None)):  # another class with BatchEncoding's method
        return readable(list(tokens.tokens()))
    return tokens.tolist() if hasattr(tokens, "tolist") else tokens  # tensors, arrays


def _from_file(name: str, path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} must be a JSON file of a list, got {path}: {error}") from None


def texts(name: str, tokens, tokenizer=None) -> list[list[str]] | None:
    """A list of texts for all examples, or one for each example, of what `look` takes as tokens."""
    if tokens is None:
        return None
    found = _from_file(name, tokens) if isinstance(tokens, Path) else tokens
    found = _of_tokenizer(name, found, tokenizer)
    wrong = TypeError(f"{name} must be {KINDS}, got {type(tokens).__name__} {tokens!r:.80}")
    if isinstance(found, (str, bytes, Mapping)) or not isinstance(found, Iterable):
        raise wrong
    found = list(found)
    lists = found if found and all(isinstance(x, (list, tuple)) for x in found) else [found]
    return [_strings(name, list(x), tokenizer, wrong) for x in lists]


def _strings(name: str, items: list, tokenizer, wrong: TypeError) -> list[str]:
    """A list of texts of one of strings or ids."""
    if items and all(isinstance(i, int) and not isinstance(i, bool) for i in items):
        items = _of_ids(name, items, tokenizer)
    if not all(isinstance(t, str) for t in items):
        raise wrong
    # lone surrogates, which a command line of other bytes than UTF-8 has, cannot be drawn
    return [t.encode("utf-8", "replace").decode() for t in items]


def visible(token: str) -> str:
    """The token with a sign for each line break and tab, and for spaces where it is nothing else,
    as the page shows it."""
    shown = token.translate({ord("\r"): "\u240d", ord("\n"): "\u23ce", ord("\t"): "\u21e5"})
    blank = not token.strip(" \r\n\t")
    return (shown.replace(" ", "\u2423") if blank else shown) or "\u2205"
