"""Adam for parameters in bfloat16: it keeps a float32 copy of each, the master, moves that, and rounds it back.

Why: bfloat16 has 8 bits, so a step of 1e-6 on a weight of 0.1 is lost when it is added to the weight itself (half a step of
the grid is 2e-4). In the master it adds up. What stays in bfloat16 is what costs time: weights and activations in products,
and with them the kernels of kernels/, which in float32 a GPU reaches at a fortieth of the speed.

    optimizer = optimizer_for(torch.optim.AdamW, params, lr=1e-6, betas=(0.9, 0.99))

is torch.optim.AdamW itself where the parameters are float32, bit for bit. Memory per weight in bfloat16: 2 bytes, 2 of gradient,
12 here (master, two moments); in float32: 4, 4 and 8. The state is per parameter, as PyTorch's optimizers have it, so
infra.runs saves it as safetensors beside the weights: "master" is one more tensor, and a resumed run goes on from it, not from
the rounded weights. The weights themselves are written in bfloat16, as transformers writes them.

Left out: gradients in float32. Micro-batches add up in bfloat16; where there are many, make them fewer.
"""

import torch
from torch.optim.adam import adam


def optimizer_for(kind, params, **settings):
    """kind (torch.optim.Adam or AdamW) over params, a list of parameters or of groups; MasterAdam with the same settings if any
    of them is not float32."""
    params = list(params)
    groups = params if isinstance(params[0], dict) else [dict(params=params)]
    if all(p.dtype == torch.float32 for group in groups for p in group["params"]):
        return kind(params, **settings)
    return MasterAdam(groups, decoupled=kind is torch.optim.AdamW, **settings)


class MasterAdam(torch.optim.Optimizer):
    """Adam (decoupled: AdamW) whose state holds, for each parameter, master, exp_avg, exp_avg_sq (float32) and step. The update
    is PyTorch's own function, on the masters."""

    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=None, fused=False, decoupled=False):
        if weight_decay is None:
            weight_decay = 0.01 if decoupled else 0.0  # PyTorch's defaults
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused, decoupled=decoupled)
        super().__init__(groups, defaults)

    def _state_of(self, p, fused):
        state = self.state[p]
        if not state:
            master = p.detach().float().clone()
            step = torch.zeros((), device=p.device if fused else "cpu")
            state.update(master=master, exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master), step=step)
        return state

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p, group["fused"]) for p in params]
            masters, means, squares, steps = ([s[name] for s in states] for name in ("master", "exp_avg", "exp_avg_sq", "step"))
            beta1, beta2 = group["betas"]
            adam(masters, [p.grad.float() for p in params], means, squares, [], steps, fused=group["fused"],
                 decoupled_weight_decay=group["decoupled"], amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                 weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)  # fmt: skip
            for p, master in zip(params, masters):
                p.copy_(master)  # rounds
