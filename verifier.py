"""The verifier V^mu: what is this solution worth so far? A Transformer and a number per token.

    verifier = load_verifier("runs/planted/seed0/verifier", tokenizer)
    values = step_values(verifier, rolled.tokens, step_ends(task, rolled, tokenizer))  # [B,S+1]
    progress = values[:, 1:] - values[:, :-1]                          # A^mu of each step, [B,S]

A step's reward in PAV (Setlur et al. 2024, arXiv 2410.08146) is its *progress*: the advantage under
a prover mu that is not the policy,

    A^mu(s,a) = Q^mu(s,a) - V^mu(s)                                                       (eq. 2)
              = V^mu(prompt + steps 1..h) - V^mu(prompt + steps 1..h-1)

so one function is enough, V^mu(prefix): the chance that the prover, taking over here, still finds
the answer. Both terms are read off the same verifier at consecutive step ends, the bare prompt
included. pav.py trains it.

Best-of-K provers need no training of their own: V^BoK = 1 - (1 - V)^K (eq. 30).
Left out: several verifiers of different provers in one model.
"""

import json

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from infra import parallel
from infra.cli import UserError, what_this_is
from model import load_model, resolve, write_model


class Verifier(nn.Module):
    """tokens [B,T] -> logits [B,T] of V^mu(tokens[:, :t+1]); meaningful at step ends.

    backbone: a Transformer; logit_shift undoes the class weights of the fit (pav.bce_weights); k is
    the Best-of-K transform; fingerprint is that of the tokenizer it was trained with.
    """

    def __init__(self, backbone, logit_shift=0.0, k=1, fingerprint=""):
        super().__init__()
        self.backbone = backbone
        self.logit_shift = logit_shift
        self.k = k
        self.fingerprint = fingerprint
        self.head = nn.Linear(backbone.cfg.hidden_size, 1).to(backbone.head.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens, length=None):
        return self.head(self.backbone(tokens, length).float())[..., 0]


def best_of_k_value(value, k):
    """V of the prover -> V of its Best-of-k: 1 - (1-V)^k (eq. 30). Monotone in V; k=1 is the
    identity."""
    return 1 - (1 - value) ** k


def single_sample_value(value, k):
    """The inverse of best_of_k_value: V of the prover itself, which is what accuracies are compared
    with."""
    return value if k == 1 else 1 - (1 - value) ** (1 / k)


@torch.no_grad()
def step_values(verifier, tokens, ends, batch_tokens=4096):
    """V^mu at the bare prompt and after every step, one forward pass.

    tokens [B,T] int64; ends [B,S+1] as rollouts.step_ends gives them. Returns [B,S+1] float32 in
    [0,1]; the last column is the value of the whole text. Rows go through in batches of about
    batch_tokens tokens: enough to fill a machine, few enough to stay in a CPU's cache.
    """
    device = verifier.head.weight.device
    share = parallel.share(len(tokens))
    size = max(1, batch_tokens // tokens.shape[1])
    logits = [ends.new_zeros(0, ends.shape[1]).float()]
    for i in range(share.start, share.stop, size):
        rows = slice(i, min(i + size, share.stop))
        text = tokens[rows, : int(ends[rows].max())]
        at_token = verifier(text.to(device), ends[rows, -1]).cpu()
        # A value is read at the step's last token.
        logits.append(at_token.gather(1, ends[rows] - 1) - verifier.logit_shift)
    values = parallel.gather(torch.cat(logits), len(tokens)).sigmoid()
    return best_of_k_value(values, verifier.k)


def save_verifier(folder, verifier, tokenizer, info):
    """Write backbone, value head and verifier.json (info: dict) to a folder."""
    write_model(folder, verifier.backbone, tokenizer)
    head = {k: v.detach().cpu().contiguous() for k, v in verifier.head.state_dict().items()}
    save_file(head, folder / "value_head.safetensors")
    info = (
        dict(
            logit_shift=verifier.logit_shift, prover_k=verifier.k, fingerprint=verifier.fingerprint
        )
        | info
    )
    (folder / "verifier.json").write_text(json.dumps(info, indent=2) + "\n")


def load_verifier(path, tokenizer, device="cpu"):
    """A verifier from its run directory. UserError: it is a language model, or was trained with
    another tokenizer."""
    folder = resolve(str(path), verifier=True)
    info = json.loads((folder / "verifier.json").read_text())
    if info["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{path} was trained with another tokenizer than the policy's: its step values would "
            f"be noise; "
            "train a verifier from this policy with pav.py"
        )
    backbone, _ = load_model(folder, device, verifier=True)
    verifier = Verifier(backbone, info["logit_shift"], info["prover_k"], info["fingerprint"])
    load_head(verifier, folder)
    return verifier.requires_grad_(False)


def load_head(verifier, folder):
    """Fill the value head from a checkpoint folder."""
    try:
        verifier.head.load_state_dict(load_file(folder / "value_head.safetensors"))
    except Exception as e:  # safetensors and torch raise several kinds here
        message = (
            f"{folder}/value_head.safetensors cannot be read ({e}); train it again with pav.py"
        )
        raise UserError(message) from None


if __name__ == "__main__":
    what_this_is(__doc__, "python pav.py --policy DIR --prover DIR")
