"""Learning dynamics: does a model learn to solve its training problems before it can recite their solutions?

    python -m papers.memorization --task worded --num-examples 500 --steps 800        # SFT, measured on its way
    python -m papers.memorization --task worded --num-examples 600 --curate DIR       # more problems like the hard ones
    python -m experiments.memorization                      # the paper's claim, on published and on new runs

Kang, Setlur et al. 2024 (arXiv 2411.07681): for checkpoint m and training example i, with acc the share of sampled
solutions that are right and nll the mean negative log-likelihood of the example's own solution,

    premem_m(i) = min( max_{m' <= m} acc_m'(i) * 1[nll_m'(i) >= threshold],  acc_m(i) )

the accuracy it had reached before the solution was memorised. Its mean over the training set predicts the test
accuracy of checkpoint m without any test data; plain training accuracy does not, as it counts what was recited. The
authors' code writes the threshold as tau = ln(nll) with tau = -2.3 (GSM8K, nll 0.100) and -1.7 (MATH, nll 0.183).

Curation: the examples of low pre-memorization accuracy are those worth more data of their kind. --curate DIR takes the
problems of a measured run and fills up to --num-examples with problems like those that it found hard.

Legend: M checkpoints of a run, n training examples.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from infra import parallel
from infra.cli import UserError, opt, parse, print_next_command, run_folder, script
from infra.runs import by_step, one_thread_if_tiny, with_progress_bar
from infra.seeds import derive
from model import token_logprobs
from rollouts import grades
from sample import generate
from tasks import smoked
from tasks.context import leave_out_long
from train_sft import (
    SFTFlags,
    build_examples,
    check_lengths,
    finish,
    first_problems,
    log_and_save,
    open_sft_run,
    resume,
    sft_batch,
    start_model,
    train_step,
)


@dataclass
class Config(SFTFlags):
    snapshots: int = opt(10, "measurements over the run of each example's accuracy and likelihood", "memorization", low=1)
    memorization_samples: int = opt(4, "samples a training and a test problem in a snapshot", "memorization", low=1)
    memorization_temperature: float = opt(0.8, "of these samples", "memorization", above=0)
    memorization_problems: int = opt(256, "test problems in a snapshot", "memorization", low=1)
    memorization_threshold: float = opt(0.1, "nats a token below which a solution counts as memorised", "memorization",
                                        above=0)
    curate: str = opt("", "a measured run: keep its examples and add problems like those that it found hard", "memorization")
    curate_by: str = opt("premem", "hard is: low pre-memorization accuracy, high nll, low accuracy; iid: any", "memorization",
                         choices=["premem", "nll", "accuracy", "iid"])


def pre_memorization(accuracy, nll, threshold):
    """accuracy [M,n] in [0,1], nll [M,n] mean nats a token, threshold in nats -> premem [M,n]."""
    fresh = np.where(nll >= threshold, accuracy, 0.0)  # nll >= threshold: not memorised yet
    return np.minimum(np.maximum.accumulate(fresh, axis=0), accuracy)


def r_squared(prediction, truth):
    """Of the line y = x, not of a fitted one: 1 - sum (truth - prediction)^2 / sum (truth - mean)^2. A prediction that
    is worse than the constant mean gives a negative number."""
    prediction, truth = np.asarray(prediction, float), np.asarray(truth, float)
    if not truth.var():
        return float("nan")  # nothing to explain
    return 1 - ((truth - prediction) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()


def predicted(runs, threshold):
    """runs: dicts with accuracy [M,n], nll [M,n], test [M] -> premem averages and test accuracies of all checkpoints."""
    premem = [pre_memorization(r["accuracy"], r["nll"], threshold).mean(1) for r in runs]
    return np.concatenate(premem), np.concatenate([r["test"] for r in runs])


def choose_threshold(runs, grid):
    """-> the threshold of the grid with the best R^2 on these runs (the first of equals)."""
    return max(grid, key=lambda t: r_squared(*predicted(runs, t)))


def held_out_r_squared(runs, grid, splits, seed):
    """The threshold is chosen on half of the runs and scored on the other half. -> R^2 and thresholds, [splits]."""
    rng, scores, chosen = np.random.default_rng(seed), [], []
    for _ in range(splits):
        order = rng.permutation(len(runs))
        half = len(runs) // 2
        chosen.append(choose_threshold([runs[i] for i in order[:half]], grid))
        scores.append(r_squared(*predicted([runs[i] for i in order[half:]], chosen[-1])))
    return np.array(scores), np.array(chosen)


@torch.no_grad()
def solution_nll(model, examples, device, batch_size=256):
    """Mean negative log-likelihood of each example's completion (EOS included), nats a token. -> [n] float32."""
    out = np.zeros(len(examples), dtype=np.float32)
    order = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i])))  # little padding
    for i in range(0, len(order), batch_size):
        rows = order[i : i + batch_size]
        tokens, targets = sft_batch([examples[j] for j in rows], device)
        logprob, _ = token_logprobs(model, tokens, targets, temperature=1.0)
        targets = targets.cpu()
        row = targets.nonzero()[:, 0]
        total = torch.zeros(len(rows)).index_add_(0, row, logprob.cpu().float())
        out[rows] = (-total / targets.sum(1)).numpy()
    return out


def sampled_accuracy(model, tokenizer, task, prompts, problems, samples, temperature, max_new_tokens, seed):
    """Share of `samples` completions of each prompt that are right. prompts: token ids. -> [n] float32."""
    out = generate(model, [p for p in prompts for _ in range(samples)], max_new_tokens=max_new_tokens,
                   temperature=temperature, seed=seed, stop_ids=task.stop_ids(tokenizer))
    right = grades(task, [p for p in problems for _ in range(samples)], out, tokenizer)
    return right.view(len(problems), samples).numpy().astype(np.float32).mean(1)


def snapshot(path, model, tokenizer, task, examples, problems, held_out, cfg, step, device):
    """Measure one checkpoint and write it to `path`, whole or not at all: accuracy [n], nll [n], test [held out]."""
    options = dict(samples=cfg.memorization_samples, temperature=cfg.memorization_temperature,
                   max_new_tokens=cfg.max_completion_length or task.max_new_tokens)
    prompts = [task.prompt_tokens(p, tokenizer) for p in held_out]
    arrays = dict(
        accuracy=sampled_accuracy(model, tokenizer, task, [e[0] for e in examples], problems,
                                  seed=derive(cfg.seed, "memorization", step), **options),
        nll=solution_nll(model, examples, device),
        test=sampled_accuracy(model, tokenizer, task, prompts, held_out, seed=derive(cfg.seed, "test", step), **options),
        step=np.array([step]))
    path.parent.mkdir(exist_ok=True)
    if parallel.rank() == 0:
        save_file(arrays, path.with_name(f".tmp-{path.name}"))
        path.with_name(f".tmp-{path.name}").replace(path)
    return arrays


def load_run(run_dir):
    """The snapshots of a run -> dict of accuracy [M,n], nll [M,n], test [M], test_each [M,held out], step [M]."""
    files = by_step((Path(run_dir) / "memorization").glob("step_*.safetensors"))
    if not files:
        raise UserError(f"{run_dir} holds no snapshots: measure one with python -m papers.memorization")
    arrays = [load_file(f) for f in files]
    run = {k: np.stack([a[k] for a in arrays]) for k in ("accuracy", "nll", "test")}
    return dict(accuracy=run["accuracy"], nll=run["nll"], test=run["test"].mean(1), test_each=run["test"],
                step=np.concatenate([a["step"] for a in arrays]))


def curate(run, task, problems, n, by, threshold, seed):
    """n more training problems, each similar to one of `problems` that the run found hard. -> [Problem]

    by: "premem" takes the seeds whose pre-memorization accuracy at the end is lowest (the paper's criterion), "nll" those
    whose solutions are least likely, "accuracy" those least often right in training, "iid" any. The hardest quarter of
    the seeds is used in turn, ties broken at random; task.similar must make a new problem like a given one.
    """
    if task.similar(problems[0], seed) is None:
        raise UserError("curation needs a task that can make similar problems (task.similar), such as --task worded")
    rng = np.random.default_rng(seed)
    hardness = dict(iid=np.zeros(len(problems)), accuracy=-run["accuracy"][-1], nll=run["nll"][-1],
                    premem=-pre_memorization(run["accuracy"], run["nll"], threshold)[-1])[by]
    order = np.lexsort((rng.random(len(problems)), -hardness))
    chosen = order if by == "iid" else order[: max(1, len(order) // 4)]
    known, out = {p.key for p in problems}, []
    for i in range(100 * n):
        if len(out) == n:
            break
        p = task.similar(problems[chosen[i % len(chosen)]], derive(seed, "similar", i))
        if p.key not in known:
            out.append(p)
            known.add(p.key)
    if len(out) < n:
        raise UserError(f"only {len(out)} of {n} new problems could be made from {len(chosen)} seeds; ask for fewer")
    return out


def curated(cfg, task):
    """The training problems of the run --curate, then new ones like those it found hard, --num-examples in all."""
    run = load_run(cfg.curate)
    old = json.loads((Path(cfg.curate) / "run_config.json").read_text())
    if old["task"] != cfg.task or old["seed"] != cfg.seed:
        raise UserError(f"{cfg.curate} was trained with --task {old['task']} --seed {old['seed']}; give the same here")
    n = run["accuracy"].shape[1]
    if cfg.num_examples <= n:
        raise UserError(f"{cfg.curate} has {n} examples already; give a larger --num-examples")
    problems = task.problems("train", n, cfg.seed)
    return problems + curate(run, task, problems, cfg.num_examples - n, cfg.curate_by, cfg.memorization_threshold, cfg.seed)


def train(cfg):
    """SFT with --snapshots measurements on its way, in --run-dir/memorization/. Resumes by itself. -> summary."""
    cfg.run_dir = run_folder(cfg, "memorization")
    device, task, run = open_sft_run(cfg)
    if run.summary:
        return run.summary
    model, tokenizer = start_model(cfg, task, device)
    one_thread_if_tiny(model, cfg.threads)
    leave_out_long(task, tokenizer, model, "train", "test")
    problems = curated(cfg, task) if cfg.curate else first_problems(task, cfg.num_problems, cfg.seed)
    examples = build_examples(task, tokenizer, problems, cfg)
    check_lengths(examples, model.cfg.max_position_embeddings, cfg.max_completion_length or task.max_new_tokens)
    problem_of = [problems[i % len(problems)] for i in range(len(examples))]
    held_out = task.problems("test", cfg.memorization_problems, cfg.seed)
    measured = {cfg.steps * (i + 1) // cfg.snapshots for i in range(cfg.snapshots)}
    start = resume(run, model, cfg)
    logs = {}
    for step in with_progress_bar(range(start + 1, cfg.steps + 1), "sft"):
        logs = train_step(run, model, examples, step, cfg, device)
        if step in measured:
            path = run.folder / f"memorization/step_{step:06d}.safetensors"
            at = snapshot(path, model, tokenizer, task, examples, problem_of, held_out, cfg, step, device)
            memorised = (at["nll"] < cfg.memorization_threshold).mean()
            print(f"  step {step}: accuracy {at['accuracy'].mean():.3f} on train, {at['test'].mean():.3f} on test, "
                  f"{memorised:.3f} of the solutions memorised")
        log_and_save(run, step, logs, tokenizer, cfg)
    return finish(run, model, tokenizer, task, cfg, logs, examples)


def main(argv=None):
    cfg = smoked(parse(Config, argv, __doc__), "sft")
    if cfg.smoke:
        cfg.snapshots = 2
    summary = train(cfg)
    print_next_command(cfg, ("how often it is right on test problems", ["-m", "report.evaluate", "--model", cfg.run_dir]))
    return summary


if __name__ == "__main__":
    script(main)
