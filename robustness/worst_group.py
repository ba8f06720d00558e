"""Multitasking for the worst group: does reconstructing the input keep a classifier off a
shortcut?

    python -m robustness.worst_group --out docs/results/worst_group    # about 6 minutes of one core
    python -m robustness.worst_group --smoke                           # in seconds, made-up images

Kulkarni, Dery, Setlur, Raghunathan, Talwalkar, Neubig 2023 (arXiv 2312.03151, TMLR 2024). The
claim: training the end task together with the pre-training objective on the end task's own data
often beats JTT on the worst group; an l1 penalty on the shared representation makes it consistent,
average accuracy included; both parts and the pre-training are needed. What would have falsified
it: no gain over ERM, paired over seeds (the spread between seeds is larger than the effect), or as
much from l1 alone.

Has the digit a loop? In 95% of the training images a shortcut agrees with the answer, in test
images it does not. marker: a patch of 2x2 pixels, little of the picture. photograph: the
background, most of it: there multitasking should lose, as reconstruction spends the representation
on what has variance. Same network for both.

    ERM; ERM + l1; MTL; MTL + l1; pre-training by reconstruction, then ERM or MTL + l1; JTT;
    balanced: every group has the same weight (knows the groups in training)

Selection: settings (four an arm, seed 100) and the step of every run by the worst group of a
balanced validation set: group labels at validation, as the authors do. The last step stands beside
it. worst_group_report.py has the tables, the claims and their rule.

--published FOLDER adds a second table: the authors' own result files, aggregated again, paired.
    git clone https://github.com/athrvkk/MTL-group-robustness runs/robustness/MTL-group-robustness

Left out: ViT and BERT with their pre-training on other data (here on the same images), SimCLR and
causal language modelling as tasks. The official l1 is divided by the size of the first batch, here
by that of each; batches have one size here, the official arms differ."""

import copy
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from infra.cli import opt, parse, script
from infra.seeds import derive, generator
from robustness import common, data
from robustness.common import TUNING_SEED
from robustness.worst_group_published import published, published_table
from robustness.worst_group_report import KNOWS, MTL_L1, SHORTCUTS, report


@dataclass
class Arm:
    """One arm's setting; zero: the part is left out."""

    lr: float = 3e-3
    weight_decay: float = 0.01
    w_mt: float = 0.0  # weight of the reconstruction
    w_l1: float = 0.0  # weight of the l1 penalty
    pretrain: int = 0  # steps of reconstruction alone, before
    jtt_steps: int = 0  # steps of the first model, whose errors get jtt_factor times the weight
    jtt_factor: float = 1.0
    balanced: bool = False


BOTH = [Arm(w_mt=m, w_l1=p) for m in (0.3, 1.0) for p in (0.1, 0.3)]
GRIDS = {
    "ERM": [Arm(lr=lr, weight_decay=wd) for lr in (1e-3, 3e-3) for wd in (0.01, 0.3)],
    "ERM + l1": [Arm(w_l1=p) for p in (0.03, 0.1, 0.3, 1.0)],
    "MTL": [Arm(w_mt=m) for m in (0.1, 0.3, 1.0, 3.0)],
    MTL_L1: BOTH,
    "pre-training, ERM": [Arm(pretrain=p, lr=lr) for p in (150, 300) for lr in (1e-3, 3e-3)],
    "pre-training, MTL + l1": [Arm(w_mt=a.w_mt, w_l1=a.w_l1, pretrain=300) for a in BOTH],
    "JTT": [Arm(jtt_steps=s, jtt_factor=f) for s in (50, 100) for f in (5.0, 20.0)],
    KNOWS: [Arm(lr=r, weight_decay=wd, balanced=True) for r in (1e-3, 3e-3) for wd in (0.01, 0.3)]}


@dataclass
class Config(common.Config):
    seeds: int = opt(10, "seeds reported, from 0 (settings: another one)", "run", low=1, high=100)
    steps: int = opt(400, "updates of each run, batches of 128", low=1)
    every: int = opt(50, "steps between two looks at the validation set", low=1)
    images: int = opt(600, "training images", low=10)
    published: str = opt("", "a clone of the authors' repository (see above)")


# Objectives. Source: the authors' src/models_mt.py; their weights are exp() of hparams.yaml's.


def masked_reconstruction_loss(encoder, decoder, x, variance, g, share=0.3):
    """Squared error on hidden pixels, divided by `variance`, that of the training pixels: 1 is
    what the average image gets. x [N, D]; `share` of the entries is hidden (set to 0), others do
    not count."""
    hidden = torch.rand(x.shape, generator=g) < share
    error = (decoder(encoder(x.masked_fill(hidden, 0.0))) - x) ** 2
    return error[hidden].mean() / variance


def mtl_loss(logits, y, h, reconstruction, w_mt, w_l1, weight):
    """Weighted CE + w_mt * reconstruction + w_l1 * mean |h|, h [N, 16] the shared representation.
    """
    ce = (weight * F.cross_entropy(logits, y, reduction="none")).mean()
    return ce + w_mt * reconstruction + w_l1 * h.abs().mean()


class Net(nn.Module):
    """Encoder D-64-16, linear head, decoder 16-64-D. forward: logits of images of any shape."""

    def __init__(self, inputs):
        super().__init__()
        self.encoder = common.mlp(inputs, 64, 16)
        self.head = nn.Linear(16, 2)
        self.decoder = common.mlp(16, 64, inputs)

    def forward(self, x):
        return self.head(self.encoder(x.flatten(1)))


def splits(shortcut, seed, cfg):
    """Train, validation, test with centred pixels."""
    make = data.markers if shortcut == "marker" else data.waterdigits
    found = make(0.95, seed, cfg.data)
    train = data.Split(*(t[: cfg.images] for t in found[0]))
    average = train.x.mean(0)
    return [s._replace(x=s.x - average) for s in (train, *found[1:])]


def batch(n, seed, *purpose):
    return torch.randint(0, n, (128,), generator=generator(seed, "batch", *purpose))


def example_weights(arm, train, cfg, seed):
    """[N] with mean 1."""
    if arm.balanced:
        return common.balanced(train.group)
    weight = torch.ones(len(train.y))
    if arm.jtt_steps:
        first, _ = fit(Arm(), train, None, cfg, seed, min(arm.jtt_steps, cfg.steps))
        with torch.no_grad():
            wrong = first(train.x).argmax(1) != train.y
        weight = torch.where(wrong, arm.jtt_factor, 1.0)
    return weight / weight.mean()


def fit(arm, train, validation, cfg, seed, steps):
    """-> last network, [(worst group of validation, weights)] of each look."""
    weight = example_weights(arm, train, cfg, seed)
    x = train.x.flatten(1)
    variance = x.var(0, unbiased=False).mean()
    net = common.seeded(derive(seed, "net"), lambda: Net(x.shape[1]))
    optimizer = torch.optim.AdamW(net.parameters(), lr=arm.lr, weight_decay=arm.weight_decay)
    g = generator(seed, "mask")
    looks = []
    for step in range(-min(arm.pretrain, cfg.steps), steps):
        j = batch(len(x), seed, "reconstruct", step)
        if step < 0:
            loss = masked_reconstruction_loss(net.encoder, net.decoder, x[j], variance, g)
        else:
            i = batch(len(x), seed, "classify", step)
            h = net.encoder(x[i])
            rebuilt = torch.zeros(())
            if arm.w_mt:
                rebuilt = masked_reconstruction_loss(net.encoder, net.decoder, x[j], variance, g)
            loss = mtl_loss(net.head(h), train.y[i], h, rebuilt, arm.w_mt, arm.w_l1, weight[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if validation is not None and step >= 0 and (step + 1) % cfg.every == 0:
            worst = common.accuracies(net, validation)[1]
            looks.append((worst, copy.deepcopy(net.state_dict())))
    return net, looks


def run(arm, parts, seed, cfg):
    """{worst, average: of the test set at the step chosen on validation; last: worst at the end;
    validation: the worst group it was chosen by}."""
    train, validation, test = parts
    net, looks = fit(arm, train, validation, cfg, seed, cfg.steps)
    last = common.accuracies(net, test)[1]
    chosen, weights = max(looks, key=lambda look: look[0])
    net.load_state_dict(weights)
    average, worst = common.accuracies(net, test)
    return dict(worst=worst, average=average, last=last, validation=chosen)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.smoke:
        cfg.steps, cfg.every = 4, 2
    authors = published(cfg.published) if cfg.published else None  # bad input ends before the work
    rows, tuned, parts = [], {}, {}
    for shortcut in SHORTCUTS:
        test = splits(shortcut, 0, cfg)[2]
        parts[shortcut] = [data.variance_share(test.x, value) for value in (test.a, test.y)]
        images = splits(shortcut, TUNING_SEED, cfg)

        def score(arm, setting, images=images):
            return run(setting, images, TUNING_SEED, cfg)["validation"]

        chosen, scores = common.tune(GRIDS, score, cfg.smoke)
        tuned[shortcut] = {arm: dict(chosen=asdict(s), scores=[v for _, v in scores.get(arm, [])])
                           for arm, s in chosen.items()}
        for seed in range(cfg.seeds):
            images = splits(shortcut, seed, cfg)
            rows += [dict(shortcut=shortcut, arm=arm, seed=seed) | run(setting, images, seed, cfg)
                     for arm, setting in chosen.items()]
        print(f"{shortcut} done", flush=True)
    command = common.command("worst_group", argv)
    text, claims, figure = report(rows, parts, cfg, command)
    if authors:
        more, claim = published_table(authors)
        text = f"{text}\n\n{more}"
        claims.append(claim | dict(command=command))
    content = dict(claims=claims, tuned=tuned, rows=rows, shares=parts, published=authors)
    common.finish_run(cfg, "worst_group", argv, text, content, figure)


if __name__ == "__main__":
    script(main)
