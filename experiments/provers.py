"""Which prover? The two terms of PAV's theory, exactly, beside the measured improvement.

    python -m experiments.provers              # about 25 minutes of one core
    python -m experiments.provers --learned-arms     # without 4 below, 10 minutes
    python -m experiments.provers --no-transformer   # 1 and 2 below, about a minute
    python -m experiments.provers --smoke      # few steps, a few seconds
    -> docs/results/provers/: results.json, table.md, curves.png

The claim (Setlur et al. 2024, arXiv 2410.08146, theorem 3.1): a policy pi that is updated by eq.
13, pi'(a|s) ~ pi(a|s) exp(eta (Q^pi + A^mu)), improves by at least the order of eta times

    E_s Var_{a~pi}[A^mu(s,a)]   (distinguishability) + E_s E_{a~pi}[A^mu(s,a) A^pi(s,a)] (alignment)

so provers mu that are too weak or too strong, whose A^mu is flat, help less; the paper finds
strengths 8 to 15 useful on the planted sub-sequence, with a base of strength 5, and Best-of-4 of
the base the best of K = 1 ... 32. Remark 3.1: where Q^pi is O(1/K), Best-of-K raises
distinguishability by K^2 and worsens alignment by at most K.

Measured on that task, which has a state of two numbers, (letters left, KMP state), in four steps
away from the theory:
  1. exact: tabular policy, exact values, the exact step of eq. 13. First order in eta; a step of
  size 1; the flow (many
     small steps: the time to reach 50%); and steps of equal KL, as a stronger prover's A^mu is also
     larger, and eta times a larger number is a larger step. No sampling, so no seeds; the spread is
     over hidden patterns with repeated letters. s is weighted by the base policy's visits, summed
     over the solution.
  2. table: sampled solutions and Adam, with exact values and a table as policy. 3. exact values:
  train_rl.py's transformer; only the verifier is replaced by the solver. 4. learned verifiers
  (pav.py), of scripted provers cloned by train_sft.py, and of the base for Best-of-K (eq. 30).
2 to 4: every arm gets the same grid of learning rates, on seeds that are not reported.

What would have falsified it: rank correlation of prediction and gain about 0 or negative; the
strongest prover not worse than a middle one. Runs stay in runs/provers, cloned policies in
runs/planted, where train_rl.py's own comparison has them too. Killed, the same command goes on.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import pav
import train_rl
import train_sft
from experiments.planted_exact import (
    natural_gradient,
    progress,
    scripted,
    spearman,
    state_values,
    table_rl,
    time_to,
    transitions,
    two_terms,
    visits,
)
from experiments.provers_report import (
    claims_of,
    correlation_table,
    exact_table,
    figure,
    remark_table,
    runs_table,
)
from experiments.toolkit import (
    TUNING,
    ExactVerifier,
    evaluations,
    mean_sd,
    print_results,
    quiet,
    spread,
    typed,
    write_results,
)
from infra.cli import opt, parse, script
from infra.runs import mean
from infra.seeds import derive
from model import load_model
from report.judge import correlation
from rollouts import step_ends
from sample import generate
from tasks import get_task
from verifier import load_verifier, step_values

# policies are those of train_rl.py's own comparison
STAGES = Path("runs/planted")
SMOKE = Path("runs/lessons_smoke")


@dataclass
class Config:
    strengths: list = opt(
        [2, 5, 8, 12, 16, 30, 100, 1000], "scripted provers of the exact part; 5 is the base"
    )
    best_of: list = opt([1, 2, 4, 8, 16, 32], "K of the Best-of-K provers of the exact part")
    patterns: int = opt(
        5, "hidden patterns with repeated letters, for the spread of the exact part", low=1
    )
    table_seeds: int = opt(10, "seeds of every prover with a table as policy", low=2)
    table_rates: list = opt(
        [0.03, 0.1, 0.3], "grid of learning rates of the tables; chosen on 3 other seeds"
    )
    transformer: bool = opt(True, "also train transformers, with exact and with learned values")
    exact_arms: list = opt(
        [
            "scripted-5",
            "scripted-8",
            "scripted-16",
            "scripted-100",
            "scripted-1000",
            "best-of-4",
            "best-of-16",
        ],
        "provers whose exact values pay a transformer",
    )
    learned_arms: list = opt(
        ["scripted-16", "scripted-1000", "best-of-1", "best-of-4"],
        "provers with a learned verifier",
    )
    verifier_problems: int = opt(
        40000, "continuations that a learned verifier is trained on (train_rl.py's default)", low=1
    )
    verifier_epochs: int = opt(6, "passes over them (also its default)", low=1)
    learning_rates: list = opt([1e-3, 3e-3], "grid of every arm with a transformer")
    seeds: int = opt(5, "seeds of the reported numbers", low=2)
    steps: int = opt(60, "RL steps", low=1)
    eval_problems: int = opt(128, "problems of an evaluation", low=1)
    out: str = opt("docs/results/provers", "where table, figure and numbers go")
    smoke: bool = opt(False, "a few steps of everything")


# --------------------------------------------------------------------------------------------------
# 1. Exact.


def exact_rows(cfg, pattern, letters, length, base_strength):
    """One row per prover: the two terms, the gain they predict, and the gains that are measured;
    the first row is outcome-only (no bonus)."""
    step = transitions(pattern, letters)
    base = scripted(pattern, letters, base_strength, length)
    V = state_values(step, base)
    d = visits(step, base)
    A_pi = progress(step, V)
    provers = (
        {"outcome": None}
        | {
            f"scripted-{g}": state_values(step, scripted(pattern, letters, g, length))
            for g in cfg.strengths
        }
        | {f"best-of-{K}": 1 - (1 - V) ** K for K in cfg.best_of}
    )
    rows = []
    tiny = 1e-5
    small = 0.1
    nats = 0.05
    for name, V_mu in provers.items():
        A_mu = progress(step, V_mu) if V_mu is not None else np.zeros_like(A_pi)
        seen, aligned = two_terms(base, d, A_mu, A_pi)
        first = natural_gradient(step, base, A_mu, tiny, 1)
        flow = natural_gradient(step, base, A_mu, small, 150)
        equal = natural_gradient(step, base, A_mu, None, 60, kl=nats)
        rows.append(
            dict(
                prover=name,
                success=float(V_mu[-1, 0]) if V_mu is not None else None,
                distinguishability=seen,
                alignment=aligned,
                predicted=seen + aligned,
                first_order=float(first[1] - first[0]) / tiny,
                own_variance=two_terms(base, d, A_pi, A_pi)[0],
                step_of_one=float(np.diff(natural_gradient(step, base, A_mu, 1.0, 1))[0]),
                time_to_half=time_to(flow, 0.5, small),
                equal_kl_steps=time_to(equal, 0.5, 1),
            )
        )
    return rows


def rank_correlations(rows):
    """Of the terms with the gains, over provers (outcome-only left out)."""
    rows = [r for r in rows if r["prover"] != "outcome"]

    def column(key):
        return [r[key] for r in rows]

    gains = dict(
        first_order=column("first_order"),
        step_of_one=column("step_of_one"),
        flow=[-t for t in column("time_to_half")],
        equal_kl=[-t for t in column("equal_kl_steps")],
    )
    return {
        f"{term}/{gain}": spearman(column(term), y)
        for term in ("distinguishability", "alignment", "predicted")
        for gain, y in gains.items()
    }


def growth_with_k(pattern, letters, length, base_strength, best_of):
    """Remark 3.1: distinguishability and alignment of Best-of-K over those of K = 1; over all
    states, and over those with K Q^pi(s,a) <= 0.3 for every letter a and the largest K, which is
    the remark's condition."""
    step = transitions(pattern, letters)
    base = scripted(pattern, letters, base_strength, length)
    V = state_values(step, base)
    d = visits(step, base)
    A_pi = progress(step, V)
    Q = np.zeros((len(V), *step.shape))
    Q[1:] = V[:-1][:, step]
    small = (Q.max(-1) * max(best_of) <= 0.3) & (Q.max(-1) > 0)
    out = []
    for K in best_of:
        A_mu = progress(step, 1 - (1 - V) ** K)
        row = dict(K=K)
        for name, weight in (("all", d), ("small_q", d * small)):
            one = two_terms(base, weight, A_pi, A_pi)
            terms = two_terms(base, weight, A_mu, A_pi)
            row |= {
                f"distinguishability_{name}": terms[0] / one[0] if one[0] else None,
                f"alignment_{name}": terms[1] / one[1] if one[1] else None,
            }
        out.append(row)
    return out


def exact_part(cfg):
    task = get_task(train_rl.Config(task="planted"))
    letters = task.letters
    L = task.max_new_tokens
    # Distinct letters: which ones does not matter.
    main = exact_rows(cfg, letters[:6], letters, L, 5.0)
    regimes = {
        "four letters in 30, base 5 (easy)": (letters[:4], 30, 5.0),
        "six letters in 12, base 2 (hard)": (letters[:6], L, 2.0),
    }
    regimes |= {
        f"repeated letters {s}": (
            "".join(random.Random(f"pattern/{s}").choices(letters[:3], k=6)),
            L,
            5.0,
        )
        for s in range(cfg.patterns)
    }
    others = {
        name: dict(pattern=p, length=n, base=b, rows=exact_rows(cfg, p, letters, n, b))
        for name, (p, n, b) in regimes.items()
    }
    for o in others.values():
        o["correlations"] = rank_correlations(o["rows"])
    return dict(
        rows=main,
        correlations=rank_correlations(main),
        regimes=others,
        remark=growth_with_k(letters[:6], letters, L, 5.0, cfg.best_of),
    )


# --------------------------------------------------------------------------------------------------
# 2. A table instead of a transformer.


def row(source, prover, lr, tried, curves, corr=()):
    """One line of the tables: accuracy averaged over a run (without the first evaluation) and at
    its end, over seeds."""
    averaged = [mean(c[1:]) for c in curves]
    end = [c[-1] for c in curves]
    print(f"  {source} {prover}: averaged {mean_sd(averaged)}, end {mean(end):.3f}", flush=True)
    return dict(
        source=source,
        prover=prover,
        learning_rate=lr,
        tuning={f"{k:g}": round(v, 4) for k, v in tried.items()},
        mean=mean(averaged),
        mean_sd=spread(averaged),
        end=mean(end),
        end_sd=spread(end),
        per_seed=[round(v, 4) for v in averaged],
        curves=[[round(v, 4) for v in c] for c in curves],
        corr_advantage=list(corr),
    )


def table_part(cfg):
    letters = get_task(train_rl.Config(task="planted")).letters
    L = 12
    step = transitions(letters[:6], letters)
    base = scripted(letters[:6], letters, 5.0, L)
    V = state_values(step, base)
    rows = []
    for prover in (
        ["none"] + [f"scripted-{g}" for g in cfg.strengths] + [f"best-of-{K}" for K in cfg.best_of]
    ):
        V_mu = None
        if prover != "none":
            kind, number = kind_of(prover)
            V_mu = (
                1 - (1 - V) ** number
                if kind == "best-of"
                else state_values(step, scripted(letters[:6], letters, number, L))
            )
        tried = {
            lr: mean(
                mean(table_rl(step, base, V_mu, TUNING + s, lr, cfg.steps)[1:]) for s in range(3)
            )
            for lr in cfg.table_rates
        }
        lr = max(tried, key=tried.get)
        curves = [table_rl(step, base, V_mu, s, lr, cfg.steps) for s in range(cfg.table_seeds)]
        rows.append(row("table", prover, lr, tried, curves))
    return rows


# --------------------------------------------------------------------------------------------------
# 3 and 4. The transformer.


def kind_of(prover):
    """'scripted-16' -> ('scripted', 16), 'best-of-4' -> ('best-of', 4)"""
    kind, number = prover.rsplit("-", 1)
    return kind, int(number)


def clone(seed, name, strength, smoke, **more):
    """A policy that train_sft.py clones from the demonstrator (or finds): the stages of
    train_rl.py's own comparison."""
    run = (SMOKE if smoke else STAGES) / f"seed{seed}" / name
    size = dict(steps=20, num_examples=256) if smoke else dict(steps=400, num_examples=6000)
    with quiet():
        train_sft.train(
            train_sft.Config(
                task="planted",
                seed=seed,
                strength=float(strength),
                run_dir=str(run),
                threads=1,
                **size | more,
            )
        )
    return run


def learn_verifier(run, seed, policy, prover, strength, problems, epochs, smoke):
    """A verifier that pav.py trains (or finds), one continuation a problem."""
    size = (
        dict(num_problems=64, epochs=1, eval_problems=16, eval_mc=4)
        if smoke
        else dict(num_problems=problems, epochs=epochs)
    )
    with quiet():
        pav.train(
            pav.Config(
                task="planted",
                seed=seed,
                policy=str(policy),
                prover=str(prover),
                prover_strength=float(strength),
                run_dir=str(run),
                threads=1,
                n_cov=1,
                cuts=1,
                n_mc=1,
                **size,
            )
        )
    return run


def get_verifier(cfg, root, seed, task, source, prover):
    """Exact, or learned: of a scripted prover's clone, or of the base with Best-of-K by eq. 30."""
    (kind, number) = kind_of(prover)
    tokenizer = task.tokenizer()
    k, strength = (number, 5) if kind == "best-of" else (1, number)
    if source == "exact":
        return ExactVerifier(task, tokenizer, strength, k)
    base = clone(seed, "sft", 5, cfg.smoke)
    # As pipeline.py calls them.
    name = {5: "sft", 16: "prover", 1000: "strong"}.get(strength, f"scripted{strength}")
    run = learn_verifier(
        root / f"seed{seed}" / f"verifier_{strength}",
        seed,
        base,
        clone(seed, name, strength, cfg.smoke),
        strength,
        cfg.verifier_problems,
        cfg.verifier_epochs,
        cfg.smoke,
    )
    verifier = load_verifier(run, tokenizer)
    verifier.k = k
    return verifier


def reinforce(cfg, root, seed, source, prover, lr):
    """One RL run (or the one that is there) -> accuracy at every evaluation."""
    run = root / f"seed{seed}" / f"{source}_{prover}_lr{lr:g}"
    config = train_rl.Config(
        task="planted",
        seed=seed,
        policy=str(clone(seed, "sft", 5, cfg.smoke)),
        run_dir=str(run),
        num_prompts=4,
        num_generations=32,
        reward="outcome" if prover == "none" else "pav",
        steps=cfg.steps,
        learning_rate=lr,
        threads=1,
        eval_problems=cfg.eval_problems,
        save_steps=cfg.steps,
        device="cpu",
        eval_split="val" if seed == TUNING else "test",
    )
    verifier = (
        None
        if prover == "none"
        else get_verifier(cfg, root, seed, get_task(config), source, prover)
    )
    with quiet():
        train_rl.train(config, verifier)
    return [r["eval/accuracy"] for r in evaluations(run)]


def advantage_correlation(cfg, root, seed, prover):
    """Of the learned with the exact A^mu, over the steps of 512 solutions of the base; nan where
    either is constant."""
    # Whose hidden sequences depend on the seed.
    task = get_task(train_rl.Config(task="planted", seed=seed))
    model, tokenizer = load_model(clone(seed, "sft", 5, cfg.smoke))
    problems = task.problems("test", 512, 0)
    rolled = generate(
        model,
        [task.prompt_tokens(p, tokenizer) for p in problems],
        max_new_tokens=task.max_new_tokens,
        temperature=1.0,
        seed=derive(seed, "advantage correlation"),
        stop_ids=task.stop_ids(tokenizer),
    )
    ends = step_ends(task, rolled, tokenizer)
    progress = []
    for source in ("learned", "exact"):
        verifier = get_verifier(cfg, root, seed, task, source, prover)
        progress.append(step_values(verifier, rolled.tokens, ends).diff(dim=1).flatten())
    return correlation(*progress)


def transformer_part(cfg, root):
    arms = (
        [("outcome", "none")]
        + [("exact", p) for p in cfg.exact_arms]
        + [("learned", p) for p in cfg.learned_arms]
    )
    rows = []
    for source, prover in arms:
        tried = {
            lr: mean(reinforce(cfg, root, TUNING, source, prover, lr)[1:])
            for lr in cfg.learning_rates
        }
        lr = max(tried, key=tried.get)
        curves = [reinforce(cfg, root, seed, source, prover, lr) for seed in range(cfg.seeds)]
        corr = [
            advantage_correlation(cfg, root, seed, prover)
            for seed in range(cfg.seeds)
            if source == "learned"
        ]
        rows.append(row(source, prover, lr, tried, curves, corr))
    return rows


# --------------------------------------------------------------------------------------------------
# Results.


def write(cfg, exact, rows, name, seconds):
    text = "\n\n".join(
        [
            "Exact, base of strength 5, six hidden letters in 12 (no sampling, no spread). "
            "First order and the terms are per unit of eta, summed over the base's visits; "
            "outcome: A^mu = 0.",
            exact_table(exact["rows"]),
            "The same with four letters in 30:",
            exact_table(next(iter(exact["regimes"].values()))["rows"]),
            "Rank correlation (Spearman) over provers of the terms with the gain (sd):",
            correlation_table(exact),
            "Remark 3.1, Best-of-K of the base:",
            remark_table(exact["remark"]),
            f"Sampled gradients, {cfg.steps} RL steps of 128 solutions; learning rate of each "
            f"arm from {cfg.table_rates} (table) or {cfg.learning_rates} (transformer) on other "
            "seeds:",
            runs_table(rows),
        ]
    )
    write_results(
        cfg.out,
        text,
        name,
        cfg,
        claims_of,
        exact=exact,
        runs=rows,
        cpu_seconds_of_this_call=round(seconds),
    )
    figure(exact, rows, Path(cfg.out) / "curves.png")
    print_results(text, cfg.out)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    clock = time.process_time()
    name = typed("provers", argv)
    root = SMOKE / "provers" if cfg.smoke else Path("runs/provers")
    if cfg.smoke:
        cfg.strengths = [5, 16, 1000]
        cfg.best_of = [1, 4]
        cfg.patterns = 1
        cfg.seeds = 1
        cfg.steps = 2
        cfg.eval_problems = 16
        cfg.exact_arms = ["scripted-16", "scripted-1000"]
        cfg.learned_arms = ["best-of-4"]
        cfg.learning_rates = [1e-3]
        cfg.table_seeds = 2
        cfg.table_rates = [0.1]
        cfg.out = str(root / "results")
    exact = exact_part(cfg)
    print(exact_table(exact["rows"]), flush=True)
    rows = table_part(cfg) + (transformer_part(cfg, root) if cfg.transformer else [])
    write(cfg, exact, rows, name, time.process_time() - clock)


if __name__ == "__main__":
    script(main)
