"""Pro^2: orthogonal directions that predict, and a probe on few labels."""

import json

import torch

from robustness import pro2


def planted(n=800):
    """Two of ten coordinates carry the label, three to one."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (n,), generator=g)
    x = torch.randn(n, 10, generator=g).double()
    x[:, 3] += 3 * (2 * y - 1)
    x[:, 7] += 1 * (2 * y - 1)
    return x - x.mean(0), y


def test_directions_are_orthonormal_and_come_in_order():
    x, y = planted()
    rows = pro2.project(x, y, 4)
    assert torch.allclose(rows @ rows.T, torch.eye(4).double(), atol=1e-10)
    assert rows[0][3] > 0.9 and (rows[0][[3, 7]] ** 2).sum() > 0.95
    shift = [abs((x[y == 1] @ r).mean() - (x[y == 0] @ r).mean()) for r in rows]
    assert shift[0] > 5 and max(shift[1:]) < 1  # the first direction takes what both carry


def test_there_are_no_more_directions_than_dimensions():
    x, y = planted(100)
    assert pro2.project(x, y, 64).shape == (10, 10)


def test_a_probe_takes_the_larger_penalty_of_equals():
    x, y = planted()
    thetas = pro2.probes(x, y, (1e-3, 1.0))
    assert thetas[0].norm() < thetas[1].norm()
    assert torch.equal(pro2.best_probe(thetas, x[:2], y[:2]), thetas[0])
    assert torch.equal(pro2.best_probe([-thetas[0], thetas[1]], x, y), thetas[1])


def test_labels_are_disjoint_and_the_test_set_is_the_same_for_every_m():
    y = torch.arange(200) % 2
    first = pro2.labels(y, 2, 10, torch.Generator().manual_seed(0))
    second = pro2.labels(y, 10, 10, torch.Generator().manual_seed(0))
    assert torch.equal(first[2], second[2]) and len(first[2]) == 160
    assert len(torch.cat(second).unique()) == 200
    assert y[first[0]].tolist() == [0, 0, 1, 1]


def test_smoke_run_leaves_claims(tmp_path):
    pro2.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {c["paper"] for c in results["claims"]} == {"2302.05441"}
    assert set(results["rows"]) == set(pro2.WORLDS)
