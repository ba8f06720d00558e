"""Search at test time: spend more tokens on a problem, and let verifiers say which of them were well spent.

    python train_sft.py --task planted --planted-length 4 --run-dir runs/p4/sft                  # the policy, 15 s on a CPU
    python pav.py --task planted --planted-length 4 --policy runs/p4/sft --prover base --label q \\
        --num-problems 20000 --run-dir runs/p4/q                                                 # Q^pi, a minute
    python pav.py --task planted --planted-length 4 --policy runs/p4/sft --label outcome \\
        --num-problems 20000 --run-dir runs/p4/orm                                               # an ORM, a minute
    python sample.py --task planted --planted-length 4 --model runs/p4/sft --search beam --n 12 \\
        --verifier runs/p4/q --alpha 0.5 --prover-k 4                                            # 5 s
    python sample.py --task planted --planted-length 4 --model runs/p4/sft --search best-of-n --n 12 --verifier runs/p4/orm
    python sample.py --task jsonl --data q.jsonl --model smollm2 --search beam --n 12 --verifier runs/q --alpha 0.5

The three verifiers (PAV, arXiv 2410.08146, sections 4 and 5; pav.py trains each):
    --verifier         Q^pi of the policy that is searched (`--label q --prover base`); for best-of-n also an ORM
                       (`--label outcome`), which knows finished solutions only
    --prover-k K       A^mu of the Best-of-K prover comes from the same Q^pi, as 1 - (1-Q)^K (eq. 30): no second model
    --prover-verifier  A^mu of any other prover mu: `--label q --prover DIR`, DIR being that prover

Beam search: --n candidates a step, of which --width are kept (default n/3: every element draws C = 3 next steps).
Candidates are ranked by Q^pi + alpha * A^mu; a finished one stays in the ranking with its score and draws nothing. The
answer is the last beam's element with the highest Q^pi alone. Each element goes on from its own token ids: nothing is
decoded and encoded again. Its prefix is prefilled anew at every step (once for its C children); there is no cache
between steps. Three books are kept: tokens generated (the axis of every comparison: all candidates count, dropped
ones too), tokens prefilled, tokens read by verifiers.

Two choices the paper is silent on: equal candidates count once (a beam of copies is no beam; their share of the n draws goes
to the others), and ties go to the earlier candidate. A step ends with the token that holds the newline after some text, as
tasks/base.py has it, or after task.step_tokens tokens.
Left out: look-ahead rollouts, a schedule of widths, keeping the cache of the survivors.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.cli import UserError
from infra.runs import derive, mean
from kernels import packed_weights
from model import pad_right, resolve
from pav import load_verifier, prover_transform, step_values
from sample import generate, pass_at_k
from tasks import get_task


@dataclass
class Element:
    """A solution so far: tokens = prompt + steps; ends = exclusive step ends, ends[0] the prompt's length. q is Q^pi of
    the whole, mu the prover's value of it, score what it is ranked by."""

    tokens: list
    ends: list
    q: float = 0.0
    mu: float = 0.0
    score: float = 0.0
    finished: bool = False

    def completion(self):
        return self.tokens[self.ends[0] :]


@dataclass
class Found:
    """One problem's result: the chosen element, all that it was chosen from, and what they cost in tokens."""

    best: Element
    candidates: list
    generated: int = 0  # by the policy, all candidates of all steps
    prefilled: int = 0  # prefixes read again by the policy, each distinct one once a step
    scored: int = 0  # read by verifiers
    rounds: int = 0


# ----------------------------------------------------------------------------------------------------
# Pure functions.


def effective_score(q, before, after, alpha):
    """Q^pi(s,a) + alpha * A^mu(s,a), with A^mu = V^mu after the step - V^mu before it (eq. 5). Numbers or tensors."""
    return q + alpha * (after - before)


def select(scores, keys, width):
    """Indices of the `width` highest scores, best first; of candidates with equal keys only the first counts, and
    ties go to the earlier one. scores: n floats, keys: n hashables."""
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    return sorted(first.values(), key=lambda i: (-scores[i], i))[:width]


def majority(answers):
    """Index of the first sample that gives the commonest answer (ties: the answer that came first); None votes for
    nothing unless there is nothing else."""
    votes = [a for a in answers if a is not None] or list(answers)
    return answers.index(max(votes, key=lambda a: (votes.count(a), -votes.index(a))))


def step_stops(task, tokenizer):
    """(ids that may end a step, tokens of a step or 0 for any number, ids that end a completion): a step is a line, up to
    a token that holds a newline, or a fixed number of tokens."""
    eos = frozenset(task.stop_ids(tokenizer) if hasattr(task, "stop_ids") else tokenizer.eos_ids)
    if fixed := getattr(task, "step_tokens", 0):
        return frozenset(), fixed, eos
    return frozenset(t for t in range(tokenizer.n_vocab) if b"\n" in tokenizer.token_bytes(t)) - eos, 0, eos


# ----------------------------------------------------------------------------------------------------
# Drawing steps and reading values.


def draw_steps(model, tokenizer, stops, prefixes, starts, ids, limit, seed, options):
    """One more step for each prefix (a list of token ids whose completion begins at starts[i]).

    stops: see step_stops; ids fix the draws. Returns [(tokens with the step, finished)], generated tokens per prefix
    [n], and the lengths of what was prefilled [n]. A blank line is no step: there the drawing goes on.
    """
    (newline, fixed, eos), context = stops, model.cfg.max_position_embeddings
    rows, finished, prefilled = [list(p) for p in prefixes], [False] * len(prefixes), [0] * len(prefixes)
    todo, attempt = list(range(len(rows))), 0
    while todo:
        room = [limit - (len(rows[i]) - starts[i]) for i in todo]
        out = generate(model, [rows[i] for i in todo], max_new_tokens=[min(r, fixed) if fixed else r for r in room],
                       seed=derive(seed, "step", attempt), sequence_ids=[ids[i] for i in todo],
                       stop_ids=[*eos, *newline], **options)
        for j, i in enumerate(todo):
            prefilled[i] += len(rows[i])
            rows[i] += out.completion(j)
            finished[i] = rows[i][-1] in eos or room[j] == len(out.completion(j)) or len(rows[i]) >= context
        line = {i: b"".join(map(tokenizer.token_bytes, rows[i][len(prefixes[i]) :])).lstrip() for i in todo if not fixed}
        todo, attempt = [i for i in line if not finished[i] and b"\n" not in line[i]], attempt + 1
    return list(zip(rows, finished)), [len(r) - len(p) for r, p in zip(rows, prefixes)], prefilled


def learned_values(q_verifier, mu_verifier=None, k=1):
    """-> function (problem, rows) -> (Q^pi [n], V^mu [n], tokens read); rows: n lists of token ids of one problem.

    Without mu_verifier the prover is Best-of-k of the policy, from the same forward pass. One problem makes one batch,
    so that a value does not depend (in its last bit) on which other problems are searched beside it.
    """
    def values(problem, rows):
        tokens, length = pad_right(rows)
        q = step_values(q_verifier, tokens, length[:, None])[:, 0]
        mu = step_values(mu_verifier, tokens, length[:, None])[:, 0] if mu_verifier is not None else q
        return q.tolist(), prover_transform(mu, k).tolist(), int(length.sum()) * (1 + (mu_verifier is not None))

    return values


def beam(model, tokenizer, task, problems, values, *, n, width, alpha, limit, seed, problem_ids=None, **options):
    """Beam search over steps -> [Found], one a problem.

    n candidates a step, `width` kept; values as learned_values gives it; limit: tokens a completion may have; seed and
    problem_ids (default 0, 1, ...) fix the draws of a problem whatever is searched beside it. options go to generate.
    """
    ids = list(range(len(problems))) if problem_ids is None else list(problem_ids)
    beams = []
    for problem in problems:
        prompt = list(task.prompt_tokens(problem, tokenizer))
        q, mu, read = values(problem, [prompt])
        beams.append(Found(None, [Element(prompt, [len(prompt)], q[0], mu[0])], scored=read))
    stops, step = step_stops(task, tokenizer), 0
    while grow := [(p, j, e) for p, found in enumerate(beams) for j, e in enumerate(parents(found.candidates, n))]:
        drawn, generated, prefilled = draw_steps(
            model, tokenizer, stops, [e.tokens for _, _, e in grow], [e.ends[0] for _, _, e in grow],
            [ids[p] * n + j for p, j, _ in grow], limit, derive(seed, "beam", step), options)
        fresh = {}
        for (p, j, parent), (tokens, finished), made, read in zip(grow, drawn, generated, prefilled):
            first = j == 0 or fresh[p][-1][0] is not parent  # siblings are neighbours and share their prefill
            beams[p].generated += made
            beams[p].prefilled += read if first else read - len(parent.tokens)
            fresh.setdefault(p, []).append((parent, Element(tokens, parent.ends + [len(tokens)], finished=finished)))
        for p, children in fresh.items():
            keep_best(beams[p], problems[p], children, values, width, alpha)
        step += 1
    for found in beams:
        found.best = max(found.candidates, key=lambda e: e.q)  # Q^pi alone; the first of equals
    return beams


def parents(elements, n):
    """Who draws a next step, each as often as its share of the n draws says; finished elements draw nothing."""
    return [e for e in elements if not e.finished for _ in range(max(1, n // len(elements)))]


def keep_best(found, problem, children, values, width, alpha):
    """One problem's beam after a step: its finished elements and the new ones (parent, child), the best `width`."""
    unique = {}
    for parent, child in children:
        unique.setdefault(tuple(child.tokens), (parent, child))
    q, mu, read = values(problem, [child.tokens for _, child in unique.values()])
    for (parent, child), child.q, child.mu in zip(unique.values(), q, mu):
        child.score = effective_score(child.q, parent.mu, child.mu, alpha)
    pool = [e for e in found.candidates if e.finished] + [child for _, child in unique.values()]
    chosen = select([e.score for e in pool], [tuple(e.tokens) for e in pool], width)
    found.candidates, found.scored, found.rounds = [pool[i] for i in chosen], found.scored + read, found.rounds + 1


def best_of_n(model, tokenizer, task, problems, values, *, n, limit, seed, problem_ids=None, **options):
    """n whole solutions a problem, the one with the highest value wins -> [Found]. They are the samples that
    sample.py --n draws with the same seed. values=None: nothing is scored and the first sample stands as best."""
    ids = list(range(len(problems))) if problem_ids is None else list(problem_ids)
    prompts = [list(task.prompt_tokens(p, tokenizer)) for p in problems]
    out = generate(model, [p for p in prompts for _ in range(n)], max_new_tokens=limit, seed=seed,
                   stop_ids=step_stops(task, tokenizer)[2], sequence_ids=[i * n + j for i in ids for j in range(n)], **options)
    results = []
    for p, prompt in enumerate(prompts):
        own = [Element(prompt + out.completion(i), [len(prompt), int(out.length[i])], finished=True)
               for i in range(p * n, (p + 1) * n)]
        read = 0
        if values is not None:
            q, _, read = values(problems[p], [e.tokens for e in own])
            for e, e.q in zip(own, q):
                e.score = e.q
        made = sum(len(e.completion()) for e in own)
        results.append(Found(max(own, key=lambda e: e.q), own, made, len(prompt), read, 1))
    return results


# ----------------------------------------------------------------------------------------------------
# The road from sample.py's flags.


def load_values(cfg, tokenizer, device):
    """Verifiers from the flags -> (values, words that say what was loaded). Refuses what cannot mean anything."""
    q = load_verifier(cfg.verifier, tokenizer, device)
    info = json.loads((resolve(cfg.verifier) / "verifier.json").read_text())
    if info.get("label") == "outcome" and cfg.search == "beam":
        raise UserError(f"{cfg.verifier} is an outcome model: it was never asked about an unfinished solution; train one with "
                        "pav.py --label q, or use --search best-of-n")
    k, q.k = cfg.prover_k or q.k, 1  # Q^pi is the value of one sample; Best-of-k belongs to the prover
    said = f"Q^pi: {cfg.verifier}"
    if info.get("prover", "base") != "base" and info.get("label") != "outcome":
        said += f" (it values the prover {info['prover']}, not this policy; --prover base would be Q^pi)"
    if not cfg.prover_verifier:
        return learned_values(q, None, k), said + (f"; mu: Best-of-{k} of it" if cfg.search == "beam" and cfg.alpha else "")
    mu = load_verifier(cfg.prover_verifier, tokenizer, device)
    k, mu.k = cfg.prover_k or mu.k, 1
    return learned_values(q, mu, k), said + f"; mu: Best-of-{k} of {cfg.prover_verifier}"


def check(cfg, temperature):
    """-> width. UserError: flags that contradict one another."""
    if not cfg.task:
        raise UserError("--search needs --task: steps and answers are a task's")
    if temperature == 0 and cfg.n > 1:
        raise UserError(f"--search with --n {cfg.n} needs candidates that differ: give --temperature above 0, not --greedy")
    if cfg.search != "majority" and not cfg.verifier:
        raise UserError(f"--search {cfg.search} needs --verifier (pav.py trains one; search.py's header says how)")
    width = cfg.width or cfg.n // 3
    if cfg.search == "beam" and (width < 1 or cfg.n % width):
        raise UserError(f"--n {cfg.n} candidates a step cannot be shared by {width} elements: give --n as a multiple of 3, "
                        "or a --width that divides it")
    if cfg.search == "beam" and not cfg.width and cfg.n % 3:
        raise UserError(f"--n {cfg.n} is no multiple of 3 (every element draws three steps); give another --n or a --width")
    return width


def answer(cfg, model, tokenizer, options):
    """Search --num-problems problems; print accuracy beside what it cost. Called by sample.py."""
    clock, width = time.time(), check(cfg, options["temperature"])
    task = get_task(cfg)
    values, said = load_values(cfg, tokenizer, model.head.device) if cfg.search != "majority" else (None, "no verifier")
    problems = task.problems(cfg.split, cfg.num_problems or None, cfg.seed)
    shared = {k: v for k, v in options.items() if k != "stop_ids"}
    shared |= dict(n=cfg.n, limit=cfg.max_new_tokens or task.max_new_tokens)
    with torch.no_grad(), packed_weights(model.parameters(), min(options["slots"], cfg.n * len(problems))):
        if cfg.search == "beam":
            found = beam(model, tokenizer, task, problems, values, width=width, alpha=cfg.alpha, **shared)
        else:
            found = best_of_n(model, tokenizer, task, problems, values, **shared)
    text = [[tokenizer.decode(e.completion()) for e in f.candidates] for f in found]
    right = [[task.grade(p, t) for t in texts] for p, texts in zip(problems, text)]
    said_by = getattr(task, "answer", lambda problem, text: text)  # a vote is for the final answer, or else for the text
    votes = [majority([said_by(p, t) for t in texts]) for p, texts in zip(problems, text)]
    pick = votes if cfg.search == "majority" else [next(i for i, e in enumerate(f.candidates) if e is f.best) for f in found]
    report(cfg, problems, found, text, right, votes, pick, width, said)
    print(f"{time.time() - clock:.1f} s")


def report(cfg, problems, found, text, right, votes, pick, width, said):
    """Lines for a person, and --out."""
    rows = [dict(key=p.key, prompt=p.prompt, answer=p.answer, completion=t[i], reward=r[i], q=f.candidates[i].q,
                 generated_tokens=f.generated, prefilled_tokens=f.prefilled, scored_tokens=f.scored)
            for p, f, t, r, i in zip(problems, found, text, right, pick)]
    if cfg.out:
        Path(cfg.out).write_text("".join(json.dumps(r) + "\n" for r in rows))
        print(f"chosen completions: {cfg.out}")
    for r in rows[:3]:
        verdict = "right" if r["reward"] else "wrong"
        print(f"[{verdict}] {r['prompt'].strip()!r} -> {r['completion'].strip()!r} (gold {r['answer']!r})")
    accuracy = mean(r["reward"] for r in rows)
    error = 1.96 * (accuracy * (1 - accuracy) / len(rows)) ** 0.5
    what = f"beam of {width}, {cfg.n} candidates a step, alpha {cfg.alpha}"
    what = what if cfg.search == "beam" else f"{cfg.search}, n {cfg.n}"
    print(f"{what}; {said}")
    print(f"accuracy {accuracy:.3f} +- {error:.3f} (95%, {len(rows)} problems)")
    if cfg.search != "beam":
        print(f"of the same samples: majority vote {mean(r[i] for r, i in zip(right, votes)):.3f}, one sample "
              f"{mean(mean(r) for r in right):.3f}, pass@{cfg.n} {mean(pass_at_k(cfg.n, int(sum(r)), cfg.n) for r in right):.3f}")
    else:
        print(f"some element of the last beam right: {mean(max(r) for r in right):.3f}")
    print("tokens a problem: " + ", ".join(f"{mean(getattr(f, k) for f in found):.0f} {k}"
                                           for k in ("generated", "prefilled", "scored")))
