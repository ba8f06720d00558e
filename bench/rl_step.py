"""One step of reinforcement learning: train_rl.py against trl.GRPOTrainer, seconds a step on the CPU.

    python -m bench.rl_step                 # tiny planted model; about 2 minutes
    python -m bench.rl_step --tiny          # few steps: does it run?

A step is 16 prompts x 8 samples x 12 tokens from a model of width 64 with 2 layers, graded by the task, and one
optimizer step on the 128 samples: train_rl.py's defaults with --reward outcome, so no verifier on either side. Ours:
pick the problems, generate, advantages, update, as in train_rl.train. Theirs: all between two ends of a step of
trainer.train(). The model comes from train_sft.py with the demonstrator "prover", so that rewards within a group differ.

Same on both sides: the weights at the start (TRL reads the folder that model.save_model wrote), the problems, float32,
temperature 1 without top-k, the reward (the task's grade of the decoded completion ids), group-mean baseline without
division by the std, loss "dapo", one iteration, beta 0, entropy bonus, clip range, Adam(0.9, 0.99) with one constant
rate, gradient clipping, threads. What costs TRL time and is not needed is off: gradient checkpointing, bfloat16, logging,
saving, progress bar. Our metrics.jsonl, evaluations and checkpoints are not timed either. Both stop a sample at EOS,
which this model almost never draws. That both sides do the same work shows in their tokens and their rising rewards.

The sides take turns step by step: a callback at the end of each TRL step runs one step of ours. Not compared: vLLM and
GPUs, for which TRL is made; transformers' continuous batching; larger models (there see bench.generate); long prompts,
where a group shares one prefill here (the prompts of this task are one token long).
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import timing
from common import derive, mean, opt, parse, script
from model import load_model, resolve, save_model
from sample import generate


@dataclass
class Config:
    steps: int = opt(40, "timed steps of each side, for each number of threads", "timing", low=1)
    warmup: int = opt(5, "untimed steps before", "timing", low=1)
    threads: list = opt([1, 2], "CPU threads of both sides, one comparison each", "timing")
    sft_steps: int = opt(400, "supervised steps that make the model", "what", low=1)
    num_prompts: int = opt(16, "prompts a step", "what", low=1)
    wait: float = opt(0.0, "seconds to wait for a quiet machine", "timing", low=0)
    seed: int = opt(0, "fixes task, model and draws", "timing", low=0)
    tiny: bool = opt(False, "few steps, few prompts", "timing")
    out: str = opt("bench/results/rl_step.json", "where the numbers go", "timing")


def starting_model(cfg, where):
    """A supervised tiny model in a plain folder that both sides read, and the task."""
    import train_sft
    from tasks import get_task

    sft = train_sft.Config(seed=cfg.seed, steps=cfg.sft_steps, threads=1, run_dir=str(Path(where) / "sft"),
                           device="cpu", eval_problems=16, num_examples=512 if cfg.tiny else 6000)
    task = get_task(sft)
    sft.strength = task.strengths["prover"]
    train_sft.train(sft)
    save_model(Path(where) / "model", *load_model(resolve(sft.run_dir)))
    return Path(where) / "model", task


class Ours:
    """The body of train_rl.train's loop: step() does one step and notes what it cost."""

    def __init__(self, cfg, folder, task, problems):
        import train_rl

        self.rl, self.task, self.problems = train_rl, task, problems
        self.cfg = train_rl.Config(reward="outcome", seed=cfg.seed, num_prompts=cfg.num_prompts)
        self.model, self.tokenizer = load_model(folder)
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.params, lr=self.cfg.learning_rate, betas=(0.9, 0.99))
        self.seconds, self.tokens, self.rewards = [], [], []

    def step(self):
        start, c, limit = time.perf_counter(), self.cfg, self.task.max_new_tokens
        step, B, G = len(self.seconds) + 1, c.num_prompts * c.num_generations, c.num_generations
        problems = [p for p in self.rl.pick_problems(self.problems, step, c) for _ in range(G)]
        rollouts = generate(self.model, [self.task.prompt_tokens(p, self.tokenizer) for p in problems],
                            max_new_tokens=limit, temperature=c.temperature, seed=derive(c.seed, "rl"), slots=c.slots,
                            stop_ids=self.tokenizer.eos_ids, sequence_ids=range((step - 1) * B, step * B))
        adv, logs = self.rl.advantages(c, self.task, problems, rollouts, self.tokenizer, None)
        self.rl.update(self.model, None, self.optimizer, self.params, rollouts, adv, c, limit, "cpu")
        self.seconds.append(time.perf_counter() - start)
        self.tokens.append(int(rollouts.mask().sum()))
        self.rewards.append(logs["reward"])


def run_theirs(cfg, folder, ours, where):
    """trainer.train() with our settings, one step of ours after each step. -> seconds, tokens, rewards by step."""
    import datasets
    import transformers
    import trl

    seconds, tokens, rewards, rl, task = [], [], [], ours.cfg, ours.task
    by_key, steps, batch = {p.key: p for p in ours.problems}, cfg.warmup + cfg.steps, rl.num_prompts * rl.num_generations

    def reward(completion_ids, key, **_):
        right = [task.grade(by_key[k], ours.tokenizer.decode(ids)) for k, ids in zip(key, completion_ids)]
        tokens.append(sum(map(len, completion_ids)))
        rewards.append(mean(right))
        return right

    class TakeTurns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)
            ours.step()
            self.start = time.perf_counter()

    args = trl.GRPOConfig(
        output_dir=str(where), use_cpu=True, bf16=False, gradient_checkpointing=False, seed=cfg.seed, max_steps=steps,
        per_device_train_batch_size=batch, gradient_accumulation_steps=1, num_generations=rl.num_generations,
        max_completion_length=task.max_new_tokens, temperature=rl.temperature, top_k=0, top_p=1.0, num_iterations=1,
        beta=0.0, loss_type=rl.loss_type, scale_rewards="none", epsilon=rl.epsilon, epsilon_high=rl.epsilon_high,
        entropy_coef=rl.entropy_coef, learning_rate=rl.learning_rate, lr_scheduler_type="constant", weight_decay=0.0,
        adam_beta1=0.9, adam_beta2=0.99, max_grad_norm=rl.max_grad_norm, report_to="none", logging_strategy="no",
        save_strategy="no", disable_tqdm=True)
    rows = [p for step in range(1, steps + 1) for p in ours.rl.pick_problems(ours.problems, step, rl)]
    trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), reward_funcs=reward,
        args=args, train_dataset=datasets.Dataset.from_list([dict(prompt=p.prompt, key=p.key) for p in rows]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder), callbacks=[TakeTurns()]).train()
    return seconds, tokens, rewards


def measure(cfg, folder, task, threads, where):
    torch.set_num_threads(threads)
    ours = Ours(cfg, folder, task, task.problems("train", None, 0))
    with timing.Others() as others:
        seconds, tokens, rewards = run_theirs(cfg, folder, ours, where)
    w = cfg.warmup
    result = timing.compare(dict(ours=ours.seconds[w:], theirs=seconds[w:]), others)
    for side, t, r in [("ours", ours.tokens, ours.rewards), ("theirs", tokens, rewards)]:
        result[side] |= dict(tokens_a_step=mean(t), reward_first_steps=mean(r[:w]), reward_last_steps=mean(r[-w:]))
    return result


def main(argv=None):
    os.environ["HF_HUB_OFFLINE"] = "1"
    cfg = parse(Config, argv, __doc__)
    timing.need("trl", "transformers", "datasets", "accelerate")
    if cfg.tiny:
        cfg.steps, cfg.warmup, cfg.threads, cfg.sft_steps, cfg.num_prompts = 2, 1, [1], 5, 2
    with tempfile.TemporaryDirectory() as where:
        folder, task = starting_model(cfg, where)
        result = timing.about("bench.rl_step", argv, cfg, "trl", "transformers", "accelerate")
        timing.header("threads", "ms")
        for n in cfg.threads:
            result[f"threads_{n}"] = measure(cfg, folder, task, n, where)
            timing.line(str(n), result[f"threads_{n}"], lambda seconds: 1000 * seconds)
    best = [min(result[f"threads_{n}"][side]["seconds"]["median"] for n in cfg.threads) for side in ("ours", "theirs")]
    result["ratio_at_best_threads"] = round(best[1] / best[0], 2)
    print(f"each side at its better number of threads: {result['ratio_at_best_threads']}")
    timing.write(cfg.out, result)


if __name__ == "__main__":
    script(main)
