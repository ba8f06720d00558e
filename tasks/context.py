"""Questions that the model's context cannot hold: left out before a run, and said.

    leave_out_long(task, tokenizer, model, "train", "val")

One such question would end a run at the step that happens to pick it, and again after every resume.
Called by every script that samples, once the model is known: training, labels and evaluation answer
the same questions.
"""

import sys

from infra import parallel
from infra.cli import UserError


def leave_out_long(task, tokenizer, model, *splits):
    """Take the problems whose prompt leaves no room for an answer out of these splits of the task.

    One line on stderr counts them. -> how many in all. UserError: a split that has none left.
    """
    context = model.cfg.max_position_embeddings
    total = 0
    for split in dict.fromkeys(splits):
        problems = getattr(task, "by_split", {}).get(split, ())
        lengths = [len(task.prompt_tokens(p, tokenizer)) for p in problems]
        fitting = [p for p, length in zip(problems, lengths) if length < context]
        left_out = len(problems) - len(fitting)
        if not left_out:
            continue
        what = (f"{left_out} of {len(problems)} {split} problems have prompts that the model's "
                f"context of {context} tokens cannot hold (the longest: {max(lengths)} tokens)")
        if not fitting:
            raise UserError(f"{what}; give shorter questions, fewer --shots, or another model")
        if parallel.rank() == 0:
            print(f"warning: {what}; they are left out", file=sys.stderr)
        task.by_split[split] = fitting
        total += left_out
    return total
