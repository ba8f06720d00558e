"""Text <-> token ids on tiktoken, from a tokenizer.json or from a small alphabet.

    tok = load.load_tokenizer("runs/models/smollm2")        # any folder with a byte-level tokenizer.json
    tok.decode(tok.encode("3 + 4 = 7"))                # '3 + 4 = 7'
    tok.chat([dict(role="user", content="2 + 2?")])    # ids, ready for the model to answer
    alphabet_tokenizer(list("0123456789+-*/=\\n"))      # a tiny model: one symbol, one token

Why tiktoken: one wheel, no network, fast. It wants a rank per token; a tokenizer.json lists pairs
to merge. The two agree when every rank is that of the merge which really makes the token
(`merge_ranks` says why), so the ids here are those of the `tokenizers` library; the tests compare.

Left out: WordPiece and SentencePiece's unigrams, normalizers other than NFC, pre-tokenizers other
than Split, Digits and ByteLevel, BPE dropout. SentencePiece's BPE (Llama 2, Gemma) goes through the
`tokenizers` library (sentencepiece.py), chat formats are in chat.py. Special tokens written out in
a text stay plain text, so data cannot forge the end of a turn; <think> and </think> are text that
is one token, whatever the file says, so that a grader sees them.

Where ids still differ from the `tokenizers` library, all of it far from ordinary text:
1. A byte without a token (SmolLM2 lacks six control characters and the unassigned planes 4 to 11)
   is dropped, as there; but there its two neighbours may then merge, here they do not.
2. Models with "ignore_merges" and a token that the merges leave in two parts: inside a longer word
   tiktoken puts the two together, the library does not. (Llama 3 lists every split: it has none.)
3. Characters newer than the Unicode tables of one of the two.
"""

import hashlib
import json
import re
import unicodedata
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import tiktoken

from infra.cli import UserError
from open_weights import chat

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits cut out first, then GPT2_SPLIT on what lies between (SmolLM2, StarCoder), as one pattern.
# The trap: a digit ends a segment, so white space before it is taken whole, where `\s+(?!\S)` would
# leave one space over.
GPT2_SPLIT_BETWEEN_DIGITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+")

MAX_VOCABULARY = 1 << 22  # a damaged id must not become a table of a billion rows


# ----------------------------------------------------------------------------------------------------
# Byte-level BPE: from merges to ranks

# GPT-2's alphabet, one printable character for each byte: character -> byte.
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {chr(b): b for b in _printable}
ALPHABET |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _printable)}


def _token_to_bytes(token):
    """'Ġthe' -> b' the'. A token outside the byte alphabet stands for its own text."""
    try:
        return bytes(map(ALPHABET.__getitem__, token))
    except KeyError:
        return token.encode("utf-8", "replace")


def _last_merge(token, pair_rank):
    """Rank of the merge that completes `token` when it is encoded alone; None if merges get
    stuck."""
    parts = list(token)
    last = None
    while len(parts) > 1:
        pairs = ((pair_rank[p], i) for i, p in enumerate(pairwise(parts)) if p in pair_rank)
        last, i = min(pairs, default=(None, 0))
        if last is None:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return last


def merge_ranks(vocab, merges, ignore_merges):
    """vocab {token: id}, merges [(left, right)] -> tiktoken's ranks {bytes: rank}, ids by rank.

    tiktoken merges any neighbours whose concatenation has a rank, BPE by pairs only the listed
    pairs; both take the smallest rank first. Suppose both did the same so far and meet neighbours
    l, r with l + r = t. No merge has crossed the border of t, so inside it the same merges were
    made as if t were encoded alone, and alone t passes through one state of two parts at most. So
    give t the rank of the merge that completes it when alone, and leave t out if none does: then
    both do the same at this step, too.
    """
    for pair in merges:
        if any(part not in vocab for part in (*pair, "".join(pair))):
            raise UserError(
                f"merge {pair} makes a token outside the vocabulary; copy the file again")
    pair_rank = {pair: k for k, pair in enumerate(merges)}
    ranks = {bytes([b]): b for b in range(256)}
    ids = [None] * (256 + len(merges))  # None: a byte without a token
    for char, b in ALPHABET.items():
        ids[b] = vocab.get(char)
    for token in {"".join(pair) for pair in merges}:
        last = _last_merge(token, pair_rank)
        if last is not None:
            ranks[_token_to_bytes(token)] = 256 + last
            ids[256 + last] = vocab[token]
    if ignore_merges:  # a word that is itself a token is taken whole, whatever the merges would do
        for token, i in vocab.items():
            if (raw := _token_to_bytes(token)) and raw not in ranks:
                ranks[raw] = len(ids)
                ids.append(i)
    return ranks, ids


# ----------------------------------------------------------------------------------------------------
# Pre-tokenizers: the JSON of tokenizer.json -> regular expressions


def _escape(text):
    """Like re.escape, in the spelling which Python, Rust and Oniguruma all read."""
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text)


def flat(part, key):
    """A normalizer's or pre-tokenizer's JSON -> its parts in order. None, and a Sequence (whose
    parts stand under key) of none, have none."""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [p for inner in part[key] for p in flat(inner, key)]


def split_stages(pre):
    """pre_tokenizer JSON -> patterns, each of which cuts the segments that the one before left."""
    parts = flat(pre, "pretokenizers")
    stages = []
    if not parts:
        raise UserError("pre_tokenizer none is not supported (ByteLevel is)")
    for k, part in enumerate(parts):
        kind = part["type"]
        last = k == len(parts) - 1
        isolates = part.get("behavior") == "Isolated" and not part.get("invert")
        if kind == "ByteLevel" and last and not part.get("add_prefix_space", True):
            stages += [GPT2_SPLIT] if part.get("use_regex", True) else []
        elif kind == "Digits" and not last:
            stages.append(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and not last and isolates:
            pattern = part["pattern"]
            stages.append(pattern["Regex"] if "Regex" in pattern else _escape(pattern["String"]))
        else:
            raise UserError(f"pre_tokenizer {json.dumps(part)[:120]} is not supported (isolated "
                            "Split and Digits are, then ByteLevel without prefix space)")
    return stages


def join_stages(stages):
    """-> (patterns to apply in Python, the last pattern for tiktoken)."""
    if len(stages) == 2 and stages[0] in (r"\p{N}", r"\p{N}+") and stages[1] == GPT2_SPLIT:
        return [], f"{stages[0]}|{GPT2_SPLIT_BETWEEN_DIGITS}"  # three times as fast as two passes
    # "Isolated" also keeps the text between two matches as a piece, which findall would lose.
    covering = [p if p == GPT2_SPLIT else p + "|(?:(?!" + p + r")[\s\S])+" for p in stages]
    return covering[:-1], covering[-1] if covering else r"[\s\S]+"


def default_template(value):
    """The field "chat_template": a text, or several by name, as a list or an object -> the text
    that is used where nobody names one, or None."""
    if isinstance(value, list):
        value = {t["name"]: t["template"] for t in value}
    value = value.get("default") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


class Tokenizer:
    """One tiktoken.Encoding and the ids that its ranks stand for. Build it with a function below.

    n_vocab: ids run from 0 to n_vocab - 1.  bos_id: int or None.  eos_ids: every id that ends a
    completion, first the one to train on.  special: {text: id}.  chat_format: a name from
    chat.FORMATS (where its opens_thought says how a chat prompt ends), or None.
    """

    reserved = chat.RESERVED

    def __init__(self, spec, config):
        """spec: the content of tokenizer.json. config: that of tokenizer_config.json."""
        self._spec = spec
        self._config = config
        model = spec["model"]
        added = spec.get("added_tokens") or []
        hidden = [t for t in added if t["special"] and t["content"] not in chat.THOUGHT_TAGS]
        self.special = {t["content"]: t["id"] for t in hidden}
        self._plain_added = {t["content"]: t["id"] for t in added if t not in hidden}
        marked = self.special | self._plain_added
        vocab = {t: i for t, i in model["vocab"].items() if t not in marked}
        ids = [*vocab.values(), *marked.values()]
        whole = all(type(i) is int and 0 <= i < MAX_VOCABULARY for i in ids)
        if not whole or len(set(ids)) != len(ids):
            raise UserError(
                "token ids are not distinct whole numbers from 0 on; copy the file again")
        self.n_vocab = max(ids, default=-1) + 1
        self._bytes = [b""] * self.n_vocab
        self._alphabet = self._added = None
        self._outer, self._nfc = [], False
        if model.get("dropout"):
            raise UserError(f"BPE dropout={model['dropout']!r} would draw other ids each time; set "
                            "it to null in tokenizer.json")
        kind = model.get("type", "BPE")
        if kind not in ("BPE", "WordLevel"):
            raise UserError(f"model type {kind!r} is not supported (BPE and WordLevel are)")
        if kind == "BPE":
            ranks, pattern = self._bpe(model, vocab, added)
        else:
            ranks, pattern = self._word_level(vocab)
        if pattern is not None:
            self._encoding = tiktoken.Encoding(
                kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._read_config()

    def _bpe(self, model, vocab, added):
        """-> (ranks, pattern) for tiktoken."""
        affixes = ("continuing_subword_prefix", "end_of_word_suffix")
        for name in (*affixes, "byte_fallback", "fuse_unk"):
            if model.get(name):
                raise UserError(f"BPE option {name}={model[name]!r} is not supported; use a "
                                "byte-level model")
        normalizers = flat(self._spec.get("normalizer"), "normalizers")
        if other := [n["type"] for n in normalizers if n["type"] != "NFC"]:
            raise UserError(f"normalizer {other[0]} is not supported (none and NFC are)")
        self._nfc = bool(normalizers)
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        if any(len(pair) != 2 for pair in merges):
            raise UserError("a merge is not a pair of tokens; copy the file again")
        ranks, self._ids = merge_ranks(vocab, merges, model.get("ignore_merges"))
        if (unknown := model.get("unk_token")) is not None:
            unknown_id = model["vocab"][unknown]
            self._ids[:256] = [unknown_id if i is None else i for i in self._ids[:256]]
        for token, i in vocab.items():
            self._bytes[i] = _token_to_bytes(token)
        for token, i in self._plain_added.items():
            self._bytes[i] = token.encode()
        # These are cut out of a text before anything else, the longest first.
        if cut := self._plain_added.keys() - self.reserved:
            flags = ("lstrip", "rstrip", "single_word")
            if any(t[k] for t in added if t["content"] in cut for k in flags):
                raise UserError("added tokens with lstrip, rstrip or single_word are not supported")
            longest = sorted(cut, key=len, reverse=True)
            self._added = re.compile(f"({'|'.join(map(re.escape, longest))})")
        self._stages = split_stages(self._spec.get("pre_tokenizer"))
        outer, last = join_stages(self._stages)
        if outer:
            import regex  # knows \p{N}; tiktoken brings it

            self._outer = [regex.compile(p) for p in outer]
        return ranks, last

    def _word_level(self, vocab):
        """-> (ranks, pattern). tiktoken looks a piece up whole first, so no single bytes."""
        if not vocab or "" in vocab or self._plain_added:
            raise UserError(
                "an alphabet needs one symbol at least, no empty one and no plain added tokens")
        pattern = "|".join(map(_escape, sorted(vocab, key=len, reverse=True)))
        if self._spec["pre_tokenizer"] != _isolate(pattern):
            raise UserError("a WordLevel model is read only as alphabet_tokenizer writes it")
        self._alphabet = re.compile(f"(?:{pattern})*")  # its match ends at the first unknown symbol
        self._stages = [pattern]
        self._ids = list(vocab.values())
        for token, i in vocab.items():
            self._bytes[i] = token.encode()
        return {token.encode(): rank for rank, token in enumerate(vocab)}, pattern

    def _read_config(self):
        config = self._config
        known = self._spec["model"]["vocab"] | self.special | self._plain_added

        def token_id(name):
            token = config.get(name)
            token = token["content"] if isinstance(token, dict) else token
            if token is not None and token not in known:
                raise UserError(
                    f"{name} {token!r} is not in the vocabulary; mend tokenizer_config.json")
            return known.get(token)

        self.bos_id = token_id("bos_token")
        stops = [token_id("eos_token"), *config.get("eos_token_ids", [])]
        stops = [i for i in stops if i is not None]
        if not all(type(i) is int and 0 <= i < self.n_vocab for i in stops):
            raise UserError(
                f"stop ids {stops} are not all in the vocabulary; mend the config files")
        self.eos_ids = tuple(dict.fromkeys(stops))
        self.chat_format = config.get("chat_format")
        if self.chat_format is None and (template := default_template(config.get("chat_template"))):
            self.chat_format = chat.detect(template)
        if self.chat_format is not None and self.chat_format not in chat.FORMATS:
            raise UserError(
                f"chat_format {self.chat_format!r} is unknown; use {', '.join(chat.FORMATS)}")
        # Does the model expect a BOS before every text? Files say so in either of two places.
        post = self._spec.get("post_processor") or {}
        templates = [p["single"] for p in post.get("processors", [post]) if p.get("single")]
        firsts = [known.get(t[0].get("SpecialToken", {}).get("id")) for t in templates]
        asked = config.get("add_bos_token", self.bos_id in firsts)
        self.add_bos = self.bos_id is not None and bool(asked)

    def encode(self, text):
        """str -> ids, without BOS. Special tokens written out in `text` stay plain text.

        UserError: a character outside the alphabet, or a run of about a million blanks (the
        pattern's stack). Time is linear in the text; with tiktoken < 0.13, quadratic in the longest
        word (10^5 letters: 3 s).
        """
        if self._alphabet and (end := self._alphabet.match(text).end()) < len(text):
            word = re.match(r"\S*", text[end:]).group()[:20]
            raise UserError(f"{text[end]!r} at character {end} (in {word!r}) is not in the "
                            f"alphabet of {len(self._ids)} symbols; change the text or take "
                            "another model")
        ids = []
        for k, part in enumerate(self._added.split(text) if self._added else [text]):
            if k % 2:  # re.split with one group alternates: text, added token, text, ...
                ids.append(self._plain_added[part])
            elif part:
                ids += self._encode_plain(unicodedata.normalize("NFC", part) if self._nfc else part)
        return ids

    def encode_behind(self, text):
        """encode() of a text that a marker stands before: the same, but with SentencePiece."""
        return self.encode(text)

    def _encode_plain(self, text):
        segments = [text]
        for cut in self._outer:
            segments = [m.group() for s in segments for m in cut.finditer(s)]
        try:
            ranks = [r for s in segments for r in self._encoding.encode_ordinary(s)]
        except BaseException as e:  # a panic in Rust is no Exception
            if type(e).__name__ != "PanicException":
                raise
            raise UserError(f"a text of {len(text)} characters overruns the pattern's stack; "
                            "shorten its longest run of white space") from None
        return [i for r in ranks if (i := self._ids[r]) is not None]

    def token_bytes(self, id):
        """b"" for special tokens and for the padding rows that some models carry past n_vocab."""
        if id < 0:  # -100 and the like: a mask went wrong; Python would read from the table's end
            raise UserError(
                f"token id {id} is negative; a padding or label mark got into the tokens")
        return self._bytes[id] if id < self.n_vocab else b""

    def decode(self, ids):
        """ids (list or 1-d tensor) -> str. Special tokens are left out, broken UTF-8 is U+FFFD."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def prompt(self, text):
        """str -> ids as the model saw texts in training: with BOS where it wants one (Llama)."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    def chat(self, messages, add_generation_prompt=True):
        """[{role, content}] -> ids: markers as ids, all that somebody wrote as plain text. See
        chat.py."""
        if self.chat_format is None:
            raise UserError("this model has no known chat format; if it speaks one of "
                            f"{', '.join(chat.FORMATS)}, write \"chat_format\": NAME into its "
                            "tokenizer_config.json")
        ids = self.special | self._plain_added
        name_of = {i: name for name, i in ids.items()}
        bos = name_of.get(self.bos_id, "")
        eos = name_of[self.eos_ids[0]] if self.eos_ids else ""
        parts = chat.pieces(self.chat_format, messages, add_generation_prompt, bos, eos)
        out = []
        for part in chat.join(parts):
            if isinstance(part, chat.Marker) and part not in ids:
                raise UserError(f"chat format {self.chat_format} needs the token {part!r}, which "
                                'this tokenizer has not; mend "chat_format" in '
                                "tokenizer_config.json")
            if isinstance(part, chat.Marker):
                out.append(ids[part])
            else:
                out += self.encode_behind(part) if out else self.encode(part)
        return out

    @cached_property
    def fingerprint(self):
        """16 hex digits over pattern, tokens and specials: models may exchange token ids iff these
        agree."""
        order = [i for i in self._ids if i is not None]
        tokens = [t.hex() for t in self._bytes]
        facts = [self._stages, self._nfc, order, self.special, self._plain_added, tokens]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder):
        """tokenizer.json and tokenizer_config.json, for transformers and load_tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
        config |= self._config
        config |= dict(eos_token_ids=list(self.eos_ids), chat_format=self.chat_format)
        if (self.chat_format or "").startswith("chatml"):
            config.setdefault("chat_template", chat.chatml_template(self.chat_format))
        for name, content in [("tokenizer.json", self._spec), ("tokenizer_config.json", config)]:
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


def added_token(content, id, special):
    """An entry of "added_tokens" in tokenizer.json."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(id=id, content=content, special=special, **flags)


def tokenizer_json(model, added, pre_tokenizer, decoder):
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                pre_tokenizer=pre_tokenizer, post_processor=None, decoder=decoder, model=model)


def _isolate(pattern):
    return dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)


def alphabet_tokenizer(symbols, eos="<eos>", bos=None):
    """Each symbol is one token ("12" may be one; the longest wins); ids in the given order, then
    eos, bos."""
    specials = [s for s in (eos, bos) if s is not None]
    names = [*symbols, *specials]
    if len(set(names)) != len(names):
        raise UserError(
            "alphabet symbols and special tokens must be distinct; remove the repeated ones")
    vocab = {s: i for i, s in enumerate(names)}
    pattern = "|".join(map(_escape, sorted(symbols, key=len, reverse=True)))
    model = dict(type="WordLevel", vocab=vocab, unk_token="<unk>")
    added = [added_token(s, vocab[s], True) for s in specials]
    spec = tokenizer_json(model, added, _isolate(pattern), decoder=dict(type="Fuse"))
    return Tokenizer(spec, dict(bos_token=bos, eos_token=eos))
