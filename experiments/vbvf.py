"""Clone right traces, or learn to tell right from wrong? The same n problems, used twice.

    python -m experiments.vbvf                   # 15 to 20 minutes of one core
    python -m experiments.vbvf --smoke           # few steps, seconds
    -> docs/results/vbvf/: results.json, table.md, curves.png

The claim (Setlur et al. 2025, arXiv 2502.12118): as the test budget of H tokens grows, fine-tuning
on right traces (verifier-free, VF) falls behind learning a verifier and searching or doing RL with
it (verifier-based, VB), by sqrt(H) where n grows with H, if the base policy is *heterogeneous* (the
reward of its traces varies: sigma^2 = sum_h Var_a Q) and *anti-concentrated* (it sometimes does
much better than its mean). Here, on their didactic task (tasks/contextual.py) with the bi-level
reward (tokens after the first right point), a tiny Transformer as base, fine-tuned on traces of a
mixture of scripted policies whose width is the dial:

    VF      SFT of the base on n right traces of its own, one a problem, by rejection sampling. How
            many base traces that took is reported and not charged.
    VB      three verifiers on *one* base trace a problem, each prefix labelled 0 or 1; the
            pessimistic reward of a letter is the mean of their predictions minus lambda times the
            standard deviation. Used twice: best-of-N of the base by a trace's mean reward (N H
            tokens at test time), and REINFORCE with it as the only reward (reward to go, whitened
            in the group, KL to the base; H tokens at test time). The true reward is not seen again,
            but by the table.

Both start from the base's weights and are tuned over the same grid of learning rate x steps (9
settings), at every n, on a tuning seed's `val`: that is also the early stopping. RL takes over the
chosen verifiers and has 9 settings of its own: KL coefficient x steps. Reported: other seeds,
`test`, prompts never seen. Set after first runs on tuning seeds: for VF, no early stopping by
held-out loss (it stopped at once); for RL, the whitening and its grid (it hardly moved).

sigma^2 needs no continuations: Q along a trace is a martingale and tokens are all the chance there
is, so that the summed variances of its steps are the variance of the trace's reward
(tests/test_vbvf.py checks this by enumeration).

What would have falsified the claim: the paired gap VB - VF (RL, tokens after the first right point,
largest n) not above 0 (its 95% interval) at the longest H, or not larger there than at the
shortest; or a gap as large from the concentrated base as from the mixed one. Where VF should win,
and is measured: few labels, small N, a base whose failures are filtered away by rejection (the
widest mixture at short H). And greedy decoding, which the paper's setting leaves out.

With endless data and a perfect verifier the same comparison is exact: vbvf_exact.py.

Left out: the paper's version space and chi-square ball (an ensemble and a KL penalty stand in for
them), budget forcing, the paper's GPT-2 and MATH experiments. Results of each cell stay in
runs/vbvf: killed, the same command goes on.
"""

import copy
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train_rl
import train_sft
from experiments.toolkit import TUNING, cached, expected_best, print_results, typed, write_results
from experiments.vbvf_report import BUDGETS, MIXTURES, claims_of, figure, tables
from infra.cli import opt, parse, script
from infra.seeds import derive, generator, shuffled
from model import load_model, token_logprobs, write_model
from pav import value_loss
from sample import generate
from tasks.contextual import Contextual
from verifier import Verifier


@dataclass
class Config:
    seeds: int = opt(5, "seeds of the reported numbers (0, 1, ...)", low=2)
    horizons: list = opt([8, 16, 32], "H: tokens of a trace")
    sizes: list = opt([64, 256, 1000], "n: problems, a trace each")
    planted: int = opt(4, "letters that a trace must hold", low=1)
    base_steps: int = opt(
        400,
        "optimizer steps of the mixed base policy; other mixtures go on from it for a quarter "
        "as many",
        low=4,
    )
    base_learning_rate: float = opt(5e-3, "of the base policy", above=0)
    base_batch_size: int = opt(64, "demonstrations a step of the base policy", low=1)
    batch_size: int = opt(32, "traces a step of VF and of the verifiers", low=1)
    learning_rates: list = opt([3e-4, 1e-3, 3e-3], "grid of VF and of the verifiers")
    steps: list = opt(
        [10, 30, 60], "grid of VF and of the verifiers: optimizer steps, in rising order"
    )
    rl_learning_rates: list = opt([1e-3], "grid of RL")
    betas: list = opt([0.03, 0.1, 0.3], "grid of RL: KL coefficient")
    rl_steps: list = opt([5, 10, 20], "grid of RL: optimizer steps, in rising order")
    rl_prompts: int = opt(8, "prompts a step of RL, out of the n problems (P)", low=1)
    rl_samples: int = opt(8, "samples a prompt (G)", low=2)
    pessimism: float = opt(1.0, "lambda of the score", low=0)
    tries: int = opt(8, "base traces a problem at most in VF's rejection sampling", low=1)
    test_problems: int = opt(100, "prompts of an evaluation, 16 base traces each", low=1)
    out: str = opt("docs/results/vbvf", "where table, figure and numbers go")
    smoke: bool = opt(False, "a few steps of everything")


# --------------------------------------------------------------------------------------------------
# One training loop for the base policy, VF and the verifiers.


def fit(model, loss, n, stops, learning_rate, batch_size, seed, warmup_steps=10):
    """AdamW on loss(rows), rows drawn out of n; the rate is constant after a warm-up. Yields at
    each of the rising numbers of steps in `stops`: one run thus tries them all, and choosing
    among them is early stopping."""
    cfg = train_sft.Config(learning_rate=learning_rate)
    params = list(model.parameters())
    optimizer = train_sft.adamw(params, cfg)
    rng = generator(seed, "rows")
    for step in range(1, stops[-1] + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / warmup_steps)
        loss(torch.randint(n, (batch_size,), generator=rng)).backward()
        torch.nn.utils.clip_grad_norm_(params, cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in stops:
            yield step


def imitation(model, tokens, prompt_len):
    """Mean negative log-prob of the letters of some traces, for fit. tokens [n,T]."""
    targets = torch.arange(tokens.shape[1]) >= prompt_len

    def loss(rows):
        return -token_logprobs(model, tokens[rows], targets.expand(len(rows), -1), 1.0)[0].mean()

    return loss


def verification(verifier, tokens, prompt_len, label):
    """Cross-entropy of every prefix with its bi-level label, for fit. tokens [n,T], label [n,H]
    in {0,1}."""

    def loss(rows):
        # (b, H): read at the letter that ends the prefix.
        logits = verifier(tokens[rows])[:, prompt_len:]
        return value_loss(logits, label[rows], torch.ones_like(logits), 1.0, 1.0)

    return loss


# --------------------------------------------------------------------------------------------------
# Traces: tokens [B, k+H] of one length, and the time at which each is right.


def sample(model, task, tokenizer, problems, times, H, seed, temperature=1.0):
    """`times` traces of each problem -> tokens [P*times, k+H], log-prob of each trace [P*times].
    No stop id: every trace has H tokens, so that prefixes of long traces are traces of a short
    budget."""
    prompts = [task.prompt_tokens(p, tokenizer) for p in problems for _ in range(times)]
    out = generate(
        model, prompts, max_new_tokens=H, temperature=temperature, seed=seed, stop_ids=[], slots=512
    )
    return out, out.logprob.sum(1)


def solve_times(task, tokenizer, problems, tokens):
    """[P, B/P] float64: tokens up to the first right point, inf where there is none. Rows of
    tokens follow problems.

    An EOS is a token like any other here (no stop id), and no letter: decoded it would vanish,
    and the letters after it would be counted as earlier tokens. It stands as a blank."""
    each = len(tokens) // len(problems)
    letter = [
        " " if t in tokenizer.eos_ids else tokenizer.decode([t]) for t in range(tokenizer.n_vocab)
    ]
    times = []
    for b, row in enumerate(tokens[:, task.planted :].tolist()):
        times.append(task.solve_time(problems[b // each], "".join(letter[t] for t in row)))
    return torch.tensor(
        [float("inf") if t is None else t for t in times], dtype=torch.float64
    ).view(-1, each)


def rewards(times, H):
    """Solve times -> bi-level trace rewards (H - t)/H, 0 where t > H."""
    return ((H - times) / H).clamp(min=0)


def labels(times, H):
    """Solve times [B] -> [B,H] float32: 1 from the first right point on."""
    return (torch.arange(1, H + 1) >= times[:, None]).float()


def predicted(verifiers, tokens, prompt_len):
    """The reward of every letter as each verifier sees it: the chance that its prefix is
    labelled 1. [3,B,H]."""
    with torch.no_grad():
        return torch.stack([v(tokens)[:, prompt_len:].sigmoid() for v in verifiers])


def pessimistic(each, weight):
    """Mean over the verifiers (the first axis) minus weight times their standard deviation."""
    return each.mean(0) - weight * each.std(0)


def reward_to_go(reward, G, floor=1e-2):
    """Advantage of a letter: the mean reward from it on, against its group at the same letter,
    in its group's standard deviations (a timid verifier's differences are small beside the KL
    penalty). reward [P*G,H] -> [P*G,H]."""
    to_go = reward.flip(1).cumsum(1).flip(1).view(-1, G, reward.shape[1]) / reward.shape[1]
    centred = to_go - to_go.mean(1, keepdim=True)
    return (centred / (to_go.std(1, keepdim=True) + floor)).flatten(0, 1)


def best_of(scores, value, N):
    """Mean over problems of the expected value of the highest-scored of N samples; scores, value
    [P, >= N]."""
    return float(expected_best(scores, value, N).mean())


def spread_of_base(reward):
    """Heterogeneity and anti-concentration, prompt by prompt. reward [P,N] of independent traces
    -> sigma (root of the median over prompts of Var r) and c(kappa) = Pr[r >= mean + sd *
    sqrt(kappa)], mean over prompts."""
    mu = reward.mean(1, keepdim=True)
    sd = reward.std(1, keepdim=True)
    out = dict(sigma=float(reward.var(1).median().sqrt()))
    for kappa in (0.25, 1.0):
        out[f"c_{kappa:g}"] = float((reward >= mu + sd * kappa**0.5).double().mean())
    return out


def summary(times, H):
    """What one sample is worth: J, accuracy."""
    return dict(J=float(rewards(times, H).mean()), accuracy=float((times <= H).double().mean()))


# --------------------------------------------------------------------------------------------------
# The base policy of a seed and mixture, and the traces that the arms share.


class World:
    """Base policy, its traces of the training problems [P,tries] and of the evaluation problems
    [P,16], all as long as the longest H: a shorter budget cuts them."""

    def __init__(self, cfg, root, seed, mixture, n):
        self.cfg = cfg
        self.seed = seed
        self.H = max(cfg.horizons)
        self.task = Contextual(seed, planted=cfg.planted, length=self.H, mixture=MIXTURES[mixture])
        self.base, self.tokenizer = self.policy(root, mixture)
        self.k = self.task.planted
        self.problems = self.task.problems("train", n, seed)
        self.test = self.task.problems("val" if seed >= TUNING else "test", cfg.test_problems, seed)
        pool, _ = sample(
            self.base,
            self.task,
            self.tokenizer,
            self.problems,
            cfg.tries,
            self.H,
            derive(seed, "pool"),
        )
        self.pool = pool.tokens
        self.pool_times = self.times(self.problems, pool.tokens)
        held, _ = sample(
            self.base,
            self.task,
            self.tokenizer,
            self.test,
            max(BUDGETS),
            self.H,
            derive(seed, "test"),
        )
        self.held = held.tokens.view(len(self.test), -1, held.tokens.shape[1])
        self.held_times = self.times(self.test, held.tokens)

    def times(self, problems, tokens):
        return solve_times(self.task, self.tokenizer, problems, tokens)

    def policy(self, root, mixture):
        """SFT on demonstrations; kept, since everything hangs on it."""
        folder = root / f"base_{mixture}_seed{self.seed}"
        cfg = self.cfg
        if folder.exists():
            return load_model(folder)
        if mixture == "mixed":
            start = train_sft.Config(task="contextual", seed=self.seed)
            (model, tokenizer) = train_sft.start_model(start, self.task, "cpu")
            steps = cfg.base_steps
        else:
            mixed = Contextual(
                self.seed, planted=cfg.planted, length=self.H, mixture=MIXTURES["mixed"]
            )
            other = World.__new__(World)
            other.cfg = cfg
            other.seed = self.seed
            other.H = self.H
            other.task = mixed
            (model, tokenizer) = other.policy(root, "mixed")
            steps = cfg.base_steps // 4
        config = train_sft.Config(
            task="contextual", seed=self.seed, num_examples=steps * cfg.base_batch_size
        )
        examples = train_sft.build_examples(
            self.task, tokenizer, self.task.problems("train", None, self.seed), config
        )
        tokens = torch.tensor([p + c for p, c in examples])
        for _ in fit(
            model,
            imitation(model, tokens, self.task.planted),
            len(tokens),
            [steps],
            cfg.base_learning_rate,
            cfg.base_batch_size,
            derive(self.seed, "base", mixture),
        ):
            pass
        temporary = folder.with_name(f".tmp-{folder.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        write_model(temporary, model, tokenizer)
        temporary.rename(folder)
        return model, tokenizer

    def correct(self, n, H):
        """VF's data: the first right trace of each of n problems -> tokens [<= n, k+H], base
        traces drawn for them."""
        right = self.pool_times[:n] <= H
        first = torch.where(right.any(1), right.double().argmax(1), self.cfg.tries - 1)
        rows = torch.arange(n) * self.cfg.tries + first
        return self.pool[rows][right.any(1), : self.k + H], int((first + 1).sum())

    def annotated(self, n, H):
        """VB's data: the first trace of each of n problems, right or wrong, and the label of
        every prefix."""
        return self.pool.view(-1, self.cfg.tries, self.pool.shape[1])[:n, 0, : self.k + H], labels(
            self.pool_times[:n, 0], H
        )


# --------------------------------------------------------------------------------------------------
# The arms. Each gets a World, n, H and its setting.


def vf(world, n, H, learning_rate, stops):
    """SFT on n right traces -> yields (steps, policy)."""
    tokens, _ = world.correct(n, H)
    model = copy.deepcopy(world.base)
    if not len(tokens):  # nothing to imitate: the base stays as it is
        yield from ((s, model) for s in stops)
        return
    for step in fit(
        model,
        imitation(model, tokens, world.k),
        len(tokens),
        stops,
        learning_rate,
        world.cfg.batch_size,
        derive(world.seed, "vf", n, H),
    ):
        yield step, model


def vb(world, n, H, learning_rate, stops, seeds=3):
    """Verifiers on n annotated traces -> yields (steps, [three verifiers]); they differ in the
    order of the traces."""
    tokens, label = world.annotated(n, H)
    verifiers = [Verifier(copy.deepcopy(world.base)) for _ in range(seeds)]
    runs = [
        fit(
            v,
            verification(v, tokens, world.k, label),
            n,
            stops,
            learning_rate,
            world.cfg.batch_size,
            derive(world.seed, "verifier", n, H, i),
        )
        for i, v in enumerate(verifiers)
    ]
    for step, *_ in zip(*runs):
        yield step, verifiers


def reinforce(world, verifiers, n, H, learning_rate, beta, stops):
    """REINFORCE from the base on the n problems by the pessimistic reward of every letter, KL to
    the base. Yields (steps, policy, what is believed of it and how far it is)."""
    cfg = world.cfg
    model = copy.deepcopy(world.base)
    rl = train_rl.Config(beta=beta, learning_rate=learning_rate, num_generations=cfg.rl_samples)
    params = list(model.parameters())
    optimizer = torch.optim.Adam(params, lr=learning_rate)
    for step in range(1, stops[-1] + 1):
        rows = shuffled(n, world.seed, "rl", step)[: cfg.rl_prompts]
        out, _ = sample(
            model,
            world.task,
            world.tokenizer,
            [world.problems[i] for i in rows],
            cfg.rl_samples,
            H,
            derive(world.seed, "rl", n, H, step),
        )
        reward = pessimistic(predicted(verifiers, out.tokens, world.k), cfg.pessimism)
        adv = torch.nn.functional.pad(reward_to_go(reward, cfg.rl_samples), (world.k, 0))
        logs = train_rl.update(model, world.base, optimizer, params, out, adv, rl, H, "cpu")
        if step in stops:
            # kl: nats a trace.
            yield (step, model, dict(kl=logs["kl"] * H, believed=float(reward.mean())))


def judge(world, model, H, each):
    """A policy on the evaluation problems: sampled, greedy, and its likeliest of N samples (no
    verifier needed)."""
    out, logprob = sample(
        model, world.task, world.tokenizer, world.test, each, H, derive(world.seed, "judge")
    )
    times = world.times(world.test, out.tokens)
    greedy, _ = sample(model, world.task, world.tokenizer, world.test, 1, H, 0, temperature=0)
    likely = {
        N: best_of(logprob.view(-1, each), rewards(times, H), N) for N in BUDGETS if each >= N
    }
    return summary(times, H) | dict(
        greedy=summary(world.times(world.test, greedy.tokens), H), likeliest=likely
    )


def search(world, verifiers, H, weight, each=BUDGETS[-1]):
    """Best-of-N of the base's own traces by score -> {N: J}, the same by the plain mean of the
    verifiers, accuracy at 16, correlation of score and reward."""
    cut = world.held[:, :each, : world.k + H].flatten(0, 1)
    times = world.held_times[:, :each]
    # a trace's score is its mean reward
    predictions = predicted(verifiers, cut, world.k).mean(2)
    r = rewards(times, H)
    s, plain = (pessimistic(predictions, w).view(times.shape).double() for w in (weight, 0.0))
    corr = (
        float(np.corrcoef(s.flatten(), r.flatten())[0, 1]) if s.std() > 0 and r.std() > 0 else 0.0
    )
    at = [N for N in BUDGETS if each >= N]
    return dict(
        J={N: best_of(s, r, N) for N in at},
        J_mean={N: best_of(plain, r, N) for N in at},
        correlation=corr,
        accuracy=best_of(s, (times <= H).double(), 16),
    )


def cell(world, n, H, setting):
    """Everything at one n and H."""
    r = rewards(world.held_times, H)
    base = (
        summary(world.held_times, H)
        | spread_of_base(r)
        | dict(
            given_right=float(r[r > 0].mean()) if (r > 0).any() else 0.0,
            oracle={N: best_of(r, r, N) for N in BUDGETS},
        )
    )
    greedy, _ = sample(world.base, world.task, world.tokenizer, world.test, 1, H, 0, temperature=0)
    base["greedy"] = summary(world.times(world.test, greedy.tokens), H)
    traces, drawn = world.correct(n, H)
    ((_, model),) = vf(world, n, H, setting["vf"]["learning_rate"], [setting["vf"]["steps"]])
    ((_, verifiers),) = vb(world, n, H, setting["vb"]["learning_rate"], [setting["vb"]["steps"]])
    ((_, policy, logs),) = reinforce(
        world,
        verifiers,
        n,
        H,
        setting["rl"]["learning_rate"],
        setting["rl"]["beta"],
        [setting["rl"]["steps"]],
    )
    return dict(
        base=base,
        vf=judge(world, model, H, 16) | dict(traces=len(traces), base_traces=drawn),
        rl=judge(world, policy, H, 16) | logs,
        bon=search(world, verifiers, H, world.cfg.pessimism),
        labelled_right=float((world.pool_times[:n, 0] <= H).double().mean()),
    )


def tune(root, n, H, world):
    """The settings at n: as many tried for each arm on the tuning seed, at the middle H with the
    mixed base."""
    best = {}
    tried = {}
    for name in ("vf", "vb", "rl"):

        def grid(name=name):
            return list(trials(world(), name, n, H, best))

        tried[name] = cached(root / f"tuning_{name}_n{n}.json", grid)
        best[name] = {
            k: v for k, v in max(tried[name], key=lambda row: row["J"]).items() if k != "J"
        }
        print(f"tuning, n = {n}, {name}: {best[name]}", flush=True)
    return best, tried


def trials(world, name, n, H, best):
    """Every setting of an arm's grid -> its J on `val`: VF and RL by samples, the verifiers by
    best-of-16."""
    cfg = world.cfg
    if name == "rl":
        ((_, verifiers),) = vb(world, n, H, best["vb"]["learning_rate"], [best["vb"]["steps"]])
        for lr, beta in itertools.product(cfg.rl_learning_rates, cfg.betas):
            for step, policy, _ in reinforce(world, verifiers, n, H, lr, beta, cfg.rl_steps):
                yield dict(
                    learning_rate=lr, beta=beta, steps=step, J=judge(world, policy, H, 8)["J"]
                )
        return
    for lr in cfg.learning_rates:
        for step, trained in (vf if name == "vf" else vb)(world, n, H, lr, cfg.steps):
            J = (
                judge(world, trained, H, 8)["J"]
                if name == "vf"
                else search(world, trained, H, cfg.pessimism, 16)["J"][16]
            )
            yield dict(learning_rate=lr, steps=step, J=J)


def run_all(cfg, root):
    """-> rows (one per seed, mixture, n, H), tuning. Every cell is a file; a World is made where
    one is missing."""

    def make(*of):
        return functools.cache(lambda: World(cfg, root, *of))

    middle, n_middle = (x[len(x) // 2] for x in (cfg.horizons, cfg.sizes))
    world = make(TUNING, "mixed", max(cfg.sizes))
    tuning = {n: tune(root, n, middle, world) for n in cfg.sizes}
    rows = []
    for seed, mixture in itertools.product(range(cfg.seeds), MIXTURES):
        mixed = mixture == "mixed"  # the others: one n, shortest and longest H
        sizes = cfg.sizes if mixed else [n_middle]
        horizons = cfg.horizons if mixed else [cfg.horizons[0], cfg.horizons[-1]]
        world = make(seed, mixture, max(sizes))
        for n, H in itertools.product(sizes, horizons):
            path = root / f"{mixture}_n{n}_H{H}_seed{seed}.json"
            row = cached(path, lambda: cell(world(), n, H, tuning[n][0]))  # noqa: B023
            rows.append(dict(seed=seed, mixture=mixture, n=n, H=H) | row)
            print(
                f"seed {seed}, {mixture}, n = {n}, H = {H}: J of base {row['base']['J']:.3f}, VF "
                f"{row['vf']['J']:.3f}, VB-RL {row['rl']['J']:.3f}, best-of-16 "
                f"{row['bon']['J']['16']:.3f}, {row['cpu_seconds']:.0f} s",
                flush=True,
            )
    return rows, {str(n): dict(chosen=best, tried=tried) for n, (best, tried) in tuning.items()}


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    torch.set_num_threads(1)
    root = Path("runs/vbvf_smoke" if cfg.smoke else "runs/vbvf")
    out = Path(cfg.out)
    if cfg.smoke:
        cfg.planted = 2
        cfg.seeds = 2
        cfg.horizons = [8, 12]
        cfg.sizes = [16, 24]
        cfg.base_steps = 4
        cfg.rl_steps = [1]
        cfg.learning_rates = [1e-3]
        cfg.rl_learning_rates = [1e-3]
        cfg.betas = [0.1]
        cfg.steps = [1, 2]
        cfg.tries = 8
        cfg.batch_size = 16
        cfg.test_problems = 8
        out = root / "results"
    root.mkdir(parents=True, exist_ok=True)
    rows, tuning = run_all(cfg, root)
    text = tables(rows, cfg)
    seconds = round(sum(r["cpu_seconds"] for r in rows))
    write_results(
        out,
        text,
        typed("vbvf", argv),
        cfg,
        claims_of,
        mixtures=MIXTURES,
        tuning=tuning,
        rows=rows,
        cpu_seconds=seconds,
    )
    figure(rows, cfg, out / "curves.png")
    print_results(text, out, seconds)


if __name__ == "__main__":
    script(main)
