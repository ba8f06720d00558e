"""Shifts of images, rows of pixels: turned, mixed with noise, replaced. The norm is kept where it
can be.

    unbalanced_digits(kind, seed)       MNIST with fewer and fewer of the higher digits, centred
    rotate(pixels, degrees)             square images [N, side * side], turned about their centre
    at_norm_of(x, reference)            rows of x [N, D] at the norms of those of reference
    mix_noise(x, weight, generator)     towards white noise
    shifted_images(pixels, average, photographs, seed)    {name in SHIFTS: centred images [N, D]}
"""

import torch
import torch.nn.functional as F

from infra.seeds import generator
from robustness import data

# name -> is the norm that of the test images?
SHIFTS = dict.fromkeys(
    ["none (test set)", "rotation 30", "rotation 60", "rotation 90", "rotation 180", "noise 0.25",
     "noise 0.5", "noise 0.75", "noise 1", "pixels shuffled", "photograph, centred", "photograph"],
    True) | {"x3": False, "inverted": False}
NO_SHIFT = "none (test set)"


def unbalanced_digits(kind, seed):
    """Centred training images, their labels, validation (images, labels), test pixels and labels,
    the average image. Class k is kept with probability 1, 0.9, ... 0.1."""
    images, digit = data.digits(kind)
    keep = torch.rand(len(digit), generator=generator(seed, "unbalanced")) < 1 - digit / 10
    pixels = images[keep].flatten(1)
    y = digit[keep]
    tr, va, te = data.parts(len(y), (0.6, 0.15, 0.25), seed, "ocs")
    average = pixels[tr].mean(0)
    validation = (pixels[va] - average, y[va])
    return pixels[tr] - average, y[tr], validation, pixels[te], y[te], average


def rotate(pixels, degrees):
    """Square images [N, side * side] turned about their centre, bilinear, black outside."""
    side = int(pixels.shape[1] ** 0.5)
    angle = torch.tensor(degrees * torch.pi / 180)
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    size = (len(pixels), 1, side, side)
    grid = F.affine_grid(turn.expand(len(pixels), 2, 3), size, align_corners=False)
    return F.grid_sample(pixels.reshape(size), grid, align_corners=False).flatten(1)


def at_norm_of(x, reference):
    """x [N, D] scaled, row by row, to the norms of reference [N, D]."""
    return x * reference.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def mix_noise(x, weight, generator):
    """(1 - weight) x + weight * white noise, both of x's norm, scaled to it: the norm says
    nothing."""
    noise = at_norm_of(torch.randn(x.shape, generator=generator), x)
    return at_norm_of((1 - weight) * x + weight * noise, x)


def shifted_images(pixels, average, photographs, seed):
    """{name of the shift: centred images [N, D]} from test pixels [N, D] in [0, 1]."""
    x = pixels - average
    shifts = {NO_SHIFT: x}
    for degrees in (30, 60, 90, 180):
        shifts[f"rotation {degrees}"] = rotate(pixels, degrees) - average
    for weight in (0.25, 0.5, 0.75, 1):
        shifts[f"noise {weight}"] = mix_noise(x, weight, generator(seed, "noise", weight))
    order = torch.randperm(x.shape[1], generator=generator(seed, "shuffle"))
    shifts["pixels shuffled"] = x[:, order]
    side = int(x.shape[1] ** 0.5)
    which = torch.arange(len(x)) % 2
    crops = data.crops(photographs, which, (side, side), generator(seed, "crops"))
    crops = crops.mean(1).flatten(1)
    shifts["photograph, centred"] = at_norm_of(crops - crops.mean(1, keepdim=True), x)
    shifts["photograph"] = at_norm_of(crops - average, x)
    shifts["x3"] = 3 * x
    shifts["inverted"] = 1 - pixels - average
    return shifts
