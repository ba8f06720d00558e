"""Open weights, word problems, the whole road: SmolLM2-135M from its base to RL with process rewards, and search.

    python experiments/openweights.py --size cpu --data mawps_*.jsonl          # about 75 minutes of one core
    python experiments/openweights.py --size cpu-gsm8k --problems gsm8k --limit 160 --data gsm8k_train.jsonl gsm8k_test.jsonl \
                                      --out docs/results/openweights_gsm8k     # about 100 minutes of one core
    python experiments/openweights.py --size gpu --data mawps_*.jsonl          # written for one H100; nobody has run it yet
    python experiments/openweights.py --size gpu --problems gsm8k --limit 256 --data gsm8k_train.jsonl gsm8k_test.jsonl
    python experiments/openweights.py --smoke                                  # a tiny random model, made-up problems
    -> docs/results/openweights/: results.json, table.md, curves.png, metrics_*.jsonl

    base -> sft -> rft -> orm, q -> rl_outcome, rl_pav -> best-of-N and beam search with orm and q

MAWPS has no solutions; wordproblems.py finds demonstrations of one or two operations, one a line, and makes the splits:
`first` (3/10) is for SFT and RFT, `second` (3/10) for the verifiers and RL, `val` (1/10) for what is watched or chosen,
`test` (3/10) for the reported numbers and for nothing else.

    orm         outcome model: one solution a problem, labelled at its end
    q           Q^pi from Monte-Carlo continuations; the PAV arm is paid by its Best-of-4 prover, 1 - (1-Q)^4
                (Setlur et al. 2024, arXiv 2410.08146, eq. 30)
    rl_outcome  and rl_pav: the same policy to start from (rft), problems, samples a step and learning rate; what the
                verifier's rollouts cost is written beside. Nothing is tuned for either arm.

Left out: a search over settings (the CPU cannot pay for it, and one arm tuned alone would be worth less than nothing),
provers that are other policies, a KL penalty. RFT goes on from SFT instead of starting at the base. Every stage is a run
directory of its own script: killed, the same command goes on; --plan prints the command lines.
"""

import itertools
import json
import math
import shlex
import shutil
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from wordproblems import read_problems  # noqa: E402

import pav  # noqa: E402
import sample  # noqa: E402
import train_rl  # noqa: E402
import train_sft  # noqa: E402
from infra.cli import UserError, opt, parse, script  # noqa: E402
from infra.runs import derive, mean, read_metrics, setup, write_json  # noqa: E402
from report.evaluate import Z, interval, vote  # noqa: E402
from labels import boundaries  # noqa: E402
from model import Config as ModelConfig  # noqa: E402
from model import Transformer, init_weights, load_model, write_model  # noqa: E402
from pipeline import last_line  # noqa: E402
from report.__main__ import COLOURS, finish, machine, print_results, pyplot  # noqa: E402
from papers.rft import sample_solutions  # noqa: E402
from tasks.files import get_task  # noqa: E402
from open_weights.tokenizer import alphabet_tokenizer  # noqa: E402

MAWPS = [f"mawps_{part}.jsonl" for part in ("singleop", "addsub", "singleeq", "multiarith")]
SCRIPTS = dict(sft=train_sft, pav=pav, rl=train_rl, sample=sample)
BEAMS = dict(beam_q=0.0, beam_pav=0.5)  # name -> alpha; 0.5 is the paper's for small models
NAMES = dict(base="base model, chat format, greedy", sft="SFT", rft="RFT", rl_outcome="RL, outcome only", rl_pav="RL, PAV")
# What each stage is run with; `search` is of this script. No entry was searched for.
SIZES = dict(
    cpu=dict(
        rl_seeds=[0, 1, 2], test=100, n=2, base=40, beam_test=50, dtype="float32",
        sft=dict(steps=36, batch_size=16, learning_rate=2e-4, warmup_steps=4, eval_problems=48, logging_steps=4),
        rft=dict(steps=10, batch_size=16, learning_rate=1e-4, warmup_steps=2, num_problems=150, num_generations=4, slots=128,
                 rft_demonstrations=False, eval_problems=48, logging_steps=2),
        verifier=dict(epochs=2, batch_size=8, learning_rate=5e-5, slots=128, eval_problems=48, eval_mc=4),
        orm=dict(num_problems=200, n_cov=1), q=dict(num_problems=100, n_cov=1, cuts=1, n_mc=2),
        rl=dict(num_prompts=4, num_generations=8, steps=8, learning_rate=2e-5, warmup_steps=2, alpha=1.0, slots=128,
                eval_steps=4, eval_problems=64),
        search=dict(n=8, beam=6)),
    gpu=dict(
        rl_seeds=[0, 1, 2], test=0, n=8, base=0, beam_test=0, dtype="bfloat16",
        sft=dict(steps=100, batch_size=32, learning_rate=1e-4, warmup_steps=10, eval_problems=256),
        rft=dict(steps=60, batch_size=32, learning_rate=5e-5, warmup_steps=5, num_generations=16, rft_demonstrations=False,
                 eval_problems=256),
        verifier=dict(epochs=2, batch_size=64, learning_rate=3e-5, eval_problems=160, eval_mc=16),
        orm=dict(num_problems=0, n_cov=32), q=dict(num_problems=0, n_cov=4, cuts=2, n_mc=4),
        rl=dict(num_prompts=16, num_generations=16, steps=100, learning_rate=1e-5, warmup_steps=5, alpha=1.0, eval_steps=10,
                eval_problems=256),
        search=dict(n=64, beam=12)),
)
# GSM8K's solutions are five times as long as MAWPS' here: fewer of them, so that it stays a matter of one core and 90 minutes. Of
# its own few are right, so that RFT trains on them and the demonstrations.
SIZES["cpu-gsm8k"] = SIZES["cpu"] | dict(
    rl_seeds=[0], test=50, beam_test=16, verifier=SIZES["cpu"]["verifier"] | dict(eval_problems=24),
    rft=SIZES["cpu"]["rft"] | dict(num_problems=100, rft_demonstrations=True),
    orm=dict(num_problems=100, n_cov=1), q=dict(num_problems=50, n_cov=1, cuts=1, n_mc=2),
    rl=SIZES["cpu"]["rl"] | dict(steps=6, eval_steps=6, eval_problems=32))
# What one GPU does in four minutes: one seed, no beams; started with --only (bench/gpu.sh).
SIZES["gpu-short"] = SIZES["gpu"] | dict(
    rl_seeds=[0], n=4, test=300, sft=SIZES["gpu"]["sft"] | dict(eval_problems=177),
    rft=SIZES["gpu"]["rft"] | dict(steps=30, num_generations=8), orm=dict(num_problems=0, n_cov=2),
    q=dict(num_problems=0, n_cov=2, cuts=2, n_mc=4), verifier=SIZES["gpu"]["verifier"] | dict(eval_problems=64, eval_mc=8),
    rl=SIZES["gpu"]["rl"] | dict(steps=40, eval_steps=20, eval_problems=177, slots=256, save_steps=1000))
SMOKE = dict(
    rl_seeds=[0], test=8, n=2, base=8, beam_test=8, dtype="float32",
    sft=dict(steps=4, batch_size=8, eval_problems=8),
    rft=dict(steps=2, batch_size=8, num_problems=8, num_generations=2, eval_problems=8),
    verifier=dict(epochs=1, batch_size=8, eval_problems=8, eval_mc=2), orm=dict(num_problems=8),
    q=dict(num_problems=8, n_cov=1, cuts=1, n_mc=1),
    rl=dict(num_prompts=2, num_generations=2, steps=2, eval_steps=1, eval_problems=8), search=dict(n=4, beam=3))


@dataclass
class Config:
    size: str = opt("cpu", "which column of SIZES", choices=["cpu", "cpu-gsm8k", "gpu", "gpu-short"])
    problems: str = opt("mawps", "what the files hold", choices=["mawps", "gsm8k"])
    data: list = opt(MAWPS, "files: MAWPS' four parts, or GSM8K's train and test")
    model: str = opt("smollm2", "open weights to start from: a folder, smollm2 or a hub id")
    limit: int = opt(48, "tokens of a completion (GSM8K needs 256)", low=1)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    threads: int = opt(0, "CPU threads (0: 1 with --size cpu*, else torch's choice)", low=0)
    run_dir: str = opt("", "where the stages are kept (default: runs/openweights/PROBLEMS_SIZE)")
    out: str = opt("docs/results/openweights", "where table, figure and numbers go")
    only: list = opt([], "run these stages alone, e.g. rft q test_sft, so that several processes share the work; report: the "
                         "tables (beams that were not run are left out)")
    plan: bool = opt(False, "print the command lines of the stages that are missing, and stop")
    smoke: bool = opt(False, "the same road with a tiny random model and made-up problems")


# ----------------------------------------------------------------------------------------------------
# The smoke run's problems and model.


def made_up(n=160):
    """Problems of the smoke run."""
    pairs = [(derive(0, "a", i) % 9 + 1, derive(0, "b", i) % 9 + 1) for i in range(n)]
    rows = [dict(question=f"Tom has {a} apples and buys {b} more ({i}).", answer=str(a + b),
                 solution=f"{a} + {b} = {a + b}\n#### {a + b}") for i, (a, b) in enumerate(pairs)]
    return dict(demonstrated=rows[:40], first=rows[:60], second=rows[60:120], val=rows[120:136], test=rows[136:])


def tiny_model(folder):
    folder.mkdir(parents=True)
    tokenizer = alphabet_tokenizer([chr(c) for c in range(32, 127)] + ["\n"])
    shape = ModelConfig(vocab_size=tokenizer.n_vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=256)
    write_model(folder, init_weights(Transformer(shape), torch.Generator().manual_seed(0)), tokenizer)


# ----------------------------------------------------------------------------------------------------
# Stages.


def plan(cfg, size, root):
    """[(name, script, argv, file that exists when it is done)], in order."""
    file = lambda part: str(root / "data" / f"{part}.jsonl")  # noqa: E731
    device = [f"--device={cfg.device}", f"--threads={cfg.threads or (1 if cfg.size != 'gpu' or cfg.smoke else 0)}"]
    task = lambda part, template="plain": ["--task=jsonl", f"--template={template}", "--data", f"train={file(part)}",  # noqa: E731
                                           f"val={file('val')}", f"test={file('test')}", *device]
    stages = []

    def stage(name, kind, part, settings, *more):
        argv = [*task(part), f"--max-completion-length={cfg.limit}", f"--run-dir={root / name}", *more]
        for k, v in settings.items():
            flag = k.replace("_", "-")
            argv.append((f"--{flag}" if v else f"--no-{flag}") if isinstance(v, bool) else f"--{flag}={v}")
        stages.append((name, kind, argv, root / name / "summary.json"))

    def measure(name, model, *more, template="plain", n=size["n"], limit=cfg.limit, tests=size["test"]):
        out = root / "test" / f"{name}.jsonl"
        argv = [*task("first", template), f"--model={model}", f"--num-problems={tests}", f"--n={n}", f"--max-new-tokens={limit}",
                f"--out={out}", f"--dtype={size['dtype']}", "--slots=128", *more]
        stages.append((f"test_{name}", "sample", argv, out.with_suffix(".done")))

    base = str(root / "tiny") if cfg.smoke else cfg.model
    stage("sft", "sft", "demonstrated", size["sft"], f"--model={base}")
    measure("sft", root / "sft")
    rft = ["--rft", f"--policy={root / 'sft'}"]
    stage("rft", "sft", "first", size["rft"], f"--model={root / 'sft'}", *rft)
    for name, label in (("orm", ["--label=outcome"]), ("q", ["--label=q", "--prover=base", "--prover-k=4"])):
        stage(name, "pav", "second", size["verifier"] | size[name], f"--policy={root / 'rft'}", *label)
    for seed, reward in itertools.product(size["rl_seeds"], ("outcome", "pav")):
        name = f"rl_{reward}_{seed}"
        paid = [f"--verifier={root / 'q'}"] if reward == "pav" else []
        stage(name, "rl", "second", size["rl"], f"--policy={root / 'rft'}", f"--reward={reward}", f"--seed={seed}", *paid)
        measure(name, root / name)
    for name, alpha in BEAMS.items():
        measure(name, root / "rft", "--search=beam", f"--verifier={root / 'q'}", f"--alpha={alpha}", "--prover-k=4",
                "--temperature=1", n=size["search"]["beam"], tests=size["beam_test"])
    measure("base", base, "--greedy", n=1, template="plain" if cfg.smoke else "auto", limit=3 * cfg.limit, tests=size["base"])
    return stages


def run_stage(name, kind, argv, done, logs):
    """One command line, in this process; its output goes to logs/NAME.log."""
    if done.exists():
        return
    clock = time.process_time()
    logs.mkdir(parents=True, exist_ok=True)
    done.parent.mkdir(parents=True, exist_ok=True)
    with open(logs / f"{name}.log", "w") as log, redirect_stdout(log):
        SCRIPTS[kind].main([*argv, "--eval"] if kind == "sample" and "--search=beam" not in argv else argv)
    seconds = time.process_time() - clock
    write_json(logs / f"{name}.seconds", seconds)
    done.touch()
    last = last_line((logs / f"{name}.log").read_text())
    print(f"  {name:<18} {seconds:5.0f} s of processor   {last[:150]}", flush=True)


def reranked(cfg, size, root):
    """n solutions of every test problem by the RFT policy -> correct [P,n], tokens [P,n], {verifier: score [P,n]}, votes."""
    path, n = root / "test" / "reranked.safetensors", size["search"]["n"]
    task = get_task("jsonl", 0, [f"{p}={root / 'data' / p}.jsonl" for p in ("val", "test")], template="plain")
    problems = task.problems("test", size["test"] or None)
    model, tokenizer = load_model(root / "rft", setup(cfg.device, cfg.threads or (0 if cfg.size.startswith("gpu") else 1)))
    settings = train_sft.Config(seed=1, slots=128, shard_problems=50, max_completion_length=cfg.limit)
    found = sample_solutions(model, tokenizer, task, problems, n, settings, root / "test" / "rft_samples")
    if not path.exists():
        ends = boundaries(task, found.rollouts, tokenizer)[:, -1:]
        score = {v: pav.step_values(pav.load_verifier(str(root / v), tokenizer, model.head.device), found.rollouts.tokens, ends)
                 for v in ("orm", "q")}
        save_file({k: v.contiguous() for k, v in score.items()}, path)
    score = {k: v.view(-1, n) for k, v in load_file(path).items()}
    said = [task.answer(problems[b // n], tokenizer.decode(found.rollouts.completion(b))) for b in range(len(found.correct))]
    tokens = (found.rollouts.length - found.rollouts.prompt_len).view(-1, n)
    return found.correct.view(-1, n).float(), tokens, score, [said[i : i + n] for i in range(0, len(said), n)]


# ----------------------------------------------------------------------------------------------------
# Numbers.


def best_of(score, correct, n):
    """Chance that the best-scored of n of a problem's N samples is right. score, correct [P,N] -> [P]; ties: the earlier.

    Exact over all subsets: the sample of rank j (0 is best) is the best of C(N-1-j, n-1) of the C(N, n) subsets."""
    N = score.shape[1]
    order = score.argsort(dim=1, descending=True, stable=True)
    weight = torch.tensor([math.comb(N - 1 - j, n - 1) / math.comb(N, n) for j in range(N)])
    return (correct.gather(1, order) * weight).sum(1)


def auc_within(score, correct):
    """Mean over the problems that have right and wrong samples of the AUC among them: what best-of-n lives on. An AUC over all
    samples can be had by knowing which problems are hard. score, correct [P,N]."""
    found = [pav.auc(s, c > 0.5) for s, c in zip(score, correct)]
    return mean(a for a in found if a == a)


def voted(said, correct, n):
    """Share of a problem's groups of n samples whose commonest answer is right. said [P][N], correct [P,N] -> [P]."""
    out = []
    for answers, right in zip(said, correct.tolist()):
        groups = range(0, len(answers) - n + 1, n)
        chosen = [vote(answers[i : i + n]) for i in groups]
        out.append(mean(0.0 if c is None else right[i + c] for i, c in zip(groups, chosen)))
    return torch.tensor(out)


def paired(a, b):
    """Two lists of shares a problem -> (mean of a - b, low, high), 95%. The problems are the same: their difficulty drops out."""
    d = [x - y for x, y in zip(a, b)]
    half = Z * (sum((x - mean(d)) ** 2 for x in d) / (len(d) - 1) / len(d)) ** 0.5 if len(d) > 1 else float("nan")
    return mean(d), mean(d) - half, mean(d) + half


def shares(path, n):
    """An evaluation's or a search's file -> right share of each problem, and its rows."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [mean(r["reward"] for r in rows[i : i + n]) for i in range(0, len(rows), n)], rows


def row(right, each=1):
    """Right share of each problem, of `each` independent samples -> a row of the results."""
    return dict(zip(("accuracy", "low", "high"), interval(right, each)), problems=len(right))


def numbers_of(cfg, size, root):
    """All finished stages -> results."""
    policies, by_arm, curves = {}, {}, {}
    for name in ("base", "sft"):
        right, _ = shares(root / "test" / f"{name}.jsonl", 1 if name == "base" else size["n"])
        policies[name] = row(right, 1 if name == "base" else size["n"])
    correct, tokens, score, said = reranked(cfg, size, root)
    rft = correct.mean(1).tolist()
    policies["rft"] = row(rft, size["search"]["n"])
    policies["sft"]["minus_rft"] = paired(right, rft)
    q = json.loads((root / "q" / "summary.json").read_text())
    for arm in ("rl_outcome", "rl_pav"):
        each = [shares(root / "test" / f"{arm}_{s}.jsonl", size["n"])[0] for s in size["rl_seeds"]]
        by_arm[arm] = [mean(x) for x in zip(*each)]
        curves[arm] = [[(r["num_tokens"], r["eval/accuracy"]) for r in read_metrics(root / f"{arm}_{s}") if "eval/accuracy" in r]
                       for s in size["rl_seeds"]]
        policies[arm] = dict(row(by_arm[arm], size["n"] * len(each)), per_seed=[mean(e) for e in each],
                             sampled_tokens=[c[-1][0] for c in curves[arm]],
                             pass_at_n=[mean(p > 0 for p in e) for e in each],
                             verifier_tokens=q["sampled_tokens"] if arm == "rl_pav" else 0,
                             minus_rft=paired(by_arm[arm], rft))
    search, ns = {}, [2**i for i in range(20) if 2**i <= size["search"]["n"]]
    ways = {f"best-of-n, {v}": lambda n, v=v: best_of(score[v], correct, n) for v in score}
    ways |= {"majority": lambda n: voted(said, correct, n), "pass@n (an oracle)": lambda n: best_of(correct, correct, n)}
    for name, way in ways.items():
        search[name] = [dict(row(way(n).tolist(), size["search"]["n"] / n), n=n, tokens=n * float(tokens.float().mean()),
                             minus_majority=paired(way(n).tolist(), voted(said, correct, n).tolist())) for n in ns]
    for name, alpha in [b for b in BEAMS.items() if (root / "test" / f"{b[0]}.jsonl").exists()]:
        right, rows = shares(root / "test" / f"{name}.jsonl", 1)
        cost = {k: mean(r[f"{k}_tokens"] for r in rows) for k in ("generated", "prefilled", "scored")}
        search["beam, Q" + (f" + {alpha} A" if alpha else "")] = [
            dict(row(right), n=size["search"]["beam"], tokens=cost["generated"], minus_one_sample=paired(right, rft), **cost)]
    summaries = {v: json.loads((root / v / "summary.json").read_text()) for v in ("sft", "rft", "orm", "q")}
    for v in score:
        summaries[v]["auc_within_problem"] = auc_within(score[v], correct)
    return dict(policies=policies, pav_minus_outcome=paired(by_arm["rl_pav"], by_arm["rl_outcome"]), search=search,
                curves=curves, summaries=summaries)


def table(r):
    """Markdown of numbers_of's result."""
    ci = lambda x: f"{x['accuracy']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"  # noqa: E731
    diff = lambda d: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*d)  # noqa: E731
    maybe = lambda x, key: diff(x[key]) if key in x else ""  # noqa: E731
    lines = ["| policy | test problems | accuracy [95%] | minus RFT, paired | seeds | tokens of RL | and of the verifier |",
             "|---|---|---|---|---|---|---|"]
    for name, p in r["policies"].items():
        seeds = ", ".join(f"{s:.3f}" for s in p.get("per_seed", []))
        tokens = [f"{mean(p['sampled_tokens']):.0f}", str(p["verifier_tokens"])] if seeds else ["", ""]
        lines.append("| " + " | ".join([NAMES[name], str(p["problems"]), ci(p), maybe(p, "minus_rft"), seeds, *tokens]) + " |")
    lines += ["", f"RL, PAV minus outcome only, paired by problem: {diff(r['pav_minus_outcome'])}", "",
              "| search with the RFT policy | n | tokens a problem | accuracy [95%] | minus majority, paired | minus one sample, "
              "paired |",
              "|---|---|---|---|---|---|"]
    for name, rows in r["search"].items():
        for x in rows:
            lines.append(f"| {name} | {x['n']} | {x['tokens']:.0f} | {ci(x)} | {maybe(x, 'minus_majority')} | "
                         f"{maybe(x, 'minus_one_sample')} |")
    lines += ["", "| verifier | labels | right among them | AUC, end | AUC, any step | within a test problem | Brier (constant) "
              "| corr. of advantage |", "|---|---|---|---|---|---|---|---|"]
    for name, v in ((v, r["summaries"][v]) for v in ("orm", "q")):
        cells = [f"{v[k]:.3f}" if v[k] is not None else "" for k in ("mean_label", "auc_outcome", "auc", "auc_within_problem")]
        brier = f"{v['brier']:.3f} ({v['brier_constant']:.3f})" if v["brier"] is not None else ""
        corr = f"{v['corr_advantage']:.2f} ({v['judged_steps']} steps)" if v["corr_advantage"] is not None else ""
        lines.append(f"| {name} | {v['labels']} | " + " | ".join([*cells, brier, corr]) + " |")
    return "\n".join(lines)


def figure(r, size, path):
    """Left: RL, accuracy on val against sampled tokens, a line a seed. Right: search, test accuracy against tokens, 95% bars."""
    if (plt := pyplot()) is None:
        return
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    n = size["rl"]["eval_problems"]
    for arm, runs in r["curves"].items():
        for i, run in enumerate(runs):
            y, low, high = zip(*(interval([1.0] * round(a * n) + [0.0] * (n - round(a * n))) for _, a in run))
            error = [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]]
            left.errorbar([t / 1e3 for t, _ in run], y, error, fmt="-o", color=COLOURS[arm[3:]], alpha=0.7, markersize=4,
                          elinewidth=0.8, label=None if i else NAMES[arm])
    left.set(xlabel="tokens sampled in RL, thousands", ylabel=f"sampled accuracy, val ({n} draws)",
             title="RL from the RFT policy (a line a seed; bars: 95%)")
    colours = ("#0072B2", "#009E73", "#7f7f7f", "#cccccc", "#D55E00", "#CC79A7")
    for i, (name, rows) in enumerate(r["search"].items()):
        x = [row["tokens"] * 1.04 ** (i - 2) for row in rows]  # side by side, so that every bar is seen
        error = [[row["accuracy"] - row["low"] for row in rows], [row["high"] - row["accuracy"] for row in rows]]
        right.errorbar(x, [row["accuracy"] for row in rows], error, fmt="-o" if len(rows) > 1 else "D", color=colours[i],
                       label=name, markersize=5, linewidth=1.5, elinewidth=0.8)
    right.set_xscale("log")
    ticks = [row["tokens"] for row in r["search"]["majority"]]
    right.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
    right.minorticks_off()
    right.set(xlabel="tokens generated a problem (logarithmic)", ylabel="accuracy, test",
              title="search with the RFT policy (bars: 95%)")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
    finish(plt, fig, (left, right), path)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    root = Path(cfg.run_dir or f"runs/openweights/{'smoke' if cfg.smoke else f'{cfg.problems}_{cfg.size}'}")
    size, out = SMOKE if cfg.smoke else SIZES[cfg.size], root / "results" if cfg.smoke else Path(cfg.out)
    parts = made_up() if cfg.smoke else read_problems(cfg.data, cfg.problems)
    (root / "data").mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        path, text = root / "data" / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows)
        if not path.exists() or path.read_text() != text:  # another process may be reading it
            path.write_text(text)
    print("problems: " + ", ".join(f"{len(rows)} {name}" for name, rows in parts.items()), flush=True)
    if cfg.smoke and not (root / "tiny").exists():
        tiny_model(root / "tiny")
    stages = plan(cfg, size, root)
    if cfg.plan:
        for _, kind, argv, done in stages:
            if not done.exists():
                print(f"python {Path(SCRIPTS[kind].__file__).name} {shlex.join(argv)}")
        return
    if unknown := set(cfg.only) - {"report", *(name for name, *_ in stages)}:
        raise UserError(f"--only: no stage {unknown.pop()!r}; there are {', '.join(name for name, *_ in stages)}")
    for name, kind, argv, done in [s for n in cfg.only for s in stages if s[0] == n] if cfg.only else stages:
        run_stage(name, kind, argv, done, root / "logs")
    if cfg.only and "report" not in cfg.only:
        return
    result = numbers_of(cfg, size, root)
    text = table(result)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    settings = {k: v for k, v in vars(cfg).items() if k in ("size", "problems", "model", "limit")}
    seconds = {p.stem: round(json.loads(p.read_text())) for p in sorted((root / "logs").glob("*.seconds"))}
    write_json(out / "results.json", dict(settings=settings, stages=size, machine=machine(), torch=torch.__version__,
                                          problems={k: len(v) for k, v in parts.items()}, processor_seconds=seconds, **result))
    for name, kind, _, _ in stages:
        if kind != "sample":
            shutil.copy(root / name / "metrics.jsonl", out / f"metrics_{name}.jsonl")
    figure(result, size, out / "curves.png")
    print_results(text, out)


if __name__ == "__main__":
    script(main)
