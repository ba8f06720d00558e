"""Tokenizers that are not byte-level: SentencePiece's BPE (Llama 1 and 2, Gemma).

Optional: pip install tokenizers. tiktoken knows bytes and ranks; SentencePiece's merges run over
characters, a space is written as a low line (U+2581), and a character without a token falls back to
tokens of its bytes, <0xE2>. So here the `tokenizers` library encodes, and this file says what the
rest of the code asks for: bytes of a token, markers, stop ids.
"""

import hashlib
import json
import re

from infra.cli import UserError
from open_weights import chat
from open_weights.tokenizer import Tokenizer

SPACE = "\u2581"
BYTE = re.compile("<0x([0-9A-F]{2})>")


def piece_bytes(token):
    """'▁the' -> b' the', '<0x0A>' -> b'\\n'."""
    byte = BYTE.fullmatch(token)
    if byte:
        return bytes([int(byte[1], 16)])
    return token.replace(SPACE, " ").encode("utf-8", "replace")


def mend(text):
    """Half of a surrogate pair becomes U+FFFD, as in tiktoken; the library takes no such text."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _no_space_first(part):
    first = part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first"
    return part | dict(prepend_scheme="never") if first else part


class LibraryTokenizer(Tokenizer):
    """As Tokenizer. Llama 2's encode puts a space before a text (and decode shows it), as the model
    was trained."""

    def _bpe(self, model, vocab, added):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise UserError("this model's tokenizer (SentencePiece's BPE) needs a library: pip "
                            "install tokenizers") from None
        # Markers of a chat, special to the file or not, are never made from a text; the tags of a
        # thought always are. Truncation and padding are settings of whoever trained the model.
        special = dict.fromkeys(self.reserved, True) | dict.fromkeys(chat.THOUGHT_TAGS, False)
        added = [t | dict(special=special.get(t["content"], t["special"])) for t in added]
        spec = self._spec | dict(added_tokens=added, truncation=None, padding=None)
        self._library = Library.from_str(json.dumps(spec))
        self._library.encode_special_tokens = True
        self._behind = self._library
        pre = json.loads(json.dumps(spec.get("pre_tokenizer")), object_hook=_no_space_first)
        if pre != spec.get("pre_tokenizer"):
            self._behind = Library.from_str(json.dumps(spec | dict(pre_tokenizer=pre)))
            self._behind.encode_special_tokens = True
        for token, i in (vocab | self._plain_added).items():
            self._bytes[i] = piece_bytes(token)
        return {}, None

    def encode(self, text):
        """str -> ids, without BOS. Special tokens written out in `text` stay plain text."""
        return self._library.encode(mend(text), add_special_tokens=False).ids

    def encode_behind(self, text):
        """encode() of a text that a marker stands before. Metaspace's prepend_scheme "first" puts a
        space before the first text of all only; "always", and Llama 2's normalizer, before each."""
        return self._behind.encode(mend(text), add_special_tokens=False).ids

    def _identity(self):
        return [self._spec.get(k) for k in ("normalizer", "pre_tokenizer", "model", "added_tokens")]

    @property
    def fingerprint(self):
        facts = json.dumps(self._identity(), sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]
