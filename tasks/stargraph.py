"""The task stargraph: one critical first step that needs looking ahead; the rest is a look-up.

    python train_sft.py --task stargraph --num-problems 2000 --num-examples 2000

papers/train_dpo.py uses it.
"""

import functools
import random

from infra.cli import UserError
from tasks.base import Problem, Task, split_of

POOL = 24000  # problems made; eight tenths are for training


class StarGraph(Task):
    """Find the arm of a star that ends at the goal (Bachmann and Nagarajan 2024, arXiv 2403.06963).

    Prompt: the shuffled edges of `degree` arms that leave one source, then source and goal;
    response: the `path`-1 nodes from the source's neighbour to the goal. After the first,
    *critical* one every node is the only successor of the one before, a look-up that hides from
    imitation that the first needs looking ahead. A step is a token.
    """

    # There is no scripted teacher: the prover is Best-of-4 of the base policy.
    stages = Task.stages | dict(verifier=Task.stages["verifier"] | dict(prover_k=4))
    ends_with_eos = False
    random_demonstrations = True
    step_tokens = 1

    def __init__(self, degree=2, path=3, nodes=8):
        if not (degree >= 2 and path >= 3 and degree * (path - 1) + 1 <= nodes <= 99):
            raise UserError(
                "stargraph needs degree >= 2, path >= 3 and degree * (path - 1) + 1 <= nodes <= 99"
            )
        self.degree, self.path, self.nodes = degree, path, nodes
        self.max_new_tokens = path - 1

    def tokenizer(self):
        from open_weights.tokenizer import alphabet_tokenizer

        return alphabet_tokenizer([f"{n:02d}" for n in range(self.nodes)] + ["|", "/", "="])

    @property
    def by_split(self):
        return self._pool(self.degree, self.path, self.nodes)

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def _pool(degree, path, nodes):
        out = dict(train=[], val=[], test=[])
        rng = random.Random(f"stargraph/{degree}/{path}/{nodes}")
        for _ in range(POOL):
            source, *rest = (f"{n:02d}" for n in rng.sample(range(nodes), degree * (path - 1) + 1))
            arms = [rest[i::degree] for i in range(degree)]
            edges = [a + b for arm in arms for a, b in zip([source, *arm], arm)]
            rng.shuffle(edges)
            prompt = f"{'|'.join(edges)}/{source}{arms[0][-1]}="
            out[split_of(prompt)].append(Problem(prompt, prompt, "".join(arms[0])))
        return out

    def demonstration(self, problem, strength=None, seed=0):
        return problem.answer

    def grade(self, problem, completion):
        return float(completion == problem.answer)
