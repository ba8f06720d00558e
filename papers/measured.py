"""PAV by its definition: the value of every step measured with rollouts of the prover, nothing learned.

    python train_sft.py --task countdown --run-dir runs/sft
    python train_sft.py --task countdown --strength 0.5 --run-dir runs/prover
    python -m papers.measured --task countdown --policy runs/sft --prover runs/prover --prover-k 4 --run-dir runs/measured

"Rewarding Progress" (Setlur et al. 2024, arXiv 2410.08146) defines a step's reward as A^mu = V^mu(after) - V^mu(before), where
V^mu(prefix) is the chance that the prover mu, taking over there, still finds the answer. pav.py fits a network to such
chances, because rolling out at every step of RL is dear. Here it is done all the same, which is the definition itself and
the yardstick of any verifier: for each distinct prefix at a step end n continuations of the frozen prover, c of them right,

    V = 1 - C(n-c, K) / C(n, K)        the unbiased value of the prover's Best-of-K (eq. 30), K <= n

What is saved: equal prefixes of a batch are asked once; the finished solution has its outcome for a value; and the bare prompt is
not asked at all. The first step's progress V_1 - V(prompt) is centred within its prompt, where V(prompt) is the same for
all samples: the mean of the *other* samples' V_1 stands in its place, so its cost and its noise cancel and no bias is added.

What is left out: reusing continuations of an earlier step of RL, more continuations where the estimate is uncertain.
The prover's tokens are in every row of metrics.jsonl (measured/sampled_tokens): compare at equal *total* tokens.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch

import train_rl
from infra.cli import UserError, opt, parse, print_next_command, script
from infra.runs import (
    Run,
    Timer,
    one_thread_if_tiny,
    read_metrics,
    require_finite,
    setup,
    with_progress_bar,
)
from infra.seeds import batch_indices, derive
from model import load_model, load_weights, write_model
from report.watch import evaluate, rollout_logs, summarize
from rollouts import continue_and_grade, distinct, first_illegal, grades, pass_at_k, step_ends
from sample import generate
from tasks import get_task, prepare
from tasks.context import leave_out_long


@dataclass
class Config(train_rl.Config):
    prover: str = opt("base", "who finishes the prefixes: base (the initial policy), or a folder", "reward")
    prover_k: int = opt(1, "take Best-of-K of the prover as prover", "reward", low=1)
    n_mc: int = opt(4, "continuations of each distinct prefix", "reward", low=1)


def inner_prefixes(problems, rollouts, ends):
    """{prompt and prefix ids: (problem, ids, prompt length)} at every step end of the batch but the last of each row."""
    prefixes = {}
    for b, problem in enumerate(problems):
        start, *inner = distinct(ends[b])[:-1] or [int(ends[b, 0])]
        for end in inner:
            ids = rollouts.tokens[b, :end].tolist()
            prefixes[tuple(ids)] = (problem, ids, start)
    return prefixes


def leave_one_out_mean(values):
    """values [P,G] -> [P,G]: the mean of the other samples of the prompt."""
    return (values.sum(1, keepdim=True) - values) / (values.shape[1] - 1)


def measured_values(complete, task, tokenizer, problems, rollouts, ends, outcome, cfg, limit, seed):
    """V^mu [B,S+1] at the step ends, measured, and the tokens that it cost.

    complete: the frozen prover (rollouts.continue_and_grade). Rows b*G..b*G+G-1 share a prompt. The last real column and
    its padding are the outcome; column 0 is the mean V_1 of the prompt's other samples (see the header).
    """
    prefixes = inner_prefixes(problems, rollouts, ends)
    value = {}
    spent = 0
    if prefixes:
        starts = list(prefixes.values())
        _, right, spent = continue_and_grade(complete, task, tokenizer, starts, cfg.n_mc, limit, seed)
        for ids, row in zip(prefixes, right.sum(1).tolist()):
            value[ids] = pass_at_k(cfg.n_mc, int(row), cfg.prover_k)
    values = outcome[:, None].expand(ends.shape).clone()
    for b, row in enumerate(ends.tolist()):
        for column, end in enumerate(row[1:], 1):
            if end < row[-1]:
                values[b, column] = value[tuple(rollouts.tokens[b, :end].tolist())]
    values[:, 0] = leave_one_out_mean(values[:, 1].view(-1, cfg.num_generations)).view(-1)
    return values, spent


def train(cfg):
    """One arm: load policy and prover, loop, leave metrics.jsonl and a checkpoint. Resumes by itself. -> summary."""
    device = setup(cfg.device, cfg.threads)
    task = get_task(cfg)
    if cfg.n_mc < cfg.prover_k:
        raise UserError(f"--n-mc {cfg.n_mc} continuations cannot estimate Best-of-{cfg.prover_k}: raise --n-mc")
    run = Run(cfg, ignore=("run_dir", "device", "rollout_url"))
    if run.summary:
        return run.summary
    model, tokenizer = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    one_thread_if_tiny(model, cfg.threads)
    leave_out_long(task, tokenizer, model, "train", cfg.eval_split)
    start = cfg.policy if cfg.prover == "base" else cfg.prover
    prover, other = load_model(start, device, getattr(torch, cfg.dtype))
    if other.fingerprint != tokenizer.fingerprint:
        raise UserError(f"--prover {cfg.prover} has another tokenizer than --policy {cfg.policy}; it cannot continue its "
                        "prefixes")
    reference = copy.deepcopy(model).requires_grad_(False) if cfg.beta > 0 else None
    state = dict(tokens=0) | run.resume(model, partial(load_weights, model), lambda params: train_rl.make_adam(params, cfg))
    limit = cfg.max_completion_length or task.max_new_tokens
    train_problems = task.problems("train", None, 0)
    options = dict(temperature=cfg.temperature, stop_ids=task.stop_ids(tokenizer))
    complete = partial(generate, prover, **options)
    G = cfg.num_generations
    B = cfg.num_prompts * G
    if state["step"] == 0:
        run.log(0, num_tokens=0, episodes=0, **evaluate(model, tokenizer, task, None, cfg, limit))

    for step in with_progress_bar(range(state["step"] + 1, cfg.steps + 1), "rl measured"):
        timer = Timer("generate", "grade", "verify", "logprob", "backward", "update", "evaluate")
        # 1. Pick P problems, generate G samples of each, grade them: as in train_rl.py.
        picked = batch_indices(len(train_problems), cfg.num_prompts, step, cfg.seed, "rl epoch")
        problems = [train_problems[i] for i in picked for _ in range(G)]
        prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
        rollouts = generate(model, prompts, max_new_tokens=limit, seed=derive(cfg.seed, "rl"),
                            sequence_ids=range((step - 1) * B, step * B), **options)
        timer.mark("generate")
        outcome = grades(task, problems, rollouts, tokenizer)
        timer.mark("grade")
        # 2. Measure the value of every step.
        ends = step_ends(task, rollouts, tokenizer, credit=True)
        seed = derive(cfg.seed, "measure", step)
        values, spent = measured_values(complete, task, tokenizer, problems, rollouts, ends, outcome, cfg, limit, seed)
        illegal = first_illegal(task, problems, rollouts, tokenizer, ends.shape[1])
        timer.mark("verify")
        # 3. Advantages and update: those of PAV.
        adv, logs = train_rl.advantages(cfg, rollouts.mask(), outcome, ends, values, illegal)
        logs["measured/sampled_tokens"] = spent
        timer.mark("other")
        for group in run.optimizer.param_groups:
            group["lr"] = cfg.learning_rate * min(1.0, step / max(1, cfg.warmup_steps))
        logs |= train_rl.update(model, reference, run.optimizer, run.params, rollouts, adv, cfg, limit, device, timer)
        batch = dict(tokens=rollouts.tokens, prompt_len=rollouts.prompt_len, length=rollouts.length, advantage=adv)
        require_finite(run.folder, step, logs["grad_norm"], batch, cfg.learning_rate)
        # 4. Evaluate, log, save.
        state["tokens"] += rollouts.num_tokens()
        if step % cfg.eval_steps == 0 or step == cfg.steps:
            logs |= evaluate(model, tokenizer, task, None, cfg, limit)
            timer.mark("evaluate")
        timer.mark("other")
        logs |= rollout_logs(rollouts) | timer.metrics()
        run.log(step, num_tokens=state["tokens"], episodes=step * B, **logs)
        if step % cfg.save_steps == 0 or step == cfg.steps:
            run.save(step, partial(write_model, tokenizer=tokenizer), tokens=state["tokens"])
    measured = sum(row.get("measured/sampled_tokens", 0) for row in read_metrics(run.folder))
    return summarize(run, state["tokens"], cfg.steps * B, "pav, measured", measured_tokens=measured)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.reward != "pav":
        raise UserError(f"--reward {cfg.reward} needs no measured values: python train_rl.py --reward {cfg.reward}")
    if not cfg.policy or not cfg.run_dir:
        raise UserError("give --policy (and --prover) and --run-dir: train_sft.py makes the policies, --strength says how good")
    summary = train(prepare(cfg, "rl", argv, cfg.policy, cfg.prover))
    print_next_command(cfg, ("how often it is right", ["-m", "report.evaluate", "--model", cfg.run_dir]))
    return summary


if __name__ == "__main__":
    script(main)
