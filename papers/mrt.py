"""Meta reinforcement fine-tuning: reward thinking that makes progress, episode by episode (MRT, arXiv 2503.07572).

    python train_rl.py --reward mrt --task probe                          # the RL form, from nothing: CPU, 3 minutes
    python mrt.py --task probe --policy DIR --run-dir runs/star           # the STaR form
    python mrt.py --task probe --policy DIR --rounds 0                    # only measure: budget curve and regret of DIR
    python train_rl.py --reward mrt --model smollm2 --task jsonl --data mawps.jsonl --max-episodes 6       # open weights

A long solution is a row of *episodes* z_1..z_k: attempts, checks, detours. Its cumulative regret is how much better one
could have done with the tokens spent so far, summed over the episodes. What can be measured of that is the *meta-prover* mu: the
policy itself, told that the time is up, answers from what it has. J(prefix) is its success rate, and

    progress of episode j = J(z_1..z_j) - J(z_1..z_{j-1}),          J(nothing) included

is its reward, beside the outcome: an episode earns what it adds to the answer that one could give right after it. This is the
form of PAV (pav.py) with two changes: the prover is the policy made to answer *now*, and it is sampled at every step of RL, not
learnt before it. So train_rl.py needs only the values [B,S+1] from here: bonus and credit to the episode's own tokens
are shared. The finished solution has its outcome for a value, so the answer itself is a last step: outcome minus J before it.

What the paper does instead (--mrt-credit scalar, in its on-policy reading): cut a trace after a random number of episodes,
roll out from there, and use R - R_termination, one number for all tokens after the cut; its traces to cut are those of an older
policy, here they are this step's. K answers at one prefix are cheap, but one number cannot say which of the episodes
after the cut was the useful one; where the outcome is nearly always right it says next to nothing. So the default is
the reward of the paper's objective, per episode and on-policy, which costs K answers at every episode.

The STaR form samples, finds for each right trace the earliest prefix with the highest J ("progress has been maximised"), keeps
the traces of least regret, closed there with a right answer of mu, fine-tunes on them, and repeats. The highest of
many noisy estimates is often a lucky one: with 4 answers a prefix the policy learns to stop early and guess. Hence 16 here, and
--min-value: the answer given there must be right nearly always.

Left out: normalising over the joint group of terminated and continued rollouts (J(c) itself is the baseline), the
backtracking variant, a learnt model of J.
"""

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from infra.cli import RunConfig, UserError, opt, parse, say_next, script
from infra.runs import (
    Metrics,
    derive,
    latest_checkpoint,
    load_state,
    mean,
    open_run,
    progress,
    save_checkpoint,
    setup,
    shuffled,
    spare_threads,
    write_json,
)
from labels import boundaries, outcomes
from sample import generate
from tasks import TaskFlags

TERMINATION = "\nTime is up. The answer is"  # where the task has no words of its own


@dataclass
class MRTFlags:
    mu_samples: int = opt(4, "answers of the meta-prover a prefix (K); their success rate is its value", "mrt", low=1)
    mu_tokens: int = opt(0, "tokens that such an answer may have (0: the task's own, else 64)", "mrt", low=0)
    termination_text: str = opt("", "closes the thinking (default: the task's own, else 'Time is up. The answer is'); for models "
                                "that think in tags let it end with </think>", "mrt")
    episode_markers: list = opt([], "an episode begins with a paragraph that begins like one of these, e.g. Wait 'But wait' "
                                "Alternatively (default: an episode is a step of the task)", "mrt")
    episode_paragraphs: int = opt(3, "paragraphs that an episode has at least, with --episode-markers", "mrt", low=1)
    thinking_end: str = opt("</think>", "from here on it is the answer, with --episode-markers", "mrt")
    max_episodes: int = opt(0, "merge neighbouring episodes down to so many a solution (0: do not)", "mrt", low=0)
    mrt_credit: str = opt("episode", "progress of each episode to its own tokens, or of all after a random cut to all of them",
                          "mrt", choices=["episode", "scalar"])


# ----------------------------------------------------------------------------------------------------
# Episodes.


def split_episodes(pieces, markers, paragraphs=1, thinking_end=""):
    """pieces: the bytes of each token -> exclusive ends of the episodes, in tokens: increasing, the last is len(pieces).

    A paragraph follows a blank line. One that begins with a marker begins an episode, if the last one has at least
    `paragraphs` of them. The first token that holds the paragraph's text belongs to it, as do all later ones.
    """
    starts = [0, *itertools.accumulate(map(len, pieces))]  # byte at which each token starts, and the length
    text = b"".join(pieces)
    stop = text.find(thinking_end.encode()) if thinking_end else -1
    cuts, at, count = [], 0, 0
    while (at := text.find(b"\n\n", at)) >= 0 and not 0 <= stop <= at:
        while text[at : at + 1] == b"\n":
            at += 1
        count += 1
        if count >= paragraphs and any(text.startswith(m.encode(), at) for m in markers):
            cuts, count = [*cuts, at], 0
    cuts += [stop] if stop > 0 else []
    ends = {max(i for i, s in enumerate(starts[:-1]) if s <= cut) for cut in cuts}  # first token of the new episode
    return sorted({e for e in ends if e} | ({len(pieces)} if pieces else set()))


def merge_episodes(ends, most):
    """At most `most` episodes, by joining neighbours as evenly as can be; the last end stays. most=0: as it is."""
    n = len(ends)
    return ends if not most or n <= most else [ends[n * (i + 1) // most - 1] for i in range(most)]


def episode_ends(task, rollouts, tokenizer, cfg):
    """[B,S+1] ends of the episodes as labels.boundaries gives those of the steps: column 0 the prompt's length, padded by
    repeating. The last step of a solution is the end of all: its answer, or what the limit cut off."""
    if not cfg.episode_markers:
        rows = [list(dict.fromkeys(r)) for r in boundaries(task, rollouts, tokenizer).tolist()]
    else:
        rows = []
        for b in range(len(rollouts)):
            start = int(rollouts.prompt_len[b])
            pieces = [b"" if t in tokenizer.eos_ids else tokenizer.token_bytes(t) for t in rollouts.completion(b)]
            found = split_episodes(pieces, cfg.episode_markers, cfg.episode_paragraphs, cfg.thinking_end)
            rows.append([start, *(start + e for e in found)])
    rows = [r[:1] + merge_episodes(r[1:-1], cfg.max_episodes) + r[-1:] if len(r) > 1 else r for r in rows]
    width = max(map(len, rows))
    return torch.tensor([r + r[-1:] * (width - len(r)) for r in rows])


# ----------------------------------------------------------------------------------------------------
# The meta-prover.


def answer_now(model, tokenizer, task, starts, cfg, seed):
    """K answers to each prefix, its thinking closed. starts: n times (problem, tokens of prompt and prefix, prompt length).

    Returns right [n,K] float, answers [n][K] (token ids after the prefix, the closing included), tokens sampled.
    Grading sees the whole text, as for any solution. UserError: a prefix that fills the context.
    """
    closing = tokenizer.encode(cfg.termination_text or getattr(task, "termination", TERMINATION))
    room = cfg.mu_tokens or getattr(task, "answer_tokens", 64)
    rows = [(p, tokens + closing, start) for p, tokens, start in starts for _ in range(cfg.mu_samples)]
    out = generate(model, [tokens for _, tokens, _ in rows], max_new_tokens=room, temperature=cfg.temperature, seed=seed,
                   stop_ids=tokenizer.eos_ids, slots=cfg.slots)
    spent = int((out.length - out.prompt_len).sum())
    out.prompt_len = torch.tensor([start for *_, start in rows])  # from here on prefix, closing and answer are one text
    right = outcomes(task, [p for p, *_ in rows], out, tokenizer).view(-1, cfg.mu_samples)
    own = [len(tokens) - len(closing) for _, tokens, _ in rows]
    answers = [out.tokens[i, own[i] : out.length[i]].tolist() for i in range(len(rows))]
    return right, [answers[i : i + cfg.mu_samples] for i in range(0, len(rows), cfg.mu_samples)], spent


def random_cuts(ends, seed):
    """The scalar form as a row of two steps, before and after a random episode end: [B,S+1] -> [B,3]. The finished
    solution is no cut; the bare prompt is one."""
    rows = [list(dict.fromkeys(r)) for r in ends.tolist()]
    return torch.tensor([[r[0], r[derive(seed, b) % max(1, len(r) - 1)], r[-1]] for b, r in enumerate(rows)])


def prefixes(problems, rollouts, ends):
    """What mu is asked: every distinct end of row b but its last, as {(b, end): (problem, tokens, prompt length)}."""
    return {(b, e): (problems[b], rollouts.tokens[b, :e].tolist(), row[0])
            for b, row in enumerate(ends.tolist()) for e in dict.fromkeys(row) if e < row[-1]}


def pooled(asked, right):
    """{(b, end): J}: the mean over all answers to the same tokens. The G samples of a prompt begin alike, the bare prompt
    above all, and one estimate from G*K answers serves them better than G of K. asked: see prefixes; right [n,K]."""
    sums = {}
    for (_, tokens, _), r in zip(asked.values(), right.mean(1).tolist()):
        total, n = sums.get(tuple(tokens), (0.0, 0))
        sums[tuple(tokens)] = total + r, n + 1
    return {k: sums[tuple(tokens)][0] / sums[tuple(tokens)][1] for k, (_, tokens, _) in asked.items()}


def value_table(ends, J, outcome):
    """[B,S+1] float32: J at the ends, the outcome at the last; 0 where nothing was asked."""
    rows = enumerate(ends.tolist())
    return torch.tensor([[outcome[b] if e == row[-1] else J.get((b, e), 0.0) for e in row] for b, row in rows])


def meta_values(model, tokenizer, task, cfg, step, problems, rollouts):
    """J at the prompt and after every episode, from K answers each -> ends [B,S+1], J [B,S+1] float32, tokens sampled.

    The last column is the outcome. Rows as in step_values. With --mrt-credit scalar S is 2, before and after the cut,
    and the first J is that of the cut, so that the step before it earns nothing.
    """
    if cfg.gate == "legal" and (cfg.mrt_credit == "scalar" or cfg.episode_markers or cfg.max_episodes):
        raise UserError("--gate legal counts the task's steps, which these episodes are not; use --gate none or outcome")
    ends = episode_ends(task, rollouts, tokenizer, cfg)
    if cfg.mrt_credit == "scalar":
        ends = random_cuts(ends, derive(cfg.seed, "cut", step))
    asked = prefixes(problems, rollouts, ends)
    if cfg.mrt_credit == "scalar":  # only the cut is needed
        asked = {k: v for k, v in asked.items() if k[1] == int(ends[k[0], 1])}
    right, _, spent = answer_now(model, tokenizer, task, list(asked.values()), cfg, derive(cfg.seed, "mu", step))
    values = value_table(ends, pooled(asked, right), outcomes(task, problems, rollouts, tokenizer).tolist())
    if cfg.mrt_credit == "scalar":
        values[:, 0] = values[:, 1]
    return ends, values, spent


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
                   temperature=cfg.temperature, stop_ids=tokenizer.eos_ids, slots=cfg.slots)
    ends = episode_ends(task, out, tokenizer, cfg)
    asked = prefixes(problems, out, ends)
    right, _, spent = answer_now(model, tokenizer, task, list(asked.values()), cfg, derive(seed, "mu"))
    outcome = outcomes(task, problems, out, tokenizer)
    tables = {"": pooled(asked, right)}
    if hasattr(task, "value_now"):
        tables["_exact"] = {k: task.value_now(p, tokenizer.decode(t[n:])) for k, (p, t, n) in asked.items()}
    lengths = (out.length - out.prompt_len).float()
    found = dict(accuracy=float(outcome.mean()), tokens=float(lengths.mean()), budget=limit,
                 clipped=mean(r == "length" for r in out.finish_reason),
                 J0=mean(v for (b, e), v in tables[""].items() if e == int(out.prompt_len[b])), measured_tokens=spent)
    for name, J in tables.items():
        tokens, values = ends - ends[:, :1], value_table(ends, J, outcome.tolist())
        curves = [curve(t, v, limit) for t, v in zip(tokens.tolist(), values.tolist())]
        found |= {"regret" + name: regret(tokens, values, limit), "curve" + name: np.mean(curves, 0).round(4).tolist()}
    if "_exact" in tables:
        a, b = (np.array([t[k] for k in asked]) for t in (tables[""], tables["_exact"]))
        found |= dict(J_bias=float((a - b).mean()), J_rms=float(((a - b) ** 2).mean() ** 0.5))
    return found


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
    found = []
    for first in range(0, len(rollouts), n):
        mine = []
        for b in range(first, first + n):
            own = [e for e in dict.fromkeys(ends[b].tolist()) if (b, e) in J]
            end, gain = best_prefix(own, [J[b, e] for e in own])
            if gain <= 0 or not good[b, end] or J[b, end] < min_value:
                continue
            upto = torch.tensor([[e for e in own if e <= end]])
            area = regret(upto - own[0], torch.tensor([[J[b, e] for e in upto[0].tolist()]]), budget)
            tokens = rollouts.tokens[b].tolist()
            mine.append((area, b, tokens[: own[0]], tokens[own[0] : end] + good[b, end][0]))
        found += [(prompt, completion) for _, _, prompt, completion in sorted(mine)[:keep]]
    return found


def star_round(model, tokenizer, task, cfg, number, device):
    """Sample, ask mu everywhere, choose, fine-tune. Returns what to log."""
    from train_sft import adamw, sft_step

    limit, G = cfg.max_completion_length or task.max_new_tokens, cfg.num_generations
    pool = task.problems("train", None, cfg.seed)
    problems = [pool[i % len(pool)] for i in range(number * cfg.num_prompts, (number + 1) * cfg.num_prompts) for _ in range(G)]
    out = generate(model, [task.prompt_tokens(p, tokenizer) for p in problems], max_new_tokens=limit, temperature=cfg.temperature,
                   seed=derive(cfg.seed, "star", number), stop_ids=tokenizer.eos_ids, slots=cfg.slots)
    ends = episode_ends(task, out, tokenizer, cfg)
    asked = prefixes(problems, out, ends)
    right, answers, spent = answer_now(model, tokenizer, task, list(asked.values()), cfg, derive(cfg.seed, "star mu", number))
    good = {k: [a for a, r in zip(texts, row) if r] for k, texts, row in zip(asked, answers, right.tolist())}
    examples = choose(out, ends, pooled(asked, right), good, G, cfg.keep, limit, cfg.min_value)
    if not examples:
        print(f"round {number + 1}: no solution made progress to a right answer, the policy stays as it is; take a better "
              "--policy, or raise --num-generations")
    (optimizer, params), nll = adamw(model, cfg), float("nan")
    for step in range(cfg.steps if examples else 0):
        batch = []
        for i in range(step * cfg.batch_size, (step + 1) * cfg.batch_size):
            epoch, at = divmod(i, len(examples))
            batch.append(examples[shuffled(len(examples), cfg.seed, "star", number, epoch)[at]])
        nll, _ = sft_step(model, batch, cfg, device)
        torch.nn.utils.clip_grad_norm_(params, cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return dict(loss=nll, kept=len(examples), kept_length=mean(len(c) for _, c in examples),
                num_tokens=int((out.length - out.prompt_len).sum()), mu_tokens=spent)


def train(cfg):
    """The STaR form, or with --rounds 0 the measurement alone. A killed run goes on with the round it was in."""
    from model import load_model, load_weights, write_model
    from tasks import get_task

    device, task = setup(cfg.device, cfg.threads), get_task(cfg)
    if not cfg.policy:
        raise UserError("--policy is missing: give the folder of the policy to start from (train_sft.py makes one)")
    cfg.run_dir = cfg.run_dir or f"runs/{cfg.task}/{'star' if cfg.rounds else 'measure'}"
    run = Path(cfg.run_dir)
    problems = task.problems(cfg.eval_split, cfg.eval_problems, 0)
    lock = open_run(run, cfg, ignore=("run_dir", "device"))  # noqa: F841 (held until the end)
    if (run / "summary.json").exists():
        print(f"{run} is complete")
        return json.loads((run / "summary.json").read_text())
    model, tokenizer = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    spare_threads(model, cfg.threads)
    state = dict(step=0, num_tokens=0, mu_tokens=0, seconds=0.0)
    if folder := latest_checkpoint(run):
        load_weights(model, folder)
        state = load_state(folder)
        print(f"resuming {run} at round {state['step']}")
    metrics, clock = Metrics(run, state["step"] or -1), time.time() - state["seconds"]
    for number in progress(range(state["step"], cfg.rounds), "star"):
        logs = star_round(model, tokenizer, task, cfg, number, device)
        for k in ("num_tokens", "mu_tokens"):
            state[k] = logs[k] = state[k] + logs[k]
        metrics.write(number + 1, **logs)
        books = {k: state[k] for k in ("num_tokens", "mu_tokens")} | dict(seconds=time.time() - clock)
        save_checkpoint(run, number + 1, lambda f: write_model(f, model, tokenizer), state=books)
    found = measure(model, tokenizer, task, problems, cfg, 0)
    summary = found | dict(num_tokens=state["num_tokens"], mu_tokens=state["mu_tokens"], seconds=round(time.time() - clock, 1))
    write_json(run / "summary.json", summary)
    limit, exact = found["budget"], f" (exact J: {found['regret_exact']:.3f})" if "regret_exact" in found else ""
    print(f"accuracy when stopped after {limit // 4}, {limit // 2}, {limit} tokens: " + ", ".join(
        f"{found['curve'][t]:.3f}" for t in (limit // 4, limit // 2, limit)) + f"; at the first token {found['J0']:.3f}")
    print(f"{cfg.rounds} rounds: accuracy {found['accuracy']:.3f} with {found['tokens']:.1f} tokens, normalised regret up to "
          f"{limit} tokens {found['regret']:.3f}{exact} (n={len(problems)}), {summary['seconds']:.0f} s -> {run}")
    return summary


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.smoke:
        cfg.rounds, cfg.num_prompts, cfg.num_generations, cfg.steps, cfg.eval_problems = min(cfg.rounds, 1), 8, 4, 2, 16
    summary = train(cfg)
    say_next(cfg, ("the same by RL", ["train_rl.py", "--reward", "mrt", "--policy", cfg.policy, "--run-dir",
                                      f"{cfg.run_dir}_rl"]))
    return summary


if __name__ == "__main__":
    script(main)
