"""Chat formats by name: how a conversation becomes markers and text. No downloaded template is run.

A chat template is a program in Jinja. Here it is only read: its markers say which of the formats
below it writes, and what it writes where an answer is asked for says whether that prompt opens a
thought (detect). The format then writes the conversation. What somebody typed stays plain text, so
that no message can forge a turn.

    chatml          Qwen3 and many others; -smollm2, -qwen2, -qwen2.5, -qwen2.5-math put in a system
                    prompt of their own
    llama2          Llama 2 chat
    llama3          Llama 3 and later
    gemma           Gemma 1 and 2
    deepseek        DeepSeek-V3, DeepSeek-R1-0528
    deepseek-r1     DeepSeek-R1's distillations: the prompt ends in <think>
    NAME-think      another format whose prompt ends in <think> (QwQ, Qwen3-Thinking: chatml-think)

Left out: tools; the date that Llama 3.1 puts into its system prompt; taking the thoughts out of
earlier answers (Qwen3, DeepSeek). Sources: the templates in the models' tokenizer_config.json,
against whose text the tests compare.
"""

import re
from dataclasses import dataclass, replace

from infra.cli import UserError

THOUGHT = "<think>\n"  # how a prompt opens a thought
THOUGHT_TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class ChatFormat:
    """family: whose markers, and which function writes them. system: the system prompt put in when
    the conversation brings none (None: none is). opens_thought: the prompt for an answer ends in
    THOUGHT, so a completion begins inside a thought and answers only behind </think>."""

    family: str
    system: str | None = None
    opens_thought: bool = False


SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN25_MATH = "Please reason step by step, and put your final answer within \\boxed{}."
FORMATS = {
    "chatml": ChatFormat("chatml"),
    "chatml-smollm2": ChatFormat("chatml", SMOLLM2),
    "chatml-qwen2.5": ChatFormat("chatml", QWEN25),
    "chatml-qwen2.5-math": ChatFormat("chatml", QWEN25_MATH),
    # behind the others: this text is part of theirs
    "chatml-qwen2": ChatFormat("chatml", "You are a helpful assistant."),
    "llama2": ChatFormat("llama2"),
    "llama3": ChatFormat("llama3"),
    "gemma": ChatFormat("gemma"),
    "deepseek": ChatFormat("deepseek"),
}
THINKING = {n: "deepseek-r1" if n == "deepseek" else f"{n}-think" for n in FORMATS}
FORMATS |= {THINKING[n]: replace(f, opens_thought=True) for n, f in FORMATS.items()}

SIGNS = {  # what gives a template away
    "llama3": "<|start_header_id|>",
    "gemma": "<start_of_turn>",
    "deepseek": "<｜User｜>",
    "llama2": "<<SYS>>",
    "chatml": "<|im_start|>",
}
MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "deepseek": ("<｜User｜>", "<｜Assistant｜>"),
    "llama2": (),
}
RESERVED = {m for markers in MARKERS.values() for m in markers}  # never the encoding of a text


class Marker(str):
    """A token that text cannot be: written by its id."""


# ----------------------------------------------------------------------------------------------------
# Reading a template


def detect(template):
    """The text of a chat template -> name of its format, or None. It is searched, not run.

    None: no known markers; a system prompt, or an opening of the answer, that no format writes.
    """
    family = next((name for name, sign in SIGNS.items() if sign in template), None)
    if family is None:
        return None
    name = family
    if family == "chatml":
        text = template.replace("\\\\", "\\")
        name = next((n for n, f in FORMATS.items() if f.system and f.system in text), family)
        if name == family and re.search("You are (?!provided)", text):
            return None
    header = "".join(pieces(family, [], True, "", ""))
    written = generation_prompt(template)
    if not written.strip():  # no such part, or one that is not understood
        return None if "<think>" in template else name
    return {header: name, header + THOUGHT: THINKING[name]}.get(written)


JINJA = re.compile(r"\{#.*?#\}|\{%(?P<statement>.*?)%\}|\{\{(?P<expression>.*?)\}\}|[^{]+|\{", re.S)
LITERAL = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
LITERALS = re.compile(rf"\s*{LITERAL}(?:\s*[+~]\s*{LITERAL})*\s*", re.S)
EMPTY_THOUGHT = re.compile(r"\s*(<think>\s*</think>\s*)?")
UNKNOWN = "\ufffd"
LONGEST_PROMPT = 4096  # characters of a template that are read behind its last condition


def generation_prompt(template):
    """The text that a template writes where an answer is asked for: behind its last mention of
    add_generation_prompt, or behind its last loop. What is no literal there, and what stands under
    a further condition (but for an empty thought), is written as U+FFFD."""
    for pattern, new in (  # white space as transformers sets Jinja up: trim_blocks, lstrip_blocks
        (r"-([}%#]\})\s*", r"\1"),
        (r"(?<!\s)\s*(\{[{%#])-", r"\1"),
        (r"([%#]\})\n", r"\1"),
        (r"(?m)^[ \t]+(\{[%#])", r"\1"),
    ):
        template = re.sub(pattern, new, template)
    at = template.rfind("add_generation_prompt")
    at = template.find("%}", at) if at >= 0 else template.find("%}", template.rfind("endfor"))
    out = nested = ""
    depth = 0
    for token in JINJA.finditer(template, at + 2, at + LONGEST_PROMPT) if at >= 0 else ():
        word = (token["statement"] or "").split()[:1]
        depth += (word == ["if"]) - (word == ["endif"])
        if depth < 0 or (depth == 0 and word in (["else"], ["elif"])):
            break
        if depth == 0 and word == ["endif"]:
            out += "" if EMPTY_THOUGHT.fullmatch(nested) else UNKNOWN
            nested = ""
        if depth:
            nested += _written(token, word)
        else:
            out += _written(token, word)
    return out


def _written(token, word):
    """What one token of a template writes. word: [the first word of a statement], else []."""
    if token["expression"] is not None:
        if not LITERALS.fullmatch(token["expression"]):
            return UNKNOWN
        text = "".join(t[1:-1] for t in re.findall(LITERAL, token["expression"], re.S))
        return re.sub(r"\\(.)", lambda m: dict(n="\n", t="\t").get(m[1], m[1]), text)
    if token["statement"] is not None:
        return "" if word and word[0] in ("if", "elif", "else", "endif", "set") else UNKNOWN
    return "" if token[0].startswith("{#") else token[0]


# ----------------------------------------------------------------------------------------------------
# Writing a conversation


def pieces(name, messages, add_generation_prompt, bos, eos):
    """[{role, content}] -> list of Marker and str. bos, eos: their texts ("": there is none)."""
    for m in messages:
        if not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
            raise UserError(f"a chat message needs role and content as text, got {str(m)[:80]}")
    form = FORMATS[name]
    if form.system and messages and messages[0]["role"] != "system":
        messages = [dict(role="system", content=form.system), *messages]
    begin = [Marker(bos)] if bos else []
    out = WRITERS[form.family](messages, add_generation_prompt, begin, Marker(eos))
    return out + [THOUGHT] * (add_generation_prompt and form.opens_thought)


def _chatml(messages, prompt, begin, eos):
    out = []
    start, end = map(Marker, MARKERS["chatml"])
    for m in messages:  # one text: the header's newline may merge with white space behind it
        out += [start, f"{m['role']}\n{m['content']}", end, "\n"]
    return out + ([start, "assistant\n"] if prompt else [])


def _llama3(messages, prompt, begin, eos):
    out = list(begin)
    start, end, turn = map(Marker, MARKERS["llama3"])
    for m in messages:
        out += [start, m["role"], end, f"\n\n{m['content'].strip()}", turn]
    return out + ([start, "assistant", end, "\n\n"] if prompt else [])


def _gemma(messages, prompt, begin, eos):
    out = list(begin)
    start, end = map(Marker, MARKERS["gemma"])
    for m in messages:
        if m["role"] == "system":
            raise UserError(
                "this model's chat format has no system prompt; write it into the first message")
        role = "model" if m["role"] == "assistant" else m["role"]
        out += [start, f"{role}\n{m['content'].strip()}", end, "\n"]
    return out + ([start, "model\n"] if prompt else [])


def _llama2(messages, prompt, begin, eos):
    out = []
    system = ""
    for m in messages:
        if m["role"] == "system":
            system = f"<<SYS>>\n{m['content']}\n<</SYS>>\n\n"
        elif m["role"] == "assistant":
            out += [f" {m['content'].strip()} ", eos]
        else:
            out += [*begin, f"[INST] {(system + m['content']).strip()} [/INST]"]
            system = ""
    return out


def _deepseek(messages, prompt, begin, eos):
    user, assistant = map(Marker, MARKERS["deepseek"])
    out = [*begin, "".join(m["content"] for m in messages if m["role"] == "system")]
    for m in messages:
        if m["role"] == "user":
            out += [user, m["content"]]
        elif m["role"] == "assistant":
            out += [assistant, m["content"].split("</think>")[-1], eos]
    return out + ([assistant] if prompt else [])


WRITERS = dict(chatml=_chatml, llama2=_llama2, llama3=_llama3, gemma=_gemma, deepseek=_deepseek)


def join(parts):
    """Neighbouring texts as one: they may share a token."""
    out = []
    for part in parts:
        if out and not isinstance(part, Marker) and not isinstance(out[-1], Marker):
            out[-1] += part
        elif part:
            out.append(part)
    return out


def chatml_template(name):
    """The Jinja text of a ChatML format, for transformers."""
    form = FORMATS[name]
    first = ""
    if form.system:
        first = ("{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
                 f"{form.system}<|im_end|>\n' }}}}{{% endif %}}")
    header = "<|im_start|>assistant\n" + THOUGHT * form.opens_thought
    return ("{% for message in messages %}" + first + "{{'<|im_start|>' + message['role'] + '\n' + "
            "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
            "{% if add_generation_prompt %}{{ '" + header + "' }}{% endif %}")
