"""Sample a policy's own solutions of the training problems, grade them, keep them: the data of RFT and of DPO.

What train_sft.py --rft and train_dpo.py share. A shard of problems is one file, written under a temporary name and
renamed, so that a killed run samples at most one shard twice; and as every draw is a function of (seed, shard,
sequence, token), the file it writes is the same.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from infra import parallel
from infra.cli import UserError
from infra.runs import derive, progress
from sample import Rollouts, generate


@dataclass
class Solutions:
    """n sampled solutions of each of P problems; row b belongs to problems[b // n].

    rollouts: token ids with lengths and finish reasons; correct [B] bool, from the task's grader;
    finished [B] bool: ended by itself (always, where the task knows no EOS).
    """

    problems: list
    n: int
    rollouts: Rollouts
    correct: torch.Tensor
    finished: torch.Tensor

    def rows(self, i):
        return range(i * self.n, (i + 1) * self.n)


def write_shard(path, tensors):
    """One safetensors file by one rename; under torchrun rank 0's, for which the others wait."""
    if parallel.rank() == 0:
        temporary = path.with_name(f".tmp-{path.name}")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        temporary.replace(path)
    parallel.barrier()


def shards(folder, name, problems, size, make, label):
    """make(shard, problems of it) -> dict of tensors, once per shard and kept in folder; yields the dicts."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*") if parallel.rank() == 0 else ():
        leftover.unlink()
    for shard in progress(range(-(-len(problems) // size)), label):
        path = folder / f"{name}_{shard:05d}.safetensors"
        if not parallel.agreed(path.exists()):
            write_shard(path, make(shard, problems[shard * size : (shard + 1) * size]))
        yield load_file(path)


def stack_rows(parts):
    """2-D int64 tensors of different widths -> one, padded with 0 on the right (lengths are kept elsewhere)."""
    width = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])


def first_problems(task, n, seed):
    """The first n training problems in the order that SFT with the same --seed takes them (0: all of them)."""
    problems = task.problems("train", n or None, seed)
    if n > len(problems):
        raise UserError(f"--num-problems {n}: there are only {len(problems)} training problems")
    return problems


def sample_solutions(model, tokenizer, task, problems, n, cfg, folder):
    """n solutions a problem at cfg.temperature, graded. Reads of cfg: seed, temperature, slots, shard_problems,
    max_completion_length. Returns Solutions."""
    limit = cfg.max_completion_length or task.max_new_tokens

    def make(shard, part):
        prompts = [task.prompt_tokens(p, tokenizer) for p in part for _ in range(n)]
        out = generate(model, prompts, max_new_tokens=limit, temperature=cfg.temperature, stop_ids=tokenizer.eos_ids,
                       seed=derive(cfg.seed, "solutions", shard), slots=cfg.slots)
        right = [task.grade(part[b // n], tokenizer.decode(out.completion(b))) > 0.5 for b in range(len(out))]
        stopped = [r == "stop" or not task.ends_with_eos for r in out.finish_reason]
        return dict(tokens=out.tokens, prompt_len=out.prompt_len, length=out.length, correct=torch.tensor(right),
                    finished=torch.tensor(stopped))

    parts = list(shards(folder, "solutions", problems, cfg.shard_problems, make, "solutions"))
    join = lambda k: torch.cat([p[k] for p in parts])  # noqa: E731
    tokens, finished = stack_rows([p["tokens"] for p in parts]), join("finished")
    rollouts = Rollouts(tokens, join("prompt_len"), join("length"), torch.zeros(tokens.shape),
                        ["stop" if f else "length" for f in finished.tolist()])
    return Solutions(problems, n, rollouts, join("correct"), finished)


def keep_correct(solutions, cap):
    """[[completion ids] per problem]: distinct correct solutions that ended by themselves, in the order they were
    drawn, at most cap a problem (0: no cap). Drawn first, kept first: no bias towards short or likely ones.

    An unfinished one is never kept: it has no EOS, and training on it would teach not to stop."""
    kept = []
    for i in range(len(solutions.problems)):
        mine = {}
        for b in solutions.rows(i):
            if solutions.correct[b] and solutions.finished[b]:
                completion = solutions.rollouts.completion(b)
                mine.setdefault(tuple(completion), completion)
        kept.append(list(mine.values())[: cap or None])
    return kept


def count(solutions, kept):
    """What a reader must know of rejection sampling: how many problems it leaves out."""
    right = solutions.correct.view(-1, solutions.n).sum(1)
    tokens = int((solutions.rollouts.length - solutions.rollouts.prompt_len).sum())
    return dict(problems=len(kept), sampled=len(solutions.correct), sampled_tokens=tokens, correct=int(right.sum()),
                distinct_kept=sum(map(len, kept)), problems_without_correct=int((right == 0).sum()),
                problems_without_incorrect=int((right == solutions.n).sum()))
