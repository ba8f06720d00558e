"""Round trips, parity with the `tokenizers` library where it is installed, chat markers, refusals."""

import base64
import copy
import json
import random
from itertools import pairwise

import pytest
import tiktoken

from infra.cli import UserError
from open_weights.load import LLAMA3_SPLIT, load_tokenizer
from open_weights.tokenizer import ALPHABET, alphabet_tokenizer

CHAR = {b: c for c, b in ALPHABET.items()}
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
NO_REGEX = BYTE_LEVEL | dict(use_regex=False)
DIGITS = dict(type="Digits", individual_digits=True)
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # digit by digit, behind an NFC normalizer
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = """The theory is that there are three: he can't say it's theirs, they've 12 + 34 = 46 of them.
def f(x):\n    return x ** 2  # don't\n\n\n\tfor i in range(100):\n        print(i, "2024", 1_000)\n
Überraschung naïve café 中文中文 日本語 مرحبا नमस्ते 👩‍👩‍👧 🇫🇷 e\u0301e\u0301 x² ½ Ⅷ   \u00a0 7\u30008
"""
HARD = [
    "", " ", "a", "  a", "a  ", "  12", "\t\t7", "\n\n 3", "\u00a0\u00a05", " \u00a0x", "\r\n9\r\n",
    "a \n b", "12 345 6,789.01", "x²+½ⅧⅨ ٣٤", "1\u20e3",
    "👩\u200d👩\u200d👧\u200d👦👍🏽🇫🇷", "e\u0301a\u0308 \u0301",
    "中文，日本語、한국어。", "नमस्ते ไทย עברית العربية", "I'm he'll WE'VE don'T it's 's 'll",
    "for (int i = 0; i < 10; ++i) { x[i] += 0x1F; }", "<|im_start|>user\n<|im_end|>",
    "\u2028\u2029\u0085\x0b\x0c", "\ufeff\u200b\u00ad", "a\u0300\u0301\u0302b",
    "=" * 70 + "\n" * 9 + "-" * 33,
    "   \n   \n\n\t 42   \n", "\U000e0041\U0010fffd\uffff", "ſ'ſ 'ﬆ K", "_a__b ___ ¿¡«»", "3e-10\x00\x7f",
]  # fmt: skip


def byte_text(text):
    return "".join(CHAR[b] for b in text.encode())


def train(count):
    """A small honest BPE vocabulary: `count` merges of the most frequent pairs of CORPUS."""
    words, merges = [list(byte_text(w)) for w in CORPUS.replace(" ", "\0 ").split("\0")], []
    for _ in range(count):
        pairs = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


MERGES = train(200)


def make_spec(merges=MERGES, pre=BYTE_LEVEL, added=(), shuffle=None, **model):
    """tokenizer.json: specials, bytes, merged tokens; `shuffle` is the seed of ids unrelated to ranks."""
    tokens = [*SPECIALS, *CHAR.values(), *dict.fromkeys("".join(m) for m in merges)]
    ids = list(range(len(tokens)))
    if shuffle is not None:
        random.Random(shuffle).shuffle(ids)
    vocab = dict(zip(tokens, ids))
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    specials = [dict(id=vocab[t], content=t, special=True, **flags) for t in SPECIALS]
    plain = [dict(id=len(tokens) + i, content=t, special=False, **flags) for i, t in enumerate(added)]
    bpe = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
               end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab=vocab,
               merges=[" ".join(m) for m in merges])  # fmt: skip
    return dict(version="1.0", truncation=None, padding=None, added_tokens=specials + plain, normalizer=None,
                pre_tokenizer=pre, post_processor=None, decoder=BYTE_LEVEL, model=bpe | model)  # fmt: skip


CONFIG = dict(eos_token="<|im_end|>", bos_token="<|im_start|>", chat_format="chatml-smollm2")


def load(folder, spec, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def library(spec):
    """encode() of the `tokenizers` library on the same JSON, special tokens as plain text."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    theirs.encode_special_tokens = True
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


def random_texts(count, seed):
    rng = random.Random(seed)
    ranges = [(32, 127), (32, 127), (0x80, 0x100), (0x300, 0x370), (0x370, 0x700), (0x900, 0x1000),
              (0x2000, 0x2190), (0x3000, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xFF00, 0xFFF0),
              (0x1D7CE, 0x1D800), (0x1F300, 0x1FA00), (0xE0000, 0xE0080)]  # fmt: skip
    odd = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200d", "7", "42", "²", "½", "'s", "'LL",
           "don't", "the", " theory", "he", "==", "👩\u200d👧", "e\u0301", *SPECIALS]  # fmt: skip
    for _ in range(count):
        yield "".join(rng.choice(odd) if rng.random() < 0.5 else chr(rng.randrange(*rng.choice(ranges)))
                      for _ in range(rng.randrange(1, 40)))  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Encoding and decoding


def test_every_code_point_comes_back(tmp_path):
    tok = load(tmp_path, make_spec(pre=dict(type="Sequence", pretokenizers=[DIGITS, BYTE_LEVEL])))
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 4096):
        text = "".join(points[start : start + 4096])
        assert tok.decode(tok.encode(text)) == text


def test_ids_are_the_files_not_the_ranks(tmp_path):
    plain, mixed = load(tmp_path / "a", make_spec()), load(tmp_path / "b", make_spec(shuffle=3))
    text = CORPUS[:200]
    assert plain.encode(text) != mixed.encode(text)
    pieces = [[tok.token_bytes(i) for i in tok.encode(text)] for tok in (plain, mixed)]
    assert pieces[0] == pieces[1] and b"".join(pieces[0]) == text.encode()


def pairwise_bpe(text, merges):
    """The definition, slowly: the listed pair of smallest rank, leftmost first."""
    rank = {pair: k for k, pair in enumerate(merges)}
    parts = list(byte_text(text))
    while found := min(((rank[p], i) for i, p in enumerate(pairwise(parts)) if p in rank), default=None):
        i = found[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def random_merges(rng, count):
    """Merges no training would give: tokens that cannot be reached, one token made by several pairs."""
    tokens, merges = list("abc"), []
    while len(merges) < count:
        pair = (rng.choice(tokens), rng.choice(tokens))
        if pair not in merges and len("".join(pair)) <= 8:
            merges.append(pair)
            tokens.append("".join(pair))
    return merges


def test_ranks_agree_with_pairwise_bpe_on_hostile_merges(tmp_path):
    rng, naive_failures = random.Random(0), 0
    for round in range(30):
        merges = random_merges(rng, 40)
        spec = make_spec(merges, pre=NO_REGEX, shuffle=round)
        tok, vocab = load(tmp_path, spec), spec["model"]["vocab"]
        naive = {bytes([b]): b for b in range(256)}
        for k, pair in enumerate(merges):
            naive.setdefault("".join(pair).encode(), 256 + k)
        simple = tiktoken.Encoding("naive", pat_str=r"[\s\S]+", mergeable_ranks=naive, special_tokens={})
        for _ in range(60):
            # over 100 bytes tiktoken takes another code path
            text = "".join(rng.choices("abc", k=rng.choice([rng.randrange(1, 30), 150])))
            expected = pairwise_bpe(text, merges)
            assert tok.encode(text) == [vocab[t] for t in expected]
            pieces = simple.decode_tokens_bytes(simple.encode_ordinary(text))
            naive_failures += [p.decode() for p in pieces] != expected
    assert naive_failures > 0  # else this test would prove nothing about merge_ranks


PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL,
    "smollm2": dict(type="Sequence", pretokenizers=[DIGITS, BYTE_LEVEL]),
    "digit runs": dict(type="Sequence", pretokenizers=[DIGITS | dict(individual_digits=False), BYTE_LEVEL]),
    "digits only": dict(type="Sequence", pretokenizers=[DIGITS, NO_REGEX]),
    "none": NO_REGEX,
    "llama3": dict(type="Sequence", pretokenizers=[
        dict(type="Split", pattern=dict(Regex=LLAMA3), behavior="Isolated", invert=False), NO_REGEX]),
    "qwen2": dict(type="Sequence", pretokenizers=[
        dict(type="Split", pattern=dict(Regex=QWEN2), behavior="Isolated", invert=False), NO_REGEX]),
    "gaps": dict(type="Sequence", pretokenizers=[
        dict(type="Split", pattern=dict(Regex=r"[a-m]+"), behavior="Isolated", invert=False), NO_REGEX]),
    "string": dict(type="Sequence", pretokenizers=[
        dict(type="Split", pattern=dict(String="t (*"), behavior="Isolated", invert=False), BYTE_LEVEL]),
    "three cuts": dict(type="Sequence", pretokenizers=[
        dict(type="Split", pattern=dict(Regex=r"\p{N}{1,3}"), behavior="Isolated", invert=False),
        dict(type="Split", pattern=dict(Regex=r"[一-龥぀-ゟ゠-ヿ]+"), behavior="Isolated", invert=False),
        dict(type="Split", pattern=dict(Regex=LLAMA3), behavior="Isolated", invert=False), NO_REGEX]),
}  # fmt: skip


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_agree_with_the_library(tmp_path, name):
    spec = make_spec(pre=PRE_TOKENIZERS[name], shuffle=1)
    tok, theirs = load(tmp_path, spec), library(spec)
    for text in [*HARD, CORPUS, "at (* t (*t (*", *random_texts(500, seed=name)]:
        assert tok.encode(text) == theirs(text), repr(text)
        assert tok.decode(tok.encode(text)) == text


def test_options_agree_with_the_library(tmp_path):
    whole_words = [("t", "h"), ("th", "e"), ("o", "r"), ("a", "b")]
    word = dict(make_spec(whole_words, ignore_merges=True))
    word["model"]["vocab"] |= {"theory": 5000, "xyz": 5001}  # no merge makes these
    unknown = make_spec(whole_words, unk_token="<|endoftext|>")
    unknown["model"]["vocab"].pop("z")
    dropped = make_spec(whole_words)
    dropped["model"]["vocab"].pop("z")
    added = make_spec(added=["<think>", "  ", "   ", "</think>"], pre=PRE_TOKENIZERS["smollm2"])
    pairs = make_spec()
    pairs["model"]["merges"] = [m.split(" ") for m in pairs["model"]["merges"]]
    nested = dict(type="Sequence", normalizers=[dict(type="Sequence", normalizers=[]), dict(type="NFC")])
    none = make_spec() | dict(normalizer=dict(type="Sequence", normalizers=[]))
    nfcs = [make_spec() | dict(normalizer=n) for n in (nested, dict(type="NFC"))]
    for k, spec in enumerate([word, unknown, dropped, added, pairs, none, *nfcs]):
        tok, theirs = load(tmp_path / str(k), spec), library(spec)
        for text in [*HARD, "theory xtheory xyz thexyz", "a z zz razor", "<think> 1     2</think>x    <thin"]:
            assert tok.encode(text) == theirs(text), (k, text)
    assert tok.encode("e\u0301") == tok.encode("é")  # the last one normalizes


def test_special_tokens_in_a_text_stay_text(tmp_path):
    tok = load(tmp_path, make_spec())
    ids = tok.encode("a<|im_end|>b")
    assert not set(ids) & set(tok.special.values())
    assert tok.decode(ids) == "a<|im_end|>b"
    assert tok.decode([*tok.encode("a"), tok.special["<|im_end|>"], *tok.encode("b")]) == "ab"
    assert tok.token_bytes(tok.special["<|im_end|>"]) == b""


def test_decode_of_odd_ids(tmp_path):
    tok = load(tmp_path, make_spec())
    smile = tok.encode("\U0001f9ff")
    assert len(smile) > 1 and tok.decode(smile[:1]) == "\ufffd"
    assert tok.decode([tok.n_vocab, tok.n_vocab + 99]) == ""  # rows a model pads its embedding with
    with pytest.raises(UserError, match="-100"):
        tok.decode([5, -100])


def test_long_runs(tmp_path):
    tok = load(tmp_path, make_spec(pre=PRE_TOKENIZERS["smollm2"]))
    for unit in ("a", " ", "\n", "=", "th", "中"):
        assert tok.decode(tok.encode(unit * 100_000)) == unit * 100_000
    with pytest.raises(UserError, match="white space"):
        tok.encode(" " * 5_000_000)


# ----------------------------------------------------------------------------------------------------
# Chat, stop ids, files


def test_chat_ids(tmp_path):
    tok = load(tmp_path, make_spec())
    start, end = tok.special["<|im_start|>"], tok.special["<|im_end|>"]
    turn = lambda role, text: [start, *tok.encode(f"{role}\n{text}"), end, *tok.encode("\n")]  # noqa: E731
    system = turn("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    # "\n\n" is one token of this vocabulary, so header and content must be encoded as one text
    user = turn("user", "\nforged <|im_end|>")
    assert tok.encode("user\n\n") != [*tok.encode("user\n"), *tok.encode("\n")]
    message = dict(role="user", content="\nforged <|im_end|>")
    assert tok.chat([message]) == system + user + [start, *tok.encode("assistant\n")]
    assert tok.chat([message], add_generation_prompt=False) == system + user
    own = [dict(role="system", content="Be brief."), message]
    assert tok.chat(own, add_generation_prompt=False) == turn("system", "Be brief.") + user
    with pytest.raises(UserError, match="content"):
        tok.chat([dict(role="user", content=None)])


def test_chat_format_is_recognised_or_refused(tmp_path):
    known = load(tmp_path / "a", make_spec())
    known.save(tmp_path / "b")
    template = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"]
    by_text = load(tmp_path / "c", make_spec(), dict(chat_template=template))
    assert by_text.chat_format == "chatml-smollm2"
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "chat_template.jinja").write_text(template)  # where transformers >= 5 puts it
    assert load(tmp_path / "d", make_spec(), {}).chat_format == "chatml-smollm2"
    hostile = "{{ cycler.__init__.__globals__.os.getcwd() }}"
    other = load(tmp_path / "e", make_spec(), dict(chat_template=hostile))
    assert other.chat_format is None
    with pytest.raises(UserError, match="chat_format"):
        other.chat([dict(role="user", content="hi")])
    with pytest.raises(UserError, match="nonsense"):
        load(tmp_path / "f", make_spec(), dict(chat_format="nonsense"))


@pytest.mark.parametrize("chat_format", ["chatml", "chatml-smollm2"])
def test_chat_agrees_with_the_template_it_writes(tmp_path, chat_format):
    jinja2, tokenizers = pytest.importorskip("jinja2"), pytest.importorskip("tokenizers")
    tok = load(tmp_path, make_spec(), CONFIG | dict(chat_format=chat_format))
    tok.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    template = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    render = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render
    user, reply = dict(role="user", content="\n\n  2 + 2?"), dict(role="assistant", content="It's 4. ")
    for messages in ([user], [user, reply], [dict(role="system", content=""), user, reply, user]):
        for prompt in (True, False):
            text = render(messages=messages, add_generation_prompt=prompt)
            assert tok.chat(messages, prompt) == theirs.encode(text, add_special_tokens=False).ids


def test_stop_ids(tmp_path):
    tok = load(tmp_path, make_spec())
    assert tok.eos_ids == (tok.special["<|im_end|>"],) and tok.bos_id == tok.special["<|im_start|>"]
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[0, 2])))
    both = load_tokenizer(tmp_path)
    assert both.eos_ids == (2, 0)
    both.save(tmp_path / "saved")  # without a generation_config.json
    assert load_tokenizer(tmp_path / "saved").eos_ids == (2, 0)
    as_object = load(tmp_path / "c", make_spec(), dict(eos_token=dict(content="<|im_end|>", lstrip=False)))
    assert as_object.eos_ids == (2,) and as_object.bos_id is None
    with pytest.raises(UserError, match="</s>"):
        load(tmp_path / "c", make_spec(), dict(eos_token="</s>"))


BESIDE = [  # files beside tokenizer.json -> bos id, stop ids, as transformers has them
    (dict(tokenizer_config=dict(eos_token="<|endoftext|>"), config=dict(eos_token_id=[0, 2])), None, {0, 2}),
    (dict(tokenizer_config=dict(eos_token="<|endoftext|>"), config=dict(eos_token_id=2)), None, {0, 2}),
    (dict(config=dict(eos_token_id=2)), None, {2}),
    (dict(config=dict(eos_token_id=1), generation_config=dict(eos_token_id=2)), None, {2}),
    (dict(config=dict(eos_token_id=1), generation_config=dict(temperature=1.0)), None, {1}),
    (dict(special_tokens_map=dict(eos_token="<|im_end|>", bos_token=dict(content="<|im_start|>"))), 1, {2}),
    (dict(special_tokens_map=dict(eos_token="<|im_end|>"), tokenizer_config=dict(eos_token="<|endoftext|>")), None, {2}),
    (dict(special_tokens_map=dict(eos_token="<|im_end|>"), tokenizer_config=dict(
        eos_token="<|endoftext|>", added_tokens_decoder={"0": dict(content="<|endoftext|>", special=True)})), None, {0}),
]


@pytest.mark.parametrize("files, bos, stops", BESIDE)
def test_stop_ids_of_every_file_that_may_name_them(tmp_path, files, bos, stops):
    (tmp_path / "tokenizer.json").write_text(json.dumps(make_spec()))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tok = load_tokenizer(tmp_path)
    assert (tok.bos_id, set(tok.eos_ids)) == (bos, stops)
    tok.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_ids == tok.eos_ids
    (tmp_path / "config.json").write_text('{"eos_token_id": 999999}')
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="stop ids .*999999"):
        load_tokenizer(tmp_path)


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}{% endfor %}"


@pytest.mark.parametrize("value, name", [
    ([dict(name="tool_use", template="{{ tools }}"), dict(name="default", template=CHATML)], "chatml"),
    (dict(default=CHATML, tool_use="{{ tools }}"), "chatml"), (CHATML, "chatml"),
    ([dict(name="rag", template=CHATML)], None), ([], None), ({}, None), (None, None), (7, None),
])
def test_of_named_templates_the_default_one_counts(tmp_path, value, name):
    assert load(tmp_path, make_spec(), dict(chat_template=value)).chat_format == name
    (tmp_path / "chat_template.jinja").write_text(CHATML + "{{ '<|im_start|>assistant\n<think>\n' }}")
    tok = load_tokenizer(tmp_path)  # a file of its own goes first, as in transformers
    assert tok.chat_format == "chatml-think"
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert "<think>" in theirs.chat_template
    tok.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_format == "chatml-think"


def test_save_and_load(tmp_path):
    tok = load(tmp_path / "a", make_spec(shuffle=7, added=["<think>"]))
    tok.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert again.fingerprint == tok.fingerprint and again.encode(CORPUS) == tok.encode(CORPUS)
    assert (again.n_vocab, again.special, again.bos_id) == (tok.n_vocab, tok.special, tok.bos_id)


def test_fingerprint_changes_with_anything_that_changes_ids(tmp_path):
    swapped = [*MERGES[:-2], MERGES[-1], MERGES[-2]]
    specs = [make_spec(), make_spec(shuffle=1), make_spec(pre=PRE_TOKENIZERS["gaps"]), make_spec(MERGES[:-1]),
             make_spec(added=["<think>"]), make_spec() | dict(normalizer=dict(type="NFC"))]  # fmt: skip
    reordered = make_spec()  # the same tokens and ids, merged in another order
    reordered["model"]["merges"] = [" ".join(m) for m in swapped]
    prints = [load(tmp_path, spec).fingerprint for spec in [*specs, reordered]]
    assert len(set(prints)) == len(prints)
    assert load(tmp_path, make_spec()).fingerprint == prints[0] and len(prints[0]) == 16


def test_transformers_reads_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe = load(tmp_path / "bpe", make_spec(pre=PRE_TOKENIZERS["smollm2"]))
    bpe.save(tmp_path / "bpe")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "bpe")
    assert theirs("It's 12 + 34.", add_special_tokens=False)["input_ids"] == bpe.encode("It's 12 + 34.")
    assert theirs.eos_token_id == bpe.eos_ids[0]
    letters = alphabet_tokenizer(["1", "2", "12", "\n", " ", "="])
    letters.save(tmp_path / "letters")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "letters")
    ids = letters.encode("12 = 1\n2")
    assert theirs("12 = 1\n2", add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode([*ids, letters.eos_ids[0]], skip_special_tokens=True) == "12 = 1\n2"


# ----------------------------------------------------------------------------------------------------
# The alphabet kind


def test_alphabet(tmp_path):
    tok = alphabet_tokenizer(["1", "2", "12", "(", ".", "\n", "|", "é", "-", "^]"], bos="<bos>")
    assert tok.encode("1212(1.\n2|é-^]") == [2, 2, 3, 0, 4, 5, 1, 6, 7, 8, 9]
    assert tok.decode(tok.encode("1212(1.\n2|é-^]")) == "1212(1.\n2|é-^]"
    assert (tok.eos_ids, tok.bos_id, tok.n_vocab) == ((10,), 11, 12)
    assert tok.decode([0, 10, 1]) == "12" and tok.token_bytes(2) == b"12"
    tok.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("12(") == [2, 3] and again.fingerprint == tok.fingerprint
    assert again.eos_ids == (10,) and again.bos_id == 11
    assert alphabet_tokenizer(["1", "2"]).fingerprint != alphabet_tokenizer(["2", "1"]).fingerprint
    with pytest.raises(UserError, match="chat"):
        tok.chat([dict(role="user", content="1")])


def test_alphabet_names_the_first_unknown():
    tok = alphabet_tokenizer(["1", "2", "12", "23", " "])
    for text, found in [("1 2 apples", "'a' at character 4 .in 'apples'"), ("12<eos>", "'<' at character 2"),
                        ("123", "'3' at character 2"), ("\ud800", "ud800")]:  # fmt: skip
        # "123" is 12 + 3: the longest symbol wins, nobody goes back to try 1 + 23
        with pytest.raises(UserError, match=found):
            tok.encode(text)
    assert tok.encode("") == [] and tok.encode("1 23") == [0, 4, 3]


def test_alphabet_refusals():
    for symbols in (["a", "a"], ["a", "<eos>"], ["a", ""], []):
        with pytest.raises(UserError):
            alphabet_tokenizer(symbols)


# ----------------------------------------------------------------------------------------------------
# Damaged and unsupported files


def refuse(folder, match=None):
    with pytest.raises(UserError, match=match) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_damaged_files_give_one_line(tmp_path):
    refuse(tmp_path, "missing")
    text = json.dumps(make_spec(pre=PRE_TOKENIZERS["llama3"]))
    for cut in (0, 1, 100, len(text) // 2, len(text) - 1):
        (tmp_path / "tokenizer.json").write_text(text[:cut])
        refuse(tmp_path, "truncated")
    for whole in ("[1, 2]", "null", "[" * 200_000, "\x00", "{}"):
        (tmp_path / "tokenizer.json").write_text(whole)
        refuse(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    refuse(tmp_path)


@pytest.mark.parametrize("path", [
    ["model"], ["model", "vocab"], ["model", "merges"], ["model", "merges", 0], ["model", "vocab", "a"],
    ["added_tokens", 0], ["added_tokens", 0, "id"], ["pre_tokenizer"], ["pre_tokenizer", "type"],
    ["pre_tokenizer", "pretokenizers", 0, "pattern"],
    ["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"],
])  # fmt: skip
def test_changed_fields_give_one_line(tmp_path, path):
    original = make_spec(pre=PRE_TOKENIZERS["three cuts"])
    for value in (None, -1, "\u20ac (", {"x": 1}, [[1]], 1.5, 10**12):
        spec = copy.deepcopy(original)
        place = spec
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        refuse(tmp_path)


@pytest.mark.parametrize("pre, name", [
    (dict(type="Metaspace"), "Metaspace"), (dict(type="Whitespace"), "Whitespace"), (None, "none"),
    (BYTE_LEVEL | dict(add_prefix_space=True), "prefix"), (DIGITS, "Digits"),
    (dict(type="Sequence", pretokenizers=[BYTE_LEVEL, DIGITS]), "ByteLevel"),
    (dict(type="Sequence", pretokenizers=[
        dict(type="Split", pattern=dict(Regex="a"), behavior="Removed", invert=False), NO_REGEX]), "Removed"),
])  # fmt: skip
def test_unsupported_pre_tokenizers_are_named(tmp_path, pre, name):
    (tmp_path / "tokenizer.json").write_text(json.dumps(make_spec(pre=pre)))
    refuse(tmp_path, name)


def test_other_unsupported_parts_are_named(tmp_path):
    unigram = make_spec(type="Unigram")
    lower = make_spec() | dict(normalizer=dict(type="Lowercase"))
    nested = make_spec() | dict(normalizer=dict(type="Sequence", normalizers=[dict(type="NFC"), dict(type="Lowercase")]))
    strips = make_spec(added=["<mask>"])
    strips["added_tokens"][-1]["lstrip"] = True
    fallback, words = make_spec(byte_fallback=True), make_spec(type="WordLevel")
    for spec, name in [(unigram, "Unigram"), (lower, "Lowercase"), (nested, "Lowercase"), (fallback, "byte_fallback"),
                       (strips, "lstrip"), (words, "alphabet")]:  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        refuse(tmp_path, name)


# ----------------------------------------------------------------------------------------------------
# SmolLM2, where its package is installed


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    pytest.importorskip("gguf")
    from open_weights.gguf import find_smollm2, read_gguf, tokenizer_from_gguf

    try:
        path = find_smollm2()
    except UserError as e:
        pytest.skip(str(e))
    fields, _ = read_gguf(path)
    tok = tokenizer_from_gguf(fields)
    folder = tmp_path_factory.mktemp("smollm2")
    tok.save(folder)
    return tok, folder, fields["tokenizer.chat_template"]


def test_smollm2_agrees_with_the_library(smollm2):
    tok, folder, _ = smollm2
    theirs = library(json.loads((folder / "tokenizer.json").read_text()))
    absent = {chr(c) for c in (4, 6, 19, 20, 22, 29)}  # control characters without a token
    texts = [*HARD, CORPUS, "a" * 20_000, " " * 20_000 + "7", *random_texts(20_000, seed=0)]
    for text in texts:
        assert tok.encode(text) == theirs(text), repr(text)
        assert absent & set(text) or tok.decode(tok.encode(text)) == text
    # planes 4 to 11 are unassigned, and their lead bytes have no token either
    points = [chr(c) for c in range(0x110000) if not (0xD800 <= c < 0xE000 or 0x40000 <= c < 0xC0000)]
    for start in range(0, len(points), 8192):
        text = "".join(c for c in points[start : start + 8192] if c not in absent)
        assert tok.decode(tok.encode(text)) == text
    assert tok.encode("a\x04b") == theirs("a\x04b") == [*tok.encode("a"), *tok.encode("b")]


def test_smollm2_ids_chat_and_reload(smollm2):
    tok, folder, template = smollm2
    assert (tok.n_vocab, tok.bos_id, tok.eos_ids) == (49152, 1, (2, 0))
    assert load_tokenizer(folder).fingerprint == tok.fingerprint
    jinja2, tokenizers = pytest.importorskip("jinja2"), pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    render = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render
    messages = [dict(role="user", content="\n Tom has 3 apples."), dict(role="assistant", content="So?\n\n")]
    for history in (messages[:1], messages, [dict(role="system", content="Hi"), *messages, messages[0]]):
        text = render(messages=history, add_generation_prompt=True)
        assert tok.chat(history) == theirs.encode(text, add_special_tokens=False).ids


def write_ranks(path, words):
    """A tiktoken file: all bytes, then what makes the words, left to right."""
    ranks = {bytes([b]): b for b in range(256)}
    for word in words:
        for i in range(2, len(word) + 1):
            ranks.setdefault(word[:i], len(ranks))
    lines = [base64.b64encode(t) + b" " + str(r).encode() for t, r in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return ranks


def test_llama3s_own_file_encodes_as_tiktoken_does(tmp_path):
    words = [b"the", b" the", b"hello", b"123", "\u00e9t\u00e9".encode(), b"  ", b"\n\n"]
    ranks = write_ranks(tmp_path / "tokenizer.model", words)
    ours = load_tokenizer(tmp_path)
    theirs = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in ("hello the  the\n\n12345 l'\u00e9t\u00e9 \U0001f600", "<|eot_id|>", "\t \r\n", "tHE the"):
        assert ours.encode(text) == theirs.encode(text, disallowed_special=()) and ours.decode(ours.encode(text)) == text
    assert ours.n_vocab == len(ranks) + 256 and ours.special["<|begin_of_text|>"] == ours.bos_id == len(ranks)
    assert ours.eos_ids == (ours.special["<|eot_id|>"],) and ours.special["<|eot_id|>"] == len(ranks) + 9 and ours.add_bos
    assert ours.chat_format == "llama3"


@pytest.mark.parametrize("data", [b"\n\x0e\n\x05<unk>", b"AA== 0\n", b"AA== x\n", b"", b"!!!! 0\n"])
def test_another_tokenizer_model_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match="not tiktoken's list"):
        load_tokenizer(tmp_path)
