"""Is a beam steered by progress cheaper than best-of-N? Accuracy against generated tokens, with learned verifiers.

    python experiments/pav_search.py             # about 26 minutes of one core
    python experiments/pav_search.py --smoke     # the same road in under 20 seconds
    -> docs/results/pav_search/: results.json, table.md, curves.png

The claims (Setlur et al. 2024, arXiv 2410.08146, sections 3 and 4): a beam ranked by Q^pi + alpha * A^mu is 1.5 to 5 times
as compute-efficient as best-of-N with an outcome model (ORM) and over 8% more accurate; it beats a beam ranked by Q^pi alone;
the best prover is a Best-of-K policy with a K that is neither 1 nor large; Q^pi re-ranking whole samples is 4% above the ORM.

    orm         best of N whole samples by an outcome model
    q_as_orm    the same samples ranked by Q^pi
    majority    the same samples: the commonest final answer (where the task has one)
    pass        the same samples: is any right? The ceiling of re-ranking, not a method
    beam_q      beam, N candidates a step, ranked by Q^pi (alpha 0)
    beam_pav    beam, ranked by Q^pi + alpha * A^mu, mu = Best-of-K of the policy (from the same Q^pi)

The x axis is tokens generated, every candidate of every step included. Per seed: a policy (SFT), Q^pi and ORM, the last two
trained on equally many sampled tokens. `planted`: 4 prompts, a hidden sequence of 4 letters each (other sequences for every
seed), searched many times with other draws. `chain`: digit arithmetic, verifiers and search on different problems.

Tuning: orm, beam_q and beam_pav get four settings each (epochs of the ORM; children an element; alpha, with the paper's K=4
and 3 children), on a seed that is not reported, mean accuracy of two sizes; the others get none. The whole grid of alpha and K
is run on that seed too and shown, but not chosen from. A curve of best-of-N comes from one set of samples by the exact
expectation over its subsets, which has less noise than a beam's. Everybody samples at temperature 1.

What would have falsified the claims: orm as accurate as beam_pav at equal tokens (paired over seeds); alpha 0 as good as the
tuned alpha; K=1 as good as the others; the ORM above Q^pi on whole samples. Where they should fail, and are measured: N=3 (one
parent: any alpha gives the same ranking); verifiers from --weak times fewer rollouts (planted); sampling at a low
temperature, where the likeliest continuation may be right already; a vote, where answers are short.

Everything stays in runs/pav_search: killed, the same command goes on.
"""

import itertools
import json
import math
import shutil
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from pav_search_report import BEAMS, NAMES, claims, figure, summarise, table  # noqa: E402

import pav  # noqa: E402
import train_sft  # noqa: E402
from infra.cli import opt, parse, script  # noqa: E402
from infra.runs import mean, write_json  # noqa: E402
from kernels import packed_weights  # noqa: E402
from model import load_model  # noqa: E402
from pav import load_verifier  # noqa: E402
from report.figures import machine, print_results  # noqa: E402
from sample import pass_at_k  # noqa: E402
from search import beam, best_of_n, learned_values, majority  # noqa: E402
from tasks import get_task  # noqa: E402

PAPER = dict(alpha=0.0, k=4, children=3)  # a beam's settings before any are chosen
TUNING = 1000  # the seed that chooses settings, on val; seeds 0, 1, ... are reported, on test
TINY = dict(threads=1, device="cpu", save_steps=10**6)
POLICY = {"planted": dict(strength=7.0, steps=300), "chain": dict(strength=0.7, steps=300)}
REGIMES = {"planted": ("weak", "cold"), "chain": ("cold",)}  # where the claims should fail; see measure


@dataclass
class Config:
    tasks: list = opt(["planted", "chain"], "which tasks", choices=["planted", "chain"])
    seeds: int = opt(5, "seeds of the reported numbers (0, 1, ...)", low=2)
    sizes: list = opt([3, 6, 12, 24, 48, 96], "N: samples a problem, or candidates a step of a beam; multiples of 3", low=3)
    problems: int = opt(64, "searches behind a point of a curve, for each seed", low=1)
    alphas: list = opt([0.2, 0.5, 1.0, 2.0], "grid of beam_pav", low=0)
    prover_ks: list = opt([1, 2, 4, 8, 16], "beside K=4, shown only", low=1)
    children: list = opt([2, 3, 6, 12], "grid of beam_q", low=1)
    orm_epochs: list = opt([2, 4, 8, 16], "grid of orm", low=1)
    tuning_sizes: list = opt([6, 12], "N of the tuning, its mean counts", low=3)
    rollouts: int = opt(8000, "problems that Q^pi's rollouts start from; the ORM gets as many tokens", low=8)
    epochs: int = opt(4, "passes of Q^pi over its rollouts", low=1)
    weak: int = opt(8, "weak verifiers: so many times fewer rollouts, twice the epochs", low=1)
    cold: float = opt(0.6, "the low temperature", above=0)
    regime_sizes: list = opt([6, 12], "N of these two regimes", low=3)
    out: str = opt("docs/results/pav_search", "where table, figure and numbers go")
    smoke: bool = opt(False, "a few steps of everything")


# ----------------------------------------------------------------------------------------------------
# Pure functions.


def expected_best(scores, right, n):
    """Expected correctness of the highest-scored of n samples out of len(scores), over all subsets: the sample of rank r
    (0 is best; ties: the earlier) is the best of a subset with chance C(m-1-r, n-1) / C(m, n)."""
    m, order = len(scores), sorted(range(len(scores)), key=lambda i: -scores[i])
    return sum(right[i] * math.comb(m - 1 - r, n - 1) for r, i in enumerate(order)) / math.comb(m, n)


def vote_accuracy(answers, right, n):
    """Accuracy of the majority vote of n samples: mean over the disjoint blocks of n."""
    blocks = [range(i, i + n) for i in range(0, len(answers) - n + 1, n)]
    return mean(right[b[majority([answers[i] for i in b])]] for b in blocks)


# ----------------------------------------------------------------------------------------------------
# Stages: run directories of train_sft.py and pav.py, and numbers kept beside them.


def kept(path, make):
    """make() -> dict, computed once: kept in path with its CPU seconds."""
    if path.exists():
        return json.loads(path.read_text())
    clock = time.process_time()
    with redirect_stdout(StringIO()):
        row = make()
    row["cpu_seconds"] = round(time.process_time() - clock, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, row)
    return row


def policy_of(cfg, home, task, seed):
    shape = dict(steps=5, num_examples=64, eval_problems=8) if cfg.smoke else dict(num_examples=6000)
    place = dict(task=task, planted_length=4, seed=seed, run_dir=str(home / "sft"))
    config = train_sft.Config(**(place | TINY | POLICY[task] | shape))
    return kept(home / "sft.json", lambda: train_sft.train(config))


def verifier_of(cfg, home, name, task, seed, label, epochs, rollouts, donor=None):
    """Train (or find) home/name. donor: a run with the same rollouts, which are copied rather than drawn again."""
    if donor and (home / donor / "rollouts").exists() and not (home / name).exists():
        shutil.copytree(home / donor / "rollouts", home / name / "rollouts")
    shape = dict(eval_problems=16, eval_mc=2) if cfg.smoke else dict(eval_problems=256, eval_mc=4)
    strength = POLICY[task]["strength"] if task == "planted" and label == "q" else -1.0
    config = pav.Config(**(dict(task=task, planted_length=4, seed=seed, policy=str(home / "sft"), run_dir=str(home / name),
                                label=label, epochs=epochs, num_problems=rollouts, prover_strength=strength) | TINY | shape))
    return kept(home / f"{name}.json", lambda: pav.train(config))


def verifiers_of(cfg, home, task, seed, orm_epochs, share=1):
    """Q^pi and ORM from equally many sampled tokens, 1/share of --rollouts. -> {"q": folder, "orm": folder}, summaries."""
    tail, more = (f"_weak{share}", 2) if share > 1 else ("", 1)
    q = verifier_of(cfg, home, f"q{tail}", task, seed, "q", cfg.epochs * more, max(8, cfg.rollouts // share))
    # A completion of the policy has its full length in both tasks, but for a rare early EOS.
    rollouts, name = q["sampled_tokens"] // get_task(task).max_new_tokens, f"orm{tail}_epochs{orm_epochs}"
    donor = next((p.name for p in sorted(home.glob(f"orm{tail}_epochs*/")) if (p / "summary.json").exists()), None)
    orm = verifier_of(cfg, home, name, task, seed, "outcome", orm_epochs * more, rollouts, donor)
    return dict(q=home / f"q{tail}", orm=home / name), dict(q=q, orm=orm)


class Searcher:
    """A seed's policy and verifiers, and the problems to search: N searches of the task's problems in turn."""

    def __init__(self, cfg, home, task, seed, folders):
        self.task = get_task(task, seed, **(dict(planted=4) if task == "planted" else {}))
        self.model, self.tokenizer = load_model(home / "sft")
        self.verifiers = {name: load_verifier(folder, self.tokenizer) for name, folder in folders.items()}
        problems = self.task.problems("val" if seed == TUNING else "test", cfg.problems, 0)
        self.problems = (problems * (1 + cfg.problems // len(problems)))[: cfg.problems]
        self.options = dict(limit=self.task.max_new_tokens, seed=seed, slots=256)

    def text(self, element):
        return self.tokenizer.decode(element.completion())

    def samples(self, sizes, temperature=1.0):
        """Curves of all arms that rank whole samples: {arm: [{n, accuracy, tokens, scored}]}."""
        most = max(sizes)
        with torch.no_grad():
            found = best_of_n(self.model, self.tokenizer, self.task, self.problems, learned_values(self.verifiers["orm"]),
                              n=most, temperature=temperature, **self.options)
            q = [learned_values(self.verifiers["q"])(p, [e.tokens for e in f.candidates])[0]
                 for p, f in zip(self.problems, found)]
        text = [[self.text(e) for e in f.candidates] for f in found]
        right = [[self.task.grade(p, t) for t in ts] for p, ts in zip(self.problems, text)]
        rank = dict(orm=[[e.q for e in f.candidates] for f in found], q_as_orm=q)
        row = lambda n, accuracy: dict(n=n, accuracy=accuracy, tokens=mean(f.generated for f in found) * n / most,  # noqa: E731
                                       scored=mean(f.scored for f in found) * n / most)
        out = {name: [row(n, mean(expected_best(s, r, n) for s, r in zip(scores, right))) for n in sizes]
               for name, scores in rank.items()}
        if not isinstance(self.problems[0].answer, str) or len(self.problems[0].answer) == 1:  # a digit; not a hidden sequence
            said = [[t.rsplit("=", 1)[-1] for t in ts] for ts in text]
            out["majority"] = [row(n, mean(vote_accuracy(a, r, n) for a, r in zip(said, right))) for n in sizes]
        out["pass"] = [row(n, mean(pass_at_k(most, int(sum(r)), n) for r in right)) for n in sizes]
        out["one_sample"] = mean(mean(r) for r in right)
        return out

    def beam(self, n, alpha, k, children, temperature=1.0):
        """dict(n, accuracy, tokens, scored) of a beam."""
        with torch.no_grad(), packed_weights(self.model.parameters(), n * len(self.problems)):
            found = beam(self.model, self.tokenizer, self.task, self.problems, learned_values(self.verifiers["q"], None, k), n=n,
                         width=max(1, n // children), alpha=alpha, temperature=temperature, **self.options)
        return dict(n=n, accuracy=mean(self.task.grade(p, self.text(f.best)) for p, f in zip(self.problems, found)),
                    tokens=mean(f.generated for f in found), scored=mean(f.scored for f in found))


# ----------------------------------------------------------------------------------------------------
# Tuning, then the reported seeds.


def tune(cfg, root, task):
    """Every setting of every arm on the tuning seed -> {arm: [(accuracy, setting), ...]}, in the order they were tried."""
    home, out = root / task / f"seed{TUNING}", {}
    policy_of(cfg, home, task, TUNING)

    def score(name, make):
        return kept(home / "tuning" / f"{name}.json", lambda: dict(accuracy=mean(r["accuracy"] for r in make())))["accuracy"]

    out["orm"] = []
    for epochs in cfg.orm_epochs:
        folders, _ = verifiers_of(cfg, home, task, TUNING, epochs)
        it = Searcher(cfg, home, task, TUNING, folders)
        out["orm"].append((score(f"orm_{epochs}", lambda: it.samples(cfg.tuning_sizes)["orm"]), dict(epochs=epochs)))  # noqa: B023
    grids = dict(alpha_0=[{}], beam_q=[dict(children=c) for c in cfg.children], beam_pav=[dict(alpha=a) for a in cfg.alphas],
                 grid=[dict(alpha=a, k=k) for a, k in itertools.product(cfg.alphas, cfg.prover_ks)])
    for arm, grid in grids.items():
        out[arm] = []
        for setting in grid:
            full = PAPER | setting
            name = "beam_" + "_".join(f"{k}{v:g}" for k, v in full.items())
            out[arm].append((score(name, lambda: [it.beam(n, **full) for n in cfg.tuning_sizes]), setting))  # noqa: B023
    for arm, tried in out.items():
        print(f"{task}: {arm}: " + ", ".join(f"{x:.3f} {s}" for x, s in tried), flush=True)
    return out


def measure(cfg, root, task, seed, chosen, regime=""):
    """All arms of one seed at their chosen settings -> {arm: curve}, one_sample, quality of the verifiers."""
    home, temperature = root / task / f"seed{seed}", cfg.cold if regime == "cold" else 1.0
    sizes = cfg.regime_sizes if regime else cfg.sizes
    policy_of(cfg, home, task, seed)
    folders, quality = verifiers_of(cfg, home, task, seed, chosen["orm"]["epochs"], cfg.weak if regime == "weak" else 1)

    it = Searcher(cfg, home, task, seed, folders)
    at = lambda name: home / "curves" / f"{name}{regime and '_'}{regime}.json"  # noqa: E731
    row = kept(at(f"samples_{chosen['orm']['epochs']}"), lambda: it.samples(sizes, temperature))
    for arm in BEAMS:
        full = PAPER | chosen[arm]
        name = "_".join(f"{k}{v:g}" for k, v in full.items())
        row[arm] = [kept(at(f"beam_{name}_n{n}"), lambda: it.beam(n, **full, temperature=temperature)) for n in sizes]  # noqa: B023
    row["verifier"] = {f"{v}_{k}": q.get(k) for v, q in quality.items()
                       for k in ("auc", "auc_outcome", "corr_advantage", "corr_advantage_exact", "sampled_tokens")}
    return row


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    root, out = Path("runs/pav_search"), Path(cfg.out)
    if cfg.smoke:
        root, out, cfg.tasks = Path("runs/pav_search_smoke"), Path("runs/pav_search_smoke/results"), ["planted"]
        cfg.seeds, cfg.sizes, cfg.tuning_sizes, cfg.regime_sizes = 2, [3, 6, 12], [6], [6]
        cfg.alphas, cfg.prover_ks, cfg.children, cfg.orm_epochs, cfg.problems = [0.5], [1, 4], [3, 6], [1], 8
        cfg.rollouts, cfg.epochs = 64, 1
    command, results = "python experiments/pav_search.py" + " --smoke" * cfg.smoke, {}
    for task in cfg.tasks:
        tuning = tune(cfg, root, task)
        chosen = {arm: max(tuning[arm], key=lambda x: x[0])[1] for arm in ("orm", *BEAMS)}
        rows = {regime: [] for regime in ("", *REGIMES[task])}
        for seed in range(cfg.seeds):
            for regime, found in rows.items():
                found.append(measure(cfg, root, task, seed, chosen, regime))
            row = rows[""][-1]
            print(f"{task} seed {seed}: one sample {row['one_sample']:.3f}; largest N: "
                  + ", ".join(f"{NAMES[a]} {row[a][-1]['accuracy']:.3f}" for a in NAMES if a in row), flush=True)
        results[task] = dict(chosen=chosen, tuning=tuning, arms=summarise(rows[""]),
                             regimes={regime: summarise(rows[regime]) for regime in REGIMES[task]},
                             one_sample=[r["one_sample"] for r in rows[""]],
                             verifiers={k or "main": [r["verifier"] for r in v] for k, v in rows.items() if k != "cold"})
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"`{task}`, {cfg.seeds} seeds x {cfg.problems} searches; one sample: {mean(r['one_sample']):.3f}; "
                       f"accuracy (sd over seeds):\n\n{table(r, cfg)}" for task, r in results.items())
    (out / "table.md").write_text(text + "\n")
    files = [p for task in cfg.tasks for below in ("", "tuning/", "curves/") for p in (root / task).glob(f"seed*/{below}*.json")]
    seconds = sum(json.loads(p.read_text())["cpu_seconds"] for p in files)
    write_json(out / "results.json", dict(command=command, machine=machine(), torch=torch.__version__, settings=vars(cfg),
                                          claims=claims(results, cfg, command), cpu_seconds=round(seconds), tasks=results))
    figure(results, cfg, out / "curves.png")
    print_results(text, out, seconds)


if __name__ == "__main__":
    script(main)
