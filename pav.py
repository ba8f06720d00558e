"""Train a verifier: what is this solution worth so far, and did the last step make progress?

    python pav.py --task planted --policy runs/sft --prover runs/prover       # CPU, about a minute
    python pav.py --task jsonl --data train.jsonl --policy runs/sft --prover base --prover-k 4

A step's reward in PAV (Setlur et al. 2024, arXiv 2410.08146) is its *progress*: the advantage under a
prover mu that is not the policy,

    A^mu(s,a) = Q^mu(s,a) - V^mu(s) = V^mu(prompt + steps 1..h) - V^mu(prompt + steps 1..h-1)       (eq. 2)

so one function is enough, V^mu(prefix): the chance that the prover, taking over here, still finds the
answer. Both terms are read off the *same* verifier at consecutive step ends, the bare prompt included.

    1. roll in   n_cov seed solutions a problem from the policy (the states we shall be asked about),
    2. cut       each at some step ends, the bare prompt among them (--coverage first-pit: more cuts where a good
                 state turns bad),
    3. roll out  n_mc continuations a cut from the prover, grade them: a Monte-Carlo label of V^mu.
                 Later step ends of a continuation are prover states too and get its own outcome, free (labels.py);
    4. fit       a Transformer with a scalar head by cross-entropy with these soft labels,
    5. judge     on held-out problems: calibration, Brier, AUC, and the correlation of the *advantage*,
                 which is what RL will be paid by. A verifier can rank states well and steps badly.

Best-of-K provers need no training of their own: V^BoK = 1 - (1 - V)^K (eq. 30); see prover_transform.
What is left out: lower-variance tree estimates, several verifiers of different provers in one model.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from infra import parallel
from infra.cli import RunConfig, UserError, opt, parse, say_next, script
from infra.optimizer import optimizer_for
from infra.runs import (
    Metrics,
    derive,
    latest_checkpoint,
    load_state,
    open_run,
    progress,
    require_finite,
    save_checkpoint,
    setup,
    shuffled,
    spare_threads,
    write_json,
)
from labels import boundaries, collect_all
from model import load_model, load_weights, resolve, shared_prefixes, write_model
from sample import generate
from tasks.files import get_task


@dataclass
class Config(RunConfig):
    policy: str = opt("", "the base policy: where seed solutions come from, and the verifier's initial weights", "policies")
    prover: str = opt("base", "who finishes the prefixes: base, or a folder", "policies")
    prover_k: int = opt(1, "take Best-of-K of the prover as prover", "policies", low=1)
    label: str = opt("q", "q: every step end gets V^mu; outcome: only the end is labelled (an ORM)", "data",
                     choices=["q", "outcome"])
    num_problems: int = opt(0, "training problems (0: all; a task with few problems repeats them)", "data", low=0)
    n_cov: int = opt(1, "seed solutions a problem (coverage)", "data", low=1)
    n_mc: int = opt(1, "prover continuations a cut (label noise)", "data", low=1)
    cuts: int = opt(1, "step ends of a seed solution to cut at (0: all of them)", "data", low=0)
    coverage: str = opt("uniform", "first-pit: after the uniform cuts follow wrong continuations of good states, step by step, "
                        "to the first step that no continuation survives", "data", choices=["uniform", "first-pit"])
    pit_threshold: float = opt(0.25, "a state is good from this Monte-Carlo value on", "data", above=0, high=1)
    pit_mc: int = opt(8, "continuations a prefix on the way to a pit", "data", low=1)
    temperature: float = opt(1.0, "of seeds and continuations", "data", above=0)
    slots: int = opt(512, "sequences decoded at once", "data", low=1)
    shard_problems: int = opt(1000, "problems per file of rollouts (what a kill may cost)", "data", low=1)
    epochs: int = opt(6, "passes over the labelled sequences", "optimization", low=1)
    batch_size: int = opt(128, "sequences a step", "optimization", low=1)
    learning_rate: float = opt(1e-3, "peak learning rate of AdamW; linear warm-up over 5%, cosine to a tenth",
                               "optimization", above=0)
    max_grad_norm: float = opt(1.0, "gradient clipping by global norm", "optimization", above=0)
    balance: bool = opt(True, "weigh right and wrong labels equally, and undo the shift exactly when reading", "optimization")
    save_steps: int = opt(500, "steps between checkpoints", "evaluation", low=1)
    eval_problems: int = opt(256, "held-out problems for the judgement", "evaluation", low=1)
    eval_mc: int = opt(16, "fresh continuations a judged prefix", "evaluation", low=1)
    prover_strength: float = opt(-1.0, "demonstrator's strength behind the prover, for exact values (-1: unknown)", "evaluation")


# ----------------------------------------------------------------------------------------------------
# The verifier: a Transformer with one more number per token.


class Verifier(nn.Module):
    """tokens [B,T] -> logits [B,T] of V^mu(tokens[:, :t+1]); meaningful at step ends. logit_shift undoes
    the class weights of the fit (see bce_weights); k is the Best-of-K transform; fingerprint the tokenizer's."""

    def __init__(self, backbone, logit_shift=0.0, k=1, fingerprint=""):
        super().__init__()
        self.backbone, self.logit_shift, self.k, self.fingerprint = backbone, logit_shift, k, fingerprint
        self.head = nn.Linear(backbone.cfg.hidden_size, 1).to(backbone.head.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens, share=None):
        return self.head(self.backbone(tokens, share).float())[..., 0]


def prover_transform(value, k):
    """V of the prover -> V of its Best-of-k: 1 - (1-V)^k (eq. 30). Monotone in V, k=1 is the identity."""
    return 1 - (1 - value) ** k


@torch.no_grad()
def step_values(verifier, tokens, ends, batch_tokens=4096):
    """V^mu at the bare prompt and after every step, one forward pass.

    tokens [B,T]; ends [B,S+1]: exclusive token positions, ends[:,0] the prompt's length, padded by
    repeating the last. Returns [B,S+1] float32 in [0,1]; the last column is the value of the whole text. Rows go through in
    batches of about batch_tokens tokens: enough to fill a machine, few enough to stay in a CPU's cache.
    """
    device, n = verifier.head.weight.device, len(tokens)
    out, mine, size = [ends.new_zeros(0, ends.shape[1]).float()], parallel.share(n), max(1, batch_tokens // tokens.shape[1])
    for i in range(mine.start, mine.stop, size):
        rows = slice(i, min(i + size, mine.stop))
        text = tokens[rows, : int(ends[rows].max())]
        logits = verifier(text.to(device), shared_prefixes(text, ends[rows, -1], device)).cpu()
        out.append(logits.gather(1, ends[rows] - 1) - verifier.logit_shift)  # read at the step's last token
    return prover_transform(parallel.gather(torch.cat(out), n).sigmoid(), verifier.k)


def guarded_values(cfg, task, problems, rollouts, tokenizer, values, ends, outcome):
    """Anchor and gate. values [B,S+1] -> [B,S+1], and pay [B,S] in {0,1}: where a bonus is due."""
    steps = (ends[:, 1:] > ends[:, :-1]).sum(1)  # (B,) real steps
    pay = torch.ones(values.shape[0], values.shape[1] - 1)
    if cfg.gate == "outcome":
        pay *= outcome[:, None]
    for b in range(len(steps)):
        if cfg.anchor:
            values[b, steps[b] :] = outcome[b]
        if cfg.gate == "legal":
            bad = task.first_illegal_step(problems[b], tokenizer.decode(rollouts.completion(b)))
            if bad is not None:
                values[b, bad + 1 :] = 0.0
    return values, pay


def save_verifier(folder, verifier, tokenizer, info):
    write_model(folder, verifier.backbone, tokenizer)
    save_file({k: v.detach().cpu().contiguous() for k, v in verifier.head.state_dict().items()},
              folder / "value_head.safetensors")
    info = dict(logit_shift=verifier.logit_shift, prover_k=verifier.k, fingerprint=verifier.fingerprint) | info
    (folder / "verifier.json").write_text(json.dumps(info, indent=2) + "\n")


def load_verifier(path, tokenizer, device="cpu"):
    """A verifier from its run directory; refuses one that was trained with another tokenizer."""
    folder = resolve(str(path))
    if not (folder / "verifier.json").exists():
        raise UserError(f"{path} holds a language model, not a verifier; train one with pav.py")
    info = json.loads((folder / "verifier.json").read_text())
    if info["fingerprint"] != tokenizer.fingerprint:
        raise UserError(f"{path} was trained with another tokenizer than the policy's: its step values would be noise; "
                        "train a verifier from this policy with pav.py")
    backbone, _ = load_model(folder, device)
    verifier = Verifier(backbone, info["logit_shift"], info["prover_k"], info["fingerprint"])
    load_head(verifier, folder)
    return verifier.requires_grad_(False)


def load_head(verifier, folder):
    try:
        verifier.head.load_state_dict(load_file(folder / "value_head.safetensors"))
    except Exception as e:  # safetensors and torch raise several kinds here
        raise UserError(f"{folder}/value_head.safetensors cannot be read ({e}); train it again with pav.py") from None


# ----------------------------------------------------------------------------------------------------
# 4. Fit.


def bce_weights(target, weight):
    """(weight of right, weight of wrong) that give both the same mass, and the shift they put on logits.

    With loss -(w1 y log p + w0 (1-y) log(1-p)) the best p has logit(p) = logit(E y) + log(w1/w0): exact
    for soft labels, so reading sigmoid(logit - shift) is calibrated again.
    """
    right = float((target * weight).sum() / weight.sum())
    right = min(max(right, 1e-3), 1 - 1e-3)
    w1, w0 = 0.5 / right, 0.5 / (1 - right)
    return w1, w0, float(torch.tensor(w1 / w0).log())


def value_loss(logits, target, weight, w1, w0, total=None):
    """Soft-label cross-entropy. logits, target, weight [B,S+1] -> scalar, mean over labelled step ends; total: weight of
    the whole batch, where these are some of its rows."""
    per_label = -(w1 * target * F.logsigmoid(logits) + w0 * (1 - target) * F.logsigmoid(-logits))
    return (per_label * weight).sum() / (weight.sum() if total is None else total)


def dealt(n):
    """This process' rows of a batch of n, as many in every process: indices [m], and [m,1] 1.0 or 0.0 (a row that stands in
    for one that is not there). One process: all rows."""
    rows = torch.arange(-(-n // parallel.size()) * parallel.size())[parallel.rank() :: parallel.size()]
    return rows % n, (rows < n).float()[:, None]


def fit(verifier, data, cfg, run, tokenizer, info, device):
    """Cross-entropy at the step ends, one forward pass a sequence for all of its steps."""
    w1, w0, verifier.logit_shift = bce_weights(data["target"], data["weight"]) if cfg.balance else (1.0, 1.0, 0.0)
    N = len(data["tokens"])
    per_epoch = -(-N // cfg.batch_size)
    steps, start, spent = per_epoch * cfg.epochs, 0, 0.0
    if folder := latest_checkpoint(run):
        load_weights(verifier.backbone, folder)
        load_head(verifier, folder)
    if cfg.shard:
        parallel.shard(verifier)
    params = list(verifier.parameters())
    optimizer = optimizer_for(torch.optim.AdamW, params, lr=cfg.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    if folder:
        state = load_state(folder, optimizer, params)
        start, spent = state["step"], state["seconds"]
        print(f"resuming {run} at step {start}")
    metrics, clock = Metrics(run, start, cfg.tensorboard), time.time() - spent
    order, epoch = None, -1
    for step in progress(range(start + 1, steps + 1), "verifier"):
        if (step - 1) // per_epoch != epoch:
            epoch = (step - 1) // per_epoch
            order = torch.tensor(shuffled(N, cfg.seed, "epoch", epoch))
        at = (step - 1) % per_epoch * cfg.batch_size
        rows = order[at : at + cfg.batch_size]
        ends = data["ends"][rows]
        tokens = data["tokens"][rows, : int(ends.max())]
        warm = min(1.0, step / max(1, steps // 20))
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * warm * (0.55 + 0.45 * float(torch.cos(torch.tensor(torch.pi * step / steps))))
        target, weight = data["target"][rows], data["weight"][rows]
        mine, real = dealt(len(rows))
        logits = verifier(tokens[mine].to(device)).gather(1, (ends[mine] - 1).to(device))  # (b, S+1)
        loss = value_loss(logits, target[mine].to(device), (weight[mine] * real).to(device), w1, w0, weight.sum().to(device))
        optimizer.zero_grad(set_to_none=True)
        parallel.backward(loss, verifier)
        parallel.sum_gradients(params)
        grad_norm = parallel.clip(params, cfg.max_grad_norm)
        require_finite(run, step, grad_norm, dict(tokens=tokens, ends=ends, target=target), cfg.learning_rate)
        optimizer.step()
        if step % 20 == 0 or step == steps:
            metrics.write(step, **parallel.summed(dict(loss=loss.item())), grad_norm=grad_norm, learning_rate=group["lr"],
                          epoch=step / per_epoch)
        if step % cfg.save_steps == 0 or step == steps:
            plain = parallel.whole(verifier)
            save_checkpoint(run, step, lambda f, v=plain: save_verifier(f, v, tokenizer, info), optimizer, params,
                            dict(seconds=time.time() - clock))
    return time.time() - clock


# ----------------------------------------------------------------------------------------------------
# 5. Judge: fresh problems, fresh prover rollouts, and the exact value where the task has a solver.


def auc(score, positive):
    """Probability that a random positive scores above a random negative (ties count half); nan if one is empty."""
    order = score.argsort()
    s, rank = score[order], torch.arange(1, len(score) + 1, dtype=torch.float64)
    _, tie, count = s.unique_consecutive(return_inverse=True, return_counts=True)
    mean_rank = torch.zeros(len(count), dtype=torch.float64).scatter_add_(0, tie, rank) / count
    ranks = torch.empty_like(rank).scatter_(0, order, mean_rank[tie])
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        return float("nan")
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def correlation(a, b):
    """Pearson's r; nan where one side is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = (a.norm() * b.norm()).item()
    return float(a @ b) / norm if norm > 0 else float("nan")


def reliability(prediction, outcome, bins=10):
    """Rows (mean prediction, mean outcome, count) of equal-width bins: the diagonal is perfect calibration."""
    which = (prediction * bins).long().clamp(max=bins - 1)
    return [(float(prediction[which == i].mean()), float(outcome[which == i].mean()), int((which == i).sum()))
            for i in range(bins) if (which == i).any()]


def judge(verifier, base, prover, tokenizer, task, cfg):
    """How good is the verifier on problems it has not seen? Returns a dict of numbers (see the keys).

    One policy solution a problem, one random step (h-1 -> h) in it; eval_mc fresh prover continuations from
    both prefixes. corr_advantage is measured against those (noisy: an upper bound below 1 even for the
    truth), corr_advantage_exact against the solver's value of the scripted demonstrator.
    """
    problems = task.problems("val", cfg.eval_problems, cfg.seed)
    problems = (problems * (1 + cfg.eval_problems // len(problems)))[: cfg.eval_problems]
    limit = cfg.max_completion_length or task.max_new_tokens
    options = dict(temperature=cfg.temperature, stop_ids=tokenizer.eos_ids, slots=cfg.slots)
    seeds = generate(base, [task.prompt_tokens(p, tokenizer) for p in problems], max_new_tokens=limit,
                     seed=derive(cfg.seed, "judge"), **options)
    ends = boundaries(task, seeds, tokenizer)
    value = step_values(verifier, seeds.tokens, ends)  # (B, S+1)
    rows, prefixes = [], []
    for i, p in enumerate(problems):
        own = sorted(set(ends[i].tolist()))
        if len(own) < 3:
            continue  # no inner step
        h = 1 + derive(cfg.seed, "judge", i) % (len(own) - 2)
        rows.append((i, h, own, p))
        prefixes += [seeds.tokens[i, : own[h - 1]].tolist(), seeds.tokens[i, : own[h]].tolist()]
    full = value[:, -1]
    truth = torch.tensor([task.grade(p, tokenizer.decode(seeds.completion(i))) for i, p in enumerate(problems)])
    if not rows:  # every solution is one step: only the end can be judged
        nothing = dict.fromkeys(("brier", "brier_constant", "auc", "corr_value", "corr_advantage"), float("nan"))
        return nothing | dict(auc_outcome=auc(full, truth > 0.5), reliability=[], judged_steps=0)
    start = [int(seeds.prompt_len[i]) for i, *_ in rows for _ in range(2)]
    todo = [(j, m) for j in range(len(prefixes)) for m in range(cfg.eval_mc)]
    rolled = generate(prover, [prefixes[j] for j, _ in todo], seed=derive(cfg.seed, "judge continuations"),
                      max_new_tokens=[limit - (len(prefixes[j]) - start[j]) for j, _ in todo], **options)
    right = torch.tensor([
        task.grade(rows[j // 2][3], tokenizer.decode(rolled.tokens[n, start[j] : rolled.length[n]].tolist()))
        for n, (j, _) in enumerate(todo)
    ]).view(-1, 2, cfg.eval_mc)
    mc = prover_transform(right.mean(-1), verifier.k)  # (n, 2): before and after the step
    guess = torch.stack([value[i, [h - 1, h]] for i, h, *_ in rows])  # (n, 2)
    plain = 1 - (1 - guess) ** (1 / verifier.k)  # of the prover itself, to hold against single continuations
    flat = plain[:, :, None].expand_as(right).reshape(-1)
    out = dict(
        brier=float((flat - right.reshape(-1)).square().mean()),
        brier_constant=float(right.var(unbiased=False)),
        auc=auc(flat, right.reshape(-1) > 0.5),
        auc_outcome=auc(full, truth > 0.5),
        corr_value=correlation(guess[:, 1], mc[:, 1]),
        corr_advantage=correlation(guess[:, 1] - guess[:, 0], mc[:, 1] - mc[:, 0]),
        reliability=reliability(flat, right.reshape(-1)),
        judged_steps=len(rows),
    )
    exact = exact_values(task, tokenizer, seeds, rows, cfg)
    if exact is not None:
        exact = prover_transform(exact, verifier.k)
        out["corr_value_exact"] = correlation(guess[:, 1], exact[:, 1])
        out["corr_advantage_exact"] = correlation(guess[:, 1] - guess[:, 0], exact[:, 1] - exact[:, 0])
    return out


def exact_values(task, tokenizer, seeds, rows, cfg):
    """[n,2] value of the demonstrator of --prover-strength before and after each judged step, or None."""
    if cfg.prover_strength < 0:
        return None
    values = []
    for i, h, own, problem in rows:
        for end in own[h - 1 : h + 1]:
            text = tokenizer.decode(seeds.tokens[i, own[0] : end].tolist())
            values.append(task.exact_value(problem, text, cfg.prover_strength))
    return None if None in values else torch.tensor(values).view(-1, 2)


def train(cfg):
    device = setup(cfg.device, cfg.threads)
    cfg.run_dir = cfg.run_dir or f"runs/{cfg.task}/verifier"
    run = Path(cfg.run_dir)
    task = get_task(cfg)
    for split in ("train", "val"):
        task.problems(split, 1, cfg.seed)  # an empty split is said now, not after the work
    if not cfg.policy:
        raise UserError("--policy is missing: give the folder of the base policy (train_sft.py makes one)")
    lock = open_run(run, cfg, ignore=("run_dir", "device"))  # noqa: F841 (held until the end)
    if (run / "summary.json").exists():
        print(f"{run} is complete")
        return json.loads((run / "summary.json").read_text())
    base, tokenizer = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    spare_threads(base, cfg.threads)
    prover = base
    if cfg.prover != "base":
        prover, other = load_model(cfg.prover, device, getattr(torch, cfg.dtype))
        if other.fingerprint != tokenizer.fingerprint:
            raise UserError(f"--prover {cfg.prover} has another tokenizer than --policy {cfg.policy}; it cannot continue "
                            "the policy's prefixes")
    clock = time.time()
    data, spent = collect_all(base, prover, tokenizer, task, cfg, run)
    sampling = time.time() - clock
    backbone, _ = load_model(cfg.policy, device)
    verifier = Verifier(backbone, k=cfg.prover_k, fingerprint=tokenizer.fingerprint)
    info = dict(task=cfg.task, label=cfg.label, prover=cfg.prover)
    fitting = fit(verifier, data, cfg, run, tokenizer, info, device)
    quality = judge(verifier, base, prover, tokenizer, task, cfg)
    labels = int((data["weight"] > 0).sum())
    summary = quality | dict(sequences=len(data["tokens"]), labels=labels, sampled_tokens=spent,
                             mean_label=float((data["target"] * data["weight"]).sum() / data["weight"].sum()),
                             seconds_sampling=round(sampling, 1), seconds_fitting=round(fitting, 1))
    write_json(run / "summary.json", summary)
    exact = f", with the exact one {quality['corr_advantage_exact']:.2f}" if "corr_advantage_exact" in quality else ""
    print(f"verifier: {labels} labels, AUC {quality['auc']:.3f}, Brier {quality['brier']:.4f} (constant: "
          f"{quality['brier_constant']:.4f}), corr of advantage {quality['corr_advantage']:.2f}{exact} -> {run}")
    return summary


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.smoke:
        cfg.num_problems, cfg.epochs, cfg.eval_problems, cfg.eval_mc = 64, 1, 16, 4
    summary = train(cfg)
    reward, search = ("orm", "best-of-n") if cfg.label == "outcome" else ("pav", "beam")
    say_next(cfg, ("RL that it pays for", ["train_rl.py", "--reward", reward, "--policy", cfg.policy, "--verifier", cfg.run_dir,
                                           "--run-dir", f"{cfg.run_dir}_rl"]))
    if cfg.label == "outcome" or cfg.prover == "base":  # a search ranks by Q of the policy itself
        say_next(cfg, ("search with it", ["sample.py", "--model", cfg.policy, "--verifier", cfg.run_dir, "--search", search,
                                          "--n", 12]))
    return summary


if __name__ == "__main__":
    script(main)
