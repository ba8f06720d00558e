"""Reinforcement learning with outcome rewards and process rewards, one readable loop.

    python train_rl.py --reward pav                       # everything from nothing: 2 minutes on 2 cores
    python train_rl.py --reward pav --model smollm2 --task jsonl --data mawps.jsonl      # open weights
    python train_rl.py --reward mrt --task probe          # progress of the answer one could give now: mrt.py

The gradient (PAV, Setlur et al. 2024, eq. 5), for step h of a sampled solution:

    sum_h grad log pi(a_h|s_h) * ( Q^pi(s_h,a_h) + alpha * A^mu(s_h,a_h) )

Q^pi is the outcome of the sample itself minus the mean outcome of its group (same prompt). A^mu is the
verifier's progress over that one step. The bonus is paid to the tokens of its own step and to no other:
summed to the right it would telescope into a baseline, sum_h A^mu = V(end) - V(prompt), and nothing
would be left of it (methods: immediate reward, discount 0).

What is left out: a value network (the group mean is the baseline), PPO epochs by default (one step per
batch, so the ratio is 1 and the clip idle; --num-iterations brings both back), length normalisation.

Without --run-dir's earlier stages the script builds them first (train_sft.py, pav.py) and says so.
"""

import copy
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from infra import parallel
from engines import server as remote
from infra.cli import RunConfig, UserError, opt, parse, say_next, script
from infra.optimizer import optimizer_for
from infra.runs import (
    Laps,
    Metrics,
    derive,
    latest_checkpoint,
    load_state,
    mean,
    open_run,
    progress,
    read_metrics,
    require_finite,
    save_checkpoint,
    setup,
    shuffled,
    spare_threads,
    write_json,
)
from labels import boundaries
from model import load_model, load_weights, shared_prefixes, token_logprobs, token_loss, write_model
from papers.mrt import MRTFlags, meta_values
from pav import guarded_values, load_verifier, step_values
from sample import generate
from tasks.files import get_task
from report.show import keep_solutions


@dataclass
class Config(MRTFlags, remote.RolloutFlags, RunConfig):
    reward: str = opt("pav", "outcome: the grader; orm: the verifier's score of the whole; q: grader + alpha*Q; pav: "
                      "grader + alpha*A; mrt: A of the policy told to answer now", "reward",
                      choices=["outcome", "orm", "q", "pav", "mrt"])
    policy: str = opt("", "folder of the initial policy (default: built by train_sft.py)", "reward")
    verifier: str = opt("", "folder of the verifier (default: built by pav.py)", "reward")
    model: str = opt("", "open weights to start the whole pipeline from: a folder or smollm2 (default: tiny)", "reward")
    alpha: float = opt(1.0, "weight of the process reward; 0 is the outcome run, bit for bit", "reward", low=0)
    length_penalty: float = opt(0.0, "a right solution of n tokens earns 1 - this * n / limit", "reward", low=0, high=1)
    anchor: bool = opt(True, "the value of the finished solution is its true outcome: the last step cannot be faked", "guards")
    gate: str = opt("none", "pay no bonus from the first illegal step on (legal), or only to right solutions (outcome)",
                    "guards", choices=["none", "legal", "outcome"])
    center_bonus: bool = opt(True, "subtract the batch's mean bonus at the same step index (others' samples only)", "guards")
    credit: str = opt("step", "a step's bonus goes to its own tokens (step), or also to all before it (return-to-go: a control)",
                      "guards", choices=["step", "return-to-go"])
    constant_value: bool = opt(False, "control: a verifier that says the same everywhere, with the same guards", "guards")
    num_prompts: int = opt(16, "prompts a step (P)", "optimization", low=1)
    num_generations: int = opt(8, "samples a prompt (G)", "optimization", low=2)
    steps: int = opt(200, "optimizer steps (batches of rollouts)", "optimization", low=1)
    learning_rate: float = opt(1e-3, "of Adam, constant after --warmup-steps", "optimization", above=0)
    adam_epsilon: float = opt(1e-8, "Adam's: gradients far below it take no step; smaller noise is blown up to a full one",
                              "optimization", above=0)
    warmup_steps: int = opt(0, "linear warm-up", "optimization", low=0)
    temperature: float = opt(1.0, "of the policy, in the sampler and in the loss", "optimization", above=0)
    loss_type: str = opt("dapo", "one weight per token (dapo), per solution (grpo), or per token by a constant (dr_grpo)",
                         "optimization", choices=["dapo", "grpo", "dr_grpo"])
    scale_rewards: str = opt("none", "divide outcome advantages by the group's std (group) or not", "optimization",
                             choices=["none", "group"])
    num_iterations: int = opt(1, "optimizer steps on the same rollouts", "optimization", low=1)
    epsilon: float = opt(0.2, "clip range of the ratio; idle when --num-iterations is 1", "optimization", above=0)
    epsilon_high: float = opt(0.28, "its upper side (clip-higher)", "optimization", above=0)
    entropy_coef: float = opt(0.0, "entropy bonus per token", "optimization", low=0)
    beta: float = opt(0.0, "KL coefficient to the initial policy", "optimization", low=0)
    kl_estimator: str = opt("k2", "k2: in the loss; k1: in the outcome reward (k1 in a loss has no gradient)", "optimization",
                            choices=["k1", "k2"])
    max_grad_norm: float = opt(1.0, "gradient clipping by global norm", "optimization", above=0)
    micro_batch_size: int = opt(0, "sequences a backward pass, to save memory (0: all)", "optimization", low=0)
    slots: int = opt(512, "sequences decoded at once", "optimization", low=1)
    eval_steps: int = opt(10, "steps between evaluations", "evaluation", low=1)
    eval_problems: int = opt(512, "problems of an evaluation (one sample each, temperature as above)", "evaluation", low=1)
    eval_split: str = opt("val", "whose problems; test only for the numbers you report", "evaluation", choices=["val", "test"])
    save_steps: int = opt(50, "steps between checkpoints", "evaluation", low=1)
    arms: list = opt(["outcome"], "other arms to run beside --reward for comparison", "pipeline",
                     choices=["outcome", "outcome-long", "constant", "base-prover", "strong-prover", "orm", "q"])
    seeds: int = opt(1, "repeat the whole pipeline with this many seeds", "pipeline", low=1)
    workers: int = opt(0, "jobs side by side (0: one per core for the tiny models, else one)", "pipeline", low=0)
    stage_flags: str = opt("", "JSON of flags for the stages, e.g. '{\"sft\": {\"steps\": 100}}'", "pipeline")


# ----------------------------------------------------------------------------------------------------
# Rewards -> advantages. Pure functions, tensors in, tensors out.


def outcome_advantage(reward, scale="none"):
    """Group baseline. reward [P,G] -> [P,G]: minus the group's mean; "group" also divides by its std
    (floored at 1e-3: a group that agrees must not explode). A group that agrees gives exactly 0."""
    centred = reward - reward[:, :1]  # first, since the mean of three times 0.7 is not 0.7 in float32
    centred = centred - centred.mean(1, keepdim=True)
    return centred / reward.std(1, keepdim=True).clamp(min=1e-3) if scale == "group" else centred


def step_bonus(values, reward):
    """Values V [B,S+1] at the prompt and after each step -> bonus [B,S]: pav, mrt: progress V_h - V_{h-1};
    "q": V_h itself, which pays for standing in a good place, again at every step (kept to show it break)."""
    return values[:, 1:] - values[:, :-1] if reward in ("pav", "mrt") else values[:, 1:]


def spread_credit(bonus, credit):
    """bonus [B,S] -> [B,S]. "step": as it is, discount 0. "return-to-go": each step gets its own and all later bonuses;
    of progress that is V(end) - V_{h-1}, a baseline for the outcome and no more (kept to show it break)."""
    return bonus if credit == "step" else bonus.flip(1).cumsum(1).flip(1)


def center_by_step(bonus, real):
    """Subtract the mean bonus of the other samples at the same step index. bonus [B,S], real [B,S] bool
    (steps that exist). The mean leaves the sample itself out, so it is a baseline and adds no bias."""
    bonus = bonus * real
    n = real.sum(0, keepdim=True)
    others = (bonus.sum(0, keepdim=True) - bonus) / (n - 1).clamp(min=1)
    return torch.where(real & (n > 1), bonus - others, bonus)


def credit_tokens(per_step, ends, T):
    """A number per step -> the same number on each token of that step, 0 elsewhere.

    per_step [B,S], ends [B,S+1] exclusive token ends (column 0: prompt length) -> [B,T].
    """
    t = torch.arange(T).expand(len(ends), T).contiguous()
    step = torch.searchsorted(ends[:, 1:].contiguous(), t, right=True)  # (B, T): ends at or before t
    inside = (t >= ends[:, :1]) & (t < ends[:, -1:])
    return per_step.gather(1, step.clamp(max=per_step.shape[1] - 1)) * inside


def token_weights(mask, loss_type, max_completion_length):
    """Weight of each token in the batch's loss, [B,T], made once from the whole batch: micro-batches and
    processes then only add up. dapo: 1/tokens; grpo: 1/(B * own length); dr_grpo: 1/(B * limit)."""
    B, n = len(mask), mask.sum(1, keepdim=True).clamp(min=1)
    if loss_type == "dapo":
        return mask / mask.sum()
    return mask / (B * n) if loss_type == "grpo" else mask / (B * max_completion_length)


def policy_loss(logprob, old_logprob, advantage, weight, low, high):
    """Clipped surrogate (PPO; with one iteration plain REINFORCE: ratio 1, gradient A * grad log pi).

    All [N]. Returns the summed loss and the share of weight that the clip silenced.
    """
    ratio = (logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.min(ratio * advantage, clipped * advantage)
    silenced = ((ratio != clipped) & (clipped * advantage < ratio * advantage)).float()
    return (loss * weight).sum(), (silenced * weight).sum()


def k2_loss(logprob, ref_logprob, weight):
    """(log pi - log ref)^2 / 2 on samples from pi: its gradient is that of KL(pi||ref); k1's would be zero."""
    return ((logprob - ref_logprob).square() / 2 * weight).sum()


def advantages(cfg, task, problems, rollouts, tokenizer, verifier, kl=None, laps=None):
    """One batch of rollouts -> advantage per token [B,T] and what to log. Rows b*G..b*G+G-1 share a prompt."""
    laps = laps or Laps()
    outcome = torch.tensor([task.grade(p, tokenizer.decode(ids)) for p, ids in zip(problems, rollouts.completions())])
    laps.lap("grade")
    mask, G = rollouts.mask(), cfg.num_generations
    logs = {"rewards/outcome/mean": float(outcome.mean())}
    limit = cfg.max_completion_length or task.max_new_tokens
    reward, per_step = outcome * (1 - cfg.length_penalty * mask.sum(1) / limit), None
    if verifier is not None:
        if cfg.reward == "mrt":
            ends, values, logs["mrt/sampled_tokens"] = verifier(problems, rollouts)
        else:
            ends = boundaries(task, rollouts, tokenizer)
            values = step_values(verifier, rollouts.tokens, ends)
        laps.lap("verify")
        logs["verifier/final_value"] = float(values[:, -1].mean())  # before any guard: what it believes
        if cfg.constant_value:
            values = torch.full_like(values, 0.5)
        if cfg.reward == "orm":
            reward = values[:, -1].clone()
        elif cfg.alpha > 0:
            values, pay = guarded_values(cfg, task, problems, rollouts, tokenizer, values, ends, outcome)
            real = ends[:, 1:] > ends[:, :-1]
            bonus = spread_credit(step_bonus(values, cfg.reward) * real * pay, cfg.credit)
            logs["rewards/progress/mean"] = float(bonus.sum() / real.sum())
            logs["rewards/progress/large"] = float(((bonus.abs() > 0.1) & real).sum() / real.sum())
            logs["completions/mean_steps"] = float(real.sum(1).float().mean())
            per_step = cfg.alpha * (center_by_step(bonus, real) if cfg.center_bonus else bonus)
    if kl is not None and cfg.kl_estimator == "k1":
        reward = reward - cfg.beta * kl  # (B,) sum over the completion of log pi - log ref
    adv = outcome_advantage(reward.view(-1, G), cfg.scale_rewards).view(-1, 1) * mask
    if per_step is not None:
        adv = adv + credit_tokens(per_step, ends, mask.shape[1])
    groups = outcome.view(-1, G)
    logs |= {"reward": float(reward.mean()), "reward_std": float(groups.std(1).mean()),
             "frac_reward_zero_std": float((groups.std(1) == 0).float().mean())}
    return adv, logs


# ----------------------------------------------------------------------------------------------------
# One update.


def update(model, reference, optimizer, params, rollouts, adv, cfg, limit, device, laps=None):
    """num_iterations optimizer steps on one batch of rollouts. Returns what to log."""
    laps = laps or Laps()
    mask = rollouts.mask()
    weight = token_weights(mask, cfg.loss_type, limit)
    rows = torch.tensor(parallel.share(len(mask)))  # in order: samples of a prompt share a micro-batch, and what they begin with
    size = cfg.micro_batch_size or len(rows)
    old = {}  # the policy's own log-probs before the first step, per micro-batch
    logs, parts = {}, []  # parts: the policy's loss and what the clip silenced, of every chunk of tokens

    def loss_fn(logprob, entropy, advantage, w, old_logprob, ref_logprob):  # [n] each; a sum over the n tokens of a chunk
        old_logprob = logprob.detach() if old_logprob is None else old_logprob  # first iteration: the ratio is 1
        loss, clip = policy_loss(logprob, old_logprob, advantage, w, cfg.epsilon, cfg.epsilon_high)
        parts.append(torch.stack([loss.detach(), clip]))
        if cfg.entropy_coef:
            loss = loss - cfg.entropy_coef * (entropy * w).sum()
        if ref_logprob is not None and cfg.kl_estimator == "k2":
            loss = loss + cfg.beta * k2_loss(logprob, ref_logprob, w)
        return loss

    for iteration in range(cfg.num_iterations):
        parts.clear()
        total = dict(entropy=0.0, kl=0.0, diff_mean=0.0, diff_max=0.0, ratio_max=0.0)
        for i in range(0, len(rows), size):
            b = rows[i : i + size]
            T = int(rollouts.length[b].max())
            m = mask[b, :T]
            share = shared_prefixes(rollouts.tokens[b, : T - 1], rollouts.length[b] - 1, device)
            tokens, targets = rollouts.tokens[b, :T].to(device), m.to(device)
            w, a, ref_logprob = weight[b, :T][m].to(device), adv[b, :T][m].to(device), None
            if reference is not None:
                with torch.no_grad():
                    ref_logprob, _ = token_logprobs(reference, tokens, targets, cfg.temperature, share)
            loss, logprob, entropy = token_loss(model, tokens, targets, cfg.temperature, loss_fn, a, w, old.get(i), ref_logprob,
                                                share=share)
            laps.lap("logprob")  # and the head's share of the gradient
            parallel.backward(loss, model)
            laps.lap("backward")
            old.setdefault(i, logprob)
            gap = (logprob.cpu() - rollouts.logprob[b, :T][m]).abs()
            total["diff_mean"] += float(gap.sum() / mask.sum())
            total["diff_max"] = max(total["diff_max"], float(gap.max()))
            total["ratio_max"] = max(total["ratio_max"], float((logprob - old[i]).exp().max()))
            total["entropy"] += (entropy * w).sum().item() / weight.sum().item()
            if reference is not None:
                total["kl"] += ((logprob - ref_logprob) * w).sum().item()
        total["policy_loss"], total["clip"] = torch.stack(parts).sum(0).tolist()
        total = parallel.summed(total, maxima=("diff_max", "ratio_max"))
        parallel.sum_gradients(params)
        grad_norm = parallel.clip(params, cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        laps.lap("update")
        if iteration == 0:  # the sampler's and the trainer's view of the same policy
            logs = {"sampling/sampling_logp_difference/mean": total["diff_mean"],
                    "sampling/sampling_logp_difference/max": total["diff_max"],
                    "ratio/first_max": total["ratio_max"], "entropy": total["entropy"]}
    extra = {"kl": total["kl"]} if reference is not None else {}
    return logs | extra | {"policy_loss": total["policy_loss"], "grad_norm": grad_norm,
                           "clip_ratio/region_mean": total["clip"]}


@torch.no_grad()
def completion_kl(model, reference, rollouts, cfg, device):
    """[B] sum over the completion of log pi - log ref (k1), for the reward."""
    mask = rollouts.mask()
    tokens, targets = rollouts.tokens.to(device), mask.to(device)
    share, gap = shared_prefixes(rollouts.tokens[:, :-1], rollouts.length - 1, device), torch.zeros(mask.shape)
    gap[mask] = (token_logprobs(model, tokens, targets, cfg.temperature, share)[0]
                 - token_logprobs(reference, tokens, targets, cfg.temperature, share)[0]).cpu()
    return gap.sum(1)


def evaluate(model, tokenizer, task, verifier, cfg, limit, keep=None):
    """Sampled accuracy on held-out problems, and what the verifier believes of the same solutions; some go to file `keep`."""
    problems = task.problems(cfg.eval_split, cfg.eval_problems, 0)
    problems = (problems * (1 + cfg.eval_problems // len(problems)))[: cfg.eval_problems]
    rolled = generate(model, [task.prompt_tokens(p, tokenizer) for p in problems], max_new_tokens=limit,
                      temperature=cfg.temperature, seed=derive(0, "evaluation"), stop_ids=tokenizer.eos_ids, slots=cfg.slots)
    right = [task.grade(p, tokenizer.decode(ids)) for p, ids in zip(problems, rolled.completions())]
    logs = {"eval/accuracy": mean(right)}
    if verifier is not None:
        ends = boundaries(task, rolled, tokenizer)
        values = step_values(verifier, rolled.tokens, ends)
        logs["eval/verifier_score"] = float(values[:, -1].mean())
        if keep is not None:
            keep_solutions(keep, tokenizer, problems, rolled, right, values, ends)
    return logs


def pick_problems(problems, step, cfg):
    """P problems for 1-based step, every epoch in its own order."""
    out = []
    for i in range((step - 1) * cfg.num_prompts, step * cfg.num_prompts):
        epoch, at = divmod(i, len(problems))
        out.append(problems[shuffled(len(problems), cfg.seed, "rl epoch", epoch)[at]])
    return out


def train(cfg, verifier=None):
    """One arm: load policy and verifier, loop, leave metrics.jsonl and a checkpoint. Resumes by itself.
    verifier: used instead of the one in the folder --verifier (experiments/provers.py gives exact values)."""
    device, run = setup(cfg.device, cfg.threads), Path(cfg.run_dir)
    task = get_task(cfg)
    if cfg.num_prompts * cfg.num_generations % parallel.size():
        raise UserError(f"--num-prompts x --num-generations must be a multiple of the {parallel.size()} processes")
    lock = open_run(run, cfg, ignore=("run_dir", "device", "arms", "seeds", "workers", "stage_flags", "rollout_url"))  # noqa: F841
    if (run / "summary.json").exists():
        print(f"{run} is complete")
        return json.loads((run / "summary.json").read_text())
    model, tokenizer = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    spare_threads(model, cfg.threads)
    if verifier is None and cfg.verifier:
        verifier = load_verifier(cfg.verifier, tokenizer, device)
    if verifier is None and cfg.reward not in ("outcome", "mrt"):
        raise UserError(f"--reward {cfg.reward} needs --verifier (pav.py trains one)")
    reference = copy.deepcopy(model).requires_grad_(False) if cfg.beta > 0 else None
    start, tokens_seen, spent = 0, 0, 0.0
    if folder := latest_checkpoint(run):
        load_weights(model, folder)
    if cfg.shard:
        parallel.shard(model)
    params = list(model.parameters())
    optimizer = optimizer_for(torch.optim.Adam, params, lr=cfg.learning_rate, betas=(0.9, 0.99), eps=cfg.adam_epsilon, fused=True)
    if folder:
        state = load_state(folder, optimizer, params)
        start, tokens_seen, spent = state["step"], state["tokens"], state["seconds"]
        print(f"resuming {run} at step {start}")
    metrics, clock = Metrics(run, start or -1, cfg.tensorboard), time.time() - spent  # -1: the row of step 0 is written again
    limit = cfg.max_completion_length or task.max_new_tokens
    train_problems = task.problems("train", None, 0)
    B, G = cfg.num_prompts * cfg.num_generations, cfg.num_generations
    complete = remote.connect(cfg, tokenizer) if cfg.rollout_url else generate  # the rollouts; evaluate() is always local
    scorer = verifier if cfg.reward not in ("outcome", "mrt") else None  # the outcome arm sees the verifier in evaluations only
    if start == 0:
        first = evaluate(model, tokenizer, task, verifier, cfg, limit, run / "solutions_start.jsonl")
        metrics.write(0, num_tokens=0, episodes=0, **first)

    for step in progress(range(start + 1, cfg.steps + 1), f"rl {cfg.reward}"):
        laps = Laps("generate", "grade", "verify", "logprob", "backward", "update", "evaluate")
        # 1. P prompts x G samples; the ids make the draws new at every step.
        picked = pick_problems(train_problems, step, cfg)
        problems, prompts = [p for p in picked for _ in range(G)], [task.prompt_tokens(p, tokenizer) for p in picked]
        rollouts = complete(model, [p for p in prompts for _ in range(G)], max_new_tokens=limit,
                            temperature=cfg.temperature, seed=derive(cfg.seed, "rl"), stop_ids=tokenizer.eos_ids,
                            sequence_ids=range((step - 1) * B, step * B), slots=cfg.slots)
        laps.lap("generate")
        # 2. Rewards, and from them one advantage per token.
        sequence_kl = completion_kl(model, reference, rollouts, cfg, device) if reference and cfg.kl_estimator == "k1" else None
        laps.lap("logprob")
        if cfg.reward == "mrt" and cfg.alpha > 0:
            scorer = partial(meta_values, model, tokenizer, task, cfg, step)
        adv, logs = advantages(cfg, task, problems, rollouts, tokenizer, scorer, sequence_kl, laps)
        laps.lap("other")
        # 3. The gradient.
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * min(1.0, step / max(1, cfg.warmup_steps))
        logs |= update(model, reference, optimizer, params, rollouts, adv, cfg, limit, device, laps)
        require_finite(run, step, logs["grad_norm"], dict(tokens=rollouts.tokens, prompt_len=rollouts.prompt_len,
                                                          length=rollouts.length, advantage=adv), cfg.learning_rate)
        if cfg.rollout_url:
            remote.require_agreement(cfg, step, logs["sampling/sampling_logp_difference/mean"])
        # 4. Books.
        lengths = (rollouts.length - rollouts.prompt_len).float()
        tokens_seen += int(lengths.sum())
        if step % cfg.eval_steps == 0 or step == cfg.steps:
            laps.lap("other")
            logs |= evaluate(model, tokenizer, task, verifier, cfg, limit, run / "solutions_end.jsonl")
            laps.lap("evaluate")
        laps.lap("other")
        metrics.write(step, num_tokens=tokens_seen, episodes=step * B, **logs, **{
            "completions/mean_length": float(lengths.mean()),
            "completions/clipped_ratio": mean(r == "length" for r in rollouts.finish_reason),
            "tokens_per_second": lengths.sum().item() / rollouts.seconds, "step_time": sum(laps.seconds.values()),
        }, **{f"timing/{name}": seconds for name, seconds in laps.seconds.items()})
        if step % cfg.save_steps == 0 or step == cfg.steps:
            plain = parallel.whole(model)
            save_checkpoint(run, step, lambda f, m=plain: write_model(f, m, tokenizer), optimizer, params,
                            dict(tokens=tokens_seen, seconds=time.time() - clock))
    evals = [r for r in read_metrics(run) if "eval/accuracy" in r]
    summary = dict(accuracy=evals[-1]["eval/accuracy"], num_tokens=tokens_seen, episodes=cfg.steps * B,
                   mrt_tokens=sum(r.get("mrt/sampled_tokens", 0) for r in read_metrics(run)),
                   curve_mean=mean(r["eval/accuracy"] for r in evals), seconds=round(time.time() - clock, 1))
    write_json(run / "summary.json", summary)
    print(f"{cfg.reward}: {evals[0]['eval/accuracy']:.3f} -> {summary['accuracy']:.3f} after {cfg.steps} steps, "
          f"{tokens_seen} tokens, {summary['seconds']:.0f} s -> {run}")
    return summary


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = parse(Config, argv, __doc__)
    if cfg.smoke:
        cfg.steps, cfg.eval_steps, cfg.eval_problems = min(cfg.steps, 3), 1, min(cfg.eval_problems, 32)
    if cfg.data:
        task = get_task(cfg)  # what is wrong with the files is said before any stage is built
        for split in ("train", "val", cfg.eval_split):
            task.problems(split, 1, 0)
    if cfg.policy and cfg.run_dir and (cfg.verifier or cfg.reward in ("outcome", "mrt")):
        summary = train(cfg)  # every stage is given: one arm
        say_next(cfg, ("how often it is right on test problems", ["sample.py", "--model", cfg.run_dir, "--eval"]))
        return summary
    import pipeline

    if parallel.size_asked() > 1 or cfg.rollout_url:
        raise UserError("torchrun and --rollout-url run one arm: build the stages first (the same command without them), then "
                        "give --policy, --verifier and --run-dir")
    return pipeline.run(cfg, given={a.split("=")[0][2:].replace("-", "_") for a in argv if a.startswith("--")})


if __name__ == "__main__":
    script(main)
