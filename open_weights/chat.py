"""Chat formats by name: how a conversation becomes markers and text. No template of a downloaded file is ever run.

A chat template is a program in Jinja. Here it is only read: its markers say which of the formats below it writes (detect),
and the format writes it. What somebody typed stays plain text, so that no message can forge a turn.

    chatml            Qwen3 and many others; -smollm2, -qwen2, -qwen2.5, -qwen2.5-math put in a system prompt of their own
    llama2            Llama 2 chat      llama3    Llama 3 and later      gemma    Gemma 1 and 2
    deepseek-r1       DeepSeek-R1 and its distillations: the answer begins with <think>

Left out: tools; the date that Llama 3.1 puts into its system prompt; taking the thoughts out of earlier answers (Qwen3,
DeepSeek). Sources: the templates in the models' tokenizer_config.json, against whose text the tests compare.
"""

import re

from infra.cli import UserError

# name -> system prompt put in when the conversation brings none (None: none is)
FORMATS = {
    "chatml": None,
    "chatml-smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "chatml-qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "chatml-qwen2.5-math": "Please reason step by step, and put your final answer within \\boxed{}.",
    "chatml-qwen2": "You are a helpful assistant.",  # last: its text is part of another one
    "llama2": None,
    "llama3": None,
    "gemma": None,
    "deepseek-r1": None,
}
SIGNS = (("llama3", "<|start_header_id|>"), ("gemma", "<start_of_turn>"), ("deepseek-r1", "<｜User｜>"), ("llama2", "<<SYS>>"),
         ("chatml", "<|im_start|>"))  # what gives a template away
MARKERS = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
           "gemma": ("<start_of_turn>", "<end_of_turn>"), "deepseek-r1": ("<｜User｜>", "<｜Assistant｜>"), "llama2": ()}
RESERVED = {m for markers in MARKERS.values() for m in markers}  # never the encoding of anybody's text


class Marker(str):
    """A token that text cannot be: written by its id."""


def detect(template):
    """The text of a chat template -> name of its format, or None. It is searched, not run."""
    found = next((name for name, sign in SIGNS if sign in template), None)
    if found != "chatml":
        return found
    text = template.replace("\\\\", "\\")
    named = next((name for name, system in FORMATS.items() if system and system in text), None)
    if named is None and re.search("You are (?!provided)", text):  # a system prompt that we should silently leave out
        return None
    return named or found


def pieces(name, messages, add_generation_prompt, bos, eos):
    """[{role, content}] -> list of Marker and str. bos, eos: the texts of these tokens ("" where there is no bos)."""
    for m in messages:
        if not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
            raise UserError(f"a chat message needs role and content as text, got {str(m)[:80]}")
    system = FORMATS[name]
    if system and messages and messages[0]["role"] != "system":
        messages = [dict(role="system", content=system), *messages]
    begin = [Marker(bos)] if bos else []
    write = dict(llama2=_llama2, llama3=_llama3, gemma=_gemma).get(name, _deepseek if name == "deepseek-r1" else _chatml)
    return write(messages, add_generation_prompt, begin, Marker(eos))


def _chatml(messages, prompt, begin, eos):
    out, start, end = [], *map(Marker, MARKERS["chatml"])
    for m in messages:  # role and content are one text: the header's newline may merge with white space behind it
        out += [start, f"{m['role']}\n{m['content']}", end, "\n"]
    return out + ([start, "assistant\n"] if prompt else [])


def _llama3(messages, prompt, begin, eos):
    out, (start, end, turn) = list(begin), map(Marker, MARKERS["llama3"])
    for m in messages:
        out += [start, m["role"], end, f"\n\n{m['content'].strip()}", turn]
    return out + ([start, "assistant", end, "\n\n"] if prompt else [])


def _gemma(messages, prompt, begin, eos):
    out, (start, end) = list(begin), map(Marker, MARKERS["gemma"])
    for m in messages:
        if m["role"] == "system":
            raise UserError("this model's chat format has no system prompt; write it into the first message")
        role = "model" if m["role"] == "assistant" else m["role"]
        out += [start, f"{role}\n{m['content'].strip()}", end, "\n"]
    return out + ([start, "model\n"] if prompt else [])


def _llama2(messages, prompt, begin, eos):
    out, system = [], ""
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
    user, assistant = map(Marker, MARKERS["deepseek-r1"])
    out = [*begin, "".join(m["content"] for m in messages if m["role"] == "system")]
    for m in messages:
        if m["role"] == "user":
            out += [user, m["content"]]
        elif m["role"] == "assistant":
            out += [assistant, m["content"].split("</think>")[-1], eos]
    return out + ([assistant, "<think>\n"] if prompt else [])


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
    first = ""
    if system := FORMATS[name]:
        first = ("{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
                 f"{system}<|im_end|>\n' }}}}{{% endif %}}")
    return ("{% for message in messages %}" + first + "{{'<|im_start|>' + message['role'] + '\n' + "
            "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
