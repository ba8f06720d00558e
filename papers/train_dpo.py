"""Learn from wrong solutions: DPO on pairs that are cut at the first pit (per-step DPO).

    python train_sft.py --task chain --num-problems 256 --num-examples 256 --run-dir runs/sft
    python -m papers.train_dpo --task chain --num-problems 256 --policy runs/sft --run-dir runs/dpo                # CPU, 20 s
    python -m papers.train_dpo --task chain --num-problems 256 --policy runs/sft --run-dir runs/whole --pairs whole

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

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from infra.cli import RunConfig, UserError, opt, parse, print_next_command, run_folder, script
from infra.runs import Run, mean, one_thread_if_tiny, read_json, require_finite, setup, with_progress_bar, write_json
from infra.seeds import derive, shuffled
from model import load_model, load_weights, pad_right, token_logprobs, write_model
from papers.rft import count, keep_correct, sample_solutions
from rollouts import continue_and_grade, distinct, pass_at_k, shards, step_ends, write_tensors
from sample import generate
from tasks import TaskFlags, adopt_task, get_task
from tasks.context import leave_out_long
from train_sft import accuracy, adamw, encode_solution, first_problems, strength_of


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
    logprob, _ = token_logprobs(model, tokens.to(device), targets, temperature, length)  # a pair begins alike
    table = torch.zeros(targets.shape, device=device).masked_scatter(targets, logprob)
    return table.sum(1)


# ----------------------------------------------------------------------------------------------------
# 1-2. Negatives and the values of their prefixes.


def choose_negatives(solutions, ends, cap):
    """[[(row, step ends relative to the completion)]]: distinct wrong solutions of each problem, at most cap."""
    chosen = []
    for i in range(len(solutions.problems)):
        negatives = {}
        for b in solutions.rows(i):
            start, *later = distinct(ends[b])
            if not solutions.correct[b] and later:
                relative = [e - start for e in later]
                negatives.setdefault(tuple(solutions.rollouts.completion(b)), (b, relative))
        chosen.append(list(negatives.values())[:cap])
    return chosen


def value_prefixes(policy, tokenizer, task, solutions, negatives, cfg, folder):
    """n_mc continuations of every distinct step prefix of the negatives -> {(problem, prefix ids): (successes, a right
    completion that begins with it or None)}, tokens sampled. Two negatives that share a prefix share its rollouts."""
    limit = cfg.max_completion_length or task.max_new_tokens
    complete = partial(generate, policy, stop_ids=task.stop_ids(tokenizer), temperature=cfg.temperature, slots=cfg.slots)

    def make(shard, indices):
        prefixes = []  # (problem, ids of prompt and prefix, prompt length)
        for i in indices:
            of_problem = {}
            for b, ends in negatives[i]:
                start = int(solutions.rollouts.prompt_len[b])
                for e in ends[:-1]:
                    if e < limit:
                        of_problem[tuple(solutions.rollouts.tokens[b, : start + e].tolist())] = start
            prefixes += [(i, list(ids), start) for ids, start in of_problem.items()]
        starts = [(solutions.problems[i], ids, start) for i, ids, start in prefixes]
        seed = derive(cfg.seed, "prefixes", shard)
        rolled, right, spent = continue_and_grade(complete, task, tokenizer, starts, cfg.n_mc, limit, seed)
        bridges = []  # the first right continuation that ended by itself
        for j in range(len(prefixes)):
            rows = [j * cfg.n_mc + m for m in range(cfg.n_mc) if right[j, m] > 0.5]
            ended = [b for b in rows if rolled.finish_reason[b] == "stop" or not task.ends_with_eos]
            bridges.append(rolled.completion(ended[0]) if ended else [])
        tokens, length = pad_right([[0], *(ids for _, ids, _ in prefixes)])  # a first row, so that it is never empty
        bridge, bridge_len = pad_right([[0], *bridges])
        return dict(
            problem=torch.tensor([i for i, _, _ in prefixes], dtype=torch.int64),
            tokens=tokens[1:],
            length=length[1:],
            prompt_len=torch.tensor([start for _, _, start in prefixes], dtype=torch.int64),
            successes=(right > 0.5).sum(1),
            bridge=bridge[1:],
            bridge_len=bridge_len[1:],
            spent=torch.tensor(spent),
        )

    values = {}
    spent = 0
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


def positives_of(task, tokenizer, problems, sampled, cfg):
    """Right completions of each problem; sampled: the policy's own. Demonstrations are those that SFT saw (same seed), and
    are graded too."""
    positives = []
    for i, problem in enumerate(problems):
        if cfg.positives == "sampled" or (cfg.positives == "either" and sampled[i]):
            positives.append(sampled[i])
            continue
        text = task.demonstration(problem, strength_of(cfg, task), derive(cfg.seed, "demonstration", i))
        positives.append([encode_solution(task, tokenizer, text)] if task.grade(problem, text) > 0.5 else [])
    return positives


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


def build_pairs(policy, tokenizer, task, cfg, folder, device):
    """Stages 1-4 and the reference's log-probs, once -> folder/pairs.safetensors (ids, log-probs) and pairs.json."""
    problems = first_problems(task, cfg.num_problems, cfg.seed)
    solutions = sample_solutions(policy, tokenizer, task, problems, cfg.num_generations, cfg, folder / "rollouts")
    right = keep_correct(solutions, 0)
    counts = count(solutions, right)
    ends = step_ends(task, solutions.rollouts, tokenizer, credit=True)
    negatives = choose_negatives(solutions, ends, cfg.num_negatives)
    values, spent = {}, 0
    if cfg.pairs == "per_step":
        values, spent = value_prefixes(policy, tokenizer, task, solutions, negatives, cfg, folder / "rollouts")
    positives = positives_of(task, tokenizer, problems, right, cfg)
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
    write_json(folder / "pairs.json", dict(counts=counts, pairs=notes))
    columns = reference_logps(policy, pairs, cfg.micro_batch_size or cfg.batch_size, device)
    for side, name in enumerate(("prompt", "chosen", "rejected")):
        columns[name], columns[name + "_len"] = pad_right([pair[side] for pair in pairs])
    write_tensors(folder / "pairs.safetensors", columns)


@torch.no_grad()
def reference_logps(policy, pairs, size, device):
    """-> {"ref_chosen": [N], "ref_rejected": [N]} summed log-probs under the frozen policy."""
    columns = {}
    for side, name in ((1, "ref_chosen"), (2, "ref_rejected")):
        rows = [(pair[0], pair[side]) for pair in pairs]
        parts = [completion_logps(policy, rows[i : i + size], device).cpu() for i in range(0, len(rows), size)]
        columns[name] = torch.cat(parts)
    return columns


def load_pairs(folder):
    """-> [(prompt ids, chosen ids, rejected ids)], reference log-probs [N] and [N], counts."""
    columns = load_file(folder / "pairs.safetensors")
    sides = []
    for name in ("prompt", "chosen", "rejected"):
        sides.append([ids[:n].tolist() for ids, n in zip(columns[name], columns[name + "_len"].tolist())])
    return list(zip(*sides)), columns["ref_chosen"], columns["ref_rejected"], read_json(folder / "pairs.json")["counts"]


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


def check(cfg, task):
    """UserError: what cannot work, before anything is sampled."""
    for split in ("train", "val"):
        task.problems(split, 1, cfg.seed)  # fail early on an empty split
    if not cfg.policy:
        raise UserError("--policy is missing: give the folder of the SFT policy (train_sft.py makes one)")
    if cfg.pairs == "per_step" and cfg.n_mc < cfg.best_of_k:
        raise UserError(f"--n-mc {cfg.n_mc} continuations cannot estimate Best-of-{cfg.best_of_k}: raise --n-mc to at least "
                        "--best-of-k")
    if cfg.pairs != "per_step" and cfg.positive == "shared_prefix":
        raise UserError("--positive shared_prefix needs a pit: use it with --pairs per_step")


def train(cfg):
    """Sample, value, cut, pair, train -> a checkpoint in --run-dir. Resumes by itself. -> summary."""
    device = setup(cfg.device, cfg.threads)
    cfg.run_dir = run_folder(cfg, "dpo")
    task = get_task(cfg)
    check(cfg, task)
    run = Run(cfg, ignore=("run_dir", "device", "logging_steps"))
    if run.summary:
        return run.summary
    model, tokenizer = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    one_thread_if_tiny(model, cfg.threads)
    leave_out_long(task, tokenizer, model, "train", "val")
    if not (run.folder / "pairs.safetensors").exists():
        build_pairs(model, tokenizer, task, cfg, run.folder, device)
    pairs, ref_chosen, ref_rejected, counts = load_pairs(run.folder)
    words = {k.replace("_", " "): f"{v:.2f}" if isinstance(v, float) else v for k, v in counts.items()}
    print("pairs: " + ", ".join(f"{k} {v}" for k, v in words.items()), flush=True)
    per_epoch = math.ceil(len(pairs) / cfg.batch_size)
    steps = cfg.max_steps or per_epoch * cfg.epochs
    start = run.resume(model, partial(load_weights, model), lambda params: adamw(params, cfg))["step"]
    for step in with_progress_bar(range(start + 1, steps + 1), "dpo"):
        epoch, at = divmod(step - 1, per_epoch)
        if at == 0 or step == start + 1:
            order = shuffled(len(pairs), cfg.seed, "epoch", epoch)
        rows = order[at * cfg.batch_size : (at + 1) * cfg.batch_size]
        warm = min(1.0, step / max(1, steps // 20))
        rate = cfg.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        logs = dpo_step(model, [pairs[i] for i in rows], (ref_chosen[rows], ref_rejected[rows]), cfg, device)
        grad_norm = torch.nn.utils.clip_grad_norm_(run.params, cfg.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            sequences = [list(pairs[i][0]) + list(pairs[i][side]) for i in rows for side in (1, 2)]
            tokens, length = pad_right(sequences)  # chosen, rejected, chosen, ...
            require_finite(run.folder, step, grad_norm, dict(tokens=tokens, length=length), cfg.learning_rate)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        if step == 1 or step % cfg.logging_steps == 0 or step == steps:
            run.log(step, **logs, grad_norm=grad_norm, learning_rate=rate, epoch=step / per_epoch)
        if step % cfg.save_steps == 0 or step == steps:
            run.save(step, lambda folder, whole: write_model(folder, whole, tokenizer))
    problems = task.problems("val", cfg.eval_problems, cfg.seed)
    limit = cfg.max_completion_length or task.max_new_tokens
    score, clipped = accuracy(model, tokenizer, task, problems, limit, cfg.seed)
    summary = run.finish(**counts, accuracy=score, clipped_ratio=clipped, steps=steps)
    print(f"dpo ({cfg.pairs}): {steps} steps on {len(pairs)} pairs, sampled accuracy {score:.3f} (val, n={len(problems)}), "
          f"{summary['seconds']:.0f} s -> {run.folder}")
    return summary


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    adopt_task(cfg, cfg.policy)
    if cfg.smoke:
        cfg.num_generations, cfg.n_mc, cfg.epochs, cfg.eval_problems = 8, max(2, cfg.best_of_k), 1, 32
        cfg.num_problems = min(cfg.num_problems or 32, 32)
    summary = train(cfg)
    print_next_command(cfg, ("how often it is right on test problems", ["-m", "report.evaluate", "--model", cfg.run_dir]))
    return summary


if __name__ == "__main__":
    script(main)
