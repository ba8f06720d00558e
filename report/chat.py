"""A conversation whose every line shows its value to a verifier as soon as it is written.

    python -m report.chat --model smollm2 --verifier runs/verifier
    python -m report.chat --model runs/planted/seed0/rl_pav --verifier runs/planted/seed0/verifier --task planted

sample.py without --prompt and --task is the same conversation without values (engines/stream.py
has its loop). Behind each step stand its progress A = V after - V before and V after it, blue for a
gain and orange for a loss. A step is a line, or what --task says: the values mean something where
the verifier has seen such prompts and steps.
"""

import sys
from dataclasses import dataclass
from functools import partial

import torch

from engines.stream import converse, decoded
from infra.cli import UserError, opt, parse, script
from infra.terminal import FAINT, GAIN, LOSS, paint, wants_colour
from sample import SampleFlags, start
from tasks.base import Task
from verifier import load_verifier, step_values


@dataclass
class Config(SampleFlags):
    verifier: str = opt("", "run directory of pav.py, whose values are shown", "what")
    raw: bool = opt(False, "continue the text as it stands, without the chat format", "what")


def value_of(verifier, tokens):
    """V^mu of one list of token ids."""
    return step_values(verifier, torch.tensor([tokens]), torch.tensor([[len(tokens)]])).item()


def ends_a_step(task, tokens, prompt_len, tokenizer):
    """Whether a step ends with the last of these tokens, whatever comes next (tasks/base.py: ends
    do not move when a text goes on)."""
    ends = task.step_ends([*tokens, 0], prompt_len, len(tokens) + 1, tokenizer)
    return len(tokens) in ends


def write_valued(prompt, tokens, tokenizer, verifier, task, colour):
    """Print an answer as it is drawn, and behind every step its progress and its value.

    prompt: token ids; tokens: iterator of the answer's. -> values, [V of the prompt, V after each
    step].
    """
    values = [value_of(verifier, prompt)]
    print(paint(FAINT, f"V {values[0]:.2f} (prompt alone)", colour), flush=True)
    text = list(prompt)
    valued = len(prompt)  # tokens up to the last step end

    def note():
        values.append(value_of(verifier, text))
        gain = values[-1] - values[-2]
        code = GAIN if gain >= 0 else LOSS
        return paint(code, f"  [A {gain:+.2f}  V {values[-1]:.2f}]", colour)

    for token, piece in decoded(tokens, tokenizer):
        if token is None:  # the answer is over
            end = note() if set(text[valued:]) - set(tokenizer.eos_ids) else ""
            print(f"{piece}{end}", end="", flush=True)
            continue
        text.append(token)
        if token in tokenizer.eos_ids or not ends_a_step(task, text, len(prompt), tokenizer):
            print(piece, end="", flush=True)
            continue
        before, newline, after = piece.partition("\n")
        print(f"{before}{note()}", newline or "\n", after, sep="", end="", flush=True)
        valued = len(text)
    return values


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if not cfg.verifier:
        raise UserError("--verifier is missing: without one, python sample.py is a conversation too")
    if cfg.n > 1:
        raise UserError("--n is of sample.py: a conversation has one answer a line")
    task, model, tokenizer, options = start(cfg)
    verifier = load_verifier(cfg.verifier, tokenizer, model.head.device)
    colour = wants_colour(sys.stdout)
    task = task or Task()  # whose steps are lines
    write = partial(write_valued, verifier=verifier, task=task, colour=colour)
    return converse(model, tokenizer, options, plain=cfg.raw, write=write)


if __name__ == "__main__":
    script(main)
