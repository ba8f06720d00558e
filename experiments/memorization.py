"""Does accuracy before memorization predict generalisation? (Kang et al. 2024, arXiv 2411.07681)

    python experiments/memorization.py                            # own runs and curation: 33 minutes of one core
    python experiments/memorization.py --published FILE.npz       # the authors' measurements, seconds
    -> docs/results/memorization/{published,runs,curation}.json, published.png, curves.png, table.md

1. published  R^2 of mean pre-memorization accuracy against test accuracy (line y = x) on the arrays that the authors
              released for Llama-3-8B on GSM8K and MATH, with their thresholds, and with the threshold chosen on half of
              the runs and scored on the other half. FILE holds, for every run, RUN/{correct [M,n], nsamples [M], nll
              [M,n], test [M]} and optionally RUN/subsample [m] (indices of the examples that were trained).
2. runs       the same on our own models, trained on --task worded (worded.py): learning rate x steps x data size, every
              snapshot of a run a point; beside it plain training accuracy, the paper's foil. Also robustness: finished
              models must go on from a first line whose meaningless letters differ from the training solution's.
3. curation   n examples more, collected where pre-memorization accuracy is low, against iid, nll and training accuracy as
              the measure, the same number of examples, steps and learning rate for each.

What would falsify it: in 2 a held-out R^2 no better than that of plain training accuracy; examples of high and low
pre-memorization accuracy losing as much under a changed first line; in 3 a curve that is not above iid's.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_sft  # noqa: E402
from infra.cli import UserError, opt, parse, script  # noqa: E402
from infra.runs import write_json  # noqa: E402
from infra.seeds import derive  # noqa: E402
from papers.memorization import (  # noqa: E402
    choose_threshold,
    held_out_r_squared,
    load_run,
    pre_memorization,
    predicted,
    r_squared,
    sampled_accuracy,
)
from model import load_model, resolve  # noqa: E402
from report.figures import finish, machine, print_results, pyplot  # noqa: E402
from tasks import get_task  # noqa: E402

TAU = dict(gsm8k=-2.3, math=-1.7)  # the authors' thresholds: ln(nll)
GRID = np.exp(np.arange(-4.0, 0.01, 0.1))  # nats a token


@dataclass
class Config:
    published: str = opt("", "npz of the authors' arrays; only that part is then run", "what")
    sizes: list = opt([400, 800, 1600], "training examples", "runs")
    learning_rates: list = opt([1e-3, 3e-3], "peak learning rates", "runs")
    steps: list = opt([200, 500], "optimizer steps (batch 128)", "runs")
    seeds: int = opt(1, "seeds of each combination", "runs", low=1)
    snapshots: int = opt(6, "a run", "runs", low=2)
    curation_seeds: int = opt(5, "seeds", "curation", low=1)
    curation_start: int = opt(500, "examples before", "curation", low=2)
    curation_sizes: list = opt([1000], "examples after", "curation")
    curation_steps: int = opt(400, "optimizer steps of each run", "curation", low=1)
    run_dir: str = opt("runs/memorization", "where the runs are kept (they resume)", "run")
    out: str = opt("docs/results/memorization", "where results go", "run")
    smoke: bool = opt(False, "a few steps of everything", "run")


def published(path):
    """-> {"gsm8k": [runs], "math": [runs]} from the npz."""
    try:
        z = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}; give the npz described in --help") from None
    out = dict(gsm8k=[], math=[])
    for name in sorted({k.split("/")[0] for k in z.files}):
        rows = z[f"{name}/subsample"] if f"{name}/subsample" in z.files else slice(None)
        out[name.split("_")[0]].append(dict(
            accuracy=(z[f"{name}/correct"] / z[f"{name}/nsamples"][:, None])[:, rows].astype(float),
            nll=z[f"{name}/nll"][:, rows].astype(float), test=z[f"{name}/test"].astype(float)))
    return out


def judge(runs, seed=0, fixed=None):
    """R^2 of the line y = x for pre-memorization and for plain accuracy. The threshold: given, or the best on all runs."""
    threshold = choose_threshold(runs, GRID) if fixed is None else fixed
    premem, test = predicted(runs, threshold)
    plain = np.concatenate([r["accuracy"].mean(1) for r in runs])
    both = len(test) > 1 and plain.var() > 0 and test.var() > 0
    scores, chosen = held_out_r_squared(runs, GRID, 200, seed)
    return dict(runs=len(runs), checkpoints=len(test), threshold=threshold, r2=r_squared(premem, test),
                r2_train_accuracy=r_squared(plain, test),
                correlation_train_accuracy=np.corrcoef(plain, test)[0, 1] ** 2 if both else None,
                held_out=dict(splits=200, median=np.median(scores), p10=np.percentile(scores, 10),
                              thresholds=np.percentile(chosen, [10, 90])),
                sensitivity={f"{t:.3f}": r_squared(*predicted(runs, t)) for t in GRID},
                premem=premem, train_accuracy=plain, test=test)


def plain(value):
    """numpy -> what JSON knows, four digits."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    return round(float(value), 4) if isinstance(value, (float, np.floating)) else value


def sft(cfg, name, **settings):
    """Train one tracked run (or find it complete) -> its config."""
    c = train_sft.Config(task="worded", threads=1, run_dir=f"{cfg.run_dir}/{name}", eval_problems=64, save_steps=100,
                         device="cpu", **settings)
    train_sft.train(c)
    return c


def own_runs(cfg):
    grid = itertools.product(cfg.sizes, cfg.learning_rates, cfg.steps, range(cfg.seeds))
    return [sft(cfg, f"n{n}_lr{lr:g}_steps{steps}_seed{seed}", num_examples=n, learning_rate=lr, steps=steps, seed=seed,
                track_memorization=cfg.snapshots) for n, lr, steps, seed in grid]


def robustness(configs, threshold):
    """Accuracy from a first line with other wording, for examples of low (< 0.5) and of high final pre-memorization
    accuracy that the finished model gets right when left alone. Pooled over runs; problems of one line are left out."""
    drop = dict(low=[], high=[])
    for c in configs:
        task, run = get_task(c), load_run(c.run_dir)
        model, tokenizer = load_model(resolve(c.run_dir))
        problems = task.problems("train", run["accuracy"].shape[1], c.seed)
        premem = pre_memorization(run["accuracy"], run["nll"], threshold)[-1]
        keep = [i for i, p in enumerate(problems) if len(p.data[1]) > 1 and run["accuracy"][-1, i] == 1][:200]
        if not keep:
            continue
        prompts = []
        for i in keep:
            line, old = problems[i].data[1][0], task.demonstration(problems[i], None, 0).split("\n")[0][-2:]
            other = "".join(chr(ord("a") + (ord(x) - ord("a") + 4) % 8) for x in old)  # both letters changed
            prompts.append(task.prompt_tokens(problems[i], tokenizer) + tokenizer.encode(f"{line}{other}\n"))
        after = sampled_accuracy(model, tokenizer, task, prompts, [problems[i] for i in keep], 4, c.memorization_temperature,
                                 task.max_new_tokens, derive(c.seed, "robustness"))
        for i, a in zip(keep, after):
            drop["low" if premem[i] < 0.5 else "high"].append(float(a))
    return {k: dict(examples=len(v), accuracy=float(np.mean(v)) if v else None) for k, v in drop.items()}


def curation(cfg, threshold):
    """Test accuracy after more data, by how it was chosen. -> {size: {by: [accuracy of each seed]}}"""
    out = {str(n): {by: [] for by in ("iid", "premem", "nll", "accuracy")} for n in cfg.curation_sizes}
    for seed in range(100, 100 + cfg.curation_seeds):  # seeds that chose nothing: the threshold comes from the runs above
        common = dict(learning_rate=3e-3, steps=cfg.curation_steps, seed=seed)
        start = sft(cfg, f"start_seed{seed}", num_examples=cfg.curation_start, track_memorization=cfg.snapshots, **common)
        out.setdefault(str(cfg.curation_start), dict(none=[]))["none"].append(load_run(start.run_dir)["test"][-1])
        for n, by in itertools.product(cfg.curation_sizes, ("iid", "premem", "nll", "accuracy")):
            c = sft(cfg, f"{by}_{n}_seed{seed}", num_examples=n, curate=start.run_dir, curate_by=by, track_memorization=1,
                    memorization_threshold=threshold, memorization_problems=1000, **common)
            out[str(n)][by].append(load_run(c.run_dir)["test"][-1])
    return out


def claim(command, says, measured, holds, fails_when=""):
    """For README (experiments/claims.py)."""
    return dict(paper="2411.07681", claim=says, measured=measured, holds=holds, command=command, fails_when=fails_when)


def predicts(r):
    """The rule for "pre-memorization accuracy predicts test accuracy": with a threshold from other runs, R^2 of at least 0.8
    and above that of training accuracy; partly, if only above."""
    better = r["held_out"]["median"] > r["r2_train_accuracy"]
    return True if better and r["held_out"]["median"] >= 0.8 else "partly" if better else False


def published_claim(command, name, r):
    good = [np.log(float(t)) for t, r2 in r["sensitivity"].items() if r2 >= 0.8]
    return claim(command, f"pre-memorization accuracy predicts test accuracy (R^2 above 0.9; {name}, Llama-3-8B)",
                 f"their arrays: R^2 {r['r2']:.3f} ({r['checkpoints']} checkpoints); threshold from half of the runs, scored "
                 f"on the other: median {r['held_out']['median']:.3f} (10th percentile {r['held_out']['p10']:.3f}); training "
                 f"accuracy {r['r2_train_accuracy']:.1f}", predicts(r),
                 f"the threshold's logarithm is not within {min(good):.1f} to {max(good):.1f} (R^2 below 0.8)")


def run_claims(command, r):
    low, high = r["robustness"]["low"], r["robustness"]["high"]
    said = [claim(command, "pre-memorization accuracy predicts test accuracy, training accuracy does not",
                  f"{r['runs']} runs of our own: R^2 {r['r2']:.3f}, held out {r['held_out']['median']:.3f} (10th percentile "
                  f"{r['held_out']['p10']:.3f}); training accuracy {r['r2_train_accuracy']:.2f}", predicts(r))]
    if low["examples"] and high["examples"]:
        said.append(claim(
            command, "examples that were learned before they were memorised survive a changed prompt, the others do not",
            f"right when left alone, and still right from a first line in other letters: {high['accuracy']:.2f} of "
            f"{high['examples']} with high pre-memorization accuracy, {low['accuracy']:.2f} of {low['examples']} with low "
            "(pooled over the runs, no spread)", high["accuracy"] - low["accuracy"] > 0.1))
    return said


def curation_claim(command, more):
    """Curated against iid data at equal size, differences paired by seed."""
    sizes = [n for n in more if "iid" in more[n]]
    gains = {by: [np.subtract(more[n][by], more[n]["iid"]) for n in sizes] for by in ("premem", "nll", "accuracy")}
    show = lambda d: ", ".join(f"{x.mean():+.3f} ({x.std(ddof=1) if len(x) > 1 else 0:.3f})" for x in d)  # noqa: E731
    sure = [x.mean() > 2 * x.std(ddof=1) / len(x) ** 0.5 for x in gains["premem"] if len(x) > 1]
    best = all(gains["premem"][i].mean() >= gains[by][i].mean() for by in gains for i in range(len(sizes)))
    return claim(command, "problems like those of low pre-memorization accuracy are worth 1.5 to 2 times iid ones",
                 f"test accuracy minus iid at {', '.join(sizes)} examples: {show(gains['premem'])}; chosen by nll "
                 f"{show(gains['nll'])}, by training accuracy {show(gains['accuracy'])} ({len(gains['premem'][0])} seeds, sd)",
                 True if all(sure) and best else "partly" if any(sure) else False,
                 "" if best else "another measure of difficulty does as well or better")


def scatter(path, panels, title, more=None):
    """A panel for each {name: result of judge()}: what training shows against test accuracy. more: curation()'s, as one more."""
    if (plt := pyplot()) is None:
        return
    fig, axes = plt.subplots(1, len(panels) + bool(more), figsize=(4.8 * (len(panels) + bool(more)), 4.2), squeeze=False,
                             constrained_layout=True)
    for axis, (name, r) in zip(axes[0], panels.items()):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        axis.scatter(r["train_accuracy"], r["test"], s=14, color="#E69F00", marker="x", label=f"train accuracy, "
                     f"R² {r['r2_train_accuracy']:.2f}")
        axis.scatter(r["premem"], r["test"], s=14, color="#0072B2", label=f"pre-memorization accuracy, R² {r['r2']:.2f} "
                     f"(held out {r['held_out']['median']:.2f})")
        axis.set(xlabel="measured on the training set", ylabel="test accuracy", xlim=(0, 1), ylim=(0, 1), title=name)
        axis.legend(fontsize=7, loc="upper left")
    if more:
        curated(axes[0][-1], more)
    fig.suptitle(title, fontsize=10)
    finish(plt, fig, axes[0], path)


def curated(axis, more):
    """Test accuracy by how the examples were chosen: a dot a seed, a bar their mean; the seeds' start is the first column."""
    columns = [(by, n, a) for n, arms in sorted(more.items(), key=lambda x: int(x[0])) for by, a in arms.items()]
    for x, (by, _, a) in enumerate(columns):
        colour = {"none": "0.5", "iid": "#000000", "premem": "#0072B2", "nll": "#D55E00", "accuracy": "#E69F00"}[by]
        axis.scatter([x] * len(a), a, s=16, color=colour, alpha=0.6)
        axis.hlines(np.mean(a), x - 0.3, x + 0.3, color=colour, linewidth=2)
    axis.set(xticks=range(len(columns)), ylabel="test accuracy", title="data chosen by a measure of difficulty")
    names = dict(none="start", premem="pre-mem.", accuracy="train acc.")
    axis.set_xticklabels([f"{names.get(by, by)}\n{n}" for by, n, _ in columns], fontsize=8)


def row(name, r):
    return (f"| {name} | {r['runs']} | {r['checkpoints']} | {r['threshold']:.3f} | {r['r2']:.3f} | "
            f"{r['held_out']['median']:.3f} ({r['held_out']['p10']:.3f}) | {r['r2_train_accuracy']:.2f} |")


HEAD = ("| data | runs | checkpoints | threshold (nats) | R² | R², threshold from the other half: median (10th percentile) | "
        "R² of train accuracy |\n|---|---|---|---|---|---|---|\n")


def minutes(cfg):
    """What all runs took, on one core each, whoever of several calls made them."""
    return sum(json.loads(p.read_text())["seconds"] for p in Path(cfg.run_dir).glob("*/summary.json")) / 60


def main():
    cfg, out = parse(Config, None, __doc__), None
    out = Path(cfg.out if not cfg.smoke else f"{cfg.run_dir}_smoke/results")
    out.mkdir(parents=True, exist_ok=True)
    argv = " ".join(sys.argv[1:]).replace(cfg.published or "\0", "FILE.npz")
    command = f"python experiments/memorization.py {argv}".strip()
    if cfg.published:
        panels = {name: judge(runs, fixed=float(np.exp(TAU[name]))) for name, runs in published(cfg.published).items()}
        found = [published_claim(command, name, r) for name, r in panels.items()]
        write_json(out / "published.json", plain(dict(command=command, claims=found) | panels))
        scatter(out / "published.png", panels, "Llama-3-8B, the authors' measurements")
        (out / "published.md").write_text(HEAD + "\n".join(row(k, v) for k, v in panels.items()) + "\n")
        print((out / "published.md").read_text())
        return
    if cfg.smoke:
        cfg.run_dir += "_smoke"
        cfg.sizes, cfg.learning_rates, cfg.steps, cfg.seeds, cfg.snapshots = [32, 64], [3e-3], [4], 2, 2
        cfg.curation_seeds, cfg.curation_start, cfg.curation_sizes, cfg.curation_steps = 1, 32, [48], 4
    configs = own_runs(cfg)
    result = judge([load_run(c.run_dir) for c in configs])
    result["robustness"] = robustness(configs, result["threshold"])
    record = dict(command=command, machine=machine(), torch=torch.__version__, settings=vars(cfg))
    write_json(out / "runs.json", plain(record | dict(claims=run_claims(command, result)) | result))
    more = curation(cfg, float(result["threshold"]))
    scatter(out / "curves.png", {"--task worded, our own runs": result}, "left: each point one snapshot of one run", more)
    write_json(out / "curation.json", plain(record | dict(claims=[curation_claim(command, more)], threshold=result["threshold"],
                                                          minutes=minutes(cfg), test_accuracy=more)))
    lines = [HEAD + row("worded", result), "", f"From a first line in other words, right: {result['robustness']}", "",
             "| examples | chosen by | test accuracy, mean (sd over seeds) | better than iid, seeds |", "|---|---|---|---|"]
    for n, arms in sorted(more.items(), key=lambda x: int(x[0])):
        for by, a in arms.items():
            wins = f"{sum(x > y for x, y in zip(a, arms['iid']))} of {len(a)}" if "iid" in arms and by != "iid" else ""
            lines.append(f"| {n} | {by} | {np.mean(a):.3f} ({np.std(a, ddof=1) if len(a) > 1 else 0:.3f}) | {wins} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print_results("\n".join(lines), out, figure="curves", numbers="runs.json, curation")


if __name__ == "__main__":
    script(main)
