"""Private transfer: do public representations pay for the noise of private training, and where not?

    python -m robustness.private_transfer --out docs/results/private_transfer   # about 2 minutes
    python -m robustness.private_transfer --smoke             # in seconds, on made-up data

Thaker, Setlur, Wu, Smith 2023 (arXiv 2312.15551; NeurIPS 2024 as "On the Benefits of Public
Representations for Private Transfer Learning under Distribution Shift"). The claim, in two
scenarios: (1) one model for all: in a subspace from public data the price of privacy falls from all
d dimensions to k, even where the public task cannot solve the private one; (2) one model a user:
with enough public data users need not coordinate privately, each fits a local head in the public
subspace. What would have falsified it: (1) no gain over the same learner without public data, or
none of the subspace over all dimensions at small epsilon; (2) local heads below those in a subspace
that users find together.

    sentences    private: film reviews, good or bad; public: MiniLM, newspaper sentences (for PCA)
    images       private: digits 5 to 9; public: digits 0 to 4 with labels (should lose: too narrow)
    local heads  private: users with ten images each and a labelling of their own; public: digits

The learner is full-batch gradient descent on clipped per-row gradients with Gaussian noise; dp.py
has it, and the accounting; local_heads.py has (2). Tuning costs no privacy: learning rate and
steps, four settings an arm and epsilon, by labels of public rows (newspaper; digits 5 to 9 of other
writers), on seed 100, with the noise per mean gradient that the private run will have. Beside it,
for one arm, tuning on private rows: the grid paid from the same budget; unpaid, by test labels, it
is not private at the epsilon printed. Left out: CLIP, DP-SGD on all weights, Poisson sampling.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from infra.cli import UserError, opt, parse, script
from infra.runs import mean
from infra.seeds import derive, generator
from robustness import common, data, dp, local_heads
from robustness.common import TUNING_SEED
from robustness.local_heads import DELTA

WORDS = 2048
GRID = list(itertools.product((0.5, 2.0), (20, 60)))  # learning rate, steps
WITHOUT, FULL = "bag of words 2048, no public data", "MiniLM 384"
SUBSPACES = ("MiniLM, public PCA 64", "MiniLM, public PCA 16")
PUBLIC_ONLY = "public labels only, no private row"
PIXELS, FEATURES = "pixels 196, no public data", "public features 64"
PAID, UNPAID = (f"{FULL}, grid on private rows, {how}" for how in ("paid", "unpaid: not private"))


@dataclass
class Config(common.Config):
    epsilons: list = opt([0.1, 0.3, 1.0, 3.0], "privacy at delta 1e-5", above=0, high=100)
    rows: list = opt([1000, 3500], "private sentences", low=10)
    users: int = opt(200, "with ten images each, second scenario", low=2)


# One model for all. Domains: {arm: unit rows (public, for tuning; private; test)}, labels alike.


def unit(x, centre=0.0):
    return F.normalize(x - centre, dim=1)


def sentence_domain(n, seed, cfg):
    """Label: valence above 0 (sentences within 0.4 of it are left out). A quarter of the film
    reviews is the test set."""
    embedding, valence, source = data.sentences(cfg.data)
    clear = valence.abs() > 0.4
    public = (clear & (source == 3)).nonzero().flatten()
    films = (clear & (source == 0)).nonzero().flatten()
    films = films[torch.randperm(len(films), generator=generator(seed, "films"))]
    test, private = films.tensor_split([len(films) // 4])
    parts = (public, private[:n], test)
    centre, basis = dp.public_subspace(embedding[public], 64)
    words = data.bag_of_words(WORDS, cfg.data)
    arms = {WITHOUT: [unit(words[i]) for i in parts],
            FULL: [unit(embedding[i], centre) for i in parts]}
    for name, k in zip(SUBSPACES, (64, 16)):
        arms[name] = [unit((embedding[i] - centre) @ basis[:, :k]) for i in parts]
    return arms, [(valence[i] > 0).long() for i in parts]


def image_domain(seed, cfg):
    """Features of a network that knows digits 0 to 4. Rows for tuning: optdigits 5 to 9."""
    images, digit = data.digits(cfg.data)
    x = data.small(images)[:, None]
    other, other_digit = data.optdigits(cfg.data)
    other = F.interpolate(other[:, None], size=(14, 14), mode="bilinear")[other_digit >= 5]
    known = digit < 5
    private = (~known).nonzero().flatten()
    private = private[torch.randperm(len(private), generator=generator(seed, "private"))]
    test, train = private.tensor_split([len(private) * 7 // 25])
    net, untrained = (common.seeded(derive(seed, "net", i), lambda: common.SmallCNN(1, 5, width=64))
                      for i in range(2))
    common.fit(net, x[known], digit[known], 2 if cfg.smoke else 15, seed)
    maps = {PIXELS: lambda v: v.flatten(1), FEATURES: net.features,
            "random features 64, no public data": untrained.features}
    arms = {}
    with torch.no_grad():
        for name, features in maps.items():
            centre = features(x[known]).mean(0)
            arms[name] = [unit(features(v), centre) for v in (other, x[train], x[test])]
        centre, basis = dp.public_subspace(net.features(x[known]), 16)
        arms["public features, public PCA 16"] = [
            unit((net.features(v) - centre) @ basis) for v in (other, x[train], x[test])]
    return arms, [other_digit[other_digit >= 5] - 5, digit[train] - 5, digit[test] - 5]


def tune(z, y, n, rho, grid):
    """Best of the grid by accuracy on a fifth of public rows (mean of three draws), trained on the
    others with the noise per mean gradient that n private rows will have."""
    order = torch.randperm(len(y), generator=generator(TUNING_SEED, "public"))
    held, train = order.tensor_split([len(y) // 5])
    target = F.one_hot(y).float()[train]
    budget = rho * (n / len(train)) ** 2

    def score(setting):
        draws = [dp.dp_linear(z[train], target, budget, *setting,
                              generator(TUNING_SEED, k, *setting)) for k in range(3)]
        return mean(dp.accuracy(w, z[held], y[held]) for w in draws)

    return common.choose(grid, score)


def shared_model(name, draw, cfg):
    """Rows {domain, arm, epsilon, seed, accuracy}, what was chosen. draw(seed) -> arms, labels."""
    epsilons = [*cfg.epsilons, math.inf]
    arms, (y_public, y, _) = draw(TUNING_SEED)
    grid = GRID[:1] if cfg.smoke else GRID
    tuned = {(arm, e): tune(z[0], y_public, len(y), dp.rho_for(e, DELTA), grid)
             for arm, z in arms.items() for e in epsilons}
    rows = []
    for seed in range(cfg.seeds):
        arms, (y_public, y, y_test) = draw(seed)
        target = F.one_hot(y).float()
        for (arm, (z_public, z, z_test)), e in itertools.product(arms.items(), epsilons):
            rho = dp.rho_for(e, DELTA)
            g = generator(seed, name, arm, str(e))
            fits = {arm: dp.dp_linear(z, target, rho, *tuned[arm, e][0], g)}
            if arm == FULL:
                setting = tuned[arm, math.inf][0]
                one_hot = F.one_hot(y_public).float()
                fits[PUBLIC_ONLY] = dp.dp_linear(z_public, one_hot, math.inf, *setting, g)
                fits[PAID] = dp.paid_tuning(z, y, rho, grid, seed)
                found = [dp.dp_linear(z, target, rho, *setting, g) for setting in grid]
                fits[UNPAID] = max(found, key=lambda w: dp.accuracy(w, z_test, y_test))
            rows += [dict(domain=name, arm=k, epsilon=f"{e:g}", seed=seed,
                          accuracy=dp.accuracy(w, z_test, y_test)) for k, w in fits.items()]
    print(f"{name} done", flush=True)
    return rows, {f"{name}/{arm}/{e:g}": choice for (arm, e), choice in tuned.items()}


def report(rows, cfg, command):
    """-> (text, claims, draw). Domains: sentences (one for each --rows), images, local heads."""
    epsilons = [f"{e:g}" for e in (*cfg.epsilons, math.inf)]
    domains = list(dict.fromkeys(r["domain"] for r in rows))

    def of(domain):
        return lambda arm, e: common.pick(rows, "accuracy", domain=domain, arm=arm, epsilon=e)

    def names(domain):
        return list(dict.fromkeys(r["arm"] for r in rows if r["domain"] == domain))

    parts = [f"Test accuracy, {cfg.seeds} seeds; columns: epsilon at delta {DELTA:g}, exact for "
             "Gaussian noise (inf: no privacy). Selection: public labels, four settings an arm and "
             f"epsilon, seed {TUNING_SEED}."]
    columns = dict.fromkeys(domains, epsilons) | {domains[-1]: [""]}
    parts += [common.matrix(d, names(d), columns[d], of(d)) for d in domains]
    parts += ["The same budgets, as other conversions would print them:\n\n"
              + common.markdown(*dp.conversions(cfg.epsilons, DELTA))]
    claims = claims_of(cfg, epsilons, domains, of)
    claims += [local_heads.claim(names(domains[-1]), of(domains[-1]), cfg)]
    claims = [dict(paper="2312.15551", command=command) | claim for claim in claims]
    return "\n\n".join(parts), claims, lambda plt: draw(plt, epsilons, domains, names, of)


def claims_of(cfg, epsilons, domains, of):
    """The two claims of the first scenario. of(domain)(arm, epsilon): accuracies over seeds."""
    *texts, images, _ = domains
    lowest, middle = epsilons[0], epsilons[len(cfg.epsilons) // 2]

    def won(domain, arm, rival):
        """Where arm is clearly above rival: names of domain and epsilon."""
        better = common.ahead(of(domain), arm, rival, epsilons[:-1])
        return [f"{domain}, epsilon {e}" for e in better]

    def cells(domain, e, *arms):
        return f"{domain}: {common.cells(of(domain), arms, e)}"

    subspace = SUBSPACES[0]
    gained = [won(d, subspace, WITHOUT) for d in texts] + [won(images, FEATURES, PIXELS)]
    fewer = [f"{d}, epsilon {e}" in won(d, subspace, FULL) for d in texts for e in epsilons[:2]]
    loose = [x for d in texts for x in won(d, FULL, subspace)]
    useless = [x for d in texts for x in won(d, PUBLIC_ONLY, subspace)]
    narrow = won(images, PIXELS, FEATURES)
    seeds = f"({cfg.seeds} seeds, sd)"
    first = dict(
        holds=common.verdict(len(where) == len(cfg.epsilons) for where in gained),
        claim="public representations make private learning better than the same without them",
        short="Public representations make private learning better",
        measured=f"epsilon {middle}; {cells(texts[-1], middle, WITHOUT, FULL, *SUBSPACES)}; "
                 f"{cells(images, middle, PIXELS, FEATURES)}; settings from private rows: "
                 f"{cells(texts[-1], middle, PAID, UNPAID)} {seeds}",
        fails_when="the public task is narrow, digits 0 to 4 for digits 5 to 9: pixels clearly "
                   f"better at {'; '.join(narrow) or 'none'}; and without any private row, public "
                   f"labels alone are clearly better at {'; '.join(useless) or 'none'}")
    second = dict(
        holds=common.verdict(fewer),
        claim="in a subspace from public data the price of privacy falls from d to k dimensions",
        short="In a public subspace privacy costs k dimensions, not d",
        measured="; ".join(cells(d, lowest, FULL, *SUBSPACES) for d in texts)
                 + f" at epsilon {lowest} {seeds}",
        fails_when="epsilon is loose: all dimensions clearly better at "
                   f"{'; '.join(loose) or 'none'}")
    return [first, second]


def draw(plt, epsilons, domains, names, of):
    """Accuracy against epsilon for the largest set of sentences and the images; local heads."""
    fig, axes = plt.subplots(1, 3, figsize=(17, 4.8), constrained_layout=True)
    for axis, domain in zip(axes, domains[-3:-1]):
        common.lines(axis, range(len(epsilons)), names(domain), epsilons, of(domain))
        axis.set_xticks(range(len(epsilons)), epsilons)
        axis.set(title=domain, xlabel="epsilon (inf: no privacy)", ylabel="test accuracy")
        axis.set_ylim(bottom=axis.get_ylim()[0] - 0.15)
        axis.legend(frameon=False, fontsize=7, loc="lower right")
    local_heads.bars(axes[2], names(domains[-1]), of(domains[-1]))
    return fig, axes


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if not cfg.epsilons or not cfg.rows:
        raise UserError("--epsilons and --rows want one number at least")
    if cfg.smoke:
        cfg.epsilons, cfg.rows, cfg.users = [0.3, 1.0], [60, 200], 20
    domains = {f"sentences, {n} private": functools.partial(sentence_domain, n, cfg=cfg)
               for n in cfg.rows} | {"images": functools.partial(image_domain, cfg=cfg)}
    parts = [shared_model(name, domain, cfg) for name, domain in domains.items()]
    parts.append(local_heads.personal_models(cfg))
    rows = [row for found, _ in parts for row in found]
    tuned = {arm: choice for _, chosen in parts for arm, choice in chosen.items()}
    text, claims, figure = report(rows, cfg, common.command("private_transfer", argv))
    content = dict(claims=claims, tuned=tuned, rows=rows)
    common.finish_run(cfg, "private_transfer", argv, text, content, figure)


if __name__ == "__main__":
    script(main)
