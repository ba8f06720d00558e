"""Each benchmark runs with tiny shapes and writes its JSON. No test looks at the times themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PEERS = {"products": [], "decode": [], "generate": ["transformers"], "rl_step": ["trl", "transformers", "datasets", "accelerate"]}


def run(name, out):
    command = [sys.executable, "-m", f"bench.{name}", "--tiny", f"--out={out}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def comparisons(value):
    """Every ours-against-theirs in the JSON."""
    if not isinstance(value, dict):
        return []
    if {"ours", "theirs", "ratio"} <= value.keys():
        return [value]
    return [found for inner in value.values() for found in comparisons(inner)]


@pytest.mark.parametrize(("name", "at_least"), [("products", 20), ("decode", 3), ("generate", 3), ("rl_step", 1)])
def test_runs_and_writes(name, at_least, tmp_path):
    for peer in PEERS[name]:
        pytest.importorskip(peer)
    done = run(name, tmp_path / "out.json")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["command"].startswith(f"python -m bench.{name}") and result["machine"]["torch"]
    found = comparisons(result)
    assert len(found) >= at_least
    for c in found:
        assert c["ratio"]["median"] > 0 and c["ours"]["seconds"]["min"] > 0 and c["theirs"]["seconds"]["min"] > 0


def test_sides_take_turns_and_the_ratio_is_made_within_rounds():
    from bench import timing

    calls = []
    times = timing.alternate(dict(ours=lambda: calls.append("o"), theirs=lambda: calls.append("t")), 3)
    assert "".join(calls) == "ot" + "to" + "ot" + "to"  # the warm-up, then three rounds in turning order
    assert [len(times[side]) for side in ("ours", "theirs")] == [3, 3]
    drifting = timing.ratio([2.0, 4.0, 60.0], [1.0, 2.0, 30.0])  # the machine slowed down 30-fold: no matter
    assert drifting["median"] == 2 and drifting["quartiles"] == [2, 2] and drifting["of_minima"] == 2


def test_a_missing_peer_is_one_clear_line():
    from bench import timing
    from common import UserError

    with pytest.raises(UserError, match="pip install no-such-package"):
        timing.need("torch", "no-such-package")


def test_products_logprob_sides_compute_the_same():
    """A comparison of speed is worth nothing if the two sides compute different things."""
    from bench import products
    from common import generator

    inputs = products.head_inputs(products.Config(tiny=True), generator(0, "test"), 8)
    losses = {side: products.logprob_step(side, *inputs) for side in ("ours", "plain", "entropy")}
    assert losses["ours"] == pytest.approx(losses["entropy"], abs=1e-5)
    assert abs(losses["ours"] - losses["plain"]) > 1e-4  # the entropy is in the loss
