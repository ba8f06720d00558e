"""Search at test time: spend more tokens on a problem, and let verifiers say which were well spent.

    python train_sft.py --task-args length=4 --run-dir runs/sft4                   # the policy
    python pav.py --policy runs/sft4 --num-problems 20000 --run-dir runs/q4      # Q^pi
    python pav.py --policy runs/sft4 --num-problems 20000 --label outcome --run-dir runs/orm4
    python search.py --task planted --model runs/sft4 --verifier runs/q4 --prover-k 4 --n 12
    python search.py --task planted --model runs/sft4 --verifier runs/orm4 --method best-of-n --n 12
    python search.py --task jsonl --data q.jsonl --model smollm2 --verifier runs/q --n 12

The three verifiers (PAV, arXiv 2410.08146, sections 4 and 5; pav.py trains each):

    --verifier         Q^pi of the policy that is searched (`--label q --prover base`); for
                       best-of-n also an ORM (`--label outcome`: it knows finished solutions only)
    --prover-k K       A^mu of the Best-of-K prover comes from the same Q^pi, as 1 - (1-Q)^K
                       (eq. 30): no second model
    --prover-verifier  A^mu of any other prover mu: `--label q --prover DIR`, DIR being that prover

Beam search: --n candidates a step, of which --width are kept (default n/3: every element draws C =
3 next steps). Candidates are ranked by Q^pi + alpha * A^mu; a finished one stays in the ranking
with its score and draws nothing. The answer is the last beam's element with the highest Q^pi alone.
Each element goes on from its own token ids: nothing is decoded and encoded again. Its prefix is
prefilled anew at every step (once for its C children); there is no cache between steps. Three
counts are kept: tokens generated (the axis of every comparison: all candidates count, dropped ones
too), tokens prefilled, tokens read by verifiers.

Two choices the paper is silent on: equal candidates count once (a beam of copies is no beam; their
share of the n draws goes to the others), and ties go to the earlier candidate. A step ends with the
token that holds the newline after some text, as tasks/base.py has it, or after task.step_tokens
tokens. Left out: look-ahead rollouts, a schedule of widths, keeping the cache of the survivors.
"""

import time
from dataclasses import dataclass

import torch

from infra.cli import UserError, opt, parse, script
from infra.runs import mean, read_json, with_progress_bar
from infra.seeds import derive
from kernels import packed_weights
from model import pad_right, resolve
from report.solutions import check_file, write_rows
from report.statistics import interval, vote
from rollouts import pass_at_k
from sample import SampleFlags, generate, start
from verifier import best_of_k_value, load_verifier, step_values


@dataclass
class Config(SampleFlags):
    method: str = opt(
        "beam",
        "spend --n samples a problem on one answer",
        "search",
        choices=["beam", "best-of-n", "majority"],
    )
    verifier: str = opt(
        "",
        "Q^pi that ranks (pav.py --label q --prover base); best-of-n: also --label outcome",
        "search",
    )
    alpha: float = opt(0.5, "beam: rank by Q^pi + alpha * A^mu", "search", low=0)
    prover_k: int = opt(
        0, "A^mu of the Best-of-K prover (0: the verifier's own K)", "search", low=0
    )
    prover_verifier: str = opt(
        "", "A^mu of another prover (default: Best-of-K of --verifier)", "search"
    )
    width: int = opt(0, "beam: elements kept a step; must divide --n (0: n/3)", "search", low=0)
    out: str = opt("", "write the chosen completions to this jsonl file", "search")


@dataclass
class Element:
    """A solution so far: tokens = prompt + steps; ends = exclusive step ends, ends[0] the prompt's
    length. q is Q^pi of the whole, mu the prover's value of it, score what it is ranked by."""

    tokens: list
    ends: list
    q: float = 0.0
    mu: float = 0.0
    score: float = 0.0
    finished: bool = False

    def completion(self):
        return self.tokens[self.ends[0] :]


@dataclass
class Result:
    """One problem's result: the chosen element, all that it was chosen from, and what they cost in
    tokens."""

    best: Element
    candidates: list
    generated: int = 0  # by the policy, all candidates of all steps
    prefilled: int = 0  # prefixes read again by the policy, each distinct one once a step
    scored: int = 0  # read by verifiers
    rounds: int = 0


# ------------------------------------------------------------------------------------------------
# Pure functions.


def effective_score(q, before, after, alpha):
    """Q^pi(s,a) + alpha * A^mu(s,a), with A^mu = V^mu after the step - V^mu before it (eq. 5).
    Numbers or tensors."""
    return q + alpha * (after - before)


def select(scores, keys, width):
    """Indices of the `width` highest scores, best first; of candidates with equal keys only the
    first counts, and ties go to the earlier one. scores: n floats, keys: n hashables."""
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    return sorted(first.values(), key=lambda i: (-scores[i], i))[:width]


def step_stops(task, tokenizer):
    """(ids that may end a step, tokens of a step or 0 for any number, ids that end a completion): a
    step is a line, up to a token that holds a newline, or a fixed number of tokens."""
    eos = frozenset(task.stop_ids(tokenizer))
    if task.step_tokens:
        return frozenset(), task.step_tokens, eos
    newline = frozenset(t for t in range(tokenizer.n_vocab) if b"\n" in tokenizer.token_bytes(t))
    return newline - eos, 0, eos


# ------------------------------------------------------------------------------------------------
# Drawing steps and reading values.


def draw_steps(model, tokenizer, stops, prefixes, starts, ids, limit, seed, options):
    """One more step for each prefix (a list of token ids whose completion begins at starts[i]).

    stops: see step_stops; ids fix the draws. Returns [(tokens with the step, finished)], generated
    tokens per prefix [n], and the lengths of what was prefilled [n]. A blank line is no step: there
    the drawing goes on.
    """
    newline, fixed, eos = stops
    context = model.cfg.max_position_embeddings
    rows = [list(p) for p in prefixes]
    finished = [False] * len(prefixes)
    prefilled = [0] * len(prefixes)
    todo = list(range(len(rows)))
    attempt = 0
    while todo:
        room = [limit - (len(rows[i]) - starts[i]) for i in todo]
        rolled = generate(
            model,
            [rows[i] for i in todo],
            max_new_tokens=[min(r, fixed) if fixed else r for r in room],
            seed=derive(seed, "step", attempt),
            sequence_ids=[ids[i] for i in todo],
            stop_ids=[*eos, *newline],
            **options,
        )
        open_lines = []  # rows whose new step is blank so far
        for i, limit_left, completion in zip(todo, room, rolled.completions()):
            prefilled[i] += len(rows[i])
            rows[i] += completion
            cut_off = limit_left == len(completion) or len(rows[i]) >= context
            finished[i] = rows[i][-1] in eos or cut_off
            line = b"".join(map(tokenizer.token_bytes, rows[i][len(prefixes[i]) :])).lstrip()
            if not fixed and not finished[i] and b"\n" not in line:
                open_lines.append(i)
        todo = open_lines
        attempt += 1
    generated = [len(row) - len(prefix) for row, prefix in zip(rows, prefixes)]
    return list(zip(rows, finished)), generated, prefilled


def learned_values(q_verifier, mu_verifier=None, k=1):
    """-> function (problem, rows) -> (Q^pi [n], V^mu [n], tokens read); rows: n lists of token ids
    of one problem.

    Without mu_verifier the prover is Best-of-k of the policy, from the same forward pass. One
    problem makes one batch, so that a value does not depend (in its last bit) on which other
    problems are searched beside it.
    """

    def values(problem, rows):
        tokens, length = pad_right(rows)
        q = step_values(q_verifier, tokens, length[:, None])[:, 0]
        mu = (
            step_values(mu_verifier, tokens, length[:, None])[:, 0]
            if mu_verifier is not None
            else q
        )
        return (
            q.tolist(),
            best_of_k_value(mu, k).tolist(),
            int(length.sum()) * (1 + (mu_verifier is not None)),
        )

    return values


def beam(
    model,
    tokenizer,
    task,
    problems,
    values,
    *,
    n,
    width,
    alpha,
    limit,
    seed,
    problem_ids=None,
    label="",
    **options,
):
    """Beam search over steps -> [Result], one a problem.

    n candidates a step, `width` kept; values as learned_values gives it; limit: tokens a completion
    may have; seed and problem_ids (default 0, 1, ...) fix the draws of a problem whatever is
    searched beside it. label: of a progress bar over the steps ("": none). options go to
    generate.
    """
    ids = list(range(len(problems))) if problem_ids is None else list(problem_ids)
    beams = []
    for problem in problems:
        prompt = list(task.prompt_tokens(problem, tokenizer))
        q, mu, read = values(problem, [prompt])
        beams.append(Result(None, [Element(prompt, [len(prompt)], q[0], mu[0])], scored=read))
    stops = step_stops(task, tokenizer)

    def rounds():  # who draws a next step, as long as there is anybody
        while grow := [
            (p, j, e)
            for p, result in enumerate(beams)
            for j, e in enumerate(parents(result.candidates, n))
        ]:
            yield grow

    for step, grow in enumerate(with_progress_bar(rounds(), label) if label else rounds()):
        drawn, generated, prefilled = draw_steps(
            model,
            tokenizer,
            stops,
            [e.tokens for _, _, e in grow],
            [e.ends[0] for _, _, e in grow],
            [ids[p] * n + j for p, j, _ in grow],
            limit,
            derive(seed, "beam", step),
            options,
        )
        fresh = {}
        for (p, j, parent), (tokens, finished), made, read in zip(
            grow, drawn, generated, prefilled
        ):
            # Siblings are neighbours and share their prefill.
            first = j == 0 or fresh[p][-1][0] is not parent
            beams[p].generated += made
            beams[p].prefilled += read if first else read - len(parent.tokens)
            fresh.setdefault(p, []).append(
                (parent, Element(tokens, parent.ends + [len(tokens)], finished=finished))
            )
        for p, children in fresh.items():
            keep_best(beams[p], problems[p], children, values, width, alpha)
    for result in beams:
        result.best = max(result.candidates, key=lambda e: e.q)  # Q^pi alone; the first of equals
    return beams


def parents(elements, n):
    """Who draws a next step, each as often as its share of the n draws says; finished elements draw
    nothing."""
    return [e for e in elements if not e.finished for _ in range(max(1, n // len(elements)))]


def keep_best(result, problem, children, values, width, alpha):
    """One problem's beam after a step: its finished elements and the new ones (parent, child), the
    best `width`."""
    unique = {}
    for parent, child in children:
        unique.setdefault(tuple(child.tokens), (parent, child))
    q, mu, read = values(problem, [child.tokens for _, child in unique.values()])
    for (parent, child), child.q, child.mu in zip(unique.values(), q, mu):
        child.score = effective_score(child.q, parent.mu, child.mu, alpha)
    pool = [e for e in result.candidates if e.finished] + [child for _, child in unique.values()]
    chosen = select([e.score for e in pool], [tuple(e.tokens) for e in pool], width)
    result.candidates = [pool[i] for i in chosen]
    result.scored += read
    result.rounds += 1


def best_of_n(
    model, tokenizer, task, problems, values, *, n, limit, seed, problem_ids=None, **options
):
    """n whole solutions a problem, the one with the highest value wins -> [Result]. They are the
    samples that sample.py --n draws with the same seed. values=None: nothing is scored and the
    first sample stands as best."""
    ids = list(range(len(problems))) if problem_ids is None else list(problem_ids)
    prompts = [list(task.prompt_tokens(p, tokenizer)) for p in problems]
    out = generate(
        model,
        [p for p in prompts for _ in range(n)],
        max_new_tokens=limit,
        seed=seed,
        stop_ids=step_stops(task, tokenizer)[2],
        sequence_ids=[i * n + j for i in ids for j in range(n)],
        **options,
    )
    results = []
    for p, prompt in enumerate(prompts):
        candidates = [
            Element(prompt + out.completion(i), [len(prompt), int(out.length[i])], finished=True)
            for i in range(p * n, (p + 1) * n)
        ]
        read = 0
        if values is not None:
            q, _, read = values(problems[p], [e.tokens for e in candidates])
            for e, e.q in zip(candidates, q):
                e.score = e.q
        generated = sum(len(e.completion()) for e in candidates)
        best = max(candidates, key=lambda e: e.q)
        results.append(Result(best, candidates, generated, len(prompt), read, 1))
    return results


# ------------------------------------------------------------------------------------------------
# Command line.


def load_values(cfg, tokenizer, device):
    """Verifiers from the flags -> (values, words that say what was loaded). Refuses what cannot
    mean anything."""
    q = load_verifier(cfg.verifier, tokenizer, device)
    info = read_json(resolve(cfg.verifier, verifier=True) / "verifier.json")
    if info.get("label") == "outcome" and cfg.method == "beam":
        raise UserError(
            f"{cfg.verifier} is an outcome model: it was never asked about an unfinished "
            f"solution; train one "
            "with pav.py --label q, or use --method best-of-n"
        )
    k = cfg.prover_k or q.k
    q.k = 1  # Q^pi is the value of one sample; Best-of-k belongs to the prover
    description = f"Q^pi: {cfg.verifier}"
    if info.get("prover", "base") != "base" and info.get("label") != "outcome":
        description += f" (it values the prover {info['prover']}, not this policy;"
        description += " --prover base would be Q^pi)"
    if not cfg.prover_verifier:
        best_of_k = f"; mu: Best-of-{k} of it" if cfg.method == "beam" and cfg.alpha else ""
        return learned_values(q, None, k), description + best_of_k
    mu = load_verifier(cfg.prover_verifier, tokenizer, device)
    k = cfg.prover_k or mu.k
    mu.k = 1
    return learned_values(q, mu, k), f"{description}; mu: Best-of-{k} of {cfg.prover_verifier}"


def check(cfg):
    """-> width. UserError: flags that contradict one another, an --out that is a folder."""
    check_file(cfg.out)
    if not cfg.task:
        raise UserError("--task is missing: steps and answers are a task's")
    if (cfg.greedy or cfg.temperature == 0) and cfg.n > 1:
        raise UserError(
            f"a search with --n {cfg.n} needs candidates that differ: give --temperature above "
            f"0, not --greedy"
        )
    if cfg.method != "majority" and not cfg.verifier:
        raise UserError(
            f"--method {cfg.method} needs --verifier (pav.py trains one; the header of search.py "
            f"says how)"
        )
    width = cfg.width or cfg.n // 3
    if cfg.method == "beam" and (width < 1 or cfg.n % width):
        raise UserError(
            f"--n {cfg.n} candidates a step cannot be shared by {width} elements: give --n as a "
            f"multiple of "
            "3, or a --width that divides it"
        )
    if cfg.method == "beam" and not cfg.width and cfg.n % 3:
        raise UserError(
            f"--n {cfg.n} is no multiple of 3 (every element draws three steps); give another "
            f"--n or a --width"
        )
    return width


def search(cfg, task, model, tokenizer, options, width):
    """Search --num-problems problems; print accuracy beside what it cost. -> rows, one a
    problem."""
    clock = time.time()
    values, description = None, "no verifier"
    if cfg.method != "majority":
        values, description = load_values(cfg, tokenizer, model.head.device)
    problems = task.problems(cfg.split, cfg.num_problems or None, cfg.seed)
    shared = {k: v for k, v in options.items() if k not in ("stop_ids", "max_new_tokens")}
    label = "steps" if cfg.method == "beam" else "tokens"
    shared |= dict(n=cfg.n, limit=options["max_new_tokens"], label=label)
    with (
        torch.no_grad(),
        packed_weights(model.parameters(), min(options["slots"], cfg.n * len(problems))),
    ):
        if cfg.method == "beam":
            results = beam(
                model, tokenizer, task, problems, values, width=width, alpha=cfg.alpha, **shared
            )
        else:
            results = best_of_n(model, tokenizer, task, problems, values, **shared)
    texts = [[tokenizer.decode(e.completion()) for e in f.candidates] for f in results]
    right = [[task.grade(p, t) for t in of_problem] for p, of_problem in zip(problems, texts)]
    # A vote is for the final answer, where the task has one, or else for the whole text; nobody
    # votes: the first stands.
    votes = [
        vote([task.final_answer(p, t) for t in of_problem]) or 0
        for p, of_problem in zip(problems, texts)
    ]
    pick = votes
    if cfg.method != "majority":
        pick = [next(i for i, e in enumerate(f.candidates) if e is f.best) for f in results]
    rows = [
        dict(
            key=p.key,
            prompt=p.prompt,
            answer=p.answer,
            completion=t[i],
            reward=r[i],
            q=f.candidates[i].q,
            generated_tokens=f.generated,
            prefilled_tokens=f.prefilled,
            scored_tokens=f.scored,
        )
        for p, f, t, r, i in zip(problems, results, texts, right, pick)
    ]
    if cfg.out:
        write_rows(cfg.out, rows)
        print(f"chosen completions: {cfg.out}")
    print_result(cfg, rows, results, right, votes, width, description)
    print(f"{time.time() - clock:.1f} s")
    return rows


def print_result(cfg, rows, results, right, votes, width, description):
    """Lines for a person."""
    for r in rows[:3]:
        verdict = "right" if r["reward"] else "wrong"
        print(
            f"[{verdict}] {r['prompt'].strip()!r} -> {r['completion'].strip()!r} (gold "
            f"{r['answer']!r})"
        )
    beam_words = f"beam of {width}, {cfg.n} candidates a step, alpha {cfg.alpha}"
    print(f"{beam_words if cfg.method == 'beam' else f'{cfg.method}, n {cfg.n}'}; {description}")
    accuracy, low, high = interval([r["reward"] for r in rows])
    print(f"accuracy {accuracy:.3f} [{low:.3f}, {high:.3f}] (95%, {len(rows)} problems)")
    if cfg.method == "beam":
        print(f"some element of the last beam right: {mean(max(r) for r in right):.3f}")
    else:
        majority = mean(r[i] for r, i in zip(right, votes))
        one = mean(mean(r) for r in right)
        some = mean(pass_at_k(cfg.n, int(sum(r)), cfg.n) for r in right)
        print(
            f"of the same samples: majority vote {majority:.3f}, one sample {one:.3f}, "
            f"pass@{cfg.n} {some:.3f}"
        )
    costs = {k: mean(getattr(f, k) for f in results) for k in ("generated", "prefilled", "scored")}
    print(
        "tokens a problem: " + ", ".join(f"{tokens:.0f} {name}" for name, tokens in costs.items())
    )


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    width = check(cfg)
    return search(cfg, *start(cfg), width)


if __name__ == "__main__":
    script(main)
