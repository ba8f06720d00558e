"""Rejection-sampling fine-tuning: train on a policy's own correct solutions (Yuan et al. 2023, arXiv 2308.01825).

    python -m papers.rft --task planted --policy runs/sft --run-dir runs/rft

1. sample     num_generations solutions of each training problem from --policy, graded,
2. keep       distinct right ones that ended by themselves, in the order they were drawn, at most rft_keep a problem,
3. imitate    them, by default beside the demonstrations of the same problems. Training starts from --model, the base
              (a tiny random model by default), not from --policy.

"RL on incorrect synthetic data" (Setlur et al. 2024, arXiv 2406.14532) compares with it; papers/train_dpo.py shares
steps 1 and 2. A shard of problems is one file, so that a killed run samples at most one shard twice.
Left out: several rounds, filtering by edit distance.
"""

from dataclasses import dataclass

import torch

from infra.cli import UserError, opt, parse, print_next_command, run_folder, script
from infra.runs import one_thread_if_tiny, with_progress_bar
from infra.seeds import derive
from model import load_model
from rollouts import Rollouts, grades, shards, stack
from sample import generate
from tasks import adopt_task, smoked
from tasks.context import leave_out_long
from train_sft import (
    SFTFlags,
    build_examples,
    check_lengths,
    finish,
    first_problems,
    log_and_save,
    open_sft_run,
    resume,
    start_model,
    train_step,
)


@dataclass
class Config(SFTFlags):
    policy: str = opt("", "whose solutions: a folder that train_sft.py made", "rejection sampling")
    num_generations: int = opt(16, "solutions sampled a problem", "rejection sampling", low=1)
    rft_keep: int = opt(4, "distinct correct solutions kept a problem (0: all)", "rejection sampling", low=0)
    rft_demonstrations: bool = opt(True, "keep the demonstrations beside them", "rejection sampling")
    temperature: float = opt(1.0, "of the sampled solutions", "rejection sampling", above=0)
    slots: int = opt(512, "sequences decoded at once", "rejection sampling", low=1)
    shard_problems: int = opt(1000, "problems per file of solutions (what a kill may cost)", "rejection sampling", low=1)


@dataclass
class Solutions:
    """n sampled solutions of each of P problems; row b belongs to problems[b // n].

    rollouts: token ids with lengths and finish reasons; correct [P*n] bool, from the task's grader;
    finished [P*n] bool: ended by itself (always, where the task knows no EOS).
    """

    problems: list
    n: int
    rollouts: Rollouts
    correct: torch.Tensor
    finished: torch.Tensor

    def rows(self, i):
        """The rows of problem i."""
        return range(i * self.n, (i + 1) * self.n)


def sample_solutions(model, tokenizer, task, problems, n, cfg, folder):
    """n solutions a problem at cfg.temperature, graded. Reads of cfg: seed, temperature, slots, shard_problems,
    max_completion_length. Returns Solutions."""
    limit = cfg.max_completion_length or task.max_new_tokens

    def make(shard, part):
        part = [p for p in part for _ in range(n)]
        prompts = [task.prompt_tokens(p, tokenizer) for p in part]
        out = generate(model, prompts, max_new_tokens=limit, temperature=cfg.temperature, slots=cfg.slots,
                       stop_ids=task.stop_ids(tokenizer), seed=derive(cfg.seed, "solutions", shard))
        stopped = torch.tensor([r == "stop" or not task.ends_with_eos for r in out.finish_reason])
        return dict(tokens=out.tokens, prompt_len=out.prompt_len, length=out.length, finished=stopped,
                    correct=grades(task, part, out, tokenizer) > 0.5)

    parts = list(shards(folder, "solutions", problems, cfg.shard_problems, make, "solutions"))
    tokens = stack([part["tokens"] for part in parts])
    joined = {k: torch.cat([part[k] for part in parts]) for k in ("prompt_len", "length", "finished", "correct")}
    reasons = ["stop" if f else "length" for f in joined["finished"].tolist()]
    rollouts = Rollouts(tokens, joined["prompt_len"], joined["length"], torch.zeros(tokens.shape), reasons)
    return Solutions(problems, n, rollouts, joined["correct"], joined["finished"])


def keep_correct(solutions, cap):
    """[[completion ids] per problem]: distinct correct solutions that ended by themselves, in the order they were
    drawn, at most cap a problem (0: no cap). Drawn first, kept first: no bias towards short or likely ones.

    An unfinished one is never kept: it has no EOS, and training on it would teach not to stop."""
    per_problem = []
    for i in range(len(solutions.problems)):
        rows = [b for b in solutions.rows(i) if solutions.correct[b] and solutions.finished[b]]
        completions = dict.fromkeys(tuple(solutions.rollouts.completion(b)) for b in rows)
        per_problem.append([list(c) for c in completions][: cap or None])
    return per_problem


def count(solutions, per_problem):
    """What a reader must know of rejection sampling: how many problems it leaves out."""
    right = solutions.correct.view(-1, solutions.n).sum(1)
    return dict(
        problems=len(per_problem),
        sampled=len(solutions.correct),
        sampled_tokens=solutions.rollouts.num_tokens(),
        correct=int(right.sum()),
        distinct_kept=sum(map(len, per_problem)),
        problems_without_correct=int((right == 0).sum()),
        problems_without_incorrect=int((right == solutions.n).sum()),
    )


def rft_examples(task, tokenizer, problems, cfg, run, device):
    """Correct solutions of --policy, after the demonstrations: [(prompt ids, completion ids)], counts."""
    policy, other = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    if other.fingerprint != tokenizer.fingerprint:
        raise UserError(f"--policy {cfg.policy} has another tokenizer than the model to train; its solutions are other tokens")
    one_thread_if_tiny(policy, cfg.threads)
    solutions = sample_solutions(policy, tokenizer, task, problems, cfg.num_generations, cfg, run.folder / "rollouts")
    per_problem = keep_correct(solutions, cfg.rft_keep)
    counts = count(solutions, per_problem)
    print("rft: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items()), flush=True)
    examples = build_examples(task, tokenizer, problems, cfg) if cfg.rft_demonstrations else []
    shown = {(*p, -1, *c) for p, c in examples}
    for problem, completions in zip(problems, per_problem):
        prompt = task.prompt_tokens(problem, tokenizer)
        examples += [(prompt, c) for c in completions if (*prompt, -1, *c) not in shown]
    if not examples:
        raise UserError("no sampled solution is right, and --no-rft-demonstrations leaves nothing to train on: raise "
                        "--num-generations, or take a better --policy")
    return examples, counts


def train(cfg):
    """Sample, keep, imitate -> a checkpoint in --run-dir. Resumes by itself. -> summary."""
    if not cfg.policy:
        raise UserError("--policy is missing: give the folder of the policy that is to be sampled (train_sft.py makes one)")
    cfg.run_dir = run_folder(cfg, "rft")
    device, task, run = open_sft_run(cfg)
    if run.summary:
        return run.summary
    model, tokenizer = start_model(cfg, task, device)
    one_thread_if_tiny(model, cfg.threads)
    leave_out_long(task, tokenizer, model, "train", "val")
    problems = first_problems(task, cfg.num_problems, cfg.seed)
    examples, counts = rft_examples(task, tokenizer, problems, cfg, run, device)
    check_lengths(examples, model.cfg.max_position_embeddings, cfg.max_completion_length or task.max_new_tokens)
    start = resume(run, model, cfg)
    logs = {}
    for step in with_progress_bar(range(start + 1, cfg.steps + 1), "rft"):
        logs = train_step(run, model, examples, step, cfg, device)
        log_and_save(run, step, logs, tokenizer, cfg)
    return finish(run, model, tokenizer, task, cfg, logs, examples, "rft", **counts)


def main(argv=None):
    cfg = smoked(parse(Config, argv, __doc__), "sft")
    adopt_task(cfg, cfg.policy)
    if cfg.smoke:
        cfg.num_generations = 4
    summary = train(cfg)
    print_next_command(cfg, ("how often it is right on test problems", ["-m", "report.evaluate", "--model", cfg.run_dir]))
    return summary


if __name__ == "__main__":
    script(main)
