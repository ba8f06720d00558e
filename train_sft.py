"""Supervised fine-tuning: imitate demonstrations. The first stage of everything.

    python train_sft.py --task planted --run-dir runs/sft        # tiny model, CPU, 15 s
    python train_sft.py --task jsonl --data train.jsonl --model smollm2    # open weights

The loss is the mean negative log-prob of the completion's tokens, its EOS included, the prompt's
left out. What is left out of the textbook: packing several examples into one row (rows of a
micro-batch have similar lengths instead), dropout, label smoothing.

Where a task has a scripted demonstrator, --strength says how often it knows what it is doing: a
weak one makes the base policy, a stronger one a prover.

Siblings with loops of their own: papers/rft.py (a policy's own correct solutions as examples),
papers/memorization.py (which examples are learned, which recited).
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from infra import parallel
from infra.cli import (
    RunConfig,
    UserError,
    opt,
    parse,
    print_next_command,
    run_folder,
    script,
    stage_words,
)
from infra.optimizer import optimizer_for
from infra.runs import Run, one_thread_if_tiny, require_finite, setup, with_progress_bar
from infra.seeds import batch_indices, derive
from model import load_model, load_weights, new_model, pad_right, token_loss, write_model
from rollouts import grades
from sample import generate
from tasks import TaskFlags, get_task, prepare, task_class
from tasks.context import leave_out_long


@dataclass
class SFTFlags(TaskFlags, RunConfig):
    """The flags of every script that trains on examples; see Config for one's own."""

    model: str = opt(
        "", "folder or name of the weights to start from (default: a tiny random model)", "model"
    )
    hidden_size: int = opt(64, "width of the tiny model", "model", low=8)
    num_hidden_layers: int = opt(2, "depth of the tiny model", "model", low=1)
    num_attention_heads: int = opt(4, "heads of the tiny model", "model", low=1)
    strength: float = opt(-1.0, "demonstrator's strength (-1: the task's base strength)", "task")
    num_examples: int = opt(
        6000, "demonstrations (a file is used whole where it has fewer)", "task", low=1
    )
    num_problems: int = opt(0, "only the first so many training problems (0: all)", "task", low=0)
    steps: int = opt(400, "optimizer steps", "optimization", low=1)
    batch_size: int = opt(128, "examples a step", "optimization", low=1)
    micro_batch_size: int = opt(
        0, "examples a backward pass, to save memory (0: the whole batch)", "optimization", low=0
    )
    learning_rate: float = opt(3e-3, "peak learning rate of AdamW", "optimization", above=0)
    warmup_steps: int = opt(
        20, "linear warm-up, then cosine decay to a tenth", "optimization", low=0
    )
    weight_decay: float = opt(0.0, "decoupled weight decay of matrices", "optimization", low=0)
    max_grad_norm: float = opt(1.0, "gradient clipping by global norm", "optimization", above=0)
    logging_steps: int = opt(20, "steps between lines of metrics.jsonl", "evaluation", low=1)
    save_steps: int = opt(200, "steps between checkpoints", "evaluation", low=1)
    eval_problems: int = opt(
        256,
        "problems for the accuracy at the end (one sample each, temperature 1)",
        "evaluation",
        low=1,
    )


@dataclass
class Config(SFTFlags):
    pass


# ------------------------------------------------------------------------------------------------
# Examples.


def first_problems(task, n, seed):
    """The first n training problems in the order that SFT with the same --seed takes them (0: all
    of them)."""
    problems = task.problems("train", n or None, seed)
    if n > len(problems):
        raise UserError(f"--num-problems {n}: there are only {len(problems)} training problems")
    return problems


def encode_solution(task, tokenizer, text):
    """Completion ids of a solution's text, with the EOS where the task has one."""
    return tokenizer.encode(text) + ([tokenizer.eos_ids[0]] if task.ends_with_eos else [])


def strength_of(cfg, task):
    """The demonstrator's strength that --strength asks for."""
    return cfg.strength if cfg.strength >= 0 or not task.strengths else task.strengths["base"]


def build_examples(task, tokenizer, problems, cfg):
    """[(prompt ids, completion ids)] of --num-examples demonstrations, problems in turn."""
    examples = []
    for i in range(cfg.num_examples):
        problem = problems[i % len(problems)]
        if i >= len(problems) and not task.random_demonstrations:
            break  # a file has one solution per problem
        prompt = task.prompt_tokens(problem, tokenizer)  # first: it may open a thought to be closed
        seed = derive(cfg.seed, "demonstration", i)
        text = task.demonstration(problem, strength_of(cfg, task), seed)
        examples.append((prompt, encode_solution(task, tokenizer, text)))
    return examples


def check_lengths(examples, context, limit):
    """UserError where an example does not fit the model's context; a warning where a completion is
    longer than the limit of RL and evaluation: no policy can be graded right on what it cannot
    finish."""
    longest = max(len(p) + len(c) for p, c in examples)
    if longest > context:
        raise UserError(
            f"an example has {longest} tokens, the model's context is {context}: shorten the "
            f"data or take "
            "another model"
        )
    too_long = sum(len(c) > limit for _, c in examples)
    if too_long:
        print(
            f"warning: {too_long / len(examples):.0%} of the demonstrations are longer than the "
            f"{limit} tokens that a "
            "completion may have (--max-completion-length): they cannot be solved by imitation"
        )


def sft_batch(examples, device):
    """Rows of (prompt, completion) -> tokens [B,T], targets [B,T] bool (completion tokens)."""
    tokens, length = pad_right([p + c for p, c in examples])
    prompt_len = torch.tensor([len(p) for p, _ in examples])
    t = torch.arange(tokens.shape[1])
    targets = (t >= prompt_len[:, None]) & (t < length[:, None])
    return tokens.to(device), targets.to(device)


# ------------------------------------------------------------------------------------------------
# Training.


def learning_rate(step, cfg):
    """Rate of 1-based step: linear warm-up, then a cosine from the peak to a tenth of it."""
    if step <= cfg.warmup_steps:
        return cfg.learning_rate * step / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.learning_rate * (0.55 + 0.45 * float(torch.cos(torch.tensor(torch.pi * done))))


def adamw(params, cfg):
    """AdamW with decay on matrices only (norm gains have no reason to shrink)."""
    matrices = dict(params=[p for p in params if p.dim() > 1], weight_decay=cfg.weight_decay)
    vectors = dict(params=[p for p in params if p.dim() == 1], weight_decay=0.0)
    groups = [group for group in (matrices, vectors) if group["params"]]
    return optimizer_for(torch.optim.AdamW, groups, lr=cfg.learning_rate, betas=(0.9, 0.99))


def sft_step(model, batch, cfg, device):
    """Accumulate the gradient of the batch's mean NLL. One denominator for all micro-batches and
    processes: the number of trained tokens in the whole batch, so the split does not change the
    gradient. Returns nll, entropy."""
    # Rows of one micro-batch have similar lengths.
    batch = sorted(batch, key=lambda example: len(example[0]) + len(example[1]))
    total = sum(len(c) for _, c in batch)
    batch = batch[parallel.rank() :: parallel.size()]
    nll = 0.0
    entropy_sum = 0.0
    size = cfg.micro_batch_size or len(batch)
    for i in range(0, len(batch), size):
        tokens, targets = sft_batch(batch[i : i + size], device)
        loss, _, entropy = token_loss(
            model, tokens, targets, 1.0, lambda logprob, entropy: -logprob.sum() / total
        )
        parallel.backward(loss, model)
        nll += loss.item()
        entropy_sum += entropy.sum().item() / total
    parallel.sum_gradients(list(model.parameters()))
    sums = parallel.summed(dict(nll=nll, entropy=entropy_sum))
    return sums["nll"], sums["entropy"]


def train_step(run, model, examples, step, cfg, device):
    """One optimizer step on the 1-based step's batch. -> what to log."""
    rows = batch_indices(len(examples), cfg.batch_size, step, cfg.seed, "epoch")
    batch = [examples[i] for i in rows]
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg)
    nll, entropy = sft_step(model, batch, cfg, device)
    grad_norm = parallel.clip(run.params, cfg.max_grad_norm)
    if not math.isfinite(grad_norm):
        tokens, targets = sft_batch(batch, "cpu")
        require_finite(
            run.folder, step, grad_norm, dict(tokens=tokens, targets=targets), cfg.learning_rate
        )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return dict(
        loss=nll,
        entropy=entropy,
        grad_norm=grad_norm,
        learning_rate=learning_rate(step, cfg),
        epoch=step * cfg.batch_size / len(examples),
    )


def start_model(cfg, task, device):
    """The model to train: open weights, or a tiny one with the task's own alphabet. -> model,
    tokenizer."""
    dtype = getattr(torch, cfg.dtype)
    if cfg.model:
        return load_model(cfg.model, device, dtype)
    tokenizer = task.tokenizer()
    if tokenizer is None:
        raise UserError(
            f"--task {cfg.task} has no alphabet of its own: give --model (a folder, or smollm2)"
        )
    model = new_model(
        tokenizer.n_vocab, cfg.hidden_size, cfg.num_hidden_layers, cfg.num_attention_heads, cfg.seed
    )
    return model.to(device, dtype), tokenizer


def open_sft_run(cfg):
    """Check what can be checked before the work -> device, task, Run (its summary is set where it
    is complete)."""
    device = setup(cfg.device, cfg.threads)
    task = get_task(cfg)
    for split in ("train", "val"):
        task.problems(split, 1, cfg.seed)  # fail early on an empty split
    if cfg.batch_size % parallel.size():
        raise UserError(
            f"--batch-size {cfg.batch_size} must be a multiple of the {parallel.size()} processes"
        )
    return device, task, Run(cfg, ignore=("run_dir", "device", "logging_steps"))


def resume(run, model, cfg):
    """Newest checkpoint into model and optimizer. -> the step it was taken at, 0 for a new run."""
    return run.resume(model, partial(load_weights, model), lambda params: adamw(params, cfg))[
        "step"
    ]


def log_and_save(run, step, logs, tokenizer, cfg):
    """A line of metrics and a checkpoint, each where it is due."""
    if step % cfg.logging_steps == 0 or step == cfg.steps:
        run.log(step, **logs)
    if step % cfg.save_steps == 0 or step == cfg.steps:
        run.save(step, lambda folder, whole: write_model(folder, whole, tokenizer))


def accuracy(model, tokenizer, task, problems, max_new_tokens, seed, temperature=1.0):
    """Share of problems solved with one sample each, and the share of samples cut off by the
    limit."""
    prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
    rollouts = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=derive(seed, "evaluation"),
        stop_ids=task.stop_ids(tokenizer),
    )
    right = grades(task, problems, rollouts, tokenizer).tolist()
    clipped = sum(r == "length" for r in rollouts.finish_reason) / len(problems)
    return sum(right) / len(problems), clipped


def finish(run, model, tokenizer, task, cfg, logs, examples, name="sft", **counts):
    """Accuracy on held-out problems, summary.json, one line for people. -> summary."""
    problems = task.problems("val", cfg.eval_problems, cfg.seed)
    limit = cfg.max_completion_length or task.max_new_tokens
    score, clipped = accuracy(model, tokenizer, task, problems, limit, cfg.seed)
    summary = run.finish(
        loss=logs.get("loss"),
        accuracy=score,
        clipped_ratio=clipped,
        examples=len(examples),
        **counts,
    )
    print(
        f"{name}: {cfg.steps} steps on {len(examples)} examples, sampled accuracy {score:.3f} "
        f"(val, n={len(problems)}), {summary['seconds']:.0f} s -> {run.folder}"
    )
    return summary


def train(cfg):
    """Demonstrations of the task -> a checkpoint in --run-dir. Resumes by itself. -> summary."""
    cfg.run_dir = run_folder(cfg, "sft")
    device, task, run = open_sft_run(cfg)
    if run.summary:
        return run.summary
    model, tokenizer = start_model(cfg, task, device)
    one_thread_if_tiny(model, cfg.threads)
    leave_out_long(task, tokenizer, model, "train", "val")
    examples = build_examples(
        task, tokenizer, first_problems(task, cfg.num_problems, cfg.seed), cfg
    )
    check_lengths(
        examples,
        model.cfg.max_position_embeddings,
        cfg.max_completion_length or task.max_new_tokens,
    )
    start = resume(run, model, cfg)
    logs = {}
    for step in with_progress_bar(range(start + 1, cfg.steps + 1), "sft"):
        logs = train_step(run, model, examples, step, cfg, device)
        log_and_save(run, step, logs, tokenizer, cfg)
    return finish(run, model, tokenizer, task, cfg, logs, examples)


def next_commands(cfg):
    """What to run now, with the settings that the task has for it -> [(what it gives, words)].

    A base that seldom succeeds has a prover from outside; else Best-of-K of the base is the prover
    (--prover-k among the task's settings)."""
    task = task_class(cfg.task)
    run = cfg.run_dir
    commands = [
        (
            "how often it is right on test problems",
            ["-m", "report.evaluate", "--model", run],
        )
    ]
    pav = ["pav.py", "--policy", run, "--run-dir", f"{run}_verifier"]
    if task.main_prover() == "prover":
        strength = f"--strength={task.strengths['prover']:g}"
        clone = ["train_sft.py", strength, "--run-dir", f"{run}_prover"]
        clone += stage_words(cfg, task.stages["sft"])
        commands.append(("a prover, the clone of a better demonstrator", clone))
        pav += ["--prover", f"{run}_prover"]
    pav += stage_words(cfg, task.stages["verifier"])
    return [*commands, ("a verifier of its steps", pav)]


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    cfg = prepare(cfg, "sft", argv, cfg.model)
    summary = train(cfg)
    print_next_command(cfg, *next_commands(cfg))
    return summary


if __name__ == "__main__":
    script(main)
