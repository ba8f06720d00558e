"""The verifier's data: which prefixes get a Monte-Carlo label, and how. Used by pav.py.

Uniform coverage cuts n_cov solutions of the policy at step ends drawn at random and lets the prover finish each n_mc times.
Once a solution is beyond saving, its later prefixes all say 0, and such cuts teach little. First-pit coverage (PAV, arXiv
2410.08146, section 4 and appendix D) looks where value is lost:

    1. uniform cuts as above; a cut whose Monte-Carlo value is at least pit_threshold is a good state;
    2. of each good state take a *wrong* continuation and walk along its steps;
    3. estimate every prefix on the way with pit_mc continuations of the prover, and stop at the first that none of them
       survives: the first pit. Everything up to and with the pit is kept, nothing beyond it is sampled.

The paper does not give the threshold, nor the share of step 1; both are flags (n_cov, cuts, n_mc make the share).
"""

import torch
from safetensors.torch import load_file, save_file

from infra import parallel
from infra.cli import UserError
from infra.runs import derive, progress, shuffled
from sample import generate


def boundaries(task, rollouts, tokenizer, ends_of=None):
    """Step ends of every rollout: [B,S+1] int64, column 0 the prompt's length, rows padded by repeating
    their last end (an empty step, whose progress is 0), so that no mask is needed behind it.

    ends_of: task.credit_ends (default), what training pays for and what is worth a cut; or task.step_ends, which has
    the position in front of an EOS as well: what gets a label, since a search ranks a solution there."""
    rows = []
    for b in range(len(rollouts)):
        start, length = int(rollouts.prompt_len[b]), int(rollouts.length[b])
        tokens = rollouts.tokens[b, :length].tolist()
        rows.append([start] + (ends_of or task.credit_ends)(tokens, start, length, tokenizer))
    width = max(len(r) for r in rows)
    return torch.tensor([r + [r[-1]] * (width - len(r)) for r in rows])


def choose_cuts(ends, cuts, rng_seed):
    """Which step ends of one seed solution to cut at: indices into [prompt, step 1, ...], the last (the
    complete solution) left out, since there is nothing to continue. cuts=0: all."""
    inner = len(ends) - 1
    return sorted(shuffled(inner, rng_seed)[:cuts]) if cuts else list(range(inner))


def outcomes(task, problems, rollouts, tokenizer):
    """[B] grades of whole solutions; problems: one a row."""
    return torch.tensor([task.grade(p, tokenizer.decode(rollouts.completion(i))) for i, p in enumerate(problems)])


def roll_out(prover, tokenizer, task, starts, n_mc, limit, seed, options):
    """Monte-Carlo labels of some prefixes. starts: [(problem, prefix, prompt length)]; limit: tokens of a completion.

    Every step end from the cut on gets a label, the cut itself always: no continuation moves it.
    Returns the labelled sequences (see collect), the rollouts, the ends of their steps that are worth a cut (see
    boundaries), outcome [len(starts), n_mc], tokens spent.
    """
    rows = [s for s in starts for _ in range(n_mc)]
    rolled = generate(prover, [prefix for _, prefix, _ in rows], seed=seed,
                      max_new_tokens=[limit - (len(prefix) - start) for _, prefix, start in rows], **options)
    rolled.prompt_len = torch.tensor([start for *_, start in rows])  # from here on prefix + continuation is one solution
    ends = boundaries(task, rolled, tokenizer, task.step_ends)
    outcome = outcomes(task, [p for p, *_ in rows], rolled, tokenizer)
    at_cut = outcome.view(-1, n_mc).mean(1).repeat_interleave(n_mc)  # the siblings' mean: a soft label
    cut_end = torch.tensor([len(prefix) for _, prefix, _ in rows])[:, None]
    target = torch.where(ends == cut_end, at_cut[:, None], outcome[:, None])
    weight = (ends >= cut_end).float()
    weight[:, 1:] *= (ends[:, 1:] > ends[:, :-1]).float()  # padding repeats the last end: count it once
    data = dict(tokens=rolled.tokens, ends=ends, target=target, weight=weight)
    return data, rolled, boundaries(task, rolled, tokenizer), outcome.view(-1, n_mc), int((rolled.length - cut_end[:, 0]).sum())


def collect(base, prover, tokenizer, task, problems, cfg, shard):
    """Labelled sequences for some problems: dict(tokens [N,T], ends [N,S+1], target [N,S+1], weight [N,S+1]), and the
    tokens that were sampled for them.

    target is the Monte-Carlo estimate of V^mu at that step end, weight 0 where there is none.
    """
    limit = cfg.max_completion_length or task.max_new_tokens
    of_seed = [p for p in problems for _ in range(cfg.n_cov)]
    options = dict(temperature=cfg.temperature, stop_ids=tokenizer.eos_ids, slots=cfg.slots)
    seeds = generate(base, [task.prompt_tokens(p, tokenizer) for p in of_seed], max_new_tokens=limit,
                     seed=derive(cfg.seed, "seeds", shard), **options)
    ends, spent = boundaries(task, seeds, tokenizer), int((seeds.length - seeds.prompt_len).sum())
    if cfg.label == "outcome":  # an ORM needs no prover: the seed's own outcome, read at its end
        weight = torch.zeros(ends.shape)
        weight[:, -1] = 1.0
        target = outcomes(task, of_seed, seeds, tokenizer)[:, None].expand(ends.shape).clone()
        return dict(tokens=seeds.tokens, ends=ends, target=target, weight=weight), spent

    starts = []
    for i, problem in enumerate(of_seed):
        own = sorted(set(ends[i].tolist()))
        for h in choose_cuts(own, cfg.cuts, derive(cfg.seed, "cuts", shard, i)):
            starts.append((problem, seeds.tokens[i, : own[h]].tolist(), int(seeds.prompt_len[i])))
    data, rolled, ends, outcome, cost = roll_out(prover, tokenizer, task, starts, cfg.n_mc, limit,
                                                 derive(cfg.seed, "continuations", shard), options)
    if cfg.coverage == "uniform":
        return data, spent + cost
    walks = wrong_walks(starts, rolled, ends, outcome, cfg.pit_threshold)
    more, extra = walk_to_pits(prover, tokenizer, task, walks, cfg.pit_mc, limit, derive(cfg.seed, "pits", shard), options)
    return concatenate([data, *more]), spent + cost + extra


def wrong_walks(starts, rolled, ends, outcome, threshold):
    """Where to look for pits: the first wrong continuation of every cut that is good, but not sure to succeed.

    outcome [starts, n_mc]. Returns [(problem, tokens, prompt length, step ends after the cut but the last)].
    """
    walks = []
    for s, (problem, prefix, start) in enumerate(starts):
        wrong = (outcome[s] == 0).nonzero()[:, 0]
        if float(outcome[s].mean()) >= threshold and len(wrong):
            row = s * outcome.shape[1] + int(wrong[0])
            later = sorted({e for e in ends[row].tolist() if e > len(prefix)})[:-1]
            walks.append((problem, rolled.tokens[row].tolist(), start, later))
    return walks


def walk_to_pits(prover, tokenizer, task, walks, n_mc, limit, seed, options):
    """All walks side by side, one step end a round, each until its first pit (no continuation right) or its end.
    Returns a list of labelled sequences as collect's, one a round, and the tokens spent."""
    found, spent, step = [], 0, 0
    while walks := [w for w in walks if step < len(w[3])]:
        starts = [(problem, tokens[: later[step]], start) for problem, tokens, start, later in walks]
        data, _, _, outcome, cost = roll_out(prover, tokenizer, task, starts, n_mc, limit, derive(seed, step), options)
        found, spent, step = [*found, data], spent + cost, step + 1
        walks = [w for w, survives in zip(walks, (outcome.sum(1) > 0).tolist()) if survives]
    return found, spent


def collect_all(base, prover, tokenizer, task, cfg, run):
    """All shards; each is a file, so a killed run does not sample twice. Returns one dict, tokens sampled."""
    if cfg.coverage == "first-pit" and (cfg.n_mc < 2 or cfg.label == "outcome"):
        raise UserError("--coverage first-pit needs --n-mc of at least 2 (a state is good, and one of its continuations wrong) "
                        "and --label q")
    folder = run / "rollouts"
    folder.mkdir(exist_ok=True)
    problems = task.problems("train", None, cfg.seed)
    if cfg.num_problems:
        problems = (problems * (1 + cfg.num_problems // len(problems)))[: cfg.num_problems]
    shards, spent = [], 0
    for shard in progress(range(-(-len(problems) // cfg.shard_problems)), "rollouts"):
        path = folder / f"shard_{shard:05d}.safetensors"
        if not parallel.agreed(path.exists()):
            part = problems[shard * cfg.shard_problems : (shard + 1) * cfg.shard_problems]
            data, cost = collect(base, prover, tokenizer, task, part, cfg, shard)
            data["spent"] = torch.tensor(cost)
            if parallel.rank() == 0:
                save_file(data, folder / ".tmp-shard")
                (folder / ".tmp-shard").replace(path)
            parallel.barrier()
        data = load_file(path)
        spent += int(data.pop("spent"))
        shards.append(data)
    return concatenate(shards), spent


def concatenate(shards):
    """Shards of different widths -> one dict; tokens are padded with 0, ends by repeating, weights with 0."""
    T, S = (max(s[k].shape[1] for s in shards) for k in ("tokens", "ends"))
    widen = lambda x, width, last: torch.cat([x, last.expand(len(x), width - x.shape[1])], 1)  # noqa: E731
    zero = torch.zeros(1, 1)
    return dict(
        tokens=torch.cat([widen(s["tokens"], T, zero.long()) for s in shards]),
        ends=torch.cat([widen(s["ends"], S, s["ends"][:, -1:]) for s in shards]),
        target=torch.cat([widen(s["target"], S, zero) for s in shards]),
        weight=torch.cat([widen(s["weight"], S, zero) for s in shards]),
    )
