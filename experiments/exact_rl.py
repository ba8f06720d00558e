"""train_rl.py with the task's solver in the place of a learned verifier: the ceiling of the method.

    python -m experiments.exact_rl --task countdown --policy runs/sft --strength 0.5 --run-dir runs/exact

A_mu is then that of the *scripted* player of --strength, read as Best-of---prover-k, and no error of
a fit is in it. It is another prover than the clone of that player, which pav.py asks: a clone plays
worse.
"""

from dataclasses import dataclass

import train_rl
from experiments.toolkit import ExactVerifier
from infra.cli import UserError, opt, parse, script
from tasks import get_task, prepare


@dataclass
class Config(train_rl.Config):
    strength: float = opt(0.5, "of the scripted player", "reward", low=0)
    prover_k: int = opt(1, "take Best-of-K of it as prover", "reward", low=1)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if not cfg.policy or not cfg.run_dir:
        raise UserError("give --policy (train_sft.py makes one) and --run-dir")
    cfg = prepare(cfg, "rl", argv, cfg.policy)
    task = get_task(cfg)
    problem = task.problems("train", 1)[0]
    if task.strengths is None or task.exact_value(problem, "", cfg.strength) is None:
        raise UserError(f"--task {cfg.task} has no solver: take planted, countdown, grid or probe")
    verifier = ExactVerifier(task, task.tokenizer(), cfg.strength, cfg.prover_k)
    return train_rl.train(cfg, verifier)


if __name__ == "__main__":
    script(main)
