"""Tokenizers that are not byte-level (Llama 1 and 2, Gemma: SentencePiece's BPE), through the `tokenizers` library.

Optional: pip install tokenizers. tiktoken knows bytes and ranks; SentencePiece's merges run over characters, a space is
written as a low line (U+2581), and a character without a token falls back to tokens of its bytes, <0xE2>. So here the library
encodes, and this file says what the rest of the code asks for: bytes of a token, markers, stop ids.
"""

import hashlib
import json
import re

from infra.cli import UserError
from open_weights.tokenizer import Tokenizer

SPACE, BYTE = "\u2581", re.compile("<0x([0-9A-F]{2})>")


def piece_bytes(token):
    """'▁the' -> b' the', '<0x0A>' -> b'\\n'."""
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode("utf-8", "replace")


class LibraryTokenizer(Tokenizer):
    """As Tokenizer. Llama 2's encode puts a space before a text (and decode shows it), as the model was trained."""

    def _bpe(self, model, vocab, added):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise UserError("this model's tokenizer (SentencePiece's BPE) needs a library: pip install tokenizers") from None
        # An id for text only: markers of a chat, special to the file or not, are never made from a text.
        plain = [t | dict(special=True) if t["content"] in self.reserved else t for t in self._spec["added_tokens"]]
        self._library = Library.from_str(json.dumps(self._spec | dict(added_tokens=plain)))
        self._library.encode_special_tokens = True
        for token, i in (vocab | self._plain_added).items():
            self._bytes[i] = piece_bytes(token)
        return {}, None

    def encode(self, text):
        """str -> ids, without BOS. Special tokens written out in `text` stay plain text."""
        return self._library.encode(text, add_special_tokens=False).ids

    def _identity(self):
        return [self._spec.get(k) for k in ("normalizer", "pre_tokenizer", "model", "added_tokens")]

    @property
    def fingerprint(self):
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()[:16]
