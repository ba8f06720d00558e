"""One completion, token by token, and a conversation made of them.

    python sample.py --model smollm2                                       # the conversation
    python -m report.chat --model smollm2 --verifier runs/verifier         # the same, every line with its value

stream() yields what sample.generate draws for the same prompt, seed and sequence id: in a conversation the id is the
number of the answer. What is left out: keys and values kept from one answer to the next (a prompt is read again, which
takes less time than one of its answers).
"""

import codecs
import contextlib
import signal
import sys

import torch

from engines.batch import begin_batch, draw_tokens, prefill
from infra.cli import UserError
from infra.terminal import printable
from kernels import packed_weights, philox_uniform
from model import KVCache


@torch.no_grad()
def stream(model, prompt, *, max_new_tokens, temperature, seed, stop_ids, sequence_id=0, top_k=0, top_p=1.0, min_p=0.0):
    """Token ids of one completion of prompt (a list of ids), each as soon as it is drawn, the stop id included.

    The options and errors of sample.decode_all; its tokens too, where the weights are packed as generate_here packs them
    (kernels/product.py: another layout may round the last bit otherwise).
    """
    device = model.head.device
    rollouts, _, ids, stops, _ = begin_batch(model, [prompt], max_new_tokens, [sequence_id], stop_ids)
    room = rollouts.tokens.shape[1] - len(prompt)
    cache = KVCache(model.cfg, 1, len(prompt) + room, device, model.head.dtype)
    draws = philox_uniform(seed, ids[:, None], torch.arange(room)).to(device)  # (1, room, 2)
    hidden = prefill(model, [prompt], cache, 0)
    for i in range(room):
        token, _ = draw_tokens(model, hidden, draws[:, i], temperature, top_k, top_p, min_p)
        yield int(token)
        if stops[int(token)]:
            return
        if i + 1 < room:
            length = len(prompt) + i
            hidden = model.decode(token, cache, torch.tensor([length], device=device), length)


# ----------------------------------------------------------------------------------------------------
# The conversation.


def prompt_of(history, line, tokenizer, plain):
    """history: [(what somebody typed, ids of the answer)], then a new line -> token ids of the next prompt.

    In the model's chat format; plain: the text so far as it stands, answers without their stop ids.
    """
    if plain:
        texts = [said for said, _ in history] + [line]
        answers = [ids for _, ids in history] + [[]]
        ids = tokenizer.prompt("")
        for text, answer in zip(texts, answers):
            ids += tokenizer.encode(text) + [t for t in answer if t not in tokenizer.eos_ids]
        return ids
    messages = []
    for said, ids in history:
        messages += [dict(role="user", content=said), dict(role="assistant", content=tokenizer.decode(ids))]
    return tokenizer.chat([*messages, dict(role="user", content=line)])


def fitting_prompt(history, line, tokenizer, plain, context, max_new_tokens):
    """prompt_of(), the oldest turns left out of `history` (in place) until half of the context, or max_new_tokens if
    they are fewer, is free for the answer. -> ids, turns left out. UserError: the line alone is too long."""
    room = min(max_new_tokens, context // 2)
    ids = prompt_of(history, line, tokenizer, plain)
    dropped = 0
    while len(ids) + room > context and history:
        del history[0]
        dropped += 1
        ids = prompt_of(history, line, tokenizer, plain)
    if len(ids) + room > context:
        raise UserError(f"{len(ids)} tokens are too long for the model's context of {context}; type less")
    return ids, dropped


def decoded(tokens, tokenizer):
    """Token ids, one by one -> (id, printable text that is complete with it). A character may need several tokens; the
    last pair is (None, what was left over)."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield token, printable(decoder.decode(tokenizer.token_bytes(token)), keep="\n\t")
    yield None, printable(decoder.decode(b"", final=True))


def write_answer(prompt, tokens, tokenizer):
    """Print an answer as it is drawn."""
    for _, text in decoded(tokens, tokenizer):
        print(text, end="", flush=True)


def recorded(tokens, record):
    """Pass tokens on, each appended to `record` first: what was drawn is known even if the reader is interrupted."""
    for token in tokens:
        record.append(token)
        yield token


def read_line():
    """What is typed; "" at the end of the input, or for a Ctrl-C where there is no answer to stop."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def converse(model, tokenizer, options, plain=False, write=write_answer, read=read_line):
    """Read a line, answer, again; an empty line ends it. -> history, [(line, ids of the answer)].

    options: of sample.generate, without sequence_ids. plain: continue the text (a model without a chat format always does).
    write(prompt ids, iterator of ids, tokenizer) prints an answer. Ctrl-C ends the answer, not the conversation: what
    was written of it stays in the history.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # infra.cli.script made it a Ctrl-C, which here ends an answer alone
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (arrow keys in input())
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    plain = plain or tokenizer.chat_format is None
    how = "the model continues what you type" if plain else f"chat format {tokenizer.chat_format}"
    print(f"{how}; Ctrl-C stops an answer, an empty line or Ctrl-D ends the conversation")
    limit = options["max_new_tokens"]
    options = {name: value for name, value in options.items() if name != "slots"}
    history = []
    turn = 0
    with packed_weights(model.parameters(), 1):
        while line := read():
            try:
                prompt, dropped = fitting_prompt(history, line, tokenizer, plain, model.cfg.max_position_embeddings, limit)
            except UserError as e:
                print(f"error: {e}")
                continue
            if dropped:
                print(f"-- the oldest {dropped} answers are forgotten: they no longer fit into the context")
            answer = []
            try:
                write(prompt, recorded(stream(model, prompt, sequence_id=turn, **options), answer), tokenizer)
                if len(answer) == limit and answer[-1] not in options["stop_ids"]:
                    print(f" [cut off at {limit} tokens: --max-new-tokens]", end="")
            except KeyboardInterrupt:
                print(" [stopped]", end="")
            print()
            history.append((line, answer))
            turn += 1
    return history
