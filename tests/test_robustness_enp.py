"""ENP: the part that counts stays, the other one comes from another image of the batch."""

import json

import pytest
import torch

from robustness import enp


def test_the_relevant_half_stays_and_the_other_is_some_image_s():
    x = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 2, 3, 4).clone()
    part = torch.tensor([0, 1, 0, 1, 1])
    out = enp.redraw(x, part, torch.Generator().manual_seed(0))
    left, right = out[:, 0, 0, 0], out[:, 0, 0, 3]
    assert torch.equal(torch.where(part == 0, left, right), torch.arange(5.0))
    drawn = torch.where(part == 0, right, left)
    assert sorted(drawn.tolist()) == [0, 1, 2, 3, 4]  # a permutation: the marginal of the batch
    assert torch.equal(x[:, 0, 0, 0], torch.arange(5.0))


def test_blanking_leaves_nothing_to_read():
    out = enp.blank(torch.ones(2, 1, 1, 4), torch.tensor([0, 1]))
    assert out.flatten(1).tolist() == [[1, 1, 0.5, 0.5], [0.5, 0.5, 1, 1]]


def test_pairs_carry_the_relevant_label_and_the_agreement():
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 1]).repeat(20)
    ink = y.float().reshape(-1, 1, 1).expand(-1, 4, 4)  # the digit's ink tells its label
    photos = [torch.zeros(3, 9, 9), torch.zeros(3, 9, 9)]
    x, label, context, agree = enp.make_pairs(ink, y, 2000, 0.9, photos, g)
    left, right = x[:, 0, 0, 0].long(), x[:, 0, 0, 7].long()
    assert torch.equal(torch.where(context == 0, left, right), label)
    assert torch.equal((left == right).long(), agree)
    assert agree.float().mean() == pytest.approx(0.9, abs=0.03)


def test_group_dro_raises_the_worse_group():
    loss, group = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0, 0, 1])
    value, q = enp.group_dro_loss(loss, group, torch.tensor([0.5, 0.5]), 0.1)
    assert (q[1] / q[0]).log() == pytest.approx(0.1 * 2)
    assert value == pytest.approx((q[0] * 1 + q[1] * 3).item())


def test_the_annotated_part_can_be_learnt():
    g = torch.Generator().manual_seed(0)
    context = torch.randint(0, 2, (64,), generator=g)
    x = context.float().reshape(-1, 1, 1, 1).expand(-1, 3, 14, 28) - 0.5
    net = enp.annotator(x, context, 20, 0)
    assert torch.equal(enp.predict_relevant(net, x), context)


def test_smoke_run_leaves_claims(tmp_path):
    enp.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {c["paper"] for c in results["claims"]} == {"2307.10026"}
    assert results["rows"][enp.SPURIOUS]["ENP 50"][0]["mask"] is not None
