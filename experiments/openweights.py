"""Open weights, word problems: SmolLM2-135M from its base to RL with process rewards.

    python -m experiments.openweights --size cpu --data mawps_*.jsonl    # 75 minutes of one core
    python -m experiments.openweights --size cpu-gsm8k --problems gsm8k --limit 160 \
        --data gsm8k_train.jsonl gsm8k_test.jsonl --out docs/results/openweights_gsm8k     # 100
    python -m experiments.openweights --size gpu --data mawps_*.jsonl    # one H100; not run yet
    python -m experiments.openweights --size gpu --problems gsm8k --limit 256 \
        --data gsm8k_train.jsonl gsm8k_test.jsonl
    python -m experiments.openweights --smoke    # a tiny random model, made-up problems
    -> docs/results/openweights/: results.json, table.md, curves.png, metrics_*.jsonl

    base -> sft -> rft -> orm, q -> rl_outcome, rl_pav -> best-of-N and beam search with orm and q

MAWPS has no solutions; wordproblems.py finds demonstrations of one or two operations, one a line,
and makes the splits: `first` (3/10) is for SFT and RFT, `second` (3/10) for the verifiers and RL,
`val` (1/10) for what is watched or chosen, `test` (3/10) for the reported numbers and for nothing
else.

    orm         outcome model: one solution a problem, labelled at its end
    q           Q^pi from Monte-Carlo continuations; the PAV arm is paid by its Best-of-4 prover, 1
                - (1-Q)^4 (Setlur et al. 2024, arXiv 2410.08146, eq. 30)
    rl_outcome  and rl_pav: the same policy to start from (rft), problems, samples a step and
                learning rate; what the verifier's rollouts cost is written beside. Nothing is tuned
                for either arm.

Left out: a search over settings (the CPU cannot pay for it, and one arm tuned alone would be worth
less than nothing), provers that are other policies, a KL penalty. RFT goes on from SFT instead of
starting at the base. Every stage is a run directory of its own script: killed, the same command
goes on; --plan prints the command lines.
"""

import itertools
import json
import shlex
import shutil
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import papers.rft
import pav
import search
import train_rl
import train_sft
from experiments.openweights_report import (
    BEAMS,
    auc_within,
    beam_numbers,
    figure,
    paired,
    rerank_numbers,
    rl_numbers,
    supervised_numbers,
    table,
)
from experiments.toolkit import (
    machine,
    print_results,
)
from experiments.wordproblems import read_problems
from infra.cli import UserError, flags, opt, parse, script
from infra.runs import setup, write_json
from infra.seeds import derive
from model import Config as ModelConfig
from model import Transformer, init_weights, load_model, write_model
from open_weights.tokenizer import alphabet_tokenizer
from pipeline import last_line
from report import evaluate
from rollouts import step_ends
from tasks import TaskFlags, get_task
from verifier import load_verifier, step_values

MAWPS = [f"mawps_{part}.jsonl" for part in ("singleop", "addsub", "singleeq", "multiarith")]
# What each stage is run with; `search` is of this script. No entry was searched for.
SIZES = dict(
    cpu=dict(
        rl_seeds=[0, 1, 2],
        test=100,
        n=2,
        base=40,
        beam_test=50,
        dtype="float32",
        sft=dict(
            steps=36,
            batch_size=16,
            learning_rate=2e-4,
            warmup_steps=4,
            eval_problems=48,
            logging_steps=4,
        ),
        rft=dict(
            steps=10,
            batch_size=16,
            learning_rate=1e-4,
            warmup_steps=2,
            num_problems=150,
            num_generations=4,
            slots=128,
            rft_demonstrations=False,
            eval_problems=48,
            logging_steps=2,
        ),
        verifier=dict(
            epochs=2, batch_size=8, learning_rate=5e-5, slots=128, eval_problems=48, eval_mc=4
        ),
        orm=dict(num_problems=200, n_cov=1),
        q=dict(num_problems=100, n_cov=1, cuts=1, n_mc=2),
        rl=dict(
            num_prompts=4,
            num_generations=8,
            steps=8,
            learning_rate=2e-5,
            warmup_steps=2,
            alpha=1.0,
            eval_steps=4,
            eval_problems=64,
        ),
        search=dict(n=8, beam=6),
    ),
    gpu=dict(
        rl_seeds=[0, 1, 2],
        test=0,
        n=8,
        base=0,
        beam_test=0,
        dtype="bfloat16",  # sampling alone: such weights swallow updates
        sft=dict(steps=100, batch_size=32, learning_rate=1e-4, warmup_steps=10, eval_problems=256),
        rft=dict(
            steps=60,
            batch_size=32,
            learning_rate=5e-5,
            warmup_steps=5,
            num_generations=16,
            rft_demonstrations=False,
            eval_problems=256,
        ),
        verifier=dict(epochs=2, batch_size=64, learning_rate=3e-5, eval_problems=160, eval_mc=16),
        orm=dict(num_problems=0, n_cov=32),
        q=dict(num_problems=0, n_cov=4, cuts=2, n_mc=4),
        rl=dict(
            num_prompts=16,
            num_generations=16,
            steps=100,
            learning_rate=1e-5,
            warmup_steps=5,
            alpha=1.0,
            eval_steps=10,
            eval_problems=256,
        ),
        search=dict(n=64, beam=12),
    ),
)
# GSM8K's solutions are five times as long as MAWPS' here: fewer of them, so that it stays a matter
# of one core and 90 minutes. Of
# its own few are right, so that RFT trains on them and the demonstrations.
SIZES["cpu-gsm8k"] = SIZES["cpu"] | dict(
    rl_seeds=[0],
    test=50,
    beam_test=16,
    verifier=SIZES["cpu"]["verifier"] | dict(eval_problems=24),
    rft=SIZES["cpu"]["rft"] | dict(num_problems=100, rft_demonstrations=True),
    orm=dict(num_problems=100, n_cov=1),
    q=dict(num_problems=50, n_cov=1, cuts=1, n_mc=2),
    rl=SIZES["cpu"]["rl"] | dict(steps=6, eval_steps=6, eval_problems=32),
)
SMOKE = dict(
    rl_seeds=[0],
    test=8,
    n=2,
    base=8,
    beam_test=8,
    dtype="float32",
    sft=dict(steps=4, batch_size=8, eval_problems=8),
    rft=dict(steps=2, batch_size=8, num_problems=8, num_generations=2, eval_problems=8),
    verifier=dict(epochs=1, batch_size=8, eval_problems=8, eval_mc=4),
    orm=dict(num_problems=8),
    q=dict(num_problems=8, n_cov=1, cuts=1, n_mc=1),
    rl=dict(num_prompts=2, num_generations=2, steps=2, eval_steps=1, eval_problems=8),
    search=dict(n=4, beam=3),
)


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
    only: list = opt(
        [],
        "run these stages alone, e.g. rft q test_sft, so that several processes share the work; "
        "report: the tables (beams that were not run are left out)",
    )
    plan: bool = opt(False, "print the command lines of the stages that are missing, and stop")
    smoke: bool = opt(
        False, "few steps of everything, with a tiny random model and made-up problems"
    )


# --------------------------------------------------------------------------------------------------
# The smoke run's problems and model.


def made_up(n=160):
    """Problems of the smoke run."""
    pairs = [(derive(0, "a", i) % 9 + 1, derive(0, "b", i) % 9 + 1) for i in range(n)]
    rows = [
        dict(
            question=f"Tom has {a} apples and buys {b} more ({i}).",
            answer=str(a + b),
            solution=f"{a} + {b} = {a + b}\n#### {a + b}",
        )
        for i, (a, b) in enumerate(pairs)
    ]
    return dict(
        demonstrated=rows[:40],
        first=rows[:60],
        second=rows[60:120],
        val=rows[120:136],
        test=rows[136:],
    )


def tiny_model(folder):
    folder.mkdir(parents=True)
    tokenizer = alphabet_tokenizer([chr(c) for c in range(32, 127)] + ["\n"])
    shape = ModelConfig(
        vocab_size=tokenizer.n_vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    )
    write_model(
        folder, init_weights(Transformer(shape), torch.Generator().manual_seed(0)), tokenizer
    )


# --------------------------------------------------------------------------------------------------
# Stages.


@dataclass
class Stage:
    """One script at one config; done: a file that exists when it has ended."""

    name: str
    script: object
    config: object
    done: Path

    def command(self):
        module = self.script.__name__
        words = ["-m", module] if "." in module else [f"{module}.py"]
        return shlex.join(["python", *words, *flags(self.config)])


class Plan:
    """The stages, in order."""

    def __init__(self, cfg, size, root):
        self.cfg = cfg
        self.size = size
        self.root = root
        self.stages = []

    def task(self, part, template="plain"):
        """Settings that all stages share; part: the problems in the place of train."""
        data = {"train": part, "val": "val", "test": "test"}
        tiny = self.cfg.size != "gpu" or self.cfg.smoke
        return dict(
            task="jsonl",
            task_args=[f"template={template}"],
            data=[f"{split}={self.root / 'data' / name}.jsonl" for split, name in data.items()],
            device=self.cfg.device,
            threads=self.cfg.threads or int(tiny),
        )

    def train(self, name, script, part, settings, **more):
        run = self.root / name
        place = dict(max_completion_length=self.cfg.limit, run_dir=str(run))
        config = script.Config(**self.task(part), **place, **settings, **more)
        self.stages.append(Stage(name, script, config, run / "summary.json"))

    def measure(self, name, script, model, template="plain", n=0, limit=0, tests=0, **more):
        """n, limit, tests: samples a problem, tokens, problems (0: those of most stages)."""
        out = self.root / "test" / f"{name}.jsonl"
        config = script.Config(
            **self.task("first", template),
            model=str(model),
            num_problems=tests or self.size["test"],
            n=n or self.size["n"],
            max_new_tokens=limit or self.cfg.limit,
            out=str(out),
            dtype=self.size["dtype"],
            slots=128,
            **more,
        )
        self.stages.append(Stage(f"test_{name}", script, config, out.with_suffix(".done")))


def plan(cfg, size, root):
    """-> the stages, in order."""
    p = Plan(cfg, size, root)
    base = str(root / "tiny") if cfg.smoke else cfg.model
    sft = str(root / "sft")
    policy = str(root / "rft")
    q = str(root / "q")
    verifier = size["verifier"]
    p.train("sft", train_sft, "demonstrated", size["sft"], model=base)
    p.measure("sft", evaluate, sft)
    p.train("rft", papers.rft, "first", size["rft"], model=sft, policy=sft)
    p.train("orm", pav, "second", verifier | size["orm"], policy=policy, label="outcome")
    mc = dict(label="q", prover="base", prover_k=4)
    p.train("q", pav, "second", verifier | size["q"], policy=policy, **mc)
    for seed, reward in itertools.product(size["rl_seeds"], ("outcome", "pav")):
        name = f"rl_{reward}_{seed}"
        paid = dict(reward=reward, verifier=q if reward == "pav" else "")
        p.train(name, train_rl, "second", size["rl"], policy=policy, seed=seed, **paid)
        p.measure(name, evaluate, root / name)
    beam = dict(method="beam", verifier=q, prover_k=4, temperature=1.0)
    sizes = dict(n=size["search"]["beam"], tests=size["beam_test"])
    for name, alpha in BEAMS.items():
        p.measure(name, search, policy, **sizes, **beam, alpha=alpha)
    template = "plain" if cfg.smoke else "auto"
    options = dict(n=1, template=template, limit=3 * cfg.limit, tests=size["base"])
    p.measure("base", evaluate, base, greedy=True, **options)
    return p.stages


def run_stage(stage, logs):
    """One command line, in this process; its output goes to logs/NAME.log."""
    if stage.done.exists():
        return
    clock = time.process_time()
    logs.mkdir(parents=True, exist_ok=True)
    stage.done.parent.mkdir(parents=True, exist_ok=True)
    path = logs / f"{stage.name}.log"
    with open(path, "w") as log, redirect_stdout(log):
        stage.script.main(flags(stage.config))
    seconds = time.process_time() - clock
    write_json(logs / f"{stage.name}.seconds", seconds)
    stage.done.touch()
    print(f"  {stage.name:<18} {seconds:5.0f} s of processor   {last_line(path)[:150]}", flush=True)


def reranked(cfg, size, root):
    """n solutions of every test problem by the RFT policy -> correct [P,n], tokens [P,n],
    {verifier: score [P,n]}, votes."""
    path = root / "test" / "reranked.safetensors"
    n = size["search"]["n"]
    data = [f"{part}={root / 'data' / part}.jsonl" for part in ("val", "test")]
    task = get_task(TaskFlags(task="jsonl", data=data, task_args=["template=plain"], task_seed=0))
    problems = task.problems("test", size["test"] or None)
    model, tokenizer = load_model(
        root / "rft", setup(cfg.device, cfg.threads or (1 if cfg.size != "gpu" else 0))
    )
    settings = papers.rft.Config(
        seed=1, slots=128, shard_problems=50, max_completion_length=cfg.limit
    )
    solutions = papers.rft.sample_solutions(
        model, tokenizer, task, problems, n, settings, root / "test" / "rft_samples"
    )
    if not path.exists():
        ends = step_ends(task, solutions.rollouts, tokenizer)[:, -1:]
        score = {
            v: step_values(
                load_verifier(root / v, tokenizer, model.head.device),
                solutions.rollouts.tokens,
                ends,
            )
            for v in ("orm", "q")
        }
        save_file({k: v.contiguous() for k, v in score.items()}, path)
    score = {k: v.view(-1, n) for k, v in load_file(path).items()}
    answers = [
        task.final_answer(problems[b // n], tokenizer.decode(solutions.rollouts.completion(b)))
        for b in range(len(solutions.correct))
    ]
    tokens = (solutions.rollouts.length - solutions.rollouts.prompt_len).view(-1, n)
    return (
        solutions.correct.view(-1, n).float(),
        tokens,
        score,
        [answers[i : i + n] for i in range(0, len(answers), n)],
    )


# --------------------------------------------------------------------------------------------------
# Numbers.












def numbers_of(cfg, size, root):
    """All finished stages -> results."""
    correct, tokens, score, answers = reranked(cfg, size, root)
    rft = correct.mean(1).tolist()
    policies = supervised_numbers(size, root, rft)
    curves = {}
    by_arm = {}
    for arm in ("rl_outcome", "rl_pav"):
        policies[arm], by_arm[arm], curves[arm] = rl_numbers(size, root, arm, rft)
    search = rerank_numbers(size, correct, tokens, score, answers) | beam_numbers(size, root, rft)
    names = ("sft", "rft", "orm", "q")
    summaries = {v: json.loads((root / v / "summary.json").read_text()) for v in names}
    for v in score:
        summaries[v]["auc_within_problem"] = auc_within(score[v], correct)
    return dict(
        policies=policies,
        pav_minus_outcome=paired(by_arm["rl_pav"], by_arm["rl_outcome"]),
        search=search,
        curves=curves,
        summaries=summaries,
    )




























def write_problems(parts, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        path = folder / f"{name}.jsonl"
        text = "".join(json.dumps(r) + "\n" for r in rows)
        if not path.exists() or path.read_text() != text:  # another process may be reading it
            path.write_text(text)
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in parts.items())
    print(f"problems: {sizes}", flush=True)


def chosen_stages(stages, only):
    """Those of --only, in that order; all without it."""
    names = [stage.name for stage in stages]
    if unknown := set(only) - {"report", *names}:
        raise UserError(f"--only: no stage {unknown.pop()!r}; there are {', '.join(names)}")
    return [s for n in only for s in stages if s.name == n] if only else stages


def write(cfg, size, root, out, parts, stages):
    result = numbers_of(cfg, size, root)
    text = table(result)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    logs = sorted((root / "logs").glob("*.seconds"))
    record = dict(
        settings={k: vars(cfg)[k] for k in ("size", "problems", "model", "limit")},
        stages=size,
        machine=machine(),
        torch=torch.__version__,
        problems={k: len(v) for k, v in parts.items()},
        processor_seconds={p.stem: round(json.loads(p.read_text())) for p in logs},
    )
    write_json(out / "results.json", record | result)
    for stage in stages:
        if stage.script not in (evaluate, search):
            shutil.copy(root / stage.name / "metrics.jsonl", out / f"metrics_{stage.name}.jsonl")
    figure(result, size, out / "curves.png")
    print_results(text, out)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    name = "smoke" if cfg.smoke else f"{cfg.problems}_{cfg.size}"
    root = Path(cfg.run_dir or f"runs/openweights/{name}")
    size = SMOKE if cfg.smoke else SIZES[cfg.size]
    out = root / "results" if cfg.smoke else Path(cfg.out)
    parts = made_up() if cfg.smoke else read_problems(cfg.data, cfg.problems)
    write_problems(parts, root / "data")
    if cfg.smoke and not (root / "tiny").exists():
        tiny_model(root / "tiny")
    stages = plan(cfg, size, root)
    if cfg.plan:
        for stage in stages:
            if not stage.done.exists():
                print(stage.command())
        return
    for stage in chosen_stages(stages, cfg.only):
        run_stage(stage, root / "logs")
    if not cfg.only or "report" in cfg.only:
        write(cfg, size, root, out, parts, stages)


if __name__ == "__main__":
    script(main)
