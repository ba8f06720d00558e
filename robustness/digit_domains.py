"""The digits of stoc.py: pairs of domains, and the views that are told to be of one image.

    augment(x, generator)         another view of images [B, 1, H, W]
    domains(pair, seed, cfg)      (images, digit) of source, source validation, target, target test
"""

import torch
import torch.nn.functional as F

from infra.seeds import generator
from robustness import data
from robustness.shifts import rotate

PAIRS = ("MNIST to turned", "MNIST to optdigits", "optdigits to MNIST", "no shift: 100 labels")
NO_SHIFT = PAIRS[-1]


def augment(x, g):
    """Another view of images [B, 1, H, W]: turned by up to 20 degrees, scaled, moved, blurred
    (half of them), darker or lighter, a square of 4x4 cut out, noise."""
    n, _, height, width = x.shape
    u = 2 * torch.rand(n, 6, generator=g) - 1
    angle = u[:, 0] * 20 * torch.pi / 180
    scale = 1 + 0.2 * u[:, 1]
    turn = torch.stack([
        torch.stack([scale * angle.cos(), -scale * angle.sin(), 0.15 * u[:, 2]], 1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), 0.15 * u[:, 3]], 1)], 1)
    x = F.grid_sample(x, F.affine_grid(turn, x.shape, align_corners=False), align_corners=False)
    x = torch.where((u[:, 4] > 0).view(-1, 1, 1, 1), F.avg_pool2d(x, 3, 1, 1), x)
    x = x.clamp(1e-4, 1) ** (0.5 * u[:, 5]).exp().view(-1, 1, 1, 1)
    top = torch.randint(0, height - 3, (n, 1), generator=g)
    left = torch.randint(0, width - 3, (n, 1), generator=g)
    in_rows = (torch.arange(height) >= top) & (torch.arange(height) < top + 4)
    in_columns = (torch.arange(width) >= left) & (torch.arange(width) < left + 4)
    cut = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return x.masked_fill(cut, 0.0) + 0.1 * torch.randn(x.shape, generator=g)


def domains(pair, seed, cfg):
    """Four pairs (images [N, 1, 14, 14], digit [N]): labelled source, source validation, target
    without labels (they are for the record), target test. No digit is in two of them."""
    x, y = data.digits(cfg.data)
    order = torch.randperm(len(y), generator=generator(seed, "mnist"))
    x, y = data.small(x)[order][:, None], y[order]
    other, y_other = data.optdigits(cfg.data)
    order = torch.randperm(len(y_other), generator=generator(seed, "optdigits"))
    other = F.interpolate(other[order][:, None], size=(10, 10), mode="bilinear")
    other = F.pad(other, (2, 2, 2, 2))  # they fill their frame, those of MNIST leave a margin
    y_other = y_other[order]
    n = min(cfg.images, len(y) // 4, len(y_other) // 2)
    one, two, three, rest = slice(n), slice(n, 2 * n), slice(2 * n, 3 * n), slice(3 * n, None)
    source = [(x[one], y[one]), (x[two], y[two])]
    target = [(x[three], y[three]), (x[rest], y[rest])]
    of_others = [(other[one], y_other[one]), (other[n:], y_other[n:])]
    if pair == "MNIST to turned":
        target = [(rotate(images.flatten(1), 35).view_as(images), d) for images, d in target]
    elif pair == "MNIST to optdigits":
        target = of_others
    elif pair == "optdigits to MNIST":
        source = of_others
    else:
        source[0] = (x[: min(n, 100)], y[: min(n, 100)])
    return *source, *target
