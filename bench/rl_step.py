"""One step of reinforcement learning: train_rl.py against trl.GRPOTrainer, seconds a step, on the CPU or a GPU.

    python -m bench.rl_step                 # tiny planted model; 2 minutes (--tiny: does it run?)
    python -m bench.rl_step --model smollm2 --threads 2 --steps 3 --warmup 1     # open weights, made-up word problems; 5 minutes
    python -m bench.rl_step --device cuda --model smollm2 --num-prompts 16 --steps 6 --warmup 2     # on a GPU, TRL without vLLM

A step is 16 prompts x 8 samples x 12 tokens from a model of width 64 with 2 layers, graded by the task, and one
optimizer step on the 128 samples: train_rl.py with --reward outcome, so no verifier on either side. Ours is
the body of train_rl.train's loop; theirs is all between two ends of a step of trainer.train(). The sides take turns: a
callback at the end of each TRL step runs one of ours. The model is train_sft.py's with the demonstrator "prover", so
that rewards within a group differ. Same on both sides: weights at the start (TRL reads the folder that model.save_model
wrote), problems, float32, threads, temperature 1 without top-k, the reward (the task's grade of the decoded completion
ids), the group's mean as baseline, loss "dapo", one iteration, beta 0, entropy bonus, clip range, Adam(0.9, 0.99) at a
constant rate, gradient clipping. Off in TRL, as it costs time: gradient checkpointing, bfloat16, logging, saving. Our
metrics and evaluations are not timed.

With --model a step is --num-prompts x 8 samples of up to --new-tokens tokens to made-up word problems of about 45 tokens, in
float32, from the model as it is; micro-batches of 8 sequences on both sides (gradient accumulation in TRL).

"products" is the time of the step's matrix products alone, on their shapes, "attention" that of its attention
(PyTorch's fused kernel, forward and backward), taken in the same run and by the CPU's clock as well as the wall's: what is left
when all else is free. largest_ratio and largest_ratio_with_attention say how large the ratio could become if each
sampled token were computed once in decoding and once in the update. Ours need not do all of that: what sequences begin with
in common, the prompt of a group first of all, is computed once in both. computed_share is what remained of the sampled
tokens, over the timed steps; it falls as the policy converges.
"cpu" is the ratio by CPU seconds of the process, which other processes disturb less.

Not compared: vLLM, for which TRL is made; transformers' continuous batching; other models and lengths: the longer
the prompt and the larger the group, the more is shared.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import train_rl
import train_sft
from bench import timing
from infra.cli import UserError, opt, parse, script
from infra.runs import mean
from infra.seeds import batch_indices, derive
from kernels.product import matmul_nt
from model import load_model, resolve, save_model
from rollouts import grades
from sample import generate
from tasks import get_task


@dataclass
class Config(timing.Flags):
    steps: int = opt(40, "timed steps of each side, for each number of threads", "timing", low=1)
    warmup: int = opt(5, "untimed steps before", "timing", low=1)
    threads: list = opt([1, 2], "CPU threads of both sides, one comparison each", "timing")
    device: str = opt("cpu", "of both sides; cuda: at the first number of threads only", "what", choices=["cpu", "cuda"])
    model: str = opt("", "open weights: a folder that both sides read, or smollm2 (default: the tiny model)", "what")
    num_prompts: int = opt(2, "prompts a step, with --model", "what", low=1)
    new_tokens: int = opt(48, "tokens of a completion, with --model", "what", low=1)
    out: str = opt("", "where the numbers go (default: bench/results/CARD/rl_step.json, or rl_step_MODEL.json)", "timing")


def starting_model(cfg, where):
    """A supervised tiny model in a plain folder that both sides read, and the task."""
    sft = train_sft.Config(seed=cfg.seed, steps=5 if cfg.tiny else 400, threads=1, run_dir=f"{where}/sft",
                           device="cpu", eval_problems=16, num_examples=512 if cfg.tiny else 6000)
    task = get_task(sft)
    sft.strength = task.strengths["prover"]
    train_sft.train(sft)
    save_model(f"{where}/model", *load_model(resolve(sft.run_dir)))
    return f"{where}/model", task


def word_problems(cfg, where):
    """Open weights as they are, and problems to ask them."""
    things, verbs = ("apples", "stamps", "marbles", "books", "pencils"), ("buys", "finds", "is given", "wins")
    rows = []
    for i in range(200):
        a, b, c, thing = 3 + 7 * i % 47, 3 + 11 * i % 47, 13 * i % 3, things[i % 5]
        text = (f"Tom has {a} {thing}. He {verbs[i % 4]} {b} more on Monday and loses {c} on Tuesday. How many {thing} does he "
                "have now?")
        rows.append(json.dumps(dict(question=text, answer=str(a + b - c))))
    (Path(where) / "problems.jsonl").write_text("\n".join(rows) + "\n")
    return str(resolve(cfg.model)), get_task("jsonl", cfg.seed, data=[f"{where}/problems.jsonl"], template="plain")


def wait(device):
    """Until the GPU has done what it was asked: a step ends when its work does."""
    if device == "cuda":
        torch.cuda.synchronize()


def picked_at(problems, step, cfg):
    """The problems of a step of train_rl.py."""
    return [problems[i] for i in batch_indices(len(problems), cfg.num_prompts, step, cfg.seed, "rl epoch")]


class Ours:
    """The body of train_rl.train's loop: step() does one step and notes what it cost."""

    def __init__(self, cfg, folder, task):
        self.task, self.problems, size = task, task.problems("train", None, 0), dict(num_prompts=2 if cfg.tiny else 16)
        if cfg.model:
            size = dict(num_prompts=cfg.num_prompts, micro_batch_size=8, learning_rate=1e-6, max_completion_length=cfg.new_tokens)
        self.cfg = train_rl.Config(reward="outcome", seed=cfg.seed, num_generations=8, **size)
        self.device = cfg.device
        self.model, self.tokenizer = load_model(folder, cfg.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.cfg.learning_rate, betas=(0.9, 0.99), fused=True)
        self.log = []  # (seconds, tokens, mean reward) of every step
        self.cpu, self.shares = [], []  # CPU seconds; distinct prefixes over tokens

    def step(self):
        start, cpu = time.perf_counter(), time.process_time()
        c, step = self.cfg, len(self.log) + 1
        limit = c.max_completion_length or self.task.max_new_tokens
        B = c.num_prompts * c.num_generations
        problems = [p for p in picked_at(self.problems, step, c) for _ in range(c.num_generations)]
        rollouts = generate(self.model, [self.task.prompt_tokens(p, self.tokenizer) for p in problems], max_new_tokens=limit,
                            temperature=c.temperature, seed=derive(c.seed, "rl"), stop_ids=self.task.stop_ids(self.tokenizer),
                            sequence_ids=range((step - 1) * B, step * B))
        adv, logs = train_rl.advantages(c, rollouts.mask(), grades(self.task, problems, rollouts, self.tokenizer))
        train_rl.update(self.model, None, self.optimizer, list(self.model.parameters()), rollouts, adv, c, limit, self.device)
        wait(self.device)
        self.log.append((time.perf_counter() - start, int(rollouts.mask().sum()), logs["reward"]))
        self.cpu.append(time.process_time() - cpu)
        rows = [(row[:a], row[a:b]) for row, a, b in zip(*(x.tolist() for x in (rollouts.tokens, rollouts.prompt_len,
                                                                                rollouts.length)))]
        prefixes = {(*prompt, *new[:n]) for prompt, new in rows for n in range(len(new))}
        self.shares.append(len(prefixes) / sum(len(new) for _, new in rows))


def grpo_config(cfg, rl, limit, where):
    """TRL's names for train_rl.py's settings."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=where, use_cpu=cfg.device == "cpu", bf16=False, gradient_checkpointing=False, seed=cfg.seed, top_k=0,
        max_steps=cfg.warmup + cfg.steps, per_device_train_batch_size=rl.micro_batch_size or rl.num_prompts * rl.num_generations,
        gradient_accumulation_steps=rl.num_prompts * rl.num_generations // rl.micro_batch_size if rl.micro_batch_size else 1,
        num_generations=rl.num_generations, max_completion_length=limit, temperature=rl.temperature, num_iterations=1,
        beta=0.0, loss_type=rl.loss_type, scale_rewards="none", epsilon=rl.epsilon, epsilon_high=rl.epsilon_high,
        entropy_coef=rl.entropy_coef, learning_rate=rl.learning_rate, lr_scheduler_type="constant", weight_decay=0.0,
        adam_beta2=0.99, max_grad_norm=rl.max_grad_norm, report_to="none", logging_strategy="no", save_strategy="no",
        disable_tqdm=True)


def run_theirs(cfg, folder, ours, where):
    """trainer.train() with one step of ours after each of its own. -> (seconds, tokens, mean reward) of every step, and
    the CPU seconds."""
    import datasets
    import transformers
    from trl import GRPOTrainer

    seconds, cpu, graded, by_key = [], [], [], {p.key: p for p in ours.problems}

    def reward(completion_ids, key, **_):
        right = [ours.task.grade(by_key[k], ours.tokenizer.decode(ids)) for k, ids in zip(key, completion_ids)]
        graded.append((sum(map(len, completion_ids)), mean(right)))
        return right

    class TakeTurns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *_, **__):
            wait(cfg.device)
            seconds.append(time.perf_counter() - self.start[0])
            cpu.append(time.process_time() - self.start[1])
            ours.step()
            self.on_train_begin()

    args = grpo_config(cfg, ours.cfg, ours.cfg.max_completion_length or ours.task.max_new_tokens, where)
    picked = [p for step in range(args.max_steps) for p in picked_at(ours.problems, step + 1, ours.cfg)]
    trainer = GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), reward_funcs=reward,
        args=args, train_dataset=datasets.Dataset.from_list([dict(prompt=p.prompt, key=p.key) for p in picked]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder), callbacks=[TakeTurns()])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [(s, *g) for s, g in zip(seconds, graded)], cpu


def median_of(call, seconds):
    """Medians of a call's wall and CPU seconds, over `seconds` of it (three calls at least)."""
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 3:
        start = time.perf_counter(), time.process_time()
        call()
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return [sorted(t)[len(t) // 2] for t in zip(*times)]


def products(ours, tokens):
    """A call that does the matrix products of one step with that many sampled tokens: decoding (a product a matrix and
    token position), the update's forward, and two as large in backward."""
    B = ours.cfg.num_prompts * ours.cfg.num_generations
    weights, positions = [p.detach() for p in ours.model.parameters() if p.dim() == 2], round(tokens / B)
    randn = partial(torch.randn, device=ours.device)
    x = {w: (randn(B, w.shape[1]), randn(tokens, w.shape[1]), randn(tokens, w.shape[0])) for w in weights}

    @torch.no_grad()
    def call():
        for w in weights:
            few, many, grad = x[w]
            for _ in range(positions):
                matmul_nt(few, w)
            matmul_nt(many, w), matmul_nt(grad, w.t()), matmul_nt(grad.t(), many.t())
        wait(ours.device)

    return call


def attention(ours, tokens):
    """A call that does the attention of one step: of one query over 1, 2, ... positions, and of whole sequences, forward and
    backward; every layer."""
    B, shape = ours.cfg.num_prompts * ours.cfg.num_generations, ours.model.cfg
    T = round(tokens / B)
    q, k, v = (torch.randn(B, n, T, shape.head_dim, device=ours.device, requires_grad=True)
               for n in (shape.num_attention_heads, *[shape.num_key_value_heads] * 2))
    attend = partial(F.scaled_dot_product_attention, enable_gqa=q.shape[1] != k.shape[1])

    def call():
        for _ in range(shape.num_hidden_layers):
            attend(q, k, v, is_causal=True).sum().backward()
            with torch.no_grad():
                for t in range(1, T + 1):
                    attend(q[:, :, :1], k[:, :, :t], v[:, :, :t])
        wait(ours.device)

    return call


def measure(cfg, folder, task, where):
    ours, w = Ours(cfg, folder, task), cfg.warmup
    with timing.Others() as others:
        their_log, their_cpu = run_theirs(cfg, folder, ours, where)
    logs = dict(theirs=their_log, ours=ours.log)
    result = timing.compare({side: [seconds for seconds, _, _ in log[w:]] for side, log in logs.items()}, others)
    result["cpu"] = timing.compare(dict(ours=ours.cpu[w:], theirs=their_cpu[w:]), others)
    for side, log in logs.items():
        _, tokens, reward = zip(*log)
        tokens_a_step = round(mean(tokens))
        result[side] |= dict(tokens_a_step=mean(tokens), first_reward=mean(reward[:w]), last_reward=mean(reward[-w:]))
    result["ours"]["computed_share"] = mean(ours.shares[w:])
    for name, make in (("products", products), ("attention", attention)):
        result[name], result["cpu"][name] = median_of(make(ours, tokens_a_step), 0.1 if cfg.tiny else 2)
    for r in (result, result["cpu"]):
        whole = r["theirs"]["seconds"]["median"]
        r |= dict(largest_ratio=whole / r["products"], largest_ratio_with_attention=whole / (r["products"] + r["attention"]))
    return result


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    timing.need("trl", "transformers", "datasets", "accelerate")
    if cfg.tiny:
        cfg.steps, cfg.warmup, cfg.threads = 2, 1, [1]
    if cfg.device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU here; leave it out")
        cfg.threads = cfg.threads[:1]
    with tempfile.TemporaryDirectory() as where:
        folder, task = word_problems(cfg, where) if cfg.model else starting_model(cfg, where)
        result = timing.about("bench.rl_step", argv, cfg, "trl", "transformers", "accelerate")
        timing.header("threads", "ms")
        for n in cfg.threads:
            torch.set_num_threads(n)
            result[f"threads_{n}"] = r = timing.undisturbed(cfg, lambda: measure(cfg, folder, task, where))
            timing.line(str(n), r, lambda seconds: 1000 * seconds)
            cpu = r["cpu"]
            print(f"  by CPU seconds {cpu['ratio']['median']:.2f}; at most {cpu['largest_ratio']:.2f} with products alone, "
                  f"{cpu['largest_ratio_with_attention']:.2f} with attention; {r['ours']['computed_share']:.0%} decoded")
    timing.write(cfg.out or timing.results(f"rl_step{f'_{Path(cfg.model).name}' if cfg.model else ''}", cfg.device), result)


if __name__ == "__main__":
    script(main)
