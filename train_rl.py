"""Reinforcement learning with outcome rewards and process rewards, one readable loop.

    python train_rl.py --reward pav                  # everything from nothing: 2 minutes on 2 cores
    python train_rl.py --reward pav --model smollm2 --task jsonl --data x.jsonl       # open weights
    python train_rl.py --reward pav --policy DIR --verifier DIR --run-dir runs/arm    # one arm

The gradient (PAV, Setlur et al. 2024, eq. 5), for step h of a sampled solution:

    sum_h grad log pi(a_h|s_h) * ( Q^pi(s_h,a_h) + alpha * A^mu(s_h,a_h) )

Q^pi is the outcome of the sample itself minus the mean outcome of its group (same prompt). A^mu is
the verifier's progress over that one step. The bonus is paid to the tokens of its own step and to
no other: summed to the right it would telescope into a baseline, sum_h A^mu = V(end) - V(prompt),
and nothing would be left of it (methods: immediate reward, discount 0).

What is left out: a value network (the group mean is the baseline), PPO epochs by default (one step
per batch, so the ratio is 1 and the clip idle; --num-iterations brings both back), length
normalisation, KL in the reward (k1; --beta's k2 in the loss has the gradient of KL).

Without --policy and --verifier the script builds them first (train_sft.py, pav.py: pipeline.py),
and runs --arms for comparison. Sibling: papers/mrt.py, progress of the answer that one could give
now.
"""

import copy
import sys
from dataclasses import dataclass
from functools import partial

import torch

from engines import server
from infra import parallel
from infra.cli import RunConfig, UserError, opt, parse, print_next_command, script
from infra.optimizer import optimizer_for
from infra.runs import Run, Timer, one_thread_if_tiny, require_finite, setup, with_progress_bar
from infra.seeds import batch_indices, derive
from model import load_model, load_weights, token_logprobs, token_loss, write_model
from report.arms import REWARDS
from report.watch import evaluate, mean_final_value, rollout_logs, summarize
from rollouts import first_illegal, grades, step_ends
from sample import generate
from tasks import TaskFlags, get_task, prepare
from tasks.context import leave_out_long
from verifier import load_verifier, step_values


@dataclass
class RLFlags(TaskFlags, RunConfig):
    """The flags of every RL loop (papers/mrt.py has the same optimization)."""

    policy: str = opt("", "folder of the initial policy (default: built by train_sft.py)", "reward")
    alpha: float = opt(
        1.0, "weight of the process reward; 0 is the outcome run, bit for bit", "reward", low=0
    )
    num_prompts: int = opt(16, "prompts a step (P)", "optimization", low=1)
    num_generations: int = opt(8, "samples a prompt (G)", "optimization", low=2)
    steps: int = opt(200, "optimizer steps (batches of rollouts)", "optimization", low=1)
    learning_rate: float = opt(
        1e-3, "of Adam, constant after --warmup-steps", "optimization", above=0
    )
    adam_epsilon: float = opt(
        1e-8,
        "Adam's: gradients far below it take no step; smaller noise is blown up",
        "optimization",
        above=0,
    )
    warmup_steps: int = opt(0, "linear warm-up", "optimization", low=0)
    temperature: float = opt(
        1.0, "of the policy, in the sampler and in the loss", "optimization", low=1e-6
    )
    loss_type: str = opt(
        "dapo",
        "one weight per token (dapo), per solution (grpo), or per token by a constant (dr_grpo)",
        "optimization",
        choices=["dapo", "grpo", "dr_grpo"],
    )
    scale_rewards: str = opt(
        "none",
        "divide outcome advantages by the group's std (group) or not",
        "optimization",
        choices=["none", "group"],
    )
    num_iterations: int = opt(1, "optimizer steps on the same rollouts", "optimization", low=1)
    epsilon: float = opt(
        0.2, "clip range of the ratio; idle when --num-iterations is 1", "optimization", above=0
    )
    epsilon_high: float = opt(0.28, "its upper side (clip-higher)", "optimization", above=0)
    entropy_coef: float = opt(0.0, "entropy bonus per token", "optimization", low=0)
    beta: float = opt(
        0.0, "KL coefficient to the initial policy (k2, in the loss)", "optimization", low=0
    )
    max_grad_norm: float = opt(1.0, "gradient clipping by global norm", "optimization", above=0)
    micro_batch_size: int = opt(
        0, "sequences a backward pass, to save memory (0: all)", "optimization", low=0
    )
    eval_steps: int = opt(10, "steps between evaluations", "evaluation", low=1)
    eval_problems: int = opt(
        512,
        "problems of an evaluation (one sample each, temperature as above)",
        "evaluation",
        low=1,
    )
    eval_split: str = opt(
        "val",
        "whose problems; test only for the numbers you report",
        "evaluation",
        choices=["val", "test"],
    )
    save_steps: int = opt(50, "steps between checkpoints", "evaluation", low=1)


@dataclass
class Config(server.RolloutFlags, RLFlags):
    reward: str = opt(
        "pav",
        "outcome: the grader; orm: the verifier's score of the whole; q: grader + alpha*Q; "
        "pav: grader + alpha*A; to-go: a step also earns all later bonuses (a control)",
        "reward",
        choices=[*REWARDS, "q-to-go", "pav-to-go"],
    )
    verifier: str = opt(
        "",
        "folder of the verifier (default: built by pav.py); constant: V is 0.5 everywhere",
        "reward",
    )
    guards: list = opt(
        ["anchor", "center"],
        "anchor: the finished solution's value is its true outcome; center: minus the batch's "
        "mean bonus at the same step; legal: no value from the first illegal step on; outcome: "
        "only right solutions earn a bonus",
        "reward",
        choices=["anchor", "center", "legal", "outcome"],
    )


# ------------------------------------------------------------------------------------------------
# Rewards -> advantages. Pure functions, tensors in, tensors out.


def outcome_advantage(reward, scale="none"):
    """Group baseline. reward [P,G] -> [P,G]: minus the group's mean; "group" also divides by its
    std (floored at 1e-3: a group that agrees must not explode). A group that agrees gives exactly
    0. The mean contains the sample itself, so outcomes come in (1 - 1/G) times and a bonus that is
    not centred so weighs G/(G-1) times as much."""
    # Minus the first, since the mean of three times 0.7 is not 0.7 in float32.
    centred = reward - reward[:, :1]
    centred = centred - centred.mean(1, keepdim=True)
    return centred / reward.std(1, keepdim=True).clamp(min=1e-3) if scale == "group" else centred


def step_bonus(values, reward):
    """Values V [B,S+1] at the prompt and after each step -> bonus [B,S]. pav: progress V_h -
    V_{h-1}; q: V_h itself, which pays for standing in a good place, again at every step (kept to
    show it break)."""
    return values[:, 1:] if reward.startswith("q") else values[:, 1:] - values[:, :-1]


def spread_credit(bonus, reward):
    """bonus [B,S] -> [B,S]: as it is (discount 0); with -to-go each step gets its own and all later
    bonuses. Of progress that is V(end) - V_{h-1}, a baseline for the outcome and no more (kept to
    show it break)."""
    return bonus.flip(1).cumsum(1).flip(1) if reward.endswith("-to-go") else bonus


def center_by_step(bonus, real):
    """Subtract the mean bonus of the other samples at the same step index. bonus [B,S], real [B,S]
    bool (steps that exist). The mean leaves the sample itself out, so it is a baseline and adds no
    bias."""
    bonus = bonus * real
    n = real.sum(0, keepdim=True)
    others = (bonus.sum(0, keepdim=True) - bonus) / (n - 1).clamp(min=1)
    return torch.where(real & (n > 1), bonus - others, bonus)


def process_bonus(cfg, values, ends, outcome, illegal):
    """Values V [B,S+1] -> the weighted, guarded, centred bonus of each step [B,S], and what to log.

    ends [B,S+1], outcome [B], illegal [B] (index of the first illegal step; S or more where there
    is none). The guards are those of --guards; an illegal step is fined the value that it lost.
    """
    real = ends[:, 1:] > ends[:, :-1]  # (B, S): steps that exist; padding repeats the last end
    column = torch.arange(values.shape[1])
    if "anchor" in cfg.guards:
        values = torch.where(column >= real.sum(1, keepdim=True), outcome[:, None], values)
    if "legal" in cfg.guards:
        values = torch.where(column > illegal[:, None], 0.0, values)
    bonus = step_bonus(values, cfg.reward) * real
    if "outcome" in cfg.guards:
        bonus = bonus * outcome[:, None]
    bonus = spread_credit(bonus, cfg.reward)
    logs = {
        "rewards/progress/mean": float(bonus.sum() / real.sum()),
        "rewards/progress/large": float(((bonus.abs() > 0.1) & real).sum() / real.sum()),
        "completions/mean_steps": float(real.sum(1).float().mean()),
    }
    return cfg.alpha * (center_by_step(bonus, real) if "center" in cfg.guards else bonus), logs


def credit_tokens(per_step, ends, T):
    """A number per step -> the same number on each token of that step, 0 elsewhere.

    per_step [B,S], ends [B,S+1] exclusive token ends (column 0: prompt length) -> [B,T].
    """
    t = torch.arange(T).expand(len(ends), T).contiguous()
    # The step of token t is the number of ends at or before it, [B,T].
    step = torch.searchsorted(ends[:, 1:].contiguous(), t, right=True)
    inside = (t >= ends[:, :1]) & (t < ends[:, -1:])
    return per_step.gather(1, step.clamp(max=per_step.shape[1] - 1)) * inside


def advantages(cfg, mask, outcome, ends=None, values=None, illegal=None):
    """Tensors of one batch -> advantage per token [B,T], and what to log. Rows b*G..b*G+G-1 share a
    prompt.

    mask [B,T] bool (completion tokens), outcome [B]; ends, values [B,S+1] of the steps (None: the
    outcome alone), illegal [B] for the guard of that name.
    """
    reward = outcome
    per_step = None
    logs = {"rewards/outcome/mean": float(outcome.mean())}
    if values is not None and cfg.reward == "orm":
        reward = values[:, -1]
    elif values is not None and cfg.alpha > 0:
        per_step, progress_logs = process_bonus(cfg, values, ends, outcome, illegal)
        logs |= progress_logs
    grouped = reward.view(-1, cfg.num_generations)
    adv = outcome_advantage(grouped, cfg.scale_rewards).view(-1, 1) * mask
    if per_step is not None:
        adv = adv + credit_tokens(per_step, ends, mask.shape[1])
    spread = outcome.view_as(grouped).std(1)
    return adv, logs | {
        "reward": float(reward.mean()),
        "reward_std": float(spread.mean()),
        "frac_reward_zero_std": float((spread == 0).float().mean()),
    }


# ------------------------------------------------------------------------------------------------
# Advantages -> loss, and one update.


def token_weights(mask, loss_type, max_completion_length):
    """Weight of each token in the batch's loss, [B,T], made once from the whole batch:
    micro-batches and processes then only add up. dapo: 1/tokens; grpo: 1/(B * own length); dr_grpo:
    1/(B * limit)."""
    if loss_type == "dapo":
        return mask / mask.sum()
    if loss_type == "grpo":
        return mask / (len(mask) * mask.sum(1, keepdim=True).clamp(min=1))
    return mask / (len(mask) * max_completion_length)


def policy_loss(logprob, old_logprob, advantage, weight, low, high):
    """Clipped surrogate (PPO; with one iteration plain REINFORCE: ratio 1, gradient A * grad log
    pi).

    All [N]. Returns the summed loss and the share of weight that the clip silenced.
    """
    ratio = (logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.min(ratio * advantage, clipped * advantage)
    silenced = ((ratio != clipped) & (clipped * advantage < ratio * advantage)).float()
    return (loss * weight).sum(), (silenced * weight).sum()


def k2_loss(logprob, ref_logprob, weight):
    """(log pi - log ref)^2 / 2 on samples from pi: its gradient is that of KL(pi||ref); k1's would
    be zero."""
    return ((logprob - ref_logprob).square() / 2 * weight).sum()


def update(model, reference, optimizer, params, rollouts, adv, cfg, limit, device, timer=None):
    """num_iterations optimizer steps on one batch of rollouts. adv [B,T]; reference: a frozen model
    or None; limit: tokens a completion may have. Returns what to log."""
    timer = timer or Timer()
    mask = rollouts.mask()
    weight = token_weights(mask, cfg.loss_type, limit)
    # In order: samples of a prompt share a micro-batch.
    rows = torch.tensor(parallel.share(len(mask)))
    size = cfg.micro_batch_size or len(rows)
    first_logprob = {}  # the policy's log-probs before the first optimizer step, per micro-batch
    parts = []  # the policy's loss and what the clip silenced, of every chunk of tokens

    def loss_fn(logprob, entropy, advantage, w, old_logprob, ref_logprob):
        """[n] each -> the loss of a chunk of tokens, a sum."""
        if old_logprob is None:  # the ratio is 1 at first
            old_logprob = logprob.detach()
        loss, clip = policy_loss(logprob, old_logprob, advantage, w, cfg.epsilon, cfg.epsilon_high)
        parts.append(torch.stack([loss.detach(), clip]))
        if cfg.entropy_coef:
            loss = loss - cfg.entropy_coef * (entropy * w).sum()
        if ref_logprob is not None:
            loss = loss + cfg.beta * k2_loss(logprob, ref_logprob, w)
        return loss

    for iteration in range(cfg.num_iterations):
        parts.clear()
        total = dict.fromkeys(("entropy", "kl", "diff_mean", "diff_max", "ratio_max"), 0.0)
        for i in range(0, len(rows), size):
            b = rows[i : i + size]
            length = rollouts.length[b]
            m = mask[b, : length.max()]
            T = m.shape[1]
            tokens = rollouts.tokens[b, :T].to(device)
            targets = m.to(device)
            w = weight[b, :T][m].to(device)
            a = adv[b, :T][m].to(device)
            ref_logprob = None
            if reference is not None:
                with torch.no_grad():
                    ref_logprob, _ = token_logprobs(
                        reference, tokens, targets, cfg.temperature, length
                    )
            loss, logprob, entropy = token_loss(
                model,
                tokens,
                targets,
                cfg.temperature,
                loss_fn,
                a,
                w,
                first_logprob.get(i),
                ref_logprob,
                length=length
            )
            timer.mark("logprob")  # and the head's share of the gradient
            parallel.backward(loss, model)
            timer.mark("backward")
            first_logprob.setdefault(i, logprob)
            gap = (logprob.cpu() - rollouts.logprob[b, :T][m]).abs()
            total["diff_mean"] += float(gap.sum() / mask.sum())
            total["diff_max"] = max(total["diff_max"], float(gap.max()))
            total["ratio_max"] = max(
                total["ratio_max"], float((logprob - first_logprob[i]).exp().max())
            )
            total["entropy"] += (entropy * w).sum().item() / weight.sum().item()
            if reference is not None:
                total["kl"] += ((logprob - ref_logprob) * w).sum().item()
        total["policy_loss"], total["clip"] = torch.stack(parts).sum(0).tolist()
        total = parallel.summed(total, maxima=("diff_max", "ratio_max"))
        parallel.sum_gradients(params)
        grad_norm = parallel.clip(params, cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        timer.mark("update")
        if iteration == 0:  # the sampler's and the trainer's view of the same policy
            logs = {
                "sampling/sampling_logp_difference/mean": total["diff_mean"],
                "sampling/sampling_logp_difference/max": total["diff_max"],
                "ratio/first_max": total["ratio_max"],
                "entropy": total["entropy"],
            }
    if reference is not None:
        logs["kl"] = total["kl"]
    return logs | {
        "policy_loss": total["policy_loss"],
        "grad_norm": grad_norm,
        "clip_ratio/region_mean": total["clip"]
    }


# ------------------------------------------------------------------------------------------------
# The loop, and its parts.


def value_steps(cfg, verifier, task, problems, rollouts, tokenizer):
    """Step ends [B,S+1], V^mu there [B,S+1], first illegal step [B] (each None where the reward
    needs none)."""
    if cfg.reward == "outcome":
        return None, None, None
    ends = step_ends(task, rollouts, tokenizer, credit=True)
    if cfg.verifier == "constant":
        values = torch.full(ends.shape, 0.5)
    else:
        values = step_values(verifier, rollouts.tokens, ends)
    if "legal" not in cfg.guards:
        return ends, values, None
    return ends, values, first_illegal(task, problems, rollouts, tokenizer, ends.shape[1])


def check(cfg):
    """UserError: what cannot work, before any weights are read."""
    if cfg.num_prompts * cfg.num_generations % parallel.size():
        raise UserError(
            f"--num-prompts x --num-generations: no multiple of the {parallel.size()} processes"
        )
    if cfg.reward != "outcome" and not cfg.verifier:
        raise UserError(f"--reward {cfg.reward} needs --verifier (pav.py trains one)")


def make_adam(params, cfg):
    return optimizer_for(
        torch.optim.Adam,
        params,
        lr=cfg.learning_rate,
        betas=(0.9, 0.99),
        eps=cfg.adam_epsilon,
        fused=True,
    )


def train(cfg, verifier=None):
    """One arm: load policy and verifier, loop, leave metrics.jsonl and a checkpoint. Resumes by
    itself. -> summary. verifier: used instead of the one in the folder --verifier (experiments give
    exact values)."""
    device = setup(cfg.device, cfg.threads)
    task = get_task(cfg)
    if verifier is None:
        check(cfg)
    run = Run(cfg, ignore=("run_dir", "device", "rollout_url"))
    if run.summary:
        return run.summary
    model, tokenizer = load_model(cfg.policy, device, getattr(torch, cfg.dtype))
    one_thread_if_tiny(model, cfg.threads)
    leave_out_long(task, tokenizer, model, "train", cfg.eval_split)
    if verifier is None and cfg.verifier not in ("", "constant"):
        verifier = load_verifier(cfg.verifier, tokenizer, device)
    reference = copy.deepcopy(model).requires_grad_(False) if cfg.beta > 0 else None
    state = dict(tokens=0) | run.resume(
        model, partial(load_weights, model), partial(make_adam, cfg=cfg)
    )
    engine = server.connect(cfg, tokenizer)  # None without --rollout-url; evaluations stay here
    limit = cfg.max_completion_length or task.max_new_tokens
    train_problems = task.problems("train", None, 0)
    G = cfg.num_generations
    B = cfg.num_prompts * G
    watch = partial(evaluate, model, tokenizer, task, verifier, cfg, limit)
    if state["step"] == 0:
        run.log(0, num_tokens=0, episodes=0, **watch(run.folder / "solutions_start.jsonl"))

    for step in with_progress_bar(range(state["step"] + 1, cfg.steps + 1), f"rl {cfg.reward}"):
        timer = Timer("generate", "grade", "verify", "logprob", "backward", "update", "evaluate")
        # 1. Pick P problems.
        picked = batch_indices(len(train_problems), cfg.num_prompts, step, cfg.seed, "rl epoch")
        problems = [train_problems[i] for i in picked for _ in range(G)]
        # 2. Generate G samples of each; the sequence ids make the draws new at every step.
        prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
        rollouts = generate(
            model,
            prompts,
            max_new_tokens=limit,
            temperature=cfg.temperature,
            seed=derive(cfg.seed, "rl"),
            stop_ids=task.stop_ids(tokenizer),
            sequence_ids=range((step - 1) * B, step * B),
            engine=engine
        )
        timer.mark("generate")
        # 3. Grade them.
        outcome = grades(task, problems, rollouts, tokenizer)
        timer.mark("grade")
        # 4. Value every step.
        ends, values, illegal = value_steps(cfg, verifier, task, problems, rollouts, tokenizer)
        timer.mark("verify")
        # 5. One advantage per token.
        adv, logs = advantages(cfg, rollouts.mask(), outcome, ends, values, illegal)
        if values is not None:  # before any guard: what the verifier believes
            logs["verifier/final_value"] = mean_final_value(values, verifier)
        timer.mark("other")
        # 6. Update.
        for group in run.optimizer.param_groups:
            group["lr"] = cfg.learning_rate * min(1.0, step / max(1, cfg.warmup_steps))
        logs |= update(
            model, reference, run.optimizer, run.params, rollouts, adv, cfg, limit, device, timer
        )
        batch = {k: getattr(rollouts, k) for k in ("tokens", "prompt_len", "length")}
        batch["advantage"] = adv
        require_finite(run.folder, step, logs["grad_norm"], batch, cfg.learning_rate)
        server.require_agreement(cfg, step, logs["sampling/sampling_logp_difference/mean"])
        # 7. Evaluate, log, save.
        state["tokens"] += rollouts.num_tokens()
        if step % cfg.eval_steps == 0 or step == cfg.steps:
            logs |= watch(run.folder / "solutions_end.jsonl")
            timer.mark("evaluate")
        timer.mark("other")
        logs |= rollout_logs(rollouts) | timer.metrics()
        run.log(step, num_tokens=state["tokens"], episodes=step * B, **logs)
        if step % cfg.save_steps == 0 or step == cfg.steps:
            run.save(step, partial(write_model, tokenizer=tokenizer), tokens=state["tokens"])
    return summarize(run, state["tokens"], cfg.steps * B, cfg.reward)


def main(argv=None):
    import pipeline  # which builds the stages before this one

    argv = sys.argv[1:] if argv is None else argv
    cfg = parse(pipeline.with_flags(Config), argv, __doc__)
    if cfg.reward == "mrt":
        raise UserError("--reward mrt has a loop of its own: python -m papers.mrt")
    if cfg.policy and cfg.run_dir and (cfg.verifier or cfg.reward == "outcome"):
        cfg = Config(**pipeline.fields_of(cfg, Config))  # every stage is given: one arm
        cfg = prepare(cfg, "rl", argv, cfg.policy, cfg.verifier)
        summary = train(cfg)
        print_next_command(
            cfg, ("how often it is right", ["-m", "report.evaluate", "--model", cfg.run_dir])
        )
        return summary
    if parallel.size_asked() > 1 or cfg.rollout_url:
        raise UserError(
            "torchrun and --rollout-url run one arm: type the same command without them first, "
            "then give --policy, --verifier and --run-dir"
        )
    return pipeline.run(cfg, {"": (["train_rl.py"], Config)}, argv)


if __name__ == "__main__":
    script(main)
