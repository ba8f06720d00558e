"""What wrong solutions are worth: accuracy against training problems, with and without them.

    python -m experiments.negatives              # about 45 minutes of one core
    python -m experiments.negatives --smoke      # few steps, under a minute
    -> docs/results/negatives/: results.json, table.md, curves.png

The claim (Setlur et al. 2024, arXiv 2406.14532): on the same problems, fine-tuning on a policy's
own right solutions (RFT) is worth twice the problems of SFT, per-step DPO on its wrong ones eight
times; DPO on whole solutions is worth nothing. Here, on the task `chain` (tasks/chain.py), whose
demonstrations end right but contain wrong steps:

    sft            demonstrations, one a problem; epochs tuned at every size
    rft            demonstrations and up to 4 right samples a problem of the SFT policy that the
                   grid of SFT picked, from the same random weights; optimizer steps tuned over the
                   same grid
    rft_early      the same of the SFT policy from which DPO starts
    dpo_per_step   from an SFT policy of 20 epochs, its negatives cut at their first pit; learning
                   rate and beta tuned
    dpo_whole      the same with whole negatives, over the same grid
    dpo_random_cut the same with negatives cut anywhere: a control, at the setting of dpo_per_step,
    not tuned

The policy from which DPO starts has seen every demonstration 20 times: the best policy by accuracy
is trained longer and makes few mistakes on its own problems (last table).
All arms of a seed see the same problems and the same 16 samples a problem. Four settings an arm are
tried, on a tuning seed and `val`; the reported numbers come from other seeds and `test`: greedy
accuracy, mean and standard deviation over seeds.

What would have falsified the claim: per-step DPO not above SFT by more than the spread of the
paired differences; or whole-solution or randomly cut negatives as good as cut ones, as then the pit
is not what helps. "Eight times" would be seen as accuracy at D problems equal to SFT's at 8 D: the
table's last column is that factor, whatever it is. Where it should fail, and is measured: clean
demonstrations (strength 1: nothing spurious to unlearn); a reference that was trained too long (it
has no negatives left) or too briefly; sizes at which SFT is done.

Runs, with their samples, stay in runs/negatives: killed, the same command goes on.
"""

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import train_sft
from experiments.negatives_report import NAMES, chain_figure, chain_summary, chain_table, claims_of, reference_table
from experiments.toolkit import (
    TUNING,
    cached,
    cpu_seconds,
    print_results,
    typed,
    write_results,
)
from infra.cli import UserError, opt, parse, script
from infra.runs import mean
from model import load_model
from papers import rft, train_dpo
from papers.train_dpo import load_pairs
from sample import generate
from tasks import get_task

DPO = {
    "dpo_per_step": dict(pairs="per_step"),
    "dpo_whole": dict(pairs="whole"),
    "dpo_random_cut": dict(pairs="random"),
}
UNTUNED = ("dpo_random_cut",)  # takes the setting of dpo_per_step
# The scripts' own last evaluation is not used.
TINY = dict(threads=1, device="cpu", save_steps=10**6, eval_problems=32)
SAMPLING = dict(num_generations=16, slots=1024)


@dataclass
class Config:
    sizes: list = opt([192, 256, 384, 576], "numbers of training problems")
    seeds: int = opt(5, "seeds of the reported numbers (0, 1, ...)", low=2)
    tuning_seeds: int = opt(1, "seeds of the search (1000, 1001, ...)", low=1)
    epochs: list = opt(
        [20, 80, 160, 320],
        "grid of SFT: passes over the demonstrations; RFT takes as many optimizer steps",
    )
    policy_epochs: int = opt(20, "epochs of the SFT policy that DPO starts from", low=1)
    learning_rates: list = opt([1e-3, 3e-3], "grid of the DPO arms")
    betas: list = opt([0.5, 2.0], "grid of the DPO arms")
    dpo_steps: int = opt(150, "optimizer steps of 64 pairs of every DPO run", low=1)
    test_problems: int = opt(1000, "problems of an evaluation", low=1)
    out: str = opt("docs/results/negatives", "where table, figure and numbers go")
    smoke: bool = opt(False, "a few steps of everything")


# --------------------------------------------------------------------------------------------------
# Runs. Each is a run directory of train_sft.py, papers/rft.py or papers/train_dpo.py; its accuracy
# is kept beside it.


def accuracy(run, task, split, n, temperature=0.0):
    """Share of n problems solved, and share whose first step is right (for stargraph)."""
    model, tokenizer = load_model(run)
    problems = task.problems(split, n, 0)
    out = generate(
        model,
        [task.prompt_tokens(p, tokenizer) for p in problems],
        max_new_tokens=task.max_new_tokens,
        temperature=temperature,
        seed=0,
        stop_ids=task.stop_ids(tokenizer),
        slots=256,
    )
    texts = [tokenizer.decode(out.completion(i)) for i in range(len(problems))]
    first = [t[:2] == p.answer[:2] for t, p in zip(texts, problems)]
    return mean(task.grade(p, t) for p, t in zip(problems, texts)), mean(first)


def trained(run, cfg, train, config):
    """Train (or find) one run -> its numbers: greedy accuracy on val (tuning seeds) or test,
    sampled accuracy, counts."""

    def make():
        summary = train(config)
        task = get_task(config)
        split = "val" if config.seed >= TUNING else "test"
        solved, first = accuracy(run, task, split, cfg.test_problems)
        row = {split: solved, "first": first}
        if split == "test":
            row["test_sampled"], _ = accuracy(run, task, split, cfg.test_problems, temperature=1.0)
        return row | {k: v for k, v in summary.items() if k not in ("accuracy", "clipped_ratio")}

    return cached(Path(run) / "accuracy.json", make)


def borrow(run, other, pairs=False):
    """The samples of another run with the same policy, problems and seed: drawn once, used by
    all arms. With `pairs` also its pairs and the reference's log-probs, which do not depend on
    learning rate and beta."""
    run = Path(run)
    other = Path(other)
    if run.exists() or not other.exists():
        return
    names = (
        ["rollouts/*.safetensors", "pairs.safetensors", "pairs.json"]
        if pairs
        else ["rollouts/solutions_*"]
    )
    for path in [p for name in names for p in sorted(other.glob(name))]:
        (run / path.relative_to(other)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, run / path.relative_to(other))


def sft_settings(task, size, seed, run):
    """Of SFT and of RFT."""
    shape = (
        dict(num_hidden_layers=1, learning_rate=5e-3, weight_decay=1.0)
        if task == "chain"
        else dict(learning_rate=2e-3)
    )
    place = dict(task=task, seed=seed, run_dir=str(run))
    examples = dict(num_problems=size, num_examples=size, batch_size=64, warmup_steps=10)
    return TINY | shape | place | examples


def dpo_config(task, size, seed, run, policy, **more):
    return train_dpo.Config(
        **(
            TINY
            | SAMPLING
            | dict(
                task=task,
                seed=seed,
                run_dir=str(run),
                policy=str(policy),
                num_problems=size,
                num_negatives=8,
                n_mc=5,
            )
            | more
        )
    )


class Arm:
    """One method at one size and seed: run(setting) trains it (or finds it) and returns its
    numbers.

    All but SFT need a policy to sample, and DPO to start from: SFT of setting["policy"] steps,
    trained if it is not there. The arms of one home and policy share its samples."""

    def __init__(self, cfg, task, name, size, seed, home, strength=-1.0):
        self.cfg = cfg
        self.task = task
        self.name = name
        self.size = size
        self.seed = seed
        self.home = Path(home)
        self.strength = strength

    def run(self, setting):
        more = {k: v for k, v in setting.items() if k != "policy"} | dict(strength=self.strength)
        tail = Path(self.name) / "_".join(f"{k}{v:g}" for k, v in setting.items() if k != "policy")
        if self.name == "sft":
            run = self.home / tail
            settings = sft_settings(self.task, self.size, self.seed, run)
            return trained(run, self.cfg, train_sft.train, train_sft.Config(**settings | more)), run
        sft = Arm(self.cfg, self.task, "sft", self.size, self.seed, self.home, self.strength)
        _, policy = sft.run(dict(steps=setting["policy"]))
        home = self.home / f"policy{setting['policy']}"
        run = home / tail
        for other in sorted(home.glob(f"{self.name}/*")):
            if (other / "summary.json").exists():
                borrow(run, other, pairs=True)
        for other in sorted(home.glob("*/*/rollouts")):
            if (other.parent / "summary.json").exists():
                borrow(run, other.parent)
        if self.name in ("rft", "rft_early"):
            settings = sft_settings(self.task, self.size, self.seed, run) | SAMPLING | more
            config = rft.Config(**settings, policy=str(policy), shard_problems=200)
            return trained(run, self.cfg, rft.train, config), run
        more |= dict(max_steps=self.cfg.dpo_steps)
        config = dpo_config(self.task, self.size, self.seed, run, policy, **DPO[self.name], **more)
        return trained(run, self.cfg, train_dpo.train, config), run


def steps_of(epochs, size):
    return max(1, round(epochs * size / 64))


def grid_of(cfg, name, size, best):
    """Settings to try of a method, four. SFT and RFT: steps. DPO: learning rate x beta. best: those
    that were chosen for the methods before it."""
    steps = [dict(steps=steps_of(e, size)) for e in cfg.epochs]
    early = dict(policy=steps_of(cfg.policy_epochs, size))
    if name == "sft":
        return steps
    if name == "rft":
        return [dict(policy=best["sft"]["steps"]) | s for s in steps]
    if name == "rft_early":
        return [early | s for s in steps]
    if name in UNTUNED:
        return [best["dpo_per_step"]]
    pairs = itertools.product(cfg.learning_rates, cfg.betas)
    return [early | dict(learning_rate=lr, beta=b) for lr, b in pairs]


# --------------------------------------------------------------------------------------------------
# The comparison.


def chain_at(cfg, root, size, strength, arms, given=None):
    """Tune every arm on the tuning seeds, then run it on the others. -> {arm: {setting, rows
    (one a seed), tuning}}. given: settings instead of the search."""
    best = dict(given or {})
    tuning = {}

    def home(seed):
        return root / f"strength{strength:g}" / f"size{size}" / f"seed{seed}"

    for name in arms if not given else ():
        scores = []
        for setting in grid_of(cfg, name, size, best):
            tuned = [
                Arm(cfg, "chain", name, size, seed, home(seed), strength).run(setting)[0]
                for seed in range(TUNING, TUNING + cfg.tuning_seeds)
            ]
            scores.append((mean(r["val"] for r in tuned), setting))
        best[name] = max(scores, key=lambda s: s[0])[1]
        tuning[name] = [dict(setting, val=round(s, 4)) for s, setting in scores]
    out = {name: dict(setting=best[name], tuning=tuning.get(name), rows=[]) for name in arms}
    for seed in range(cfg.seeds):
        for name in arms:
            row, run = Arm(cfg, "chain", name, size, seed, home(seed), strength).run(best[name])
            if name != "sft":
                start, _ = Arm(cfg, "chain", "sft", size, seed, home(seed), strength).run(
                    dict(steps=best[name]["policy"])
                )
                row = row | dict(policy_test=start["test"])
            if name == "dpo_per_step":
                row = row | pit_quality(run)
            out[name]["rows"].append(row)
    summary = "  ".join(
        f"{NAMES[n]} {mean(r['test'] for r in o['rows']):.3f}" for n, o in out.items()
    )
    print(f"chain, strength {strength:g}, {size} problems: {summary}", flush=True)
    return out


def pit_quality(run):
    """Where the cuts lie against the truth: at the first wrong step, after it (the first one was
    healed, or seemed so), or before any (too few continuations)."""
    task = get_task("chain")
    tokenizer = task.tokenizer()
    counts = dict.fromkeys(("pit_exact", "pit_later", "pit_early"), 0)
    pairs, *_ = load_pairs(run)
    problems = {p.prompt: p for p in task.problems("train")}
    for prompt, _, rejected in pairs:
        text = tokenizer.decode(rejected)
        first = task.first_illegal_step(problems[tokenizer.decode(prompt)], text)
        cut = text.count("=") - 1
        counts[
            "pit_early"
            if first is None or first > cut
            else "pit_exact"
            if first == cut
            else "pit_later"
        ] += 1
    return {k: v / len(pairs) for k, v in counts.items()}


def reference_regimes(cfg, root, size, setting):
    """Per-step and whole DPO from SFT policies that were trained for too few, enough, and too
    many steps."""
    rows = []
    for epochs in (max(1, cfg.epochs[0] // 2), cfg.policy_epochs, cfg.epochs[-1]):
        steps = steps_of(epochs, size)
        for seed in range(min(3, cfg.seeds)):
            home = root / "strength0.7" / f"size{size}" / f"seed{seed}"
            sft, _ = Arm(cfg, "chain", "sft", size, seed, home, 0.7).run(dict(steps=steps))
            row = dict(steps=steps, seed=seed, sft=sft["test"])
            for name in ("dpo_per_step", "dpo_whole"):
                try:
                    dpo, _ = Arm(cfg, "chain", name, size, seed, home, 0.7).run(
                        setting[name] | dict(policy=steps)
                    )
                    row |= {
                        name: dpo["test"],
                        "pairs": dpo["pairs"],
                        "wrong_share": 1 - dpo["correct"] / dpo["sampled"],
                    }
                except UserError:  # no negative left
                    row |= {name: sft["test"], "pairs": 0, "wrong_share": 0.0}
            rows.append(row)
    for steps in sorted({r["steps"] for r in rows}):
        at_steps = [r for r in rows if r["steps"] == steps]
        print(
            f"reference of {steps} steps: SFT {mean(r['sft'] for r in at_steps):.3f}, per-step DPO "
            f"{mean(r['dpo_per_step'] for r in at_steps):.3f}, whole "
            f"{mean(r['dpo_whole'] for r in at_steps):.3f}, pairs "
            f"{mean(r['pairs'] for r in at_steps):.0f}",
            flush=True,
        )
    return rows


def chain(cfg, root, out, name):
    results = {str(s): chain_at(cfg, root, s, 0.7, list(NAMES)) for s in cfg.sizes}
    size = cfg.sizes[len(cfg.sizes) // 2]
    chosen = {name: arm["setting"] for name, arm in results[str(size)].items()}
    clean = {
        str(size): chain_at(
            cfg, root, size, 1.0, ["sft", "rft", "dpo_per_step", "dpo_whole"], chosen
        )
    }
    reference = reference_regimes(cfg, root, size, chosen)
    rows = chain_summary(results, cfg.sizes)
    clean_rows = chain_summary(clean, [size])
    tables = [
        f"Sloppy demonstrations (strength 0.7), {cfg.seeds} seeds:",
        chain_table(rows),
        "Clean demonstrations (strength 1), at the settings chosen above:",
        chain_table(clean_rows),
        reference_table(reference),
    ]
    pits = {
        s: {
            k: mean(r[k] for r in arm["dpo_per_step"]["rows"])
            for k in ("pit_exact", "pit_later", "pit_early")
        }
        for s, arm in results.items()
        if "dpo_per_step" in arm
    }
    text = "\n\n".join(tables)
    write_results(
        out,
        text,
        name,
        cfg,
        claims_of,
        rows=rows,
        clean=clean_rows,
        reference=reference,
        pits=pits,
        tuning={s: {n: a["tuning"] for n, a in arm.items()} for s, arm in results.items()},
        details={s: {n: a["rows"] for n, a in arm.items()} for s, arm in results.items()},
        clean_details={s: {n: a["rows"] for n, a in arm.items()} for s, arm in clean.items()},
        cpu_seconds=cpu_seconds(root.glob("**/accuracy.json")),
    )
    chain_figure(rows, clean_rows, reference, cfg.sizes, out / "curves.png")
    print_results(text, out)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    root = Path("runs/negatives_smoke" if cfg.smoke else "runs/negatives")
    out = Path("runs/negatives_smoke/results" if cfg.smoke else cfg.out)
    if cfg.smoke:
        cfg.sizes = [32, 48, 64]
        cfg.seeds = 2
        cfg.tuning_seeds = 1
        cfg.epochs = [2, 4]
        cfg.test_problems = 32
        cfg.policy_epochs = 2
        cfg.learning_rates = [1e-3]
        cfg.betas = [0.3]
        cfg.dpo_steps = 2
        SAMPLING["num_generations"] = 4
    chain(cfg, root / "chain", out, typed("negatives", argv))


if __name__ == "__main__":
    script(main)
