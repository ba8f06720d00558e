"""A tokenizer from a folder of open weights: tokenizer.json or Llama 3's tokenizer.model, and what stands beside it.

    tok = load_tokenizer("runs/models/smollm2")        # Tokenizer, or LibraryTokenizer for SentencePiece's kind

The files beside it (tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json,
chat_template.jinja) say which tokens begin, end and stop a text, and how a chat is written.
"""

import base64
import json
from pathlib import Path

from infra.cli import UserError
from open_weights.sentencepiece import LibraryTokenizer
from open_weights.tokenizer import ALPHABET, Tokenizer, _isolate, added_token, tokenizer_json


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; give a folder with the tokenizer files of a model") from None
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{path} is truncated or not JSON ({e}); copy the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; copy the file again")
    return content


def _read_optional(path):
    return _read_json(path) if path.exists() else {}


def read_settings(folder):
    """What stands beside tokenizer.json -> the content of tokenizer_config.json and, as
    "eos_token_ids", every stop id. As in transformers, chat_template.jinja goes before a template
    in tokenizer_config.json, and config.json names stop ids where generation_config.json does not.
    """
    config = _read_optional(folder / "tokenizer_config.json")
    names = _read_optional(folder / "special_tokens_map.json")
    older = "added_tokens_decoder" not in config  # then special_tokens_map.json goes first
    for name in ("bos_token", "eos_token"):
        if name in names and (older or not config.get(name)):
            config[name] = names[name]
    if (folder / "chat_template.jinja").exists():
        path = folder / "chat_template.jinja"
        config["chat_template"] = path.read_text(encoding="utf-8", errors="replace")
    stops = _read_optional(folder / "generation_config.json").get("eos_token_id")
    if stops is None:
        stops = _read_optional(folder / "config.json").get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    known = config.get("eos_token_ids") or []
    return config | dict(eos_token_ids=known + [i for i in stops if i is not None])


def load_tokenizer(folder):
    """Tokenizer from tokenizer.json, or from Llama 3's tokenizer.model (tiktoken's format), and
    what stands beside it (read_settings)."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    config = {}
    if not path.exists() and (folder / "tokenizer.model").exists():
        path = folder / "tokenizer.model"
        spec = llama3_spec(path)
        config = dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", add_bos_token=True,
                      chat_format="llama3")
    else:
        spec = _read_json(path)
    try:
        config |= read_settings(folder)
        pre = json.dumps(spec.get("pre_tokenizer"))
        sentencepiece = spec["model"].get("byte_fallback") and "ByteLevel" not in pre
        return (LibraryTokenizer if sentencepiece else Tokenizer)(spec, config)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except Exception as e:  # a damaged file fails in a hundred ways
        raise UserError(
            f"{path} is damaged ({type(e).__name__}: {e}); copy the folder again") from None


LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text", "reserved_special_token_0",
                  "reserved_special_token_1", "finetune_right_pad_id", "step_id",
                  "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]


def llama3_spec(path):
    """Meta's tokenizer.model of Llama 3, a line "base64 rank" a token -> the content of a
    tokenizer.json. tiktoken merges any neighbours that make a token, the lowest rank first, so
    every split of a token into two tokens is a merge."""
    ranks = {}
    try:
        for line in Path(path).read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError
        if any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError
    except ValueError:
        raise UserError(f"{path} is not tiktoken's list of ranks (SentencePiece's tokenizer.model "
                        "is not read: take the folder with a tokenizer.json)") from None
    spell = {b: c for c, b in ALPHABET.items()}

    def text(token):
        return "".join(map(spell.__getitem__, token))

    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[text(a), text(b)] for a, b in pairs]
    more = range(2, 2 + 256 - len(LLAMA3_SPECIAL))
    names = LLAMA3_SPECIAL + [f"reserved_special_token_{i}" for i in more]
    added = [added_token(f"<|{name}|>", len(ranks) + i, True) for i, name in enumerate(names)]
    bytelevel = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    vocab = {text(token): rank for token, rank in ranks.items()}
    model = dict(type="BPE", vocab=vocab, merges=merges, ignore_merges=True)
    pre = dict(type="Sequence", pretokenizers=[_isolate(LLAMA3_SPLIT), bytelevel])
    return tokenizer_json(model, added, pre, bytelevel)
