"""The smallest task and model that can show a mistake. Kept apart from conftest.py so that the processes which
test_resume.py starts and kills can import it."""

import random
from dataclasses import dataclass

import torch

from infra.seeds import generator
from model import Config, Transformer, init_weights
from open_weights.tokenizer import alphabet_tokenizer
from rollouts import Rollouts
from tasks.base import Task

EOS = 11  # ids 0..9 are the digits, 10 is "=", 11 ends a completion


@dataclass(frozen=True)
class Problem:
    key: str
    prompt: str
    answer: str


class ToyTask(Task):
    """Prompt "37=", right if the completion contains a 7: the gold stands in the prompt, so that rewards computed
    with somebody else's gold are seen. A step is two tokens (the last may be one); "=" in it is illegal."""

    ends_with_eos = random_demonstrations = True
    max_new_tokens = 6
    strengths = dict(base=1.0, prover=5.0, strong=50.0)

    def tokenizer(self):
        return alphabet_tokenizer(list("0123456789="))

    def problems(self, split, n, seed):
        parity = 0 if split == "train" else 1
        numbers = [f"{i:02d}" for i in range(100) if sum(divmod(i, 10)) % 2 == parity]
        found = [Problem(s, s + "=", s[1]) for s in numbers]
        return found[: n or len(found)]

    def prompt_tokens(self, problem, tokenizer):
        return tokenizer.encode(problem.prompt)

    def demonstration(self, problem, strength, seed):
        rng = random.Random(seed)
        knows, n = strength / (strength + 9), rng.randint(1, 3)
        digits = [problem.answer if rng.random() < knows else rng.choice("0123456789") for _ in range(n)]
        return "".join(digits)

    def grade(self, problem, completion):
        return float(problem.answer in completion)

    def step_ends(self, tokens, prompt_len, length, tokenizer):
        return sorted({*range(prompt_len + 2, length, 2), length})

    def credit_ends(self, tokens, prompt_len, length, tokenizer):
        return self.step_ends(tokens, prompt_len, length, tokenizer)

    def first_illegal_step(self, problem, completion):
        return completion.index("=") // 2 if "=" in completion else None


def tiny_model(seed=0, tied=True, layers=2, heads=4, kv_heads=2, context=32, vocab=12):
    shape = Config(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
                   num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=4, max_position_embeddings=context,
                   tie_word_embeddings=tied)
    return init_weights(Transformer(shape), generator(seed, "toy")).requires_grad_(True)


def make_rollouts(prompts, completions):
    """Rollouts as generate() returns them, from lists of ids written by hand; the sampler's log-probs are zeros."""
    rows = [p + c for p, c in zip(prompts, completions)]
    length = torch.tensor([len(r) for r in rows])
    tokens = torch.zeros(len(rows), int(length.max()), dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = torch.tensor(row)
    reasons = ["stop" if c and c[-1] == EOS else "length" for c in completions]
    return Rollouts(tokens, torch.tensor([len(p) for p in prompts]), length, torch.zeros(tokens.shape), reasons, 1.0)
