"""Learn from wrong solutions: DPO on pairs that are cut at the first pit (per-step DPO).

    python train_sft.py --task chain --num-problems 256 --num-examples 256 --run-dir runs/sft
    python train_dpo.py --task chain --num-problems 256 --policy runs/sft --run-dir runs/dpo                # CPU, 20 s
    python train_dpo.py --task chain --num-problems 256 --policy runs/sft --run-dir runs/whole --pairs whole

"RL on Incorrect Synthetic Data" (Setlur et al. 2024, arXiv 2406.14532): a wrong solution is not wrong everywhere.

    1. sample   solutions of the training problems from the SFT policy; its wrong ones are the negatives
    2. value    every step prefix of a negative by n_mc continuations of the same policy, s of which succeed:
                Q = 1 - C(n_mc-s,K) / C(n_mc,K), its success under Best-of-K, unbiased
    3. cut      the negative after its first pit, the first step with the lowest Q. What follows is not blamed: it may
                be right, given the mistake
    4. pair     with a full correct solution, or with the successful continuation of the prefix before the pit
                (--positive shared_prefix, the form of the paper's theorem 6.1)
    5. train    -log sigmoid( beta log pi/ref(chosen) - beta log pi/ref(rejected) ),  ref = the SFT policy, frozen

A complete negative has Q = 0, so the pit is the first step after which no continuation succeeded, at the latest the
last one. K changes no pit (Q rises with s); it scales the Q that is reported. --pairs whole leaves 2 and 3 out: the
usual DPO on whole solutions, for comparison; --pairs random cuts as often but anywhere, to see that the place matters.

What is left out: length normalisation (the loss needs sums), label smoothing, an NLL term on the chosen solution,
a reference that follows the policy. Log-probs of the reference are computed once, before training.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from infra.cli import RunConfig, UserError, opt, parse, say_next, script
from infra.runs import (
    Metrics,
    derive,
    latest_checkpoint,
    load_state,
    mean,
    open_run,
    progress,
    require_finite,
    save_checkpoint,
    setup,
    shuffled,
    spare_threads,
    write_json,
)
from model import load_model, load_weights, pad_right, shared_prefixes, token_logprobs, write_model
from pav import boundaries
from sample import generate, pass_at_k
from papers.rft import count, first_problems, keep_correct, sample_solutions, shards, write_shard
from tasks import TaskFlags, get_task
from train_sft import accuracy, adamw


@dataclass
class Config(TaskFlags, RunConfig):
    policy: str = opt("", "the SFT policy: where training starts, and the reference", "pairs")
    pairs: str = opt("per_step", "per_step: negatives end at their first pit; whole: they are whole solutions; random: they "
                     "end at any step (control)", "pairs", choices=["per_step", "whole", "random"])
    positive: str = opt("full", "full: a complete right solution; shared_prefix: the negative's own steps before the pit, "
                        "then a continuation that succeeds", "pairs", choices=["full", "shared_prefix"])
    positives: str = opt("either", "right solutions from the policy, from the demonstrations, or a demonstration where the "
                         "policy has none", "pairs", choices=["sampled", "demonstration", "either"])
    strength: float = opt(-1.0, "demonstrator's strength, as in train_sft.py (-1: the task's base strength)", "pairs")
    num_problems: int = opt(0, "only the first so many training problems, as in train_sft.py (0: all)", "pairs", low=0)
    num_generations: int = opt(16, "solutions sampled a problem", "pairs", low=1)
    num_negatives: int = opt(8, "wrong solutions used a problem, at most", "pairs", low=1)
    n_mc: int = opt(8, "continuations a step prefix", "pairs", low=1)
    best_of_k: int = opt(5, "K of the Best-of-K policy whose Q is estimated", "pairs", low=1)
    temperature: float = opt(1.0, "of solutions and continuations", "pairs", above=0)
    slots: int = opt(512, "sequences decoded at once", "pairs", low=1)
    shard_problems: int = opt(200, "problems per file of rollouts (what a kill may cost)", "pairs", low=1)
    beta: float = opt(0.3, "how far the policy may go from the reference: small is far", "optimization", above=0)
    epochs: int = opt(2, "passes over the pairs", "optimization", low=1)
    max_steps: int = opt(0, "optimizer steps, instead of --epochs (0: by epochs)", "optimization", low=0)
    batch_size: int = opt(64, "pairs a step", "optimization", low=1)
    micro_batch_size: int = opt(0, "pairs a backward pass, to save memory (0: the whole batch)", "optimization", low=0)
    learning_rate: float = opt(3e-4, "peak of AdamW; warm-up over 5%, cosine to a tenth (open weights: 1e-6 or less)",
                               "optimization", above=0)
    weight_decay: float = opt(0.0, "decoupled weight decay of matrices", "optimization", low=0)
    max_grad_norm: float = opt(1.0, "gradient clipping by global norm", "optimization", above=0)
    logging_steps: int = opt(10, "steps between lines of metrics.jsonl", "evaluation", low=1)
    save_steps: int = opt(200, "steps between checkpoints", "evaluation", low=1)
    eval_problems: int = opt(256, "problems for the accuracy at the end (one sample each)", "evaluation", low=1)


# ----------------------------------------------------------------------------------------------------
# Pure functions: the method.


def first_pit(q):
    """Index of the first step with the lowest Q. q: value after step 1, 2, ..., S (S >= 1)."""
    return min(range(len(q)), key=q.__getitem__)  # min() keeps the first of equals


def step_q(successes, n_mc, k):
    """Counts s_i of n_mc continuations after each step -> Q_i under Best-of-k, unbiased; None (the solution is
    complete, there is nothing to continue) -> 0, as the solution is wrong."""
    return [0.0 if s is None else pass_at_k(n_mc, s, k) for s in successes]


def make_pair(prompt, negative, ends, pit, positives, turn=0, bridge=None):
    """One preference pair as token ids: (prompt, chosen, rejected), or None if nothing contradicts the negative.

    negative: completion ids; ends: exclusive ends of its steps in them; pit: index of the step it is cut after
    (len(ends)-1: the whole). positives: right completions; number `turn` is taken, cyclically. bridge: instead of
    them a right completion that shares the steps before the pit; then those stand in the prompt (they would cancel
    in the loss). A positive that itself goes through the pit refutes it and is passed over.
    """
    rejected, shared = negative[: ends[pit]], 0
    if bridge is not None:
        shared, positives = (ends[pit - 1] if pit else 0), [bridge]
        if bridge[:shared] != negative[:shared]:
            raise ValueError("the bridge does not share the steps before the pit")
    usable = [y for y in positives if y[: len(rejected)] != rejected]
    if not usable:
        return None
    chosen = usable[turn % len(usable)]
    return prompt + negative[:shared], chosen[shared:], rejected[shared:]


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO (Rafailov et al. 2023, eq. 7). Summed log-probs [N] of both completions under policy and reference
    -> loss [N], implicit rewards beta * log pi/ref of chosen and rejected [N]."""
    chosen_reward, rejected_reward = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_reward - rejected_reward), chosen_reward, rejected_reward


def completion_logps(model, rows, device, temperature=1.0):
    """rows: [(prompt ids, completion ids)] -> [B] summed log-prob of each completion; the prompt has no part in it.

    Not through model.token_loss: the loss couples the tokens of two sequences, which a chunk of tokens does not see. To
    run the log-probs first and then a linear loss with the pairs' coefficients would cost 2 + 6 NDV, the same 8.
    """
    tokens, length = pad_right([p + c for p, c in rows])
    prompt_len = torch.tensor([len(p) for p, _ in rows])
    t = torch.arange(tokens.shape[1])
    targets = ((t >= prompt_len[:, None]) & (t < length[:, None])).to(device)
    share = shared_prefixes(tokens[:, :-1], length - 1, device)  # a pair begins alike
    logprob, _ = token_logprobs(model, tokens.to(device), targets, temperature, share)
    table = torch.zeros(targets.shape, device=device).masked_scatter(targets, logprob)
    return table.sum(1)


# ----------------------------------------------------------------------------------------------------
# 1-2. Negatives and the values of their prefixes.


def choose_negatives(solutions, ends, cap):
    """[[(row, step ends relative to the completion)]]: distinct wrong solutions of each problem, at most cap."""
    chosen = []
    for i in range(len(solutions.problems)):
        mine = {}
        for b in solutions.rows(i):
            start, length = int(solutions.rollouts.prompt_len[b]), int(solutions.rollouts.length[b])
            if not solutions.correct[b] and length > start:
                own = [e - start for e in sorted(set(ends[b, 1:].tolist()))]
                mine.setdefault(tuple(solutions.rollouts.completion(b)), (b, own))
        chosen.append(list(mine.values())[:cap])
    return chosen


def value_prefixes(policy, tokenizer, task, solutions, negatives, cfg, folder):
    """n_mc continuations of every distinct step prefix of the negatives -> {(problem, prefix ids): (successes, a right
    completion that begins with it or None)}, tokens sampled. Two negatives that share a prefix share its rollouts."""
    limit = cfg.max_completion_length or task.max_new_tokens
    out = solutions.rollouts

    def make(shard, indices):
        found = []  # (problem, prompt length, ids of prompt and prefix)
        for i in indices:
            mine = {}
            for b, ends in negatives[i]:
                start = int(out.prompt_len[b])
                for e in ends[:-1]:
                    if e < limit:
                        mine[tuple(out.tokens[b, : start + e].tolist())] = start
            found += [(i, start, list(ids)) for ids, start in mine.items()]
        m = cfg.n_mc
        rolled = generate(policy, [ids for _, _, ids in found for _ in range(m)], stop_ids=tokenizer.eos_ids,
                          max_new_tokens=[limit - (len(ids) - start) for _, start, ids in found for _ in range(m)] or 1,
                          temperature=cfg.temperature, seed=derive(cfg.seed, "prefixes", shard), slots=cfg.slots)
        successes, bridges = [], []
        for j, (i, start, _) in enumerate(found):
            right = []
            for b in range(j * m, (j + 1) * m):
                completion = rolled.tokens[b, start : rolled.length[b]].tolist()
                if task.grade(solutions.problems[i], tokenizer.decode(completion)) > 0.5:
                    right.append((rolled.finish_reason[b] == "stop" or not task.ends_with_eos, completion))
            successes.append(len(right))
            bridges.append(next((c for finished, c in right if finished), []))
        tokens, length = pad_right([ids for *_, ids in found]) if found else (torch.zeros(0, 1).long(), torch.zeros(0).long())
        bridge, bridge_len = pad_right([[0], *bridges])  # a first row, so that it is never empty
        return dict(problem=torch.tensor([f[0] for f in found], dtype=torch.int64), tokens=tokens, length=length,
                    prompt_len=torch.tensor([f[1] for f in found], dtype=torch.int64),
                    successes=torch.tensor(successes, dtype=torch.int64), bridge=bridge[1:], bridge_len=bridge_len[1:],
                    spent=(rolled.length - rolled.prompt_len).sum())

    values, spent = {}, 0
    indices = list(range(len(solutions.problems)))
    for part in shards(folder, "prefixes", indices, cfg.shard_problems, make, "prefixes"):
        spent += int(part["spent"])
        for j in range(len(part["problem"])):
            ids = part["tokens"][j, part["prompt_len"][j] : part["length"][j]].tolist()
            bridge = part["bridge"][j, : part["bridge_len"][j]].tolist() or None
            values[int(part["problem"][j]), tuple(ids)] = int(part["successes"][j]), bridge
    return values, spent


# ----------------------------------------------------------------------------------------------------
# 3-4. Pairs.


def positives_of(task, tokenizer, problems, kept, cfg):
    """Right completions of each problem. Demonstrations are those that SFT saw (same seed), and are graded too."""
    strength = cfg.strength if cfg.strength >= 0 or not task.strengths else task.strengths["base"]
    out = []
    for i, problem in enumerate(problems):
        if cfg.positives == "sampled" or (cfg.positives == "either" and kept[i]):
            out.append(kept[i])
            continue
        text = task.demonstration(problem, strength, derive(cfg.seed, "demonstration", i))
        ids = tokenizer.encode(text) + ([tokenizer.eos_ids[0]] if task.ends_with_eos else [])
        out.append([ids] if task.grade(problem, text) > 0.5 else [])
    return out


def make_pairs(solutions, negatives, values, positives, cfg, prompts):
    """All pairs: [(prompt, chosen, rejected)], and a list of what was decided for each: problem, pit, steps, Q."""
    pairs, notes = [], []
    for i, mine in enumerate(negatives):
        for turn, (b, ends) in enumerate(mine):
            negative = solutions.rollouts.completion(b)
            pit, q, bridge = len(ends) - 1, [], None
            if cfg.pairs == "per_step":
                q = step_q([values.get((i, tuple(negative[:e])), (None,))[0] for e in ends], cfg.n_mc, cfg.best_of_k)
                pit = first_pit(q)
                if cfg.positive == "shared_prefix" and pit:
                    bridge = values[i, tuple(negative[: ends[pit - 1]])][1]
                    if bridge is None:
                        continue  # what succeeded from there did not end by itself
            elif cfg.pairs == "random":
                pit = derive(cfg.seed, "cut", i, turn) % len(ends)
            pair = make_pair(prompts[i], negative, ends, pit, positives[i], turn, bridge)
            if pair is not None:
                pairs.append(pair)
                notes.append(dict(index=i, problem=solutions.problems[i].key, pit=pit, steps=len(ends),
                                  q=[round(v, 4) for v in q]))
    return pairs, notes


def build_pairs(policy, tokenizer, task, cfg, run, device):
    """Stages 1-4 and the reference's log-probs, once -> run/pairs.safetensors (ids, log-probs) and pairs.json."""
    problems = first_problems(task, cfg.num_problems, cfg.seed)
    solutions = sample_solutions(policy, tokenizer, task, problems, cfg.num_generations, cfg, run / "rollouts")
    kept = keep_correct(solutions, 0)
    counts = count(solutions, kept)
    negatives = choose_negatives(solutions, boundaries(task, solutions.rollouts, tokenizer), cfg.num_negatives)
    values, spent = {}, 0
    if cfg.pairs == "per_step":
        values, spent = value_prefixes(policy, tokenizer, task, solutions, negatives, cfg, run / "rollouts")
    positives = positives_of(task, tokenizer, problems, kept, cfg)
    prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
    pairs, notes = make_pairs(solutions, negatives, values, positives, cfg, prompts)
    if not pairs:
        raise UserError(f"no pair: of {counts['sampled']} sampled solutions {counts['correct']} are right, and no problem has "
                        "a wrong one and a right one to set against it; raise --num-generations or --temperature")
    longest = max(len(p) + max(len(c), len(r)) for p, c, r in pairs)
    if longest > policy.cfg.max_position_embeddings:
        raise UserError(f"a pair has {longest} tokens, the model's context is {policy.cfg.max_position_embeddings}: use "
                        "--positives sampled")
    counts |= dict(negatives=sum(map(len, negatives)), pairs=len(pairs), prefixes=len(values),
                   prefix_rollouts=len(values) * cfg.n_mc, sampled_tokens=counts["sampled_tokens"] + spent,
                   problems_without_pair=len(problems) - len({n["index"] for n in notes}),
                   pit_share=mean((n["pit"] + 1) / n["steps"] for n in notes))
    size = cfg.micro_batch_size or cfg.batch_size
    with torch.no_grad():
        reference = [torch.cat([completion_logps(policy, [(p[0], p[side]) for p in pairs[i : i + size]], device).cpu()
                                for i in range(0, len(pairs), size)]) for side in (1, 2)]
    columns = {}
    for name, rows in (("prompt", [p for p, _, _ in pairs]), ("chosen", [c for _, c, _ in pairs]),
                       ("rejected", [r for _, _, r in pairs])):
        columns[name], columns[name + "_len"] = pad_right(rows)
    write_json(run / "pairs.json", dict(counts=counts, pairs=notes))
    write_shard(run / "pairs.safetensors", columns | dict(ref_chosen=reference[0], ref_rejected=reference[1]))


def load_pairs(run):
    """-> [(prompt ids, chosen ids, rejected ids)], reference log-probs [N] and [N], counts."""
    columns = load_file(run / "pairs.safetensors")
    parts = [[ids[:n].tolist() for ids, n in zip(columns[k], columns[k + "_len"].tolist())]
             for k in ("prompt", "chosen", "rejected")]
    return list(zip(*parts)), columns["ref_chosen"], columns["ref_rejected"], \
        json.loads((run / "pairs.json").read_text())["counts"]


# ----------------------------------------------------------------------------------------------------
# 5. Train.


def dpo_step(model, batch, reference, cfg, device):
    """Accumulate the gradient of the batch's mean loss. batch: n pairs; reference: ([n], [n]) log-probs of chosen and
    rejected. The denominator is n whatever the micro-batches. Returns the metrics under TRL's names."""
    n, size = len(batch), cfg.micro_batch_size or len(batch)
    total = dict.fromkeys(("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
                           "logps/chosen", "logps/rejected"), 0.0)
    for i in range(0, n, size):
        part = batch[i : i + size]
        logps = completion_logps(model, [(p, c) for p, c, _ in part] + [(p, r) for p, _, r in part], device)
        chosen, rejected = logps.split(len(part))
        ref_chosen, ref_rejected = (r[i : i + size].to(device) for r in reference)
        loss, reward_chosen, reward_rejected = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta)
        (loss.sum() / n).backward()
        margin = (reward_chosen - reward_rejected).detach()
        for name, value in (("loss", loss), ("rewards/chosen", reward_chosen), ("rewards/rejected", reward_rejected),
                            ("rewards/margins", margin), ("rewards/accuracies", (margin > 0).float()),
                            ("logps/chosen", chosen), ("logps/rejected", rejected)):
            total[name] += float(value.detach().sum()) / n
    return total


def train(cfg):
    device = setup(cfg.device, cfg.threads)
    cfg.run_dir = cfg.run_dir or f"runs/{cfg.task}/dpo"
    run = Path(cfg.run_dir)
    task = get_task(cfg)
    for split in ("train", "val"):
        task.problems(split, 1, cfg.seed)  # an empty split is said now, not after the work
    if not cfg.policy:
        raise UserError("--policy is missing: give the folder of the SFT policy (train_sft.py makes one)")
    if cfg.pairs == "per_step" and cfg.n_mc < cfg.best_of_k:
        raise UserError(f"--n-mc {cfg.n_mc} continuations cannot estimate Best-of-{cfg.best_of_k}: raise --n-mc to at least "
                        "--best-of-k")
    if cfg.pairs != "per_step" and cfg.positive == "shared_prefix":
        raise UserError("--positive shared_prefix needs a pit: use it with --pairs per_step")
    lock = open_run(run, cfg, ignore=("run_dir", "device", "logging_steps"))  # noqa: F841 (held until the end)
    if (run / "summary.json").exists():
        print(f"{run} is complete")
        return json.loads((run / "summary.json").read_text())
    model, tokenizer = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    spare_threads(model, cfg.threads)
    clock = time.time()
    if not (run / "pairs.safetensors").exists():
        build_pairs(model, tokenizer, task, cfg, run, device)
    pairs, ref_chosen, ref_rejected, counts = load_pairs(run)
    print("pairs: " + ", ".join(f"{k.replace('_', ' ')} {v:.2f}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
                                for k, v in counts.items()), flush=True)
    optimizer, params = adamw(model, cfg)
    per_epoch = math.ceil(len(pairs) / cfg.batch_size)
    steps, start = cfg.max_steps or per_epoch * cfg.epochs, 0
    if folder := latest_checkpoint(run):
        load_weights(model, folder)
        state = load_state(folder, optimizer, params)
        start, clock = state["step"], clock - state["seconds"]
        print(f"resuming {run} at step {start}")
    metrics, order, epoch = Metrics(run, start, cfg.tensorboard), None, -1
    for step in progress(range(start + 1, steps + 1), "dpo"):
        if (step - 1) // per_epoch != epoch:
            epoch = (step - 1) // per_epoch
            order = shuffled(len(pairs), cfg.seed, "epoch", epoch)
        at = (step - 1) % per_epoch * cfg.batch_size
        rows = order[at : at + cfg.batch_size]
        rate = cfg.learning_rate * min(1.0, step / max(1, steps // 20)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logs = dpo_step(model, [pairs[i] for i in rows], (ref_chosen[rows], ref_rejected[rows]), cfg, device)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, cfg.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            bad = [list(p) + list(c) for i in rows for p, c in ((pairs[i][0], pairs[i][1]), (pairs[i][0], pairs[i][2]))]
            tokens, length = pad_right(bad)  # chosen, rejected, chosen, ...
            require_finite(run, step, grad_norm, dict(tokens=tokens, length=length), cfg.learning_rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 1 or step % cfg.logging_steps == 0 or step == steps:
            metrics.write(step, **logs, grad_norm=grad_norm, learning_rate=rate, epoch=step / per_epoch)
        if step % cfg.save_steps == 0 or step == steps:
            save_checkpoint(run, step, lambda f: write_model(f, model, tokenizer), optimizer, params,
                            dict(seconds=time.time() - clock))
    held_out = task.problems("val", cfg.eval_problems, cfg.seed)
    score, clipped = accuracy(model, tokenizer, task, held_out, cfg.max_completion_length or task.max_new_tokens, cfg.seed)
    summary = counts | dict(accuracy=score, clipped_ratio=clipped, steps=steps, seconds=round(time.time() - clock, 1))
    write_json(run / "summary.json", summary)
    print(f"dpo ({cfg.pairs}): {steps} steps on {len(pairs)} pairs, sampled accuracy {score:.3f} (val, n={len(held_out)}), "
          f"{summary['seconds']:.0f} s -> {run}")
    return summary


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.smoke:
        cfg.num_generations, cfg.n_mc, cfg.epochs, cfg.eval_problems = 8, max(2, cfg.best_of_k), 1, 32
        cfg.num_problems = min(cfg.num_problems or 32, 32)
    summary = train(cfg)
    say_next(cfg, ("how often it is right on test problems", ["sample.py", "--model", cfg.run_dir, "--eval"]))
    return summary


if __name__ == "__main__":
    script(main)
