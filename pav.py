"""Train a verifier: what is this solution worth so far, and did the last step make progress?

    python pav.py --policy runs/sft --prover runs/prover --num-problems 40000     # CPU, a minute
    python pav.py --task jsonl --data train.jsonl --policy runs/sft --prover base --prover-k 4
    python pav.py --task jsonl --data train.jsonl --policy runs/sft --labels prm800k.jsonl

V^mu(prefix) is the chance that the prover mu, taking over here, still finds the answer
(verifier.py). It is learned from rollouts (PAV, Setlur et al. 2024, arXiv 2410.08146, section 4 and
appendix D):

    1. roll in   n_cov seed solutions a problem from the policy (the states to be asked about),
    2. cut       each at some step ends, the bare prompt among them,
    3. roll out  n_mc continuations a cut from the prover, graded: a Monte-Carlo label of V^mu.
                 Later step ends of a continuation are prover states too and get its own outcome,
                 free;
    4. fit       a Transformer with a scalar head by cross-entropy with these soft labels,
    5. judge     on held-out problems: calibration, AUC, and the correlation of the *advantage*,
                 which is what RL will be paid by (report/judge.py). A verifier can rank states
                 well and steps badly. Who is the prover, beside the base? (report/prover.py)

Once a solution is beyond saving, its later prefixes all say 0, and cuts there teach little.
--coverage first-pit looks where value is lost: of each cut whose value is at least --pit-threshold
it takes a *wrong* continuation, walks along its steps, labels every prefix with pit_mc
continuations, and stops at the first that none of them survives. The paper gives neither the
threshold nor the share of uniform cuts.

--labels FILE takes the labels from rows {prompt, completions, labels} instead (PRM800K,
Math-Shepherd): 1 to 3 are left out. A label is then whatever its file means by it: "no mistake so
far" is not V^mu, and there is no prover that is better than the policy.

What is left out: lower-variance tree estimates, several verifiers of different provers in one
model.
"""

import math
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from infra import parallel
from infra.cli import (
    RunConfig,
    UserError,
    opt,
    parse,
    print_next_command,
    run_folder,
    script,
    stage_words,
)
from infra.optimizer import optimizer_for
from infra.runs import Run, one_thread_if_tiny, require_finite, setup, with_progress_bar
from infra.seeds import derive, shuffled
from model import load_model, load_weights
from report.judge import judge, judge_labels, shortcomings
from report.prover import compare, describe
from rollouts import continue_and_grade, grades, labelled_solutions, shards, stack, step_ends
from sample import generate
from tasks import TaskFlags, get_task, prepare, task_class
from tasks.base import split_of
from tasks.context import leave_out_long
from tasks.files import read_labelled
from verifier import Verifier, load_head, save_verifier


@dataclass
class Config(TaskFlags, RunConfig):
    policy: str = opt(
        "", "the base policy: seed solutions, and the verifier's initial weights", "policies"
    )
    prover: str = opt("base", "who finishes the prefixes: base, or a folder", "policies")
    prover_k: int = opt(1, "take Best-of-K of the prover as prover", "policies", low=1)
    label: str = opt(
        "q",
        "q: every step end gets V^mu; outcome: only the end is labelled (an ORM)",
        "data",
        choices=["q", "outcome"]
    )
    labels: str = opt(
        "", "file of solutions with labelled steps, in place of rollouts (--task asks)", "data"
    )
    num_problems: int = opt(
        0, "training problems (0: all; few problems are repeated)", "data", low=0
    )
    n_cov: int = opt(1, "seed solutions a problem (coverage)", "data", low=1)
    n_mc: int = opt(1, "prover continuations a cut (label noise)", "data", low=1)
    cuts: int = opt(1, "step ends of a seed solution to cut at (0: all of them)", "data", low=0)
    coverage: str = opt(
        "uniform",
        "first-pit: after the uniform cuts follow wrong continuations of good states "
        "to the first step that no continuation survives",
        "data",
        choices=["uniform", "first-pit"]
    )
    pit_threshold: float = opt(
        0.25, "a state is good from this Monte-Carlo value on", "data", above=0, high=1
    )
    pit_mc: int = opt(8, "continuations a prefix on the way to a pit", "data", low=1)
    temperature: float = opt(1.0, "of seeds and continuations", "data", above=0)
    slots: int = opt(512, "sequences decoded at once", "data", low=1)
    shard_problems: int = opt(
        1000, "problems per file of rollouts (what a kill may cost)", "data", low=1
    )
    epochs: int = opt(6, "passes over the labelled sequences", "optimization", low=1)
    batch_size: int = opt(128, "sequences a step", "optimization", low=1)
    learning_rate: float = opt(
        1e-3, "peak of AdamW; warm-up over 5%, cosine to a tenth", "optimization", above=0
    )
    max_grad_norm: float = opt(1.0, "gradient clipping by global norm", "optimization", above=0)
    balance: bool = opt(
        True,
        "weigh right and wrong labels equally, and undo the shift exactly when reading",
        "optimization"
    )
    save_steps: int = opt(500, "steps between checkpoints", "evaluation", low=1)
    eval_problems: int = opt(256, "held-out problems for the judgement", "evaluation", low=1)
    eval_mc: int = opt(16, "fresh continuations a judged prefix", "evaluation", low=1)
    prover_strength: float = opt(
        -1.0,
        "demonstrator's strength behind the prover, for exact values (-1: unknown)",
        "evaluation"
    )


# ------------------------------------------------------------------------------------------------
# 1-3. Labels.


def choose_cuts(ends, cuts, seed):
    """Which step ends of one seed solution to cut at: indices into ends = [prompt, step 1, ...],
    the last (the complete solution) left out, since there is nothing to continue. cuts=0: all."""
    inner = len(ends) - 1
    return sorted(shuffled(inner, seed)[:cuts]) if cuts else list(range(inner))


def label_continuations(ends, outcome, starts):
    """Step ends [N*n,S+1] and outcomes [N,n] of n continuations of each of N starts -> target,
    weight [N*n,S+1].

    The end of the cut itself gets the mean of the siblings' outcomes (a soft label), every later
    end the outcome of its own continuation; ends before the cut get weight 0.
    """
    n = outcome.shape[1]
    at_cut = outcome.mean(1).repeat_interleave(n)[:, None]
    cut = torch.tensor([len(prefix) for _, prefix, _ in starts]).repeat_interleave(n)[:, None]
    target = torch.where(ends == cut, at_cut, outcome.view(-1, 1))
    weight = (ends >= cut).float()
    weight[:, 1:] *= (ends.diff() > 0).float()  # padding repeats the last end: count it once
    return target, weight


def roll_out(complete, task, tokenizer, starts, n, limit, seed):
    """Continue, grade, label: -> the labelled sequences (see collect), outcome [N,n], tokens
    sampled."""
    rolled, outcome, spent = continue_and_grade(complete, task, tokenizer, starts, n, limit, seed)
    ends = step_ends(task, rolled, tokenizer)
    target, weight = label_continuations(ends, outcome, starts)
    return dict(tokens=rolled.tokens, ends=ends, target=target, weight=weight), outcome, spent


def collect(base, prover, tokenizer, task, problems, cfg, shard):
    """Labelled sequences for some problems, and the tokens that were sampled for them.

    -> dict(tokens [N,T], ends [N,S+1], target [N,S+1], weight [N,S+1]): target is the Monte-Carlo
    estimate of V^mu at that step end, weight 0 where there is none.
    """
    limit = cfg.max_completion_length or task.max_new_tokens
    options = dict(temperature=cfg.temperature, stop_ids=task.stop_ids(tokenizer), slots=cfg.slots)
    of_seed = [p for p in problems for _ in range(cfg.n_cov)]
    prompts = [task.prompt_tokens(p, tokenizer) for p in of_seed]
    seeds = generate(
        base, prompts, max_new_tokens=limit, seed=derive(cfg.seed, "seeds", shard), **options
    )
    # A cut in front of an EOS alone would teach nothing: credit=True.
    ends = step_ends(task, seeds, tokenizer, credit=True)
    spent = seeds.num_tokens()
    if cfg.label == "outcome":  # an ORM needs no prover: the seed's own outcome, read at its end
        weight = torch.zeros(ends.shape)
        weight[:, -1] = 1.0
        target = grades(task, of_seed, seeds, tokenizer)[:, None].expand(ends.shape).clone()
        return dict(tokens=seeds.tokens, ends=ends, target=target, weight=weight), spent

    starts = []
    for i, problem in enumerate(of_seed):
        row = sorted(set(ends[i].tolist()))
        for h in choose_cuts(row, cfg.cuts, derive(cfg.seed, "cuts", shard, i)):
            starts.append((problem, seeds.tokens[i, : row[h]].tolist(), row[0]))
    complete = partial(generate, prover, **options)
    seed = derive(cfg.seed, "continuations", shard)
    data, outcome, cost = roll_out(complete, task, tokenizer, starts, cfg.n_mc, limit, seed)
    if cfg.coverage == "uniform":
        return data, spent + cost
    walks = wrong_walks(starts, data, outcome, cfg.pit_threshold)
    seed = derive(cfg.seed, "pits", shard)
    more, pit_cost = walk_to_pits(complete, task, tokenizer, walks, cfg.pit_mc, limit, seed)
    return join([data, *more]), spent + cost + pit_cost


def wrong_walks(starts, data, outcome, threshold):
    """Where to look for pits: the first wrong continuation of every cut that is good, but not sure
    to succeed.

    outcome [starts, n_mc]. Returns [(problem, tokens, prompt length, step ends after the cut but
    the last)].
    """
    walks = []
    for s, (problem, prefix, prompt_len) in enumerate(starts):
        wrong = (outcome[s] == 0).nonzero()[:, 0]
        if float(outcome[s].mean()) >= threshold and len(wrong):
            row = s * outcome.shape[1] + int(wrong[0])
            later = sorted({e for e in data["ends"][row].tolist() if e > len(prefix)})[:-1]
            walks.append((problem, data["tokens"][row].tolist(), prompt_len, later))
    return walks


def walk_to_pits(complete, task, tokenizer, walks, n, limit, seed):
    """All walks side by side, one step end a round, each until its first pit (no continuation
    right) or its end. Returns a list of labelled sequences as collect's, one a round, and the
    tokens spent."""
    rounds = []
    spent = 0
    while walks := [walk for walk in walks if len(rounds) < len(walk[3])]:
        starts = [
            (problem, tokens[: later[len(rounds)]], start)
            for problem, tokens, start, later in walks
        ]
        data, outcome, cost = roll_out(
            complete, task, tokenizer, starts, n, limit, derive(seed, len(rounds))
        )
        rounds.append(data)
        spent += cost
        survives = (outcome.sum(1) > 0).tolist()
        walks = [walk for walk, alive in zip(walks, survives) if alive]
    return rounds, spent


def join(parts):
    """Labelled sequences of different widths -> one dict; tokens and weights are padded with 0,
    ends by repeating."""
    return {
        k: stack([part[k] for part in parts], "repeat" if k == "ends" else None)
        for k in ("tokens", "ends", "target", "weight")
    }


def collect_all(base, prover, tokenizer, task, cfg, folder):
    """The shards of all problems; each is a file, so a killed run does not sample twice. -> one
    dict, tokens sampled."""
    problems = task.problems("train", None, cfg.seed)
    if cfg.num_problems:
        problems = (problems * (1 + cfg.num_problems // len(problems)))[: cfg.num_problems]

    def make(shard, part):
        data, spent = collect(base, prover, tokenizer, task, part, cfg, shard)
        return data | dict(spent=torch.tensor(spent))

    parts = list(
        shards(folder / "rollouts", "shard", problems, cfg.shard_problems, make, "rollouts")
    )
    return join(parts), sum(int(part["spent"]) for part in parts)


def read_labels(cfg, task, tokenizer, context):
    """--labels -> labelled sequences of the prompts that the hash gives to "train", and to "val".
    UserError: the task has another alphabet; a split is empty."""
    own = task.tokenizer()
    if own and own.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--task {cfg.task} cannot write prompts for {cfg.policy}: give --task jsonl --data "
            "FILE (the problems RL will see), so that RL and --labels ask alike"
        )
    parts = dict(train=[], val=[], test=[])
    for row in read_labelled(cfg.labels):
        parts[split_of(" ".join(row[0].split()))].append(row)
    if not (parts["train"] and parts["val"]):
        raise UserError(f"{cfg.labels} has too few prompts: a tenth (by hash) is kept to judge by")
    return [labelled_solutions(task, tokenizer, parts[s], context) for s in ("train", "val")]


# ------------------------------------------------------------------------------------------------
# 4. Fit.


def bce_weights(target, weight):
    """(weight of right, weight of wrong) that give both the same mass, and the shift they put on
    logits.

    With loss -(w1 y log p + w0 (1-y) log(1-p)) the best p has logit(p) = logit(E y) + log(w1/w0):
    exact for soft labels, so reading sigmoid(logit - shift) is calibrated again.
    """
    right = float((target * weight).sum() / weight.sum())
    right = min(max(right, 1e-3), 1 - 1e-3)
    w1 = 0.5 / right
    w0 = 0.5 / (1 - right)
    return w1, w0, float(torch.tensor(w1 / w0).log())


def value_loss(logits, target, weight, w1, w0, total=None):
    """Soft-label cross-entropy. logits, target, weight [B,S+1] -> scalar, mean over labelled step
    ends; total: weight of the whole batch, where these are some of its rows."""
    per_label = -(w1 * target * F.logsigmoid(logits) + w0 * (1 - target) * F.logsigmoid(-logits))
    return (per_label * weight).sum() / (weight.sum() if total is None else total)


def padded_share(n):
    """This process' rows of a batch of n, as many in every process: indices [m], and [m,1] 1.0 or
    0.0 (a padding row, where n does not divide). One process: all rows."""
    size = parallel.size()
    rows = torch.arange(-(-n // size) * size)[parallel.rank() :: size]
    return rows % n, (rows < n).float()[:, None]


def learning_rate(step, steps, peak):
    """Of the 1-based step: linear warm-up over a twentieth of the steps, then a cosine to a tenth
    of the peak."""
    warm = min(1.0, step / max(1, steps // 20))
    return peak * warm * (0.55 + 0.45 * float(torch.cos(torch.tensor(torch.pi * step / steps))))


def fit(verifier, data, cfg, run, tokenizer, info, device):
    """Cross-entropy at the step ends, one forward pass a sequence for all of its steps."""
    w1, w0, shift = bce_weights(data["target"], data["weight"]) if cfg.balance else (1.0, 1.0, 0.0)
    verifier.logit_shift = shift
    N = len(data["tokens"])
    per_epoch = math.ceil(N / cfg.batch_size)
    steps = per_epoch * cfg.epochs

    def load(folder):
        load_weights(verifier.backbone, folder)
        load_head(verifier, folder)

    def make_optimizer(params):
        settings = dict(lr=cfg.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        return optimizer_for(torch.optim.AdamW, params, **settings)

    state = run.resume(verifier, load, make_optimizer)
    for step in with_progress_bar(range(state["step"] + 1, steps + 1), "verifier"):
        epoch, at = divmod(step - 1, per_epoch)
        if at == 0 or step == state["step"] + 1:
            order = torch.tensor(shuffled(N, cfg.seed, "epoch", epoch))
        rows = order[at * cfg.batch_size : (at + 1) * cfg.batch_size]
        ends = data["ends"][rows]
        tokens = data["tokens"][rows, : int(ends.max())]
        target = data["target"][rows]
        weight = data["weight"][rows]
        share, real = padded_share(len(rows))
        at_token = verifier(tokens[share].to(device))  # (b, T)
        logits = at_token.gather(1, (ends[share] - 1).to(device))  # (b, S+1)
        total = weight.sum().to(device)
        loss = value_loss(
            logits, target[share].to(device), (weight[share] * real).to(device), w1, w0, total
        )
        run.optimizer.zero_grad(set_to_none=True)
        parallel.backward(loss, verifier)
        parallel.sum_gradients(run.params)
        grad_norm = parallel.clip(run.params, cfg.max_grad_norm)
        batch = dict(tokens=tokens, ends=ends, target=target)
        require_finite(run.folder, step, grad_norm, batch, cfg.learning_rate)
        rate = learning_rate(step, steps, cfg.learning_rate)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        if step % 20 == 0 or step == steps:
            losses = parallel.summed(dict(loss=loss.item()))
            run.log(step, **losses, grad_norm=grad_norm, learning_rate=rate, epoch=step / per_epoch)
        if step % cfg.save_steps == 0 or step == steps:
            run.save(step, lambda folder, whole: save_verifier(folder, whole, tokenizer, info))


# ------------------------------------------------------------------------------------------------
# The whole road.


def check(cfg, task):
    """UserError: what cannot work, before anything is sampled."""
    for split in ("train", "val"):
        task.problems(split, 1, cfg.seed)  # fail early on an empty split
    if not cfg.policy:
        raise UserError(
            "--policy is missing: give the folder of the base policy (train_sft.py makes one)"
        )
    if cfg.coverage == "first-pit" and (cfg.n_mc < 2 or cfg.label == "outcome"):
        raise UserError(
            "--coverage first-pit needs --n-mc of at least 2 (a state is good, and one of its "
            "continuations wrong) and --label q"
        )
    if cfg.labels and (cfg.prover != "base" or cfg.prover_k > 1 or cfg.label == "outcome"):
        raise UserError("--labels needs no prover: leave out --prover, --prover-k and --label")
    if cfg.label == "outcome" and cfg.prover_k > 1:
        raise UserError(
            "--label outcome has no prover, so Best-of-K means nothing there: leave out --prover-k"
        )
    if cfg.eval_mc < cfg.prover_k:
        raise UserError(f"--eval-mc must be at least --prover-k {cfg.prover_k}: pass@k judges it")


def load_prover(cfg, base, tokenizer, device):
    """The prover's model: base itself, or that of --prover. UserError: it has another tokenizer."""
    if cfg.prover == "base":
        return base
    prover, other = load_model(cfg.prover, device, getattr(torch, cfg.dtype))
    if other.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--prover {cfg.prover} has another tokenizer than --policy {cfg.policy}; it cannot "
            "continue its prefixes"
        )
    return prover


def train(cfg):
    """Collect, fit, judge; leaves a verifier in --run-dir. Resumes by itself. -> summary."""
    device = setup(cfg.device, cfg.threads)
    cfg.run_dir = run_folder(cfg, "verifier")
    task = get_task(cfg)
    check(cfg, task)
    run = Run(cfg)
    if run.summary:
        return run.summary
    base, tokenizer = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    one_thread_if_tiny(base, cfg.threads)
    prover = load_prover(cfg, base, tokenizer, device)
    clock = time.time()
    if cfg.labels:
        data, held = read_labels(cfg, task, tokenizer, base.cfg.max_position_embeddings)
        spent = 0
    else:
        leave_out_long(task, tokenizer, base, "train", "val")
        data, spent = collect_all(base, prover, tokenizer, task, cfg, run.folder)
    seconds_sampling = time.time() - clock
    backbone, _ = load_model(cfg.policy, device)
    verifier = Verifier(backbone, k=cfg.prover_k, fingerprint=tokenizer.fingerprint)
    info = dict(task=cfg.task, label=cfg.label, prover=cfg.labels or cfg.prover)
    fit(verifier, data, cfg, run, tokenizer, info, device)
    seconds_fitting = time.time() - run.began
    if cfg.labels:
        quality = judge_labels(verifier, held)
    else:
        quality = judge(verifier, base, prover, tokenizer, task, cfg)
        quality |= compare(verifier, base, prover, tokenizer, task, cfg)
    weight = data["weight"]
    summary = run.finish(
        **quality,
        sequences=len(data["tokens"]),
        labels=int((weight > 0).sum()),
        sampled_tokens=spent,
        mean_label=float((data["target"] * weight).sum() / weight.sum()),
        seconds_sampling=round(seconds_sampling, 1),
        seconds_fitting=round(seconds_fitting, 1),
    )
    print(f"{describe(summary)} -> {run.folder}")
    return summary


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    cfg = prepare(cfg, "verifier", argv, cfg.policy, cfg.prover)
    summary = train(cfg)
    weak = shortcomings(cfg, summary)
    for line in weak:
        print(f"warning: {line}")
    reward, method = ("orm", "best-of-n") if cfg.label == "outcome" else ("pav", "beam")
    rl = ["train_rl.py", "--reward", reward, "--policy", cfg.policy, "--verifier", cfg.run_dir]
    rl += ["--run-dir", f"{cfg.run_dir}_rl", *stage_words(cfg, task_class(cfg.task).stages["rl"])]
    if cfg.smoke or not weak:
        print_next_command(cfg, ("RL that it pays for", rl))
    of_policy = cfg.prover == "base" and not cfg.labels
    if cfg.label == "outcome" or of_policy:  # a search ranks by Q of the policy itself
        search = ["search.py", "--method", method, "--model", cfg.policy, "--n", 12]
        print_next_command(cfg, ("search with it", [*search, "--verifier", cfg.run_dir]))
    return summary


if __name__ == "__main__":
    script(main)
