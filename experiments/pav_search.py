"""Is a beam steered by progress cheaper than best-of-N? Accuracy against generated tokens.

    python -m experiments.pav_search             # about 26 minutes of one core
    python -m experiments.pav_search --tasks grid --rollouts 40000 --epochs 6 --orm-epochs 1 2 4 8 \
        --sizes 3 6 12 24 48 --problems 192 --out docs/results/pav_search_grid     # 75 minutes
    python -m experiments.pav_search --smoke     # few steps, under 20 seconds
    -> docs/results/pav_search/: results.json, table.md, curves.png

The claims (Setlur et al. 2024, arXiv 2410.08146, sections 3 and 4): a beam ranked by Q^pi + alpha *
A^mu is 1.5 to 5 times as compute-efficient as best-of-N with an outcome model (ORM) and over 8%
more accurate; it beats a beam ranked by Q^pi alone; the best prover is a Best-of-K policy with a K
that is neither 1 nor large; Q^pi re-ranking whole samples is 4% above the ORM.

    orm         best of N whole samples by an outcome model
    q_as_orm    the same samples ranked by Q^pi
    majority    the same samples: the commonest final answer (where the task has one)
    pass        the same samples: is any right? The ceiling of re-ranking, not a method
    beam_q      beam, N candidates a step, ranked by Q^pi (alpha 0)
    beam_pav    beam, ranked by Q^pi + alpha * A^mu, mu = Best-of-K of the policy (from the same
                Q^pi)

The x axis is tokens generated, every candidate of every step included. Per seed: a policy (SFT),
Q^pi and ORM, the last two trained on equally many sampled tokens. `planted`: 4 prompts, a hidden
sequence of 4 letters each (other sequences for every seed), searched many times with other draws.
`chain`: digit arithmetic, `grid`: shortest ways of 5 to 7 lines; verifiers and search on different
problems.

Tuning: orm, beam_q and beam_pav get four settings each (epochs of the ORM; children an element;
alpha, with the paper's K=4 and 3 children), on a seed that is not reported, mean accuracy of two
sizes; the others get none. The whole grid of alpha and K is run on that seed too and shown, but not
chosen from. A curve of best-of-N comes from one set of samples by the exact expectation over its
subsets, which has less noise than a beam's. Everybody samples at temperature 1.

What would have falsified the claims: orm as accurate as beam_pav at equal tokens (paired over
seeds); alpha 0 as good as the tuned alpha; K=1 as good as the others; the ORM above Q^pi on whole
samples. Where they should fail, and are measured: N=3 (one parent: any alpha gives the same
ranking); verifiers from --weak times fewer rollouts (planted); sampling at a low temperature, where
the likeliest continuation may be right already; a vote, where answers are short.

Everything stays in runs/pav_search: killed, the same command goes on.
"""

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import pav
import train_sft
from experiments.pav_search_report import BEAMS, NAMES, claims_of, figure, summarise, table
from experiments.toolkit import (
    TUNING,
    cached,
    cpu_seconds,
    expected_best,
    print_results,
    typed,
    vote_accuracy,
    write_results,
)
from infra.cli import opt, parse, script
from infra.runs import mean
from kernels import packed_weights
from model import load_model
from rollouts import pass_at_k
from search import beam, best_of_n, learned_values
from tasks import TaskFlags, get_task
from verifier import load_verifier

PAPER = dict(alpha=0.0, k=4, children=3)  # a beam's settings before any are chosen
ARGS = {"planted": ["length=4"], "chain": [], "grid": []}  # --task-args
TINY = dict(threads=1, device="cpu", save_steps=10**6)
POLICY = {
    "planted": dict(strength=7.0, steps=300, num_examples=6000),
    "chain": dict(strength=0.7, steps=300, num_examples=6000),
    # The clone solves a sixth, as the paper's policies solve a fifth of MATH.
    "grid": dict(strength=0.85, steps=800, num_examples=100000),
}
LENGTH = {"grid": 19}  # tokens a completion, where it is not the longest
# Fresh continuations that judge Q^pi: few where the policy succeeds often.
JUDGE = {"grid": dict(eval_problems=512, eval_mc=16)}
# Where the claims should fail; see measure.
REGIMES = {"planted": ("weak", "cold"), "chain": ("cold",), "grid": ("cold",)}


@dataclass
class Config:
    tasks: list = opt(["planted", "chain"], "which tasks", choices=list(POLICY))
    seeds: int = opt(5, "seeds of the reported numbers (0, 1, ...)", low=2)
    sizes: list = opt(
        [3, 6, 12, 24, 48, 96],
        "N: samples a problem, or candidates a step of a beam; multiples of 3",
        low=3,
    )
    problems: int = opt(64, "searches behind a point of a curve, for each seed", low=1)
    alphas: list = opt([0.2, 0.5, 1.0, 2.0], "grid of beam_pav", low=0)
    prover_ks: list = opt([1, 2, 4, 8, 16], "beside K=4, shown only", low=1)
    children: list = opt([2, 3, 6, 12], "grid of beam_q", low=1)
    orm_epochs: list = opt([2, 4, 8, 16], "grid of orm", low=1)
    tuning_sizes: list = opt([6, 12], "N of the tuning, its mean counts", low=3)
    rollouts: int = opt(
        8000, "problems that Q^pi's rollouts start from; the ORM gets as many tokens", low=8
    )
    epochs: int = opt(4, "passes of Q^pi over its rollouts", low=1)
    weak: int = opt(8, "weak verifiers: so many times fewer rollouts, twice the epochs", low=1)
    cold: float = opt(0.6, "the low temperature", above=0)
    regime_sizes: list = opt([6, 12], "N of these two regimes", low=3)
    out: str = opt("docs/results/pav_search", "where table, figure and numbers go")
    smoke: bool = opt(False, "a few steps of everything")


# --------------------------------------------------------------------------------------------------
# Stages: run directories of train_sft.py and pav.py, and numbers kept beside them.


def policy_of(cfg, home, task, seed):
    shape = dict(steps=5, num_examples=64, eval_problems=8) if cfg.smoke else {}
    place = dict(task=task, task_args=ARGS[task], seed=seed, run_dir=str(home / "sft"))
    config = train_sft.Config(**(place | TINY | POLICY[task] | shape))
    return cached(home / "sft.json", lambda: train_sft.train(config))


def verifier_of(cfg, home, name, task, seed, label, epochs, rollouts, donor=None):
    """Train (or find) home/name. donor: a run with the same rollouts, which are copied rather
    than drawn again."""
    if donor and (home / donor / "rollouts").exists() and not (home / name).exists():
        shutil.copytree(home / donor / "rollouts", home / name / "rollouts")
    shape = JUDGE.get(task, dict(eval_problems=256, eval_mc=4))
    if cfg.smoke:
        shape = dict(eval_problems=16, eval_mc=2)
    strength = POLICY[task]["strength"] if task == "planted" and label == "q" else -1.0
    config = pav.Config(
        **(
            dict(
                task=task,
                task_args=ARGS[task],
                seed=seed,
                policy=str(home / "sft"),
                run_dir=str(home / name),
                label=label,
                epochs=epochs,
                num_problems=rollouts,
                prover_strength=strength,
            )
            | TINY
            | shape
        )
    )
    return cached(home / f"{name}.json", lambda: pav.train(config))


def verifiers_of(cfg, home, task, seed, orm_epochs, share=1):
    """Q^pi and ORM from equally many sampled tokens, 1/share of --rollouts. -> {"q": folder,
    "orm": folder}, summaries."""
    tail, more = (f"_weak{share}", 2) if share > 1 else ("", 1)
    q = verifier_of(
        cfg, home, f"q{tail}", task, seed, "q", cfg.epochs * more, max(8, cfg.rollouts // share)
    )
    # A completion of the policy has its full length, but for a rare early EOS; grid: on average.
    rollouts = q["sampled_tokens"] // LENGTH.get(task, get_task(task).max_new_tokens)
    name = f"orm{tail}_epochs{orm_epochs}"
    donor = next(
        (p.name for p in sorted(home.glob(f"orm{tail}_epochs*/")) if (p / "summary.json").exists()),
        None,
    )
    orm = verifier_of(cfg, home, name, task, seed, "outcome", orm_epochs * more, rollouts, donor)
    return dict(q=home / f"q{tail}", orm=home / name), dict(q=q, orm=orm)


class Searcher:
    """A seed's policy and verifiers, and the problems to search: N searches of the task's
    problems in turn."""

    def __init__(self, cfg, home, task, seed, folders):
        self.task = get_task(TaskFlags(task=task, task_seed=seed, task_args=ARGS[task]))
        self.model, self.tokenizer = load_model(home / "sft")
        self.verifiers = {
            name: load_verifier(folder, self.tokenizer) for name, folder in folders.items()
        }
        problems = self.task.problems("val" if seed == TUNING else "test", cfg.problems, 0)
        self.problems = (problems * (1 + cfg.problems // len(problems)))[: cfg.problems]
        self.options = dict(limit=self.task.max_new_tokens, seed=seed, slots=256)

    def text(self, element):
        return self.tokenizer.decode(element.completion())

    def samples(self, sizes, temperature=1.0):
        """Curves of all arms that rank whole samples: {arm: [{n, accuracy, tokens, scored}]}."""
        most = max(sizes)
        with torch.no_grad():
            searches = best_of_n(
                self.model,
                self.tokenizer,
                self.task,
                self.problems,
                learned_values(self.verifiers["orm"]),
                n=most,
                temperature=temperature,
                **self.options,
            )
            q = [
                learned_values(self.verifiers["q"])(p, [e.tokens for e in f.candidates])[0]
                for p, f in zip(self.problems, searches)
            ]
        text = [[self.text(e) for e in f.candidates] for f in searches]
        right = torch.tensor(
            [[self.task.grade(p, t) for t in ts] for p, ts in zip(self.problems, text)]
        )
        rank = dict(
            orm=torch.tensor([[e.q for e in f.candidates] for f in searches]),
            q_as_orm=torch.tensor(q),
        )
        generated = mean(f.generated for f in searches) / most
        scored = mean(f.scored for f in searches) / most

        def curve(accuracy):
            return [
                dict(n=n, accuracy=accuracy(n), tokens=n * generated, scored=n * scored)
                for n in sizes
            ]

        def ranked(score):
            return curve(lambda n: float(expected_best(score, right, n).mean()))

        out = {name: ranked(score) for name, score in rank.items()}
        # A digit is voted on; a hidden sequence is not.
        if not isinstance(self.problems[0].answer, str) or len(self.problems[0].answer) == 1:
            answers = [[t.rsplit("=", 1)[-1] for t in ts] for ts in text]
            out["majority"] = curve(
                lambda n: mean(vote_accuracy(a, r, n) for a, r in zip(answers, right.tolist()))
            )
        out["pass"] = curve(lambda n: mean(pass_at_k(most, int(sum(r)), n) for r in right.tolist()))
        out["one_sample"] = float(right.mean())
        return out

    def orm(self, sizes):
        return self.samples(sizes)["orm"]

    def beams(self, sizes, **setting):
        return [self.beam(n, **setting) for n in sizes]

    def beam(self, n, alpha, k, children, temperature=1.0):
        """dict(n, accuracy, tokens, scored) of a beam."""
        with torch.no_grad(), packed_weights(self.model.parameters(), n * len(self.problems)):
            searches = beam(
                self.model,
                self.tokenizer,
                self.task,
                self.problems,
                learned_values(self.verifiers["q"], None, k),
                n=n,
                width=max(1, n // children),
                alpha=alpha,
                temperature=temperature,
                **self.options,
            )
        return dict(
            n=n,
            accuracy=mean(
                self.task.grade(p, self.text(f.best)) for p, f in zip(self.problems, searches)
            ),
            tokens=mean(f.generated for f in searches),
            scored=mean(f.scored for f in searches),
        )


# --------------------------------------------------------------------------------------------------
# Tuning, then the reported seeds.


def tune(cfg, root, task):
    """Every setting of every arm on the tuning seed -> {arm: [(accuracy, setting), ...]}, in the
    order they were tried."""
    home = root / task / f"seed{TUNING}"
    out = {}
    policy_of(cfg, home, task, TUNING)

    def score(name, make, *args, **options):
        """Mean accuracy of the rows that make gives, once."""

        def averaged():
            return dict(accuracy=mean(r["accuracy"] for r in make(*args, **options)))

        return cached(home / "tuning" / f"{name}.json", averaged)["accuracy"]

    out["orm"] = []
    for epochs in cfg.orm_epochs:
        folders, _ = verifiers_of(cfg, home, task, TUNING, epochs)
        searcher = Searcher(cfg, home, task, TUNING, folders)
        accuracy = score(f"orm_{epochs}", searcher.orm, cfg.tuning_sizes)
        out["orm"].append((accuracy, dict(epochs=epochs)))
    grids = dict(
        alpha_0=[{}],
        beam_q=[dict(children=c) for c in cfg.children],
        beam_pav=[dict(alpha=a) for a in cfg.alphas],
        grid=[dict(alpha=a, k=k) for a, k in itertools.product(cfg.alphas, cfg.prover_ks)],
    )
    for arm, grid in grids.items():
        out[arm] = []
        for setting in grid:
            full = PAPER | setting
            name = "beam_" + "_".join(f"{k}{v:g}" for k, v in full.items())
            out[arm].append((score(name, searcher.beams, cfg.tuning_sizes, **full), setting))
    for arm, tried in out.items():
        print(f"{task}: {arm}: " + ", ".join(f"{x:.3f} {s}" for x, s in tried), flush=True)
    return out


def measure(cfg, root, task, seed, chosen, regime=""):
    """All arms of one seed at their chosen settings -> {arm: curve}, one_sample, quality of the
    verifiers."""
    home = root / task / f"seed{seed}"
    temperature = cfg.cold if regime == "cold" else 1.0
    sizes = cfg.regime_sizes if regime else cfg.sizes
    policy_of(cfg, home, task, seed)
    folders, quality = verifiers_of(
        cfg, home, task, seed, chosen["orm"]["epochs"], cfg.weak if regime == "weak" else 1
    )

    searcher = Searcher(cfg, home, task, seed, folders)

    def curve(name, make, *args, **options):
        path = home / "curves" / f"{name}{regime and '_'}{regime}.json"
        return cached(path, lambda: make(*args, **options, temperature=temperature))

    row = curve(f"samples_{chosen['orm']['epochs']}", searcher.samples, sizes)
    for arm in BEAMS:
        full = PAPER | chosen[arm]
        name = "_".join(f"{k}{v:g}" for k, v in full.items())
        row[arm] = [curve(f"beam_{name}_n{n}", searcher.beam, n, **full) for n in sizes]
    row["verifier"] = {
        f"{v}_{k}": q.get(k)
        for v, q in quality.items()
        for k in ("auc", "auc_outcome", "corr_advantage", "corr_advantage_exact", "sampled_tokens")
    }
    return row


SMOKE = dict(
    tasks=["planted"],
    seeds=2,
    sizes=[3, 6, 12],
    tuning_sizes=[6],
    regime_sizes=[6],
    alphas=[0.5],
    prover_ks=[1, 4],
    children=[3, 6],
    orm_epochs=[1],
    problems=8,
    rollouts=64,
    epochs=1,
)


def run_task(cfg, root, task):
    """Tuning and all reported seeds of one task -> its entry in results.json."""
    tuning = tune(cfg, root, task)
    chosen = {arm: max(tuning[arm], key=lambda x: x[0])[1] for arm in ("orm", *BEAMS)}
    rows = {regime: [] for regime in ("", *REGIMES[task])}
    for seed in range(cfg.seeds):
        for regime, curves in rows.items():
            curves.append(measure(cfg, root, task, seed, chosen, regime))
        row = rows[""][-1]
        largest = [f"{NAMES[a]} {row[a][-1]['accuracy']:.3f}" for a in NAMES if a in row]
        one = f"{task} seed {seed}: one sample {row['one_sample']:.3f}"
        print(f"{one}; largest N: {', '.join(largest)}", flush=True)
    verifiers = {k or "main": [r["verifier"] for r in v] for k, v in rows.items() if k != "cold"}
    return dict(
        chosen=chosen,
        tuning=tuning,
        arms=summarise(rows[""]),
        regimes={regime: summarise(rows[regime]) for regime in REGIMES[task]},
        one_sample=[r["one_sample"] for r in rows[""]],
        verifiers=verifiers,
    )


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    root = Path("runs/pav_search")
    out = Path(cfg.out)
    if cfg.smoke:
        root = Path("runs/pav_search_smoke")
        out = root / "results"
        vars(cfg).update(SMOKE)
    results = {task: run_task(cfg, root, task) for task in cfg.tasks}
    text = "\n\n".join(
        f"`{task}`, {cfg.seeds} seeds x {cfg.problems} searches; one sample: "
        f"{mean(r['one_sample']):.3f}; accuracy (sd over seeds):\n\n{table(r, cfg)}"
        for task, r in results.items()
    )
    cells = [
        f"{task}/seed*/{below}*.json" for task in cfg.tasks for below in ("", "tuning/", "curves/")
    ]
    seconds = cpu_seconds(path for pattern in cells for path in root.glob(pattern))
    name = typed("pav_search", argv)
    write_results(out, text, name, cfg, claims_of, cpu_seconds=seconds, tasks=results)
    figure(results, cfg, out / "curves.png")
    print_results(text, out, seconds)


if __name__ == "__main__":
    script(main)
