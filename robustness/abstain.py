"""Decisions of ocs.py: +1 for the right class, -4 for a wrong one, 0 for abstaining.

A network that predicts the reward of each action and takes the best one, against class
probabilities with a threshold: of a one-hot squared loss, of cross-entropy with a temperature (from
source validation labels; as an oracle, from the labels of the shift itself).

    act(reward), act_on_probability(p)    actions [N]; the last one, CLASSES, is to abstain
    policy_reward(action, y)              mean reward
    rewards(out, y, source)               {policy: mean reward} of the networks' outputs
    claim(at, cfg, command)               what the rows say of the reward network
"""

import torch

from robustness import common
from robustness.shifts import NO_SHIFT, SHIFTS

CLASSES = 10
PENALTY = 4.0
REWARD, ONEHOT, CE_T = "reward network", "one-hot, squared loss, threshold", "CE + temperature"
POLICIES = (REWARD, ONEHOT, CE_T, "CE + temperature of that shift (oracle)", "CE, never abstains")


def act(reward):
    """Reward of each action [N, A] -> the best one [N]."""
    return reward.argmax(1)


def act_on_probability(probability, penalty=PENALTY):
    """The same decision from class probabilities: abstain where the expected reward (1 + penalty)
    p - penalty is negative."""
    best, action = probability.max(1)
    return torch.where(best * (1 + penalty) > penalty, action, probability.shape[1])


def policy_reward(action, y, penalty=PENALTY):
    """Mean reward of actions [N]; action CLASSES is to abstain."""
    reward = torch.where(action == y, 1.0, -penalty)
    return torch.where(action == CLASSES, 0.0, reward).mean().item()


def rewards(out, y, source):
    """{policy: mean reward} from outputs {loss: [N, K]}; source: the temperature of the source."""
    shifted = common.temperature(out["ce"], y)
    actions = (act(out["reward"]), act_on_probability(out["onehot"]),
               act_on_probability((out["ce"] / source).softmax(1)),
               act_on_probability((out["ce"] / shifted).softmax(1)), act(out["ce"]))
    return {policy: policy_reward(action, y) for policy, action in zip(POLICIES, actions)}


def claim(at, cfg, command):
    """at(policy, shift): rewards over seeds, default head. Shifts count that keep the norm."""
    kept = [s for s, norm_kept in SHIFTS.items() if norm_kept and s != NO_SHIFT]
    more = common.ahead(at, REWARD, CE_T, kept)
    less = common.ahead(at, CE_T, REWARD, kept)
    beaten = common.ahead(at, ONEHOT, REWARD, kept)
    return dict(
        paper="2310.00873", command=command, holds=common.verdict(s in more for s in kept),
        claim="a network that predicts rewards, abstaining among them, is cautious where CE with a "
              "temperature is not",
        short="Predicted rewards with an abstaining action are cautious far away",
        measured=f"more reward than CE + temperature on {len(more)} of {len(kept)} shifts "
                 f"({', '.join(more)}), than a one-hot squared loss with a threshold, which never "
                 f"hears of rewards, on {len(common.ahead(at, REWARD, ONEHOT, kept))}; rotation "
                 f"60: {common.cells(at, POLICIES, 'rotation 60', sign=True)} ({cfg.seeds} seeds, "
                 "sd)",
        fails_when=f"less reward than CE + temperature under {', '.join(less) or 'none'}; than the "
                   f"one-hot control under {', '.join(beaten) or 'none'}")
