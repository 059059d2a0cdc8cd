"""What single tokens stand for: their bytes, and how they are written in logprobs.

A character may be spread over tokens, so the text of one alone can say less than its bytes.

Owns: the pieces of a tokenizer.  Thread-safety: made by the tokenizer's thread, immutable after.
"""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "\u2581"
"""What SentencePiece writes for a space."""

_KEEPING_NORMALIZERS = frozenset({"Sequence", "NFC", "Prepend", "Replace"})
"""Steps before tokenization that take no characters away, up to ``_MAX_COMPOSED`` to one."""
_MAX_COMPOSED = 4


class Vocabulary:
    """The tokens of one tokenizer.

    Args:
        tokenizer: a transformers tokenizer; None: tokens are known by their ids alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        num_tokens = 0 if tokenizer is None else len(tokenizer)
        self._pieces: list[str | None] = []
        self._added: dict[int, str] = {}
        self._special: frozenset[int] = frozenset()
        self._decoders: frozenset[str] = frozenset()
        self._max_token_chars: int | None = None
        if tokenizer is None:
            return
        self._pieces = list(tokenizer.convert_ids_to_tokens(list(range(num_tokens))))
        self._added = {idx: str(one) for idx, one in tokenizer.added_tokens_decoder.items()}
        self._special = frozenset(tokenizer.all_special_ids)
        self._decoders = _decoder_kinds(tokenizer)
        if self._decoders & {"ByteLevel", "ByteFallback"} and _keeps_characters(tokenizer):
            self._max_token_chars = max(len(piece or "") for piece in self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def max_chars(self, num_tokens: int) -> int | None:
        """More characters than a text of so many tokens can have; None: there may be any number."""
        if self._max_token_chars is None:
            return None
        return num_tokens * self._max_token_chars * _MAX_COMPOSED

    def is_special(self, token_id: int) -> bool:
        """Whether ``skip_special_tokens`` leaves it out of a text."""
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that it adds to a text; none for an id without a token."""
        piece = self._pieces[token_id] if token_id < len(self._pieces) else None
        if piece is None:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        if "ByteLevel" in self._decoders and all(char in _BYTES for char in piece):
            return bytes(_BYTES[char] for char in piece)
        if "ByteFallback" in self._decoders and (found := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(found[1], 16)])
        if self._decoders & {"ByteFallback", "Metaspace", "Replace"}:
            piece = piece.replace(_WORD_START, " ")
        return piece.encode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        r"""How it is written: its text, ``bytes:\xe4\xb8`` for part of a character, as OpenAI has
        it, ``token_id:N`` for an id without a token."""
        token_bytes = self.token_bytes(token_id)
        if not token_bytes:
            return f"token_id:{token_id}"
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _decoder_kinds(tokenizer: Any) -> frozenset[str]:
    """Names of the steps that turn pieces into text; none for a tokenizer in pure Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return frozenset()
    decoder = json.loads(backend.decoder.__getstate__())
    return frozenset(step["type"] for step in (decoder, *decoder.get("decoders", ())))


def _keeps_characters(tokenizer: Any) -> bool:
    """Whether every character of a text is part of some token, and a token has few of them."""
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return False  # it takes any number of spaces beside it
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None:
        return True
    steps = json.loads(normalizer.__getstate__())
    steps = [steps, *steps.get("normalizers", ())]
    return all(
        step["type"] in _KEEPING_NORMALIZERS
        and (step["type"] != "Replace" or (step["pattern"] == {"String": " "} and step["content"]))
        for step in steps
    )


def _byte_chars() -> dict[str, int]:
    """GPT-2's bytes by the characters it writes them as: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): byte for byte in printable}
    return chars | {chr(256 + idx): byte for idx, byte in enumerate(others)}


_BYTES = _byte_chars()
