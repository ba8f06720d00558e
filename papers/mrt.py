"""Meta reinforcement fine-tuning: reward thinking that makes progress, episode by episode (MRT, arXiv 2503.07572).

    python -m papers.mrt --task probe                                     # from nothing, with the outcome arm: CPU, 3 minutes
    python -m papers.mrt --task probe --policy DIR --run-dir runs/mrt     # one arm
    python -m papers.mrt --model smollm2 --task jsonl --data mawps.jsonl --max-episodes 6              # open weights

A long solution is a row of *episodes* z_1..z_k: attempts, checks, detours. Its cumulative regret is how much better one
could have done with the tokens spent so far, summed over the episodes. What can be measured of that is the *meta-prover* mu: the
policy itself, told that the time is up, answers from what it has. J(prefix) is its success rate, and

    progress of episode j = J(z_1..z_j) - J(z_1..z_{j-1}),          J(nothing) included

is its reward, beside the outcome: an episode earns what it adds to the answer that one could give right after it. This is the
form of PAV (train_rl.py) with two changes: the prover is the policy made to answer *now*, and it is sampled at every step of
RL, not learned before it. So this loop is train_rl.py's, with J in the place of the verifier's values; bonus, credit and
update are the same functions. The finished solution has its outcome for a value, so the answer itself is a last step.

What the paper does instead (--mrt-credit scalar, in its on-policy reading): cut a trace after a random number of episodes,
roll out from there, and use R - R_termination, one number for all tokens after the cut; its traces to cut are those of an older
policy, here they are this step's. K answers at one prefix are cheap, but one number cannot say which of the episodes
after the cut was the useful one; its expected gradient is the outcome's with another baseline.

Left out: normalising over the joint group of terminated and continued rollouts (J(c) itself is the baseline), the
backtracking variant, a learned model of J. Siblings: papers/mrt_star.py (the STaR form; budget curve and regret).
--alpha 0 --length-penalty X is the baseline that the paper compares with: the outcome minus a price on length.
"""

import copy
import itertools
import sys
from dataclasses import dataclass
from functools import partial

import torch

import pipeline
import train_rl
from infra import parallel
from infra.cli import UserError, opt, parse, print_next_command, script
from infra.runs import Run, Timer, one_thread_if_tiny, read_metrics, require_finite, setup, with_progress_bar
from infra.seeds import batch_indices, derive
from model import load_model, load_weights, write_model
from report.watch import evaluate, rollout_logs, summarize
from rollouts import continue_and_grade, distinct, grades, pad_ends, step_ends
from sample import generate
from tasks import adopt_task, get_task, smoked
from tasks.context import leave_out_long

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
    """[B,S+1] ends of the episodes as rollouts.step_ends gives those of the steps: column 0 the prompt's length, padded by
    repeating. The last step of a solution is the end of all: its answer, or what the limit cut off."""
    if not cfg.episode_markers:
        rows = [distinct(row) for row in step_ends(task, rollouts, tokenizer, credit=True)]
    else:
        rows = []
        for b in range(len(rollouts)):
            start = int(rollouts.prompt_len[b])
            pieces = [b"" if t in tokenizer.eos_ids else tokenizer.token_bytes(t) for t in rollouts.completion(b)]
            found = split_episodes(pieces, cfg.episode_markers, cfg.episode_paragraphs, cfg.thinking_end)
            rows.append([start, *(start + e for e in found)])
    rows = [r[:1] + merge_episodes(r[1:-1], cfg.max_episodes) + r[-1:] if len(r) > 1 else r for r in rows]
    return pad_ends(rows)


# ----------------------------------------------------------------------------------------------------
# The meta-prover.


def answer_now(model, tokenizer, task, starts, cfg, seed):
    """K answers to each prefix, its thinking closed. starts: n times (problem, tokens of prompt and prefix, prompt length).

    Returns right [n,K] float, answers [n][K] (token ids after the prefix, the closing included), tokens sampled.
    Grading sees the whole text, as for any solution. UserError: a prefix that fills the context.
    """
    closing = tokenizer.encode(cfg.termination_text or task.termination)
    room = cfg.mu_tokens or task.answer_tokens
    closed = [(problem, tokens + closing, prompt_len) for problem, tokens, prompt_len in starts]

    def complete(prompts, max_new_tokens, seed):  # mu has a limit of its own, whatever the prefix left
        return generate(model, prompts, max_new_tokens=room, temperature=cfg.temperature, seed=seed,
                        stop_ids=task.stop_ids(tokenizer))

    rolled, right, spent = continue_and_grade(complete, task, tokenizer, closed, cfg.mu_samples, 0, seed)
    answers = []
    for i, (_, tokens, _) in enumerate(starts):
        rows = range(i * cfg.mu_samples, (i + 1) * cfg.mu_samples)
        answers.append([rolled.tokens[b, len(tokens) : rolled.length[b]].tolist() for b in rows])
    return right, answers, spent


def random_cuts(ends, seed):
    """The scalar form as a row of two steps, before and after a random episode end: [B,S+1] -> [B,3]. The finished
    solution is no cut; the bare prompt is one."""
    rows = [distinct(row) for row in ends]
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


def meta_values(model, tokenizer, task, cfg, step, problems, rollouts, outcome):
    """J at the prompt and after every episode, from K answers each -> ends [B,S+1], J [B,S+1] float32, tokens sampled.
    outcome [B]: grades of the rollouts.

    The last column is the outcome. Rows as in step_values. With --mrt-credit scalar S is 2, before and after the cut,
    and the first J is that of the cut, so that the step before it earns nothing.
    """
    ends = episode_ends(task, rollouts, tokenizer, cfg)
    if cfg.mrt_credit == "scalar":
        ends = random_cuts(ends, derive(cfg.seed, "cut", step))
    asked = prefixes(problems, rollouts, ends)
    if cfg.mrt_credit == "scalar":  # only the cut is needed
        asked = {k: v for k, v in asked.items() if k[1] == int(ends[k[0], 1])}
    right, _, spent = answer_now(model, tokenizer, task, list(asked.values()), cfg, derive(cfg.seed, "mu", step))
    values = value_table(ends, pooled(asked, right), outcome.tolist())
    if cfg.mrt_credit == "scalar":
        values[:, 0] = values[:, 1]
    return ends, values, spent


# ----------------------------------------------------------------------------------------------------
# The RL form.


@dataclass
class Config(MRTFlags, train_rl.RLFlags):
    length_penalty: float = opt(0.0, "a right solution of n tokens earns 1 - this * n / limit", "reward", low=0, high=1)

    reward = "mrt"  # what train_rl.advantages reads beside the flags
    guards = ("anchor", "center")


def train(cfg):
    """One arm: load the policy, loop, leave metrics.jsonl and a checkpoint. Resumes by itself. -> summary."""
    device = setup(cfg.device, cfg.threads)
    task = get_task(cfg)
    if cfg.num_prompts * cfg.num_generations % parallel.size():
        raise UserError(f"--num-prompts x --num-generations must be a multiple of the {parallel.size()} processes")
    run = Run(cfg)
    if run.summary:
        return run.summary
    model, tokenizer = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    one_thread_if_tiny(model, cfg.threads)
    leave_out_long(task, tokenizer, model, "train", cfg.eval_split)
    reference = copy.deepcopy(model).requires_grad_(False) if cfg.beta > 0 else None
    state = run.resume(model, partial(load_weights, model), lambda params: train_rl.make_adam(params, cfg))
    tokens_seen = state.get("tokens", 0)
    limit = cfg.max_completion_length or task.max_new_tokens
    train_problems = task.problems("train", None, 0)
    G = cfg.num_generations
    B = cfg.num_prompts * G
    if state["step"] == 0:
        run.log(0, num_tokens=0, episodes=0, **evaluate(model, tokenizer, task, None, cfg, limit))

    for step in with_progress_bar(range(state["step"] + 1, cfg.steps + 1), "rl mrt"):
        timer = Timer("generate", "grade", "verify", "logprob", "backward", "update", "evaluate")
        # 1. Pick P problems, generate G samples of each, grade them: as in train_rl.py.
        picked = batch_indices(len(train_problems), cfg.num_prompts, step, cfg.seed, "rl epoch")
        problems = [train_problems[i] for i in picked for _ in range(G)]
        prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
        rollouts = generate(model, prompts, max_new_tokens=limit, temperature=cfg.temperature,
                            seed=derive(cfg.seed, "rl"), stop_ids=task.stop_ids(tokenizer),
                            sequence_ids=range((step - 1) * B, step * B))
        timer.mark("generate")
        outcome = grades(task, problems, rollouts, tokenizer)
        timer.mark("grade")
        # 2. J after every episode: the policy, told to answer now.
        ends, values, spent = None, None, 0
        if cfg.alpha > 0:
            ends, values, spent = meta_values(model, tokenizer, task, cfg, step, problems, rollouts, outcome)
        timer.mark("verify")
        # 3. Advantages and update: those of PAV.
        mask = rollouts.mask()
        reward = outcome * (1 - cfg.length_penalty * mask.sum(1) / limit)
        adv, logs = train_rl.advantages(cfg, mask, reward, ends, values)
        logs |= {"rewards/outcome/mean": float(outcome.mean()), "mrt/sampled_tokens": spent}
        timer.mark("other")
        for group in run.optimizer.param_groups:
            group["lr"] = cfg.learning_rate * min(1.0, step / max(1, cfg.warmup_steps))
        logs |= train_rl.update(model, reference, run.optimizer, run.params, rollouts, adv, cfg, limit, device, timer)
        batch = dict(tokens=rollouts.tokens, prompt_len=rollouts.prompt_len, length=rollouts.length, advantage=adv)
        require_finite(run.folder, step, logs["grad_norm"], batch, cfg.learning_rate)
        # 4. Evaluate, log, save.
        tokens_seen += rollouts.num_tokens()
        if step % cfg.eval_steps == 0 or step == cfg.steps:
            timer.mark("other")
            logs |= evaluate(model, tokenizer, task, None, cfg, limit)
            timer.mark("evaluate")
        timer.mark("other")
        logs |= rollout_logs(rollouts) | timer.metrics()
        run.log(step, num_tokens=tokens_seen, episodes=step * B, **logs)
        if step % cfg.save_steps == 0 or step == cfg.steps:
            run.save(step, lambda folder, whole: write_model(folder, whole, tokenizer), tokens=tokens_seen)
    mrt_tokens = sum(row.get("mrt/sampled_tokens", 0) for row in read_metrics(run.folder))
    return summarize(run, tokens_seen, cfg.steps * B, "mrt", mrt_tokens=mrt_tokens)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = parse(pipeline.with_flags(Config), argv, __doc__)
    if not cfg.policy or not cfg.run_dir:
        scripts = {"mrt": (["-m", "papers.mrt"], Config), "": (["train_rl.py"], train_rl.Config)}
        return pipeline.run(cfg, scripts, argv)
    adopt_task(cfg, cfg.policy)
    arm = Config(**pipeline.fields_of(cfg, Config))
    summary = train(smoked(arm, "rl"))
    measure = ["-m", "papers.mrt_star", "--policy", cfg.run_dir, "--rounds", 0]
    print_next_command(cfg, ("its budget curve and regret", measure))
    return summary


if __name__ == "__main__":
    script(main)
