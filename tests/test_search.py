"""search.py: who is kept, what a beam costs, and that a problem's search depends on its seed and id alone."""

import copy
import itertools

import pytest
import torch
from toy import EOS, Problem, ToyTask, tiny_model

import search
from infra.cli import UserError
from model import save_model
from open_weights.tokenizer import alphabet_tokenizer
from report.statistics import vote
from search import beam, best_of_n, effective_score, learned_values, parents, select
from tasks import get_task
from tasks.base import Task, line_ends
from verifier import Verifier, save_verifier

OPTIONS = dict(n=6, limit=6, seed=3, temperature=1.0)


class Pairs(ToyTask):
    """The toy with a step of two tokens that the search can know of."""

    step_tokens = 2


class Lines(Task):
    """Prompt "37=", steps are lines; newlines and blanks are frequent under a random model."""

    strengths, ends_with_eos, max_new_tokens, step_tokens = None, True, 12, 0

    def tokenizer(self):
        return alphabet_tokenizer(list("012345= ") + ["\n", "7\n"])

    def problems(self, split, n, seed):
        return [Problem(str(i), f"{i}=", str(i)) for i in range(n or 6)]

    def prompt_tokens(self, problem, tokenizer):
        return tokenizer.encode(problem.prompt)

    def grade(self, problem, completion):
        return float(problem.answer in completion)


@pytest.fixture
def model():
    return tiny_model()


def sevens(problem, rows):
    """A value that anybody can check: the share of tokens that are the prompt's second digit."""
    q = [sum(t == int(problem.answer) for t in r[3:]) / 6 for r in rows]
    return q, [x**0.5 for x in q], sum(map(len, rows))


def run(model, task=None, values=sevens, count=8, width=2, alpha=0.5, **other):
    task = task or Pairs()
    tokenizer = task.tokenizer()
    problems = task.problems("val", count, 0)
    return problems, tokenizer, beam(model, tokenizer, task, problems, values, width=width, alpha=alpha, **(OPTIONS | other))


def test_select_takes_the_best_distinct_and_the_earlier_of_equals():
    assert select([0.1, 0.9, 0.9, 0.5], "abcd", 2) == [1, 2]
    assert select([0.1, 0.9, 0.9, 0.5], "abbd", 3) == [1, 3, 0]  # two copies are one candidate
    assert select([1.0, 1.0, 1.0], "aaa", 2) == [0]


def test_effective_score_is_q_plus_alpha_times_progress():
    assert effective_score(0.5, 0.2, 0.6, 2.0) == pytest.approx(1.3)
    assert effective_score(0.5, 0.2, 0.6, 0.0) == 0.5


def test_majority_prefers_the_commonest_then_the_earliest_and_ignores_the_unparsed():
    assert vote(["3", "5", "5"]) == 1
    assert vote(["3", "5", "5", "3"]) == 0
    assert vote([None, None, "4"]) == 2
    assert vote([None, None]) is None


def test_draws_are_shared_among_the_living_and_the_finished_keep_their_share():
    a, b, done = (search.Element([i], [1], finished=i == 2) for i in range(3))
    assert parents([a], 6) == [a] * 6
    assert parents([a, b], 6) == [a] * 3 + [b] * 3
    assert parents([a, b, done], 6) == [a] * 2 + [b] * 2
    assert parents([done], 6) == []


@pytest.mark.parametrize("width, alpha", [(1, 0.0), (2, 0.5), (6, 1.0)])
def test_a_beam_against_its_definition_in_plain_python(model, width, alpha):
    """The same search written without batches: one problem, lists, every candidate drawn by generate alone."""
    problems, tokenizer, found = run(model, width=width, alpha=alpha)
    for p, problem in enumerate(problems):
        prompt = tokenizer.encode(problem.prompt)
        kept = [(0.0, prompt, False, 0.0)]  # score, tokens, finished, mu
        cost = 0
        for step in itertools.count():
            living = [(t, m) for _, t, f, m in kept if not f for _ in range(max(1, 6 // len(kept)))]
            if not living:
                break
            pool, seen = [x for x in kept if x[2]], set()
            for j, (tokens, before) in enumerate(living):
                out = search.generate(model, [tokens], max_new_tokens=min(2, 6 - (len(tokens) - 3)), temperature=1.0,
                                      seed=search.derive(search.derive(3, "beam", step), "step", 0), stop_ids=[EOS],
                                      sequence_ids=[p * 6 + j])
                new = tokens + out.completion(0)
                cost += len(new) - len(tokens)
                q, mu, _ = sevens(problem, [new])
                if tuple(new) not in seen:
                    pool.append((q[0] + alpha * (mu[0] - before), new, new[-1] == EOS or len(new) == 9, mu[0]))
                seen.add(tuple(new))
            kept = sorted(pool, key=lambda x: -x[0])[:width]
        assert [e.tokens for e in found[p].candidates] == [t for _, t, _, _ in kept]
        assert found[p].generated == cost
        best = max(sevens(problem, [t])[0][0] for _, t, _, _ in kept)
        assert found[p].best.q == best  # Q alone, whatever alpha


def test_the_answer_is_chosen_by_q_and_the_beam_by_the_effective_score(model):
    def values(problem, rows):  # what q likes and what the prover likes have nothing to do with each other
        return [sum(r) % 7 / 7 for r in rows], [sum(r) % 5 / 5 for r in rows], 0

    _, _, found = run(model, values=values, alpha=2.0)
    assert all(f.best.q == max(e.q for e in f.candidates) for f in found)
    assert any(f.best is not max(f.candidates, key=lambda e: e.score) for f in found)


@pytest.mark.parametrize("slots", [1, 5, 64])
def test_order_company_and_slots_do_not_change_a_search(model, slots):
    verifier = Verifier(tiny_model(1))
    torch.nn.init.normal_(verifier.head.weight, generator=torch.Generator().manual_seed(0))
    task = Pairs()
    tokenizer, problems, values = task.tokenizer(), task.problems("val", 12, 0), learned_values(verifier, k=4)
    whole = beam(model, tokenizer, task, problems, values, width=2, alpha=0.5, **OPTIONS)
    order = [7, 2, 11, 0, 5]
    part = beam(model, tokenizer, task, [problems[i] for i in order], values, width=2, alpha=0.5, problem_ids=order,
                slots=slots, **OPTIONS)
    for i, found in zip(order, part):
        assert found == whole[i]  # tokens, values and books, to the last bit
    other = beam(model, tokenizer, task, problems, values, width=2, alpha=0.5, **(OPTIONS | dict(seed=4)))
    assert [f.best.tokens for f in other] != [f.best.tokens for f in whole]


def test_alpha_is_idle_with_one_parent_and_a_prover_that_ranks_as_q(model):
    """Width 1 and Best-of-K: siblings share V(s) and 1-(1-q)^K is monotone, so Q + alpha A is the same algorithm."""
    verifier = Verifier(tiny_model(1))
    torch.nn.init.normal_(verifier.head.weight, generator=torch.Generator().manual_seed(0))
    plain, paid = (run(model, values=learned_values(verifier, k=8), width=1, alpha=a)[2] for a in (0.0, 3.0))
    assert [f.best.tokens for f in plain] == [f.best.tokens for f in paid]


def test_every_element_goes_on_from_its_own_ids_and_nothing_is_encoded_again(model, monkeypatch):
    task = Pairs()
    tokenizer, problems = task.tokenizer(), task.problems("val", 4, 0)
    ids = {p.prompt: tokenizer.encode(p.prompt) for p in problems}
    monkeypatch.setattr(task, "prompt_tokens", lambda p, t: ids[p.prompt])
    monkeypatch.setattr(type(tokenizer), "encode", lambda *a: pytest.fail("a decoded text was encoded"))
    monkeypatch.setattr(type(tokenizer), "decode", lambda *a: pytest.fail("ids were decoded during the search"))
    seen, real = [], search.generate
    monkeypatch.setattr(search, "generate", lambda m, prompts, **o: seen.append(copy.deepcopy(prompts)) or real(m, prompts, **o))
    found = beam(model, tokenizer, task, problems, sevens, width=2, alpha=0.5, **OPTIONS)
    assert seen[0] == [ids[p.prompt] for p in problems for _ in range(6)]  # first step: six draws from each bare prompt
    for f in found:
        for e in f.candidates:
            assert e.tokens[:3] in ids.values() and e.ends[0] == 3 and e.ends[-1] == len(e.tokens)
            assert e.ends == sorted(set(e.ends)) and e.finished


def test_the_books_count_every_candidate_and_each_prefix_once(model):
    """Neither EOS nor copies: 3 steps of 2 tokens, 6 candidates each; 1 prompt, then at most 2 prefixes are prefilled."""
    tokenizer = Pairs().tokenizer()
    with torch.no_grad():
        model.head[EOS] = 0.0
    _, _, found = run(model, count=8)
    whole = [f for f in found if all(len(e.tokens) == 9 for e in f.candidates) and f.generated == 6 * 6]
    assert whole and list(tokenizer.eos_ids) == [EOS]
    assert all(f.prefilled <= 3 + 2 * 5 + 2 * 7 and f.rounds == 3 for f in whole)
    assert all(f.scored <= 3 + 6 * 5 + 6 * 7 + 6 * 9 for f in whole)


def test_a_step_is_a_line_and_blank_lines_are_none():
    task = Lines()
    tokenizer = task.tokenizer()
    model = tiny_model(vocab=tokenizer.n_vocab, context=64)
    _, _, found = run(model, task=task, values=lambda p, rows: ([len(r) / 99 for r in rows],) * 2 + (0,), count=6,
                      limit=12, width=3)
    steps = [e.tokens[a:b] for f in found for e in f.candidates for a, b in itertools.pairwise(e.ends)]
    text = [tokenizer.decode(s) for s in steps]
    assert sum("\n" in t for t in text) > 10 and any(t.startswith("\n") for t in text)  # a blank joins the next line
    for tokens, t in zip(steps, text):
        last = tokens[-1] in tokenizer.eos_ids or any(e.tokens[-len(tokens) :] == tokens for f in found for e in f.candidates)
        assert last or (t.endswith("\n") and t.strip() and "\n" not in t.lstrip("\n ")[:-1])
    assert all(len(e.completion()) <= 12 for f in found for e in f.candidates)
    for e in (e for f in found for e in f.candidates):  # where the verifier was trained to be read
        assert set(line_ends(e.tokens, e.ends[0], len(e.tokens), tokenizer)) <= set(e.ends)


@pytest.mark.parametrize("name", ["planted", "countdown", "chain", "stargraph", "worded", "contextual"])
def test_every_position_that_a_beam_ranks_at_is_one_that_is_labelled(name):
    """Values are read where the verifier was trained to be read: at the task's own step ends."""
    task = get_task(name)
    tokenizer = task.tokenizer()
    model = tiny_model(vocab=tokenizer.n_vocab, context=64)
    problems = task.problems("val", 6, 0)
    found = beam(model, tokenizer, task, problems, lambda p, rows: ([0.5] * len(rows),) * 2 + (0,), n=6, width=3, alpha=0.0,
                 limit=task.max_new_tokens, seed=0, temperature=1.0)
    for e in (e for f in found for e in f.candidates):
        assert set(e.ends[1:]) <= set(task.step_ends(e.tokens, e.ends[0], len(e.tokens), tokenizer))


def test_best_of_n_ranks_the_samples_that_sample_py_draws(model):
    task = Pairs()
    tokenizer, problems = task.tokenizer(), task.problems("val", 5, 0)
    found = best_of_n(model, tokenizer, task, problems, sevens, **OPTIONS)
    prompts = [tokenizer.encode(p.prompt) for p in problems for _ in range(6)]
    out = search.generate(model, prompts, max_new_tokens=6, temperature=1.0, seed=3, stop_ids=tokenizer.eos_ids)
    for p, f in enumerate(found):
        assert [e.completion() for e in f.candidates] == [out.completion(p * 6 + j) for j in range(6)]
        assert f.best.q == max(sevens(problems[p], [e.tokens for e in f.candidates])[0])
        assert f.generated == sum(len(e.completion()) for e in f.candidates)


def test_best_of_k_comes_from_the_same_forward_pass_and_another_prover_from_its_own():
    one, two = Verifier(tiny_model(1)), Verifier(tiny_model(2))
    for v in (one, two):
        torch.nn.init.normal_(v.head.weight, generator=torch.Generator().manual_seed(0))
    rows = [[1, 2, 3], [1, 2, 3, 4, 5]]
    q, mu, read = learned_values(one, k=3)(None, rows)
    assert mu == pytest.approx([1 - (1 - x) ** 3 for x in q]) and read == 8
    q2, mu2, read2 = learned_values(one, two, k=1)(None, rows)
    assert q2 == q and mu2 == pytest.approx(learned_values(two)(None, rows)[0]) and read2 == 16


# ----------------------------------------------------------------------------------------------------
# Flags


@pytest.fixture
def folders(tmp_path):
    """A policy of the planted task, two verifiers for it, and one of another tokenizer; all of random weights."""
    task = get_task("planted")
    tokenizer = task.tokenizer()
    model = tiny_model(vocab=tokenizer.n_vocab)
    save_model(tmp_path / "policy", model, tokenizer)
    for name, label, print_ in [("q", "q", tokenizer.fingerprint), ("orm", "outcome", tokenizer.fingerprint),
                                ("foreign", "q", "another")]:
        (tmp_path / name).mkdir()
        save_verifier(tmp_path / name, Verifier(model, fingerprint=print_), tokenizer, dict(label=label, prover="base"))
    return {name: str(tmp_path / name) for name in ("policy", "q", "orm", "foreign")}


def call(folders, *argv):
    return search.main(["--model", folders["policy"], "--num-problems", "4", *argv])


@pytest.mark.parametrize("match, argv", [
    ("another tokenizer", ["--task", "planted", "--method", "beam", "--n", "3", "--verifier", "foreign"]),
    ("multiple of 3", ["--task", "planted", "--method", "beam", "--n", "4", "--verifier", "q"]),
    ("multiple of 3", ["--task", "planted", "--method", "beam", "--n", "1", "--verifier", "q"]),
    ("divides", ["--task", "planted", "--method", "beam", "--n", "6", "--width", "4", "--verifier", "q"]),
    ("temperature", ["--task", "planted", "--method", "beam", "--n", "6", "--greedy", "--verifier", "q"]),
    ("needs --verifier", ["--task", "planted", "--method", "best-of-n", "--n", "6"]),
    ("--task is missing", ["--method", "beam", "--n", "6", "--verifier", "q"]),
    ("outcome model", ["--task", "planted", "--method", "beam", "--n", "6", "--verifier", "orm"]),
    ("not a verifier", ["--task", "planted", "--method", "beam", "--n", "6", "--verifier", "policy"]),
])
def test_flags_that_cannot_mean_anything_are_refused(folders, match, argv):
    with pytest.raises(UserError, match=match):
        call(folders, *[folders.get(a, a) for a in argv])


@pytest.mark.parametrize("argv", [["beam", "--verifier", "q", "--alpha", "0.5", "--prover-k", "4"],
                                  ["beam", "--verifier", "q", "--prover-verifier", "q", "--width", "3"],
                                  ["best-of-n", "--verifier", "orm"], ["majority"]])
def test_each_search_runs_and_says_what_it_cost(capsys, folders, tmp_path, argv):
    call(folders, "--task", "planted", "--n", "6", "--out", str(tmp_path / "new" / "out.jsonl"), "--method",
         *[folders.get(a, a) for a in argv])
    said = capsys.readouterr().out
    assert "accuracy" in said and "generated" in said and "prefilled" in said
    assert "[0.000, 0.490]" in said or "accuracy 0.000" not in said  # 0 of 4 is no proof of 0: Wilson's interval
    assert len((tmp_path / "new" / "out.jsonl").read_text().splitlines()) == 4


def test_the_vote_is_that_of_evaluations(monkeypatch, folders):
    """Of "3", "1/2" and "0.5" the grader says that two are one answer, in a search as in an evaluation."""
    task = type(get_task("planted"))
    texts = {}

    def answer(self, problem, text):
        texts.setdefault(problem.key, []).append(text)
        return ["3", "1/2", "0.5"][len(texts[problem.key]) - 1]

    monkeypatch.setattr(task, "final_answer", answer)
    rows = call(folders, "--task", "planted", "--n", "3", "--method", "majority")
    assert len(rows) == 4 and all(r["completion"] == texts[r["key"]][1] for r in rows)
