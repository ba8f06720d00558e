"""Rollouts, the currency: completions as token ids, where their steps end, how they were graded.

    rolled = generate(model, prompts, ...)                 # sample.py -> Rollouts
    ends = step_ends(task, rolled, tokenizer)              # [B,S+1]
    outcome = grades(task, problems, rolled, tokenizer)    # [B]
    rolled, outcome, spent = continue_and_grade(...)       # Monte-Carlo continuations of prefixes

Everything that trains, judges or searches is a function of these tensors. Token in, token out: text
is decoded to be graded, and never encoded again.

Legend: P prompts, G samples per prompt, B = P*G rows, T tokens, S steps.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from infra import parallel
from infra.cli import UserError, what_this_is
from infra.runs import mean, with_progress_bar
from model import pad_right
from tasks.base import Problem


@dataclass
class Rollouts:
    """Completions as token ids, with everything a trainer needs to know about them.

    tokens [B,T] int64: prompt, completion (its EOS included), then zeros; prompt_len [B], length
    [B] int64 (length counts prompt and completion); logprob [B,T] float32, the sampler's, 0 outside
    the completion; finish_reason: "stop" (a stop id was drawn) or "length"; seconds: time spent
    generating.
    """

    tokens: torch.Tensor
    prompt_len: torch.Tensor
    length: torch.Tensor
    logprob: torch.Tensor
    finish_reason: list
    seconds: float = 0.0

    def __len__(self):
        return len(self.finish_reason)

    def mask(self):
        """[B,T] bool: True on completion tokens, EOS included."""
        t = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (t >= self.prompt_len[:, None]) & (t < self.length[:, None])

    def completion(self, b):
        """Token ids of row b's completion."""
        return self.tokens[b, self.prompt_len[b] : self.length[b]].tolist()

    def completions(self):
        """Token ids of every completion."""
        rows = zip(self.tokens.tolist(), self.prompt_len.tolist(), self.length.tolist())
        return [tokens[start:end] for tokens, start, end in rows]

    def num_tokens(self):
        """Tokens of all completions together."""
        return int((self.length - self.prompt_len).sum())


def take(rollouts, rows):
    """Some rows (a list of indices) of Rollouts, as Rollouts."""
    reasons = [rollouts.finish_reason[b] for b in rows]
    return Rollouts(
        rollouts.tokens[rows],
        rollouts.prompt_len[rows],
        rollouts.length[rows],
        rollouts.logprob[rows],
        reasons,
        rollouts.seconds,
    )


CUDA_TOKENS = 8192  # of one backward pass, where the caller does not say how many rows it takes


def rows_that_fit(rollouts, device):
    """Rows of one backward pass: all on a CPU; on a GPU as many as hold CUDA_TOKENS tokens.
    Backward keeps 1.3 MB for each of SmolLM2's in float32 (bench/scale.py, Shape.activations)."""
    if not str(device).startswith("cuda"):
        return len(rollouts)
    return max(1, CUDA_TOKENS // rollouts.tokens.shape[1])


# ------------------------------------------------------------------------------------------------
# Steps and grades.


def step_ends(task, rollouts, tokenizer, credit=False):
    """Where the steps of every row end: [B,S+1] int64, exclusive token positions. Column 0 is the
    prompt's length; rows are padded by repeating their last end (an empty step, whose progress is
    0), so no mask is needed.

    These are the places of labels, and where a search cuts. credit=True: for training, where an EOS
    alone belongs to the step before it.
    """
    ends_of = task.credit_ends if credit else task.step_ends
    rows = []
    for b in range(len(rollouts)):
        start = int(rollouts.prompt_len[b])
        length = int(rollouts.length[b])
        tokens = rollouts.tokens[b, :length].tolist()
        rows.append([start, *ends_of(tokens, start, length, tokenizer)])
    return pad_ends(rows)


def pad_ends(rows):
    """Lists of ends of different lengths -> [B,S+1] int64, padded by repeating the last."""
    width = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])


def distinct(ends):
    """One row of step ends without its padding, as a list."""
    return list(dict.fromkeys(ends.tolist()))


def labelled_solutions(task, tokenizer, rows, context):
    """Solutions that somebody labelled step by step -> what pav.py fits: dict(tokens [N,T], ends,
    target, weight [N,S+1]). Rows of more than `context` tokens are left out.

    rows: [(prompt, steps, labels)], see tasks.files.read_labelled. A step ends with its newline
    (with nothing, where the task counts tokens), the last with an EOS where the task has one. The
    bare prompt's label is the mean of its rows' last labels.
    """
    last = {}
    for prompt, _, labels in rows:
        last.setdefault(prompt, []).append(labels[-1])
    newline = "" if task.step_tokens else "\n"
    eos = list(tokenizer.eos_ids[:1]) if task.ends_with_eos else []
    tokens, ends, targets = [], [], []
    for prompt, steps, labels in rows:
        row = list(task.prompt_tokens(Problem(prompt, prompt, ""), tokenizer))
        at = [len(row)]
        for h, step in enumerate(steps, 1):
            is_last = h == len(steps)
            row += tokenizer.encode(step if is_last else step + newline) + (eos if is_last else [])
            at.append(len(row))
        if len(row) <= context:
            tokens.append(row)
            ends.append(at)
            targets.append([mean(last[prompt]), *labels])
    if len(tokens) < len(rows):
        longer = len(rows) - len(tokens)
        print(f"{longer} of {len(rows)} labelled solutions exceed {context} tokens: left out")
    if not tokens:
        raise UserError("no labelled solution fits into the model's context; take shorter ones")
    ends = pad_ends(ends)
    weight = torch.ones(ends.shape)
    weight[:, 1:] = (ends[:, 1:] > ends[:, :-1]).float()  # padding repeats the last end
    return dict(
        tokens=pad_right(tokens)[0], ends=ends, target=pad_ends(targets).float(), weight=weight
    )


def grades(task, problems, rollouts, tokenizer):
    """[B] float: the task's grade of every row's completion; problems: one a row."""
    texts = map(tokenizer.decode, rollouts.completions())
    return torch.tensor([task.grade(problem, text) for problem, text in zip(problems, texts)])


def first_illegal(task, problems, rollouts, tokenizer, width):
    """[B] index of each solution's first illegal step; width where there is none."""
    texts = map(tokenizer.decode, rollouts.completions())
    steps = [task.first_illegal_step(problem, text) for problem, text in zip(problems, texts)]
    return torch.tensor([width if step is None else step for step in steps])


def continue_and_grade(complete, task, tokenizer, starts, n, limit, seed):
    """n continuations of each prefix, graded as whole solutions: the Monte-Carlo estimate of V^mu.

    complete(prompts, max_new_tokens=[...], seed=...) -> Rollouts: generate() with the prover mu and
    its options. starts: P times (problem, prefix token ids, the prompt's length). limit: tokens of
    a completion, prefix included. Returns Rollouts of P*n rows (prompt_len is the problem's, so
    prefix and continuation are one solution), outcome [P,n] float, and the tokens sampled.
    """
    rows = [start for start in starts for _ in range(n)]
    room = [limit - (len(prefix) - prompt_len) for _, prefix, prompt_len in rows]
    rolled = complete([prefix for _, prefix, _ in rows], max_new_tokens=room, seed=seed)
    spent = rolled.num_tokens()
    rolled = dataclasses.replace(
        rolled, prompt_len=torch.tensor([start for *_, start in rows], dtype=torch.int64)
    )
    outcome = grades(task, [problem for problem, *_ in rows], rolled, tokenizer)
    return rolled, outcome.view(len(starts), n), spent


def pass_at_k(num_samples, num_correct, k):
    """Probability that k of num_samples, drawn without replacement, hold a correct one: 1 -
    C(n-c,k)/C(n,k) (Chen et al. 2021, unbiased; k <= n). With step counts it is Q under the
    Best-of-k prover."""
    n = num_samples
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} needs 1 <= k <= {n} samples; take more samples or a smaller k")
    if n - num_correct < k:
        return 1.0
    miss = 1.0
    for i in range(k):
        miss *= (n - num_correct - i) / (n - i)
    return 1.0 - miss


# ------------------------------------------------------------------------------------------------
# Files of rollouts: a killed run does not sample twice.


def write_tensors(path, tensors):
    """One safetensors file by one rename; under torchrun rank 0's, for which the others wait."""
    if parallel.rank() == 0:
        temporary = path.with_name(f".tmp-{path.name}")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        temporary.replace(path)
    parallel.barrier()


def shards(folder, name, problems, size, make, label):
    """Dicts of tensors, one a shard of `size` problems; each is made once and then read from
    folder/name_00000.safetensors.

    make(shard, its problems) -> {name: tensor}. A file appears by one rename; under torchrun rank 0
    writes it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*") if parallel.rank() == 0 else ():
        leftover.unlink()
    for shard in with_progress_bar(range(-(-len(problems) // size)), label):
        path = folder / f"{name}_{shard:05d}.safetensors"
        if not parallel.agreed(path.exists()):
            write_tensors(path, make(shard, problems[shard * size : (shard + 1) * size]))
        yield load_file(path)


def widen(tensor, width, last=None):
    """[N,w] -> [N,width]: padded with zeros on the right, or with the row's own last column
    (last="repeat")."""
    missing = width - tensor.shape[1]
    if last == "repeat":
        return torch.cat([tensor, tensor[:, -1:].expand(len(tensor), missing)], 1)
    return F.pad(tensor, (0, missing))


def stack(parts, last=None):
    """2-D tensors of different widths -> one; see widen."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([widen(part, width, last) for part in parts])


if __name__ == "__main__":
    what_this_is(__doc__, "python sample.py --task planted --model DIR")
