"""Does accuracy before memorization predict generalisation? (Kang et al. 2024, arXiv 2411.07681)

    python -m experiments.memorization                        # 2 to 4: 33 minutes of one core
    python -m experiments.memorization --published FILE.npz   # the authors' measurements, seconds
    python -m experiments.memorization --robustness --sizes 800 --learning-rates 3e-3 --steps 500 \
        --threshold 0.4493                                    # one run and part 3: 3 minutes
    -> docs/results/memorization/: {published,runs,robustness,curation}.{json,md}, two figures

1. published  R^2 of mean pre-memorization accuracy against test accuracy (line y = x) on the arrays
              that the authors released for Llama-3-8B on GSM8K and MATH, with their thresholds, and
              with the threshold chosen on half of the runs and scored on the other half. FILE
              holds, for every run, RUN/{correct [M,n], nsamples [M], nll [M,n], test [M]} and
              optionally RUN/subsample [m] (indices of the examples that were trained).
2. runs       the same on our own models, trained on --task worded (tasks/worded.py): learning rate
              x steps x data size, every snapshot of a run a point; beside it plain training
              accuracy, the paper's foil.
3. robustness finished models go on from the first line of a training solution, with its own
              meaningless letters and with others: what the change costs examples of low and of high
              pre-memorization accuracy, within each run that has both.
4. curation   n examples more, collected where pre-memorization accuracy is low, against iid, nll
              and training accuracy as the measure, the same number of examples, steps and learning
              rate for each.

What would falsify it: in 2 a held-out R^2 no better than that of plain training accuracy; in 3
examples of high and low pre-memorization accuracy losing as much; in 4 a curve that is not above
iid's.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.memorization_report import (
    ENOUGH,
    HEAD,
    curation_claims,
    published_claims,
    robustness_claims,
    row,
    runs_claims,
    scatter,
)
from experiments.toolkit import (
    mean_sd,
    print_results,
    write_results,
)
from infra.cli import UserError, opt, parse, script
from infra.seeds import derive
from model import load_model, resolve
from papers.memorization import Config as RunConfig
from papers.memorization import (
    choose_threshold,
    held_out_r_squared,
    load_run,
    pre_memorization,
    predicted,
    r_squared,
    sampled_accuracy,
    train,
)
from tasks import get_task
from tasks.worded import WORDING

TAU = dict(gsm8k=-2.3, math=-1.7)  # the authors' thresholds: ln(nll)
GRID = np.exp(np.arange(-4.0, 0.01, 0.1))  # nats a token


@dataclass
class Config:
    published: str = opt("", "npz of the authors' arrays; only that part is then run", "what")
    sizes: list = opt([400, 800, 1600], "training examples", "runs")
    learning_rates: list = opt([1e-3, 3e-3], "peak learning rates", "runs")
    steps: list = opt([200, 500], "optimizer steps (batch 128)", "runs")
    seeds: int = opt(1, "seeds of each combination", "runs", low=1)
    robustness: bool = opt(
        False, "of the runs, only what a changed first line costs their examples", "runs"
    )
    threshold: float = opt(
        0.0, "of --robustness, in nats a token (0: the best on these runs)", "runs", low=0
    )
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
        out[name.split("_")[0]].append(
            dict(
                accuracy=(z[f"{name}/correct"] / z[f"{name}/nsamples"][:, None])[:, rows].astype(
                    float
                ),
                nll=z[f"{name}/nll"][:, rows].astype(float),
                test=z[f"{name}/test"].astype(float),
            )
        )
    return out


def judge(runs, seed=0, fixed=None):
    """R^2 of the line y = x for pre-memorization and for plain accuracy. The threshold: given,
    or the best on all runs."""
    threshold = choose_threshold(runs, GRID) if fixed is None else fixed
    premem, test = predicted(runs, threshold)
    plain = np.concatenate([r["accuracy"].mean(1) for r in runs])
    both = len(test) > 1 and plain.var() > 0 and test.var() > 0
    scores, chosen = held_out_r_squared(runs, GRID, 200, seed)
    return dict(
        runs=len(runs),
        checkpoints=len(test),
        threshold=threshold,
        r2=r_squared(premem, test),
        r2_train_accuracy=r_squared(plain, test),
        correlation_train_accuracy=np.corrcoef(plain, test)[0, 1] ** 2 if both else None,
        held_out=dict(
            splits=200,
            median=np.median(scores),
            p10=np.percentile(scores, 10),
            thresholds=np.percentile(chosen, [10, 90]),
        ),
        sensitivity={f"{t:.3f}": r_squared(*predicted(runs, t)) for t in GRID},
        premem=premem,
        train_accuracy=plain,
        test=test,
    )


def plain(value):
    """numpy -> what JSON knows, six digits."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    return round(float(value), 6) if isinstance(value, (float, np.floating)) else value


def sft(cfg, name, **settings):
    """Train one measured run (or find it complete) -> its config."""
    c = RunConfig(
        task="worded",
        threads=1,
        run_dir=f"{cfg.run_dir}/{name}",
        eval_problems=64,
        save_steps=100,
        device="cpu",
        **settings,
    )
    train(c)
    return c


def own_runs(cfg):
    grid = itertools.product(cfg.sizes, cfg.learning_rates, cfg.steps, range(cfg.seeds))
    return [
        sft(
            cfg,
            f"n{n}_lr{lr:g}_steps{steps}_seed{seed}",
            num_examples=n,
            learning_rate=lr,
            steps=steps,
            seed=seed,
            snapshots=cfg.snapshots,
        )
        for n, lr, steps, seed in grid
    ]


def changed_wording(letters):
    """The two meaningless letters of a line -> two others."""
    return "".join(chr(ord("a") + (ord(x) - ord("a") + 4) % len(WORDING)) for x in letters)


def after_first_line(config, threshold):
    """One finished run -> what it costs its examples to go on from a first line in other
    letters, or None.

    Examples: problems of several lines whose samples are all right at the end. Each is drawn
    four times from its own first line and four times from the same line with both letters
    changed; the cost is the accuracy lost. low, high: pre-memorization accuracy below 0.5, or
    not. The two are compared within a run, since runs differ in both."""
    task = get_task(config)
    run = load_run(config.run_dir)
    model, tokenizer = load_model(resolve(config.run_dir))
    problems = task.problems("train", run["accuracy"].shape[1], config.seed)
    premem = pre_memorization(run["accuracy"], run["nll"], threshold)[-1]
    right = [
        i for i, p in enumerate(problems) if len(p.data[1]) > 1 and run["accuracy"][-1, i] == 1
    ]
    if not right:
        return None

    def accuracy(change):
        prompts = []
        for i in right:
            letters = task.demonstration(problems[i], None, 0).split("\n")[0][-2:]
            line = f"{problems[i].data[1][0]}{change(letters)}\n"
            prompts.append(task.prompt_tokens(problems[i], tokenizer) + tokenizer.encode(line))
        return sampled_accuracy(
            model,
            tokenizer,
            task,
            prompts,
            [problems[i] for i in right],
            4,
            config.memorization_temperature,
            task.max_new_tokens,
            derive(config.seed, "robustness"),
        )

    unchanged = accuracy(lambda letters: letters)
    changed = accuracy(changed_wording)
    groups = dict(low=premem[right] < 0.5, high=premem[right] >= 0.5)
    numbers = {
        k: dict(examples=int(of.sum()), unchanged=unchanged[of], changed=changed[of])
        for k, of in groups.items()
    }
    return dict(
        run=Path(config.run_dir).name,
        train_accuracy=float(run["accuracy"][-1].mean()),
        premem=float(premem.mean()),
        test=float(run["test"][-1]),
        **numbers,
    )


def group_numbers(group):
    """{examples, unchanged [n], changed [n]} -> their means, the mean cost and its standard
    error over the examples."""
    n = group["examples"]
    cost = np.subtract(group["unchanged"], group["changed"])
    return dict(
        examples=n,
        unchanged=float(np.mean(group["unchanged"])),
        changed=float(np.mean(group["changed"])),
        cost=float(cost.mean()),
        error=float(cost.std(ddof=1) / n**0.5),
    )


def robustness(configs, threshold):
    """-> a row for each run that has at least ENOUGH examples of low and of high
    pre-memorization accuracy."""
    rows = [r for c in configs if (r := after_first_line(c, threshold))]
    return [
        r | {k: group_numbers(r[k]) for k in ("low", "high")}
        for r in rows
        if min(r["low"]["examples"], r["high"]["examples"]) >= ENOUGH
    ]


def curation(cfg, threshold):
    """Test accuracy after more data, by how it was chosen. -> {size: {by: [accuracy of each
    seed]}}"""
    out = {
        str(n): {by: [] for by in ("iid", "premem", "nll", "accuracy")} for n in cfg.curation_sizes
    }
    for seed in range(
        100, 100 + cfg.curation_seeds
    ):  # seeds that chose nothing: the threshold comes from the runs above
        common = dict(learning_rate=3e-3, steps=cfg.curation_steps, seed=seed)
        start = sft(
            cfg,
            f"start_seed{seed}",
            num_examples=cfg.curation_start,
            snapshots=cfg.snapshots,
            **common,
        )
        out.setdefault(str(cfg.curation_start), dict(none=[]))["none"].append(
            load_run(start.run_dir)["test"][-1]
        )
        for n, by in itertools.product(cfg.curation_sizes, ("iid", "premem", "nll", "accuracy")):
            c = sft(
                cfg,
                f"{by}_{n}_seed{seed}",
                num_examples=n,
                curate=start.run_dir,
                curate_by=by,
                snapshots=1,
                memorization_threshold=threshold,
                memorization_problems=1000,
                **common,
            )
            out[str(n)][by].append(load_run(c.run_dir)["test"][-1])
    return out






















def minutes(cfg):
    """What all runs took, on one core each, whoever of several calls made them."""
    return (
        sum(json.loads(p.read_text())["seconds"] for p in Path(cfg.run_dir).glob("*/summary.json"))
        / 60
    )


def published_part(cfg, out):
    panels = {
        name: judge(runs, fixed=float(np.exp(TAU[name])))
        for name, runs in published(cfg.published).items()
    }
    text = HEAD + "\n".join(row(k, v) for k, v in panels.items())
    write_results(
        out,
        text,
        "memorization --published FILE.npz",
        cfg,
        published_claims,
        "published",
        **plain(panels),
    )
    scatter(out / "published.png", panels, "Llama-3-8B, the authors' measurements")
    print(text)


def runs_part(cfg, out, configs, name):
    """-> the R^2 of our own runs; runs.json."""
    result = judge([load_run(c.run_dir) for c in configs])
    text = HEAD + row("worded", result)
    write_results(out, text, name, cfg, runs_claims, "runs", **plain(result))
    return result, text


def robustness_part(cfg, out, configs, threshold, name):
    """-> robustness.json, a row a run."""
    rows = robustness(configs, threshold)
    lines = [
        "| run | train accuracy | pre-mem. | test | examples | of them | own first line | other "
        "letters | cost (standard error) |",
        "|---" * 9 + "|",
    ]
    for r in rows:
        for k in ("low", "high"):
            g = r[k]
            lines.append(
                f"| {r['run']} | {r['train_accuracy']:.2f} | {r['premem']:.2f} | {r['test']:.2f} "
                f"| {k} | {g['examples']} | {g['unchanged']:.3f} | {g['changed']:.3f} | "
                f"{g['cost']:.3f} ({g['error']:.3f}) |"
            )
    text = "\n".join(lines)
    write_results(
        out,
        text,
        name,
        cfg,
        robustness_claims,
        "robustness",
        threshold=float(threshold),
        rows=plain(rows),
    )
    return text


def curation_part(cfg, out, threshold, name):
    """-> {size: {by: [accuracy a seed]}}; curation.json."""
    more = curation(cfg, float(threshold))
    lines = [
        "| examples | chosen by | test accuracy, mean (sd over seeds) | better than iid, seeds |",
        "|---|---|---|---|",
    ]
    for n, arms in sorted(more.items(), key=lambda x: int(x[0])):
        for by, a in arms.items():
            wins = (
                f"{sum(x > y for x, y in zip(a, arms['iid']))} of {len(a)}"
                if "iid" in arms and by != "iid"
                else ""
            )
            lines.append(f"| {n} | {by} | {mean_sd(a)} | {wins} |")
    text = "\n".join(lines)
    write_results(
        out,
        text,
        name,
        cfg,
        curation_claims,
        "curation",
        threshold=float(threshold),
        minutes=minutes(cfg),
        test_accuracy=plain(more),
    )
    return more, text


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    out = Path(cfg.out if not cfg.smoke else f"{cfg.run_dir}_smoke/results")
    if cfg.published:
        published_part(cfg, out)
        return
    name = " ".join(["memorization", *(sys.argv[1:] if argv is None else argv)])
    if cfg.smoke:
        cfg.run_dir += "_smoke"
        cfg.sizes = [32, 64]
        cfg.learning_rates = [3e-3]
        cfg.steps = [4]
        cfg.seeds = 2
        cfg.snapshots = 2
        cfg.curation_seeds = 1
        cfg.curation_start = 32
        cfg.curation_sizes = [48]
        cfg.curation_steps = 4
    configs = own_runs(cfg)
    if cfg.robustness:
        threshold = cfg.threshold or choose_threshold([load_run(c.run_dir) for c in configs], GRID)
        print(robustness_part(cfg, out, configs, threshold, name))
        return
    result, text = runs_part(cfg, out, configs, name)
    tables = [text, robustness_part(cfg, out, configs, result["threshold"], name)]
    more, text = curation_part(cfg, out, result["threshold"], name)
    scatter(
        out / "curves.png",
        {"--task worded, our own runs": result},
        "left: each point one snapshot of one run",
        more,
    )
    print_results(
        "\n\n".join([*tables, text]),
        out,
        figure="curves",
        numbers="runs.json, robustness.json, curation",
    )


if __name__ == "__main__":
    script(main)
