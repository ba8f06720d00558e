"""Supervised fine-tuning: imitate demonstrations. The first stage of everything.

    python train_sft.py --task planted --run-dir runs/sft                        # tiny model from nothing, CPU, 15 s
    python train_sft.py --task jsonl --data gsm8k_train.jsonl --model smollm2    # open weights
    python train_sft.py --task planted --rft --policy runs/sft --run-dir runs/rft    # rejection-sampling fine-tuning
    python train_sft.py --task worded --num-examples 500 --track-memorization 10  # who learns, who recites: memorization.py

The loss is the mean negative log-prob of the completion's tokens, its EOS included, the prompt's left
out. What is left out of the textbook: packing several examples into one row (rows of a micro-batch have
similar lengths instead), dropout, label smoothing.

With --task planted or countdown the demonstrations come from a scripted policy whose --strength says how
often it knows what it is doing: a weak one makes the base policy, a stronger one a prover.

With --rft the examples are a policy's own correct solutions (solutions.py), by default beside the demonstrations
of the same problems (Yuan et al. 2023, arXiv 2308.01825). Training starts from --model, the base, not from --policy.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from infra import parallel
from infra.cli import RunConfig, UserError, opt, parse, say_next, script
from infra.optimizer import optimizer_for
from infra.runs import (
    Metrics,
    derive,
    generator,
    latest_checkpoint,
    load_state,
    open_run,
    progress,
    require_finite,
    save_checkpoint,
    setup,
    shuffled,
    spare_threads,
    write_json,
)
from papers.memorization import curate, load_run, snapshot
from model import Config as ModelConfig
from model import Transformer, init_weights, load_model, load_weights, pad_right, token_loss, write_model
from sample import generate
from papers.rft import count, first_problems, keep_correct, sample_solutions
from tasks.files import get_task


@dataclass
class Config(RunConfig):
    model: str = opt("", "folder or name of the weights to start from (default: a tiny random model)", "model")
    hidden_size: int = opt(64, "width of the tiny model", "model", low=8)
    num_hidden_layers: int = opt(2, "depth of the tiny model", "model", low=1)
    num_attention_heads: int = opt(4, "heads of the tiny model", "model", low=1)
    strength: float = opt(-1.0, "demonstrator's strength (-1: the task's base strength)", "task")
    num_examples: int = opt(6000, "demonstrations (a file is used whole where it has fewer)", "task", low=1)
    num_problems: int = opt(0, "only the first so many training problems (0: all)", "task", low=0)
    rft: bool = opt(False, "train on correct solutions sampled from --policy", "rejection sampling")
    policy: str = opt("", "whose solutions: a folder that train_sft.py made", "rejection sampling")
    num_generations: int = opt(16, "solutions sampled a problem", "rejection sampling", low=1)
    rft_keep: int = opt(4, "distinct correct solutions kept a problem (0: all)", "rejection sampling", low=0)
    rft_demonstrations: bool = opt(True, "keep the demonstrations beside them", "rejection sampling")
    temperature: float = opt(1.0, "of the sampled solutions", "rejection sampling", above=0)
    slots: int = opt(512, "sequences decoded at once", "rejection sampling", low=1)
    shard_problems: int = opt(1000, "problems per file of solutions (what a kill may cost)", "rejection sampling", low=1)
    steps: int = opt(400, "optimizer steps", "optimization", low=1)
    batch_size: int = opt(128, "examples a step", "optimization", low=1)
    micro_batch_size: int = opt(0, "examples a backward pass, to save memory (0: the whole batch)", "optimization", low=0)
    learning_rate: float = opt(3e-3, "peak learning rate of AdamW", "optimization", above=0)
    warmup_steps: int = opt(20, "linear warm-up, then cosine decay to a tenth", "optimization", low=0)
    weight_decay: float = opt(0.0, "decoupled weight decay of matrices", "optimization", low=0)
    max_grad_norm: float = opt(1.0, "gradient clipping by global norm", "optimization", above=0)
    logging_steps: int = opt(20, "steps between lines of metrics.jsonl", "evaluation", low=1)
    save_steps: int = opt(200, "steps between checkpoints", "evaluation", low=1)
    eval_problems: int = opt(256, "problems for the accuracy at the end (one sample each, temperature 1)", "evaluation", low=1)
    track_memorization: int = opt(0, "snapshots over the run of each example's accuracy and likelihood (memorization.py; "
                                  "0: none)", "memorization", low=0)
    memorization_samples: int = opt(4, "samples a training and a test problem in a snapshot", "memorization", low=1)
    memorization_temperature: float = opt(0.8, "of these samples", "memorization", above=0)
    memorization_problems: int = opt(256, "test problems in a snapshot", "memorization", low=1)
    memorization_threshold: float = opt(0.1, "nats a token below which a solution counts as memorised", "memorization", above=0)
    curate: str = opt("", "a tracked run: keep its examples and fill up to --num-examples with problems like those that it "
                      "found hard", "memorization")
    curate_by: str = opt("premem", "hard is: low pre-memorization accuracy, high nll, low accuracy; iid: any", "memorization",
                         choices=["premem", "nll", "accuracy", "iid"])


def learning_rate(step, cfg):
    """Rate of 1-based step: linear warm-up, then a cosine from the peak to a tenth of it."""
    if step <= cfg.warmup_steps:
        return cfg.learning_rate * step / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.learning_rate * (0.55 + 0.45 * float(torch.cos(torch.tensor(torch.pi * done))))


def build_examples(task, tokenizer, problems, cfg):
    """[(prompt ids, completion ids)], EOS at the end where the task has one."""
    strength = cfg.strength if cfg.strength >= 0 or not task.strengths else task.strengths["base"]
    examples = []
    for i in range(cfg.num_examples):
        problem = problems[i % len(problems)]
        if i >= len(problems) and not task.random_demonstrations:
            break  # a file has one solution per problem
        text = task.demonstration(problem, strength, derive(cfg.seed, "demonstration", i))
        completion = tokenizer.encode(text)
        completion += [tokenizer.eos_ids[0]] if task.ends_with_eos else []
        examples.append((task.prompt_tokens(problem, tokenizer), completion))
    return examples


def rft_examples(task, tokenizer, problems, cfg, run, device):
    """Correct solutions of --policy, and unless told otherwise the demonstrations: [(prompt ids, completion ids)], counts."""
    if not cfg.policy:
        raise UserError("--rft needs --policy: the folder of the policy that is to be sampled (train_sft.py makes one)")
    policy, other = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    if other.fingerprint != tokenizer.fingerprint:
        raise UserError(f"--policy {cfg.policy} has another tokenizer than the model to train; its solutions are other tokens")
    spare_threads(policy, cfg.threads)
    solutions = sample_solutions(policy, tokenizer, task, problems, cfg.num_generations, cfg, run / "rollouts")
    kept = keep_correct(solutions, cfg.rft_keep)
    counts = count(solutions, kept)
    print("rft: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items()), flush=True)
    examples = build_examples(task, tokenizer, problems, cfg) if cfg.rft_demonstrations else []
    shown = {(*p, -1, *c) for p, c in examples}
    for problem, mine in zip(problems, kept):
        prompt = task.prompt_tokens(problem, tokenizer)
        examples += [(prompt, c) for c in mine if (*prompt, -1, *c) not in shown]
    if not examples:
        raise UserError("no sampled solution is right, and --no-rft-demonstrations leaves nothing to train on: raise "
                        "--num-generations, or take a better --policy")
    return examples, counts


def sft_batch(examples, device):
    """Rows of (prompt, completion) -> tokens [B,T], targets [B,T] bool (completion tokens)."""
    tokens, length = pad_right([p + c for p, c in examples])
    prompt_len = torch.tensor([len(p) for p, _ in examples])
    t = torch.arange(tokens.shape[1])
    targets = (t >= prompt_len[:, None]) & (t < length[:, None])
    return tokens.to(device), targets.to(device)


def sft_step(model, batch, cfg, device):
    """Accumulate the gradient of the batch's mean NLL. One denominator for all micro-batches and processes: the number
    of trained tokens in the whole batch, so the split does not change the gradient. Returns nll, entropy."""
    batch = sorted(batch, key=lambda e: len(e[0]) + len(e[1]))  # rows of one micro-batch have similar lengths
    total = sum(len(c) for _, c in batch)
    batch = batch[parallel.rank() :: parallel.size()]
    nll = entropy_sum = 0.0
    size = cfg.micro_batch_size or len(batch)
    for i in range(0, len(batch), size):
        tokens, targets = sft_batch(batch[i : i + size], device)
        loss, _, entropy = token_loss(model, tokens, targets, 1.0, lambda logprob, entropy: -logprob.sum() / total)
        parallel.backward(loss, model)
        nll += loss.item()
        entropy_sum += entropy.sum().item() / total
    parallel.sum_gradients(list(model.parameters()))
    return tuple(parallel.summed(dict(nll=nll, entropy=entropy_sum)).values())


def adamw(model, cfg):
    """AdamW with decay on matrices only (norm gains have no reason to shrink)."""
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() > 1], weight_decay=cfg.weight_decay),
              dict(params=[p for p in params if p.dim() == 1], weight_decay=0.0)]
    groups = [g for g in groups if g["params"]]
    return optimizer_for(torch.optim.AdamW, groups, lr=cfg.learning_rate, betas=(0.9, 0.99)), params


def start_model(cfg, task, device):
    """The model to train: open weights, or a tiny one with the task's own alphabet."""
    dtype = getattr(torch, cfg.dtype)
    if cfg.model:
        return load_model(cfg.model, device, dtype)
    tokenizer = task.tokenizer()
    if tokenizer is None:
        raise UserError(f"--task {cfg.task} has no alphabet of its own: give --model (a folder, or smollm2)")
    if cfg.hidden_size % (2 * cfg.num_attention_heads):
        raise UserError("--hidden-size must be a multiple of 2 * --num-attention-heads (rotary pairs)")
    shape = ModelConfig(
        vocab_size=tokenizer.n_vocab,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.hidden_size * 8 // 3,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_attention_heads,
        head_dim=cfg.hidden_size // cfg.num_attention_heads,
        max_position_embeddings=256,
    )
    model = init_weights(Transformer(shape), generator(cfg.seed, "init"))
    return model.to(device, dtype), tokenizer


def accuracy(model, tokenizer, task, problems, max_new_tokens, seed, temperature=1.0):
    """Share of problems solved with one sample each, and the share of samples cut off by the limit."""
    prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
    rollouts = generate(model, prompts, max_new_tokens=max_new_tokens, temperature=temperature,
                        seed=derive(seed, "evaluation"), stop_ids=tokenizer.eos_ids)
    right = [task.grade(p, tokenizer.decode(rollouts.completion(i))) for i, p in enumerate(problems)]
    clipped = sum(r == "length" for r in rollouts.finish_reason) / len(problems)
    return sum(right) / len(problems), clipped


def train(cfg):
    device = setup(cfg.device, cfg.threads)
    cfg.run_dir = cfg.run_dir or f"runs/{cfg.task}/sft"
    run = Path(cfg.run_dir)
    task = get_task(cfg)
    for split in ("train", "val"):
        task.problems(split, 1, cfg.seed)  # an empty split is said now, not after the work
    if cfg.rft and (cfg.track_memorization or cfg.curate):
        raise UserError("--track-memorization and --curate are about the task's own solutions; leave out --rft")
    if cfg.batch_size % parallel.size():
        raise UserError(f"--batch-size {cfg.batch_size} must be a multiple of the {parallel.size()} processes")
    lock = open_run(run, cfg, ignore=("run_dir", "device", "logging_steps"))  # noqa: F841 (held until the end)
    if (run / "summary.json").exists():
        print(f"{run} is complete")
        return json.loads((run / "summary.json").read_text())
    model, tokenizer = start_model(cfg, task, device)
    spare_threads(model, cfg.threads)
    start, spent = 0, 0.0
    if folder := latest_checkpoint(run):
        load_weights(model, folder)
    if cfg.shard:
        parallel.shard(model)
    optimizer, params = adamw(model, cfg)
    if folder:
        state = load_state(folder, optimizer, params)
        start, spent = state["step"], state["seconds"]
        print(f"resuming {run} at step {start}")
    metrics = Metrics(run, start, cfg.tensorboard)
    problems = curated(cfg, task) if cfg.curate else first_problems(task, cfg.num_problems, cfg.seed)
    counts = {}
    if cfg.rft:
        examples, counts = rft_examples(task, tokenizer, problems, cfg, run, device)
    else:
        examples = build_examples(task, tokenizer, problems, cfg)
    longest = max(len(p) + len(c) for p, c in examples)
    if longest > model.cfg.max_position_embeddings:
        raise UserError(f"an example has {longest} tokens, the model's context is {model.cfg.max_position_embeddings}: "
                        "shorten the data or take another model")

    snapshots = {cfg.steps * (i + 1) // cfg.track_memorization for i in range(cfg.track_memorization)}
    tracked = task.problems("test", cfg.memorization_problems, cfg.seed) if snapshots else []
    clock = time.time() - spent
    for step in progress(range(start + 1, cfg.steps + 1), "sft"):
        first = (step - 1) * cfg.batch_size
        batch = []
        for i in range(first, first + cfg.batch_size):  # every epoch has its own order
            order = shuffled_cached(len(examples), cfg.seed, i // len(examples))
            batch.append(examples[order[i % len(examples)]])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        nll, entropy = sft_step(model, batch, cfg, device)
        grad_norm = parallel.clip(params, cfg.max_grad_norm)
        if not math.isfinite(grad_norm):
            tokens, targets = sft_batch(batch, "cpu")
            require_finite(run, step, grad_norm, dict(tokens=tokens, targets=targets), cfg.learning_rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in snapshots:
            at = snapshot(run / f"memorization/step_{step:06d}.safetensors", model, tokenizer, task, examples,
                          [problems[i % len(problems)] for i in range(len(examples))], tracked, cfg, step, device)
            print(f"  step {step}: accuracy {at['accuracy'].mean():.3f} on train, {at['test'].mean():.3f} on test, "
                  f"{(at['nll'] < cfg.memorization_threshold).mean():.3f} of the solutions memorised")
        if step % cfg.logging_steps == 0 or step == cfg.steps:
            metrics.write(step, loss=nll, entropy=entropy, grad_norm=grad_norm, learning_rate=learning_rate(step, cfg),
                          epoch=(first + cfg.batch_size) / len(examples))
        if step % cfg.save_steps == 0 or step == cfg.steps:
            plain = parallel.whole(model)
            save_checkpoint(run, step, lambda f, m=plain: write_model(f, m, tokenizer), optimizer, params,
                            dict(seconds=time.time() - clock))

    held_out = task.problems("val", cfg.eval_problems, cfg.seed)
    score, clipped = accuracy(model, tokenizer, task, held_out, cfg.max_completion_length or task.max_new_tokens, cfg.seed)
    summary = dict(loss=nll if start < cfg.steps else None, accuracy=score, clipped_ratio=clipped,
                   examples=len(examples), seconds=round(time.time() - clock, 1), **counts)
    write_json(run / "summary.json", summary)
    print(f"sft: {cfg.steps} steps on {len(examples)} examples, sampled accuracy {score:.3f} "
          f"(val, n={len(held_out)}), {summary['seconds']:.0f} s -> {run}")
    return summary


def curated(cfg, task):
    """The training problems of the run cfg.curate, then new ones like those it found hard, cfg.num_examples in all."""
    run, old = load_run(cfg.curate), json.loads((Path(cfg.curate) / "run_config.json").read_text())
    if old["task"] != cfg.task or old["seed"] != cfg.seed:
        raise UserError(f"{cfg.curate} was trained with --task {old['task']} --seed {old['seed']}; give the same here")
    n = run["accuracy"].shape[1]
    if cfg.num_examples <= n:
        raise UserError(f"{cfg.curate} has {n} examples already; give a larger --num-examples")
    problems = task.problems("train", n, cfg.seed)
    return problems + curate(run, task, problems, cfg.num_examples - n, cfg.curate_by, cfg.memorization_threshold, cfg.seed)


_orders = {}


def shuffled_cached(n, seed, epoch):
    if (n, seed, epoch) not in _orders:
        _orders.clear()
        _orders[n, seed, epoch] = shuffled(n, seed, "epoch", epoch)
    return _orders[n, seed, epoch]


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.smoke:
        cfg.steps, cfg.num_examples, cfg.eval_problems = min(cfg.steps, 20), min(cfg.num_examples, 256), 32
        cfg.num_generations = 4
    summary = train(cfg)
    say_next(cfg, ("how often it is right on test problems", ["sample.py", "--model", cfg.run_dir, "--eval"]),
             ("a verifier of its steps", ["pav.py", "--policy", cfg.run_dir]))
    return summary


if __name__ == "__main__":
    script(main)
