"""The STaR form of MRT (arXiv 2503.07572), and what MRT is measured by: budget curve and cumulative regret.

    python -m papers.mrt_star --task probe --policy DIR --run-dir runs/star           # the STaR form
    python -m papers.mrt_star --task probe --policy DIR --rounds 0                    # only measure DIR

J(prefix) is the success rate of the meta-prover, the policy told to answer now (papers/mrt.py). The STaR form samples, finds for
each right trace the earliest prefix with the highest J ("progress has been maximised"), takes the traces of least regret,
closed there with a right answer of mu, fine-tunes on them, and repeats. The highest of many noisy estimates is often a lucky
one: with 4 answers a prefix the policy learns to stop early and guess. Hence 16 here, and --min-value: the answer given there
must be right nearly always.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from infra.cli import RunConfig, UserError, opt, parse, print_next_command, run_folder, script
from infra.runs import Run, mean, one_thread_if_tiny, setup, with_progress_bar
from infra.seeds import batch_indices, derive
from model import load_model, load_weights, write_model
from papers.mrt import MRTFlags, answer_now, episode_ends, pooled, prefixes, value_table
from rollouts import distinct, grades
from sample import generate
from tasks import TaskFlags, adopt_task, get_task
from tasks.context import leave_out_long
from train_sft import adamw, sft_step

# ----------------------------------------------------------------------------------------------------
# Regret.


def curve(tokens, values, budget, linear=False):
    """J of one solution at 0, 1, ..., budget tokens of thinking -> [budget+1]. tokens, values [n]: J after so many tokens.

    Stepwise (what a stop at t is worth: the episodes finished by then), or linear between the ends as the authors'
    notebook has it. A solution that has ended keeps its last value.
    """
    tokens, first = np.unique(np.asarray(tokens), return_index=True)  # padding repeats the last end
    values, t = np.asarray(values)[first], np.arange(budget + 1)
    return np.interp(t, tokens, values) if linear else values[np.searchsorted(tokens, t, side="right") - 1]


def regret(tokens, values, budget):
    """Normalised cumulative regret of solutions against tokens [B,n], J [B,n]: 1 - (area under J up to the budget) / budget.

    The comparator is the constant 1 (always right), as in the authors' analysis: an upper bound of the regret to the best
    policy. They let curves begin at (0, 0); ours begin at J(nothing). mu's own tokens are not on the axis.
    """
    areas = [np.trapezoid(curve(t, v, budget, linear=True)) / budget for t, v in zip(tokens.tolist(), values.tolist())]
    return 1 - float(np.mean(areas))


def measure(model, tokenizer, task, problems, cfg, seed):
    """One solution a problem, J after each of its episodes. Returns accuracy, tokens, budget curve, regret, the same with the
    exact J where the task has one, and how far the two are apart."""
    limit = cfg.max_completion_length or task.max_new_tokens
    out = generate(model, [task.prompt_tokens(p, tokenizer) for p in problems], max_new_tokens=limit, seed=derive(seed, "trace"),
                   temperature=cfg.temperature, stop_ids=task.stop_ids(tokenizer), slots=cfg.slots)
    ends = episode_ends(task, out, tokenizer, cfg)
    asked = prefixes(problems, out, ends)
    right, _, spent = answer_now(model, tokenizer, task, list(asked.values()), cfg, derive(seed, "mu"))
    outcome = grades(task, problems, out, tokenizer)
    tables = {"": pooled(asked, right)}
    exact = {k: task.value_now(p, tokenizer.decode(tokens[n:])) for k, (p, tokens, n) in asked.items()}
    if None not in exact.values():
        tables["_exact"] = exact
    at_prompt = [v for (b, e), v in tables[""].items() if e == int(out.prompt_len[b])]
    result = dict(accuracy=float(outcome.mean()), tokens=float((out.length - out.prompt_len).float().mean()), budget=limit,
                  clipped=mean(r == "length" for r in out.finish_reason), J0=mean(at_prompt), measured_tokens=spent)
    for name, J in tables.items():
        tokens = ends - ends[:, :1]
        values = value_table(ends, J, outcome.tolist())
        curves = [curve(t, v, limit) for t, v in zip(tokens.tolist(), values.tolist())]
        result["regret" + name] = regret(tokens, values, limit)
        result["curve" + name] = np.mean(curves, 0).round(4).tolist()
    if "_exact" in tables:
        gap = np.array([tables[""][k] - exact[k] for k in asked])
        result |= dict(J_bias=float(gap.mean()), J_rms=float((gap**2).mean() ** 0.5))
    return result


# ----------------------------------------------------------------------------------------------------
# The STaR form.


@dataclass
class Config(MRTFlags, TaskFlags, RunConfig):
    policy: str = opt("", "folder of the policy to start from (train_sft.py makes one)", "star")
    rounds: int = opt(3, "rounds of sample, choose, fine-tune (0: only measure the policy)", "star", low=0)
    num_prompts: int = opt(256, "problems a round", "star", low=1)
    num_generations: int = opt(8, "solutions a problem", "star", low=1)
    keep: int = opt(1, "solutions kept a problem, at most", "star", low=1)
    mu_samples: int = opt(16, "answers of the meta-prover a prefix (K); few make lucky guesses look like progress", "mrt", low=1)
    min_value: float = opt(0.9, "J of the prefix of a kept solution, at least: guesses stay out", "star", low=0, high=1)
    steps: int = opt(15, "optimizer steps a round", "star", low=1)
    batch_size: int = opt(64, "examples a step", "star", low=1)
    micro_batch_size: int = opt(0, "examples a backward pass (0: all)", "star", low=0)
    learning_rate: float = opt(1e-3, "of AdamW, constant; its state begins anew each round", "star", above=0)
    weight_decay: float = opt(0.0, "decoupled weight decay of matrices", "star", low=0)
    max_grad_norm: float = opt(1.0, "gradient clipping by global norm", "star", above=0)
    temperature: float = opt(1.0, "of solutions and of mu's answers", "star", above=0)
    slots: int = opt(512, "sequences decoded at once", "star", low=1)
    eval_problems: int = opt(256, "problems of the measurement", "evaluation", low=1)
    eval_split: str = opt("val", "whose problems; test only for the numbers you report", "evaluation", choices=["val", "test"])


def best_prefix(ends, values):
    """Of one solution, ends and J [n] (the finished text left out): (index of the first highest J, its progress)."""
    top = max(values)
    j = values.index(top)
    return ends[j], top - values[0]


def choose(rollouts, ends, J, good, n, keep, budget, min_value=0.0):
    """Examples [(prompt ids, completion ids)] of the STaR form: see the header. n solutions a problem, neighbours.

    J {(b, end): value}, good {(b, end): [right answers, token ids with the closing]}. Only prefixes with progress, a right answer
    and a J of min_value are kept; of a problem's solutions the `keep` of least regret, the closed prefix holding its J to the
    budget.
    """
    examples = []
    for first in range(0, len(rollouts), n):
        candidates = []
        for b in range(first, first + n):
            asked = [e for e in distinct(ends[b]) if (b, e) in J]
            end, gain = best_prefix(asked, [J[b, e] for e in asked])
            if gain <= 0 or not good[b, end] or J[b, end] < min_value:
                continue
            upto = [e for e in asked if e <= end]
            area = regret(torch.tensor([upto]) - asked[0], torch.tensor([[J[b, e] for e in upto]]), budget)
            tokens = rollouts.tokens[b].tolist()
            candidates.append((area, b, tokens[: asked[0]], tokens[asked[0] : end] + good[b, end][0]))
        examples += [(prompt, completion) for _, _, prompt, completion in sorted(candidates)[:keep]]
    return examples


def star_round(model, tokenizer, task, cfg, number, device):
    """Sample, ask mu everywhere, choose, fine-tune. Returns what to log."""
    limit = cfg.max_completion_length or task.max_new_tokens
    G = cfg.num_generations
    pool = task.problems("train", None, cfg.seed)
    picked = range(number * cfg.num_prompts, (number + 1) * cfg.num_prompts)
    problems = [pool[i % len(pool)] for i in picked for _ in range(G)]
    prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
    out = generate(model, prompts, max_new_tokens=limit, temperature=cfg.temperature, slots=cfg.slots,
                   seed=derive(cfg.seed, "star", number), stop_ids=task.stop_ids(tokenizer))
    ends = episode_ends(task, out, tokenizer, cfg)
    asked = prefixes(problems, out, ends)
    seed = derive(cfg.seed, "star mu", number)
    right, answers, spent = answer_now(model, tokenizer, task, list(asked.values()), cfg, seed)
    good = {k: [a for a, r in zip(texts, row) if r] for k, texts, row in zip(asked, answers, right.tolist())}
    examples = choose(out, ends, pooled(asked, right), good, G, cfg.keep, limit, cfg.min_value)
    if not examples:
        print(f"round {number + 1}: no solution made progress to a right answer, the policy stays as it is; take a better "
              "--policy, or raise --num-generations")
    params = list(model.parameters())
    optimizer = adamw(params, cfg)
    nll = float("nan")
    for step in range(1, 1 + (cfg.steps if examples else 0)):
        rows = batch_indices(len(examples), cfg.batch_size, step, cfg.seed, "star", number)
        nll, _ = sft_step(model, [examples[i] for i in rows], cfg, device)
        torch.nn.utils.clip_grad_norm_(params, cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return dict(loss=nll, kept=len(examples), kept_length=mean(len(c) for _, c in examples), num_tokens=out.num_tokens(),
                mu_tokens=spent)


def train(cfg):
    """The STaR form, or with --rounds 0 the measurement alone. A killed run goes on with the round it was in."""
    device = setup(cfg.device, cfg.threads)
    task = get_task(cfg)
    if not cfg.policy:
        raise UserError("--policy is missing: give the folder of the policy to start from (train_sft.py makes one)")
    cfg.run_dir = run_folder(cfg, "star" if cfg.rounds else "measure")
    run = Run(cfg)
    if run.summary:
        return run.summary
    model, tokenizer = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    one_thread_if_tiny(model, cfg.threads)
    leave_out_long(task, tokenizer, model, "train", cfg.eval_split)
    problems = task.problems(cfg.eval_split, cfg.eval_problems, 0)
    state = run.resume(model, partial(load_weights, model), None)  # the optimizer begins anew each round
    spent = {k: state.get(k, 0) for k in ("num_tokens", "mu_tokens")}
    for number in with_progress_bar(range(state["step"], cfg.rounds), "star"):
        logs = star_round(model, tokenizer, task, cfg, number, device)
        for k in spent:
            spent[k] += logs[k]
        run.log(number + 1, **logs | spent)
        run.save(number + 1, lambda folder, whole: write_model(folder, whole, tokenizer), **spent)
    result = measure(model, tokenizer, task, problems, cfg, 0)
    summary = run.finish(**result, **spent)
    limit = result["budget"]
    exact = f" (exact J: {result['regret_exact']:.3f})" if "regret_exact" in result else ""
    stops = (limit // 4, limit // 2, limit)
    print(f"accuracy when stopped after {', '.join(map(str, stops))} tokens: "
          + ", ".join(f"{result['curve'][t]:.3f}" for t in stops) + f"; at the first token {result['J0']:.3f}")
    print(f"{cfg.rounds} rounds: accuracy {result['accuracy']:.3f} with {result['tokens']:.1f} tokens, normalised regret up to "
          f"{limit} tokens {result['regret']:.3f}{exact} (n={len(problems)}), {summary['seconds']:.0f} s -> {run.folder}")
    return summary


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    adopt_task(cfg, cfg.policy)
    if cfg.smoke:
        cfg.rounds, cfg.num_prompts, cfg.num_generations, cfg.steps, cfg.eval_problems = min(cfg.rounds, 1), 8, 4, 2, 16
    summary = train(cfg)
    rl = ["-m", "papers.mrt", "--policy", cfg.policy, "--run-dir", f"{cfg.run_dir}_rl"]
    print_next_command(cfg, ("the same by RL", rl))
    return summary


if __name__ == "__main__":
    script(main)
