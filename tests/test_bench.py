"""Each benchmark runs with tiny shapes and writes its JSON. No test looks at the times themselves."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PEERS = {"products": [], "decode": [], "generate": ["transformers"], "rl_step": ["trl", "transformers", "datasets", "accelerate"]}


def run(name, out, *more):
    command = [sys.executable, "-m", f"bench.{name}", "--tiny", f"--out={out}", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def comparisons(value):
    """Every ours-against-theirs in the JSON."""
    if not isinstance(value, dict):
        return []
    if {"ours", "theirs", "ratio"} <= value.keys():
        return [value]
    return [found for inner in value.values() for found in comparisons(inner)]


@pytest.mark.parametrize(("name", "at_least"), [("products", 20), ("decode", 3), ("generate", 4), ("rl_step", 1)])
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


def test_the_short_gpu_run_runs_tiny_and_says_whether_it_is_right(tmp_path):
    """Interpreted: every part leaves a line, none is wrong."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--out", str(tmp_path / "gpu.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {"ceilings", "right", "k1", "k2", "attention", "variants", "end"} == {line["part"] for line in lines}
    assert not any("error" in line or line.get("wrong") for line in lines)


def test_wrong_numbers_end_the_short_gpu_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    from bench import gpu

    monkeypatch.setitem(gpu.LIMITS, "logprob", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--parts", "right"])
    with pytest.raises(SystemExit) as e:
        gpu.main()
    assert e.value.code == 1 and '"wrong": ["tiny: logprob"' in capsys.readouterr().out


def test_the_page_on_speed_is_what_the_files_say(tmp_path, monkeypatch):
    """docs/speed.md is written from bench/results; a card without files says "not yet", one with files its numbers."""
    from bench import speed

    assert speed.PAGE.read_text() == speed.page()
    rows = [dict(part="k1", shape="llama-8b", N=4096, forward_of_cublas=0.83, ours_loss_ms=20.0, liger_per_token_ms=26.0),
            dict(part="right", wrong=[]), dict(part="right", wrong=["tile wide"])]
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100/gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    text = speed.page()
    assert "8B head, 4,096 rows, against Liger's per-token kernel | - | 1.3 | not yet |" in text
    assert "of cuBLAS | - | 0.83 | not yet |" in text and "| - | wrong: tile wide | not yet |" in text


def test_results_go_to_their_cards_folder(monkeypatch):
    from bench import timing

    assert timing.results("x", "cpu") == "bench/results/cpu/x.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, card in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-40GB", "a100"),
                       ("NVIDIA GeForce RTX 4090", "rtx_4090")):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert timing.results("x") == f"bench/results/{card}/x.json"


def test_growth_fits_straight_lines_and_watches_a_run(tmp_path):
    from bench import growth

    assert growth.exponent([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert growth.exponent([1, 2, 4], [5, 20, 80]) == pytest.approx(2) and growth.exponent([1, 2], [7, 7]) == 0
    done = run("growth", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert {c["cost"] for c in result["curves"]} == {"logprob", "generate", "update", "rl step", "verify"}
    for c in result["curves"]:
        assert len(c["seconds"]) == len(c["values"]) == 2 and min(c["seconds"]) > 0 and c["time_exponent"] is not None
    assert len(result["run"]["resident_mib"]) == 10


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no commit to compare with")
def test_this_tree_another_commit_and_the_peers_in_one_run(tmp_path):
    done = run("cpu", tmp_path / "out.json", "--before=HEAD", "--cases", "log-prob", "sampling")
    assert done.returncode == 0, done.stderr[-2000:]
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases.values():
        assert case["now"]["ratio"]["median"] == 1
        assert all(case[side]["cpu_seconds"]["min"] > 0 for side in ("now", "before", "peer"))
    refused = run("cpu", tmp_path / "none.json", "--before=no-such-commit")
    assert refused.returncode != 0 and "--before no-such-commit" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("case", ["RL step", "generation"])
def test_the_sides_of_whole_steps(case, tmp_path):
    for peer in PEERS["rl_step"]:
        pytest.importorskip(peer)
    done = run("cpu", tmp_path / "out.json", "--cases", case)
    assert done.returncode == 0, done.stderr[-2000:]
    ((_, sides),) = json.loads((tmp_path / "out.json").read_text())["cases"].items()
    assert sides["now"]["seconds"]["min"] > 0 and sides["peer"]["ratio"]["median"] > 0


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
    from infra.cli import UserError

    with pytest.raises(UserError, match="pip install no-such-package"):
        timing.need("torch", "no-such-package")


def test_products_logprob_sides_compute_the_same():
    """A comparison of speed is worth nothing if the two sides compute different things."""
    from bench import products
    from infra.seeds import generator

    inputs = products.head_inputs(products.Config(tiny=True), generator(0, "test"), 8)
    losses = {side: products.logprob_step(side, *inputs) for side in ("ours", "plain", "entropy")}
    assert losses["ours"] == pytest.approx(losses["entropy"], abs=1e-5)
    assert abs(losses["ours"] - losses["plain"]) > 1e-4  # the entropy is in the loss


def test_kernels_table_holds_right_values_only(tmp_path):
    """Every side that could be measured here agrees with the exact value, and ours is among them in every table."""
    done = run("kernels", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out.json").read_text())
    here = result.get("threads_1", result)
    tables = [table for part in ("logprob", "gradients", "grpo", "sampling", "decode") for table in here[part].values()]
    assert len(tables) >= 6
    for sides in (table["sides"] for table in tables if "sides" in table):
        assert sides["ours"]["agrees"] and sides["ours"]["ratio"]["median"] == 1
        for name, side in sides.items():
            if "absent" not in side:
                assert side["seconds"]["min"] > 0 and side["peak_mib"] >= 0 and side.get("agrees", name == "product"), name


def test_kernels_says_which_sides_are_wrong_or_absent(capsys):
    from bench import kernels

    def missing(x):
        raise ImportError("No module named 'elsewhere'")

    def breaks(x):
        raise ZeroDivisionError("inside")

    x = torch.ones(3)
    sides = {"ours": (lambda x: x * 1, 1e-3), "off": (lambda x: x * 1.1, 1e-3), "nan": (lambda x: x * math.nan, 1e-3),
             "missing": (missing, 1e-3), "breaks": (breaks, 1e-3), "product": (lambda x: x + 0, None)}  # fmt: skip
    found = kernels.compare(kernels.Config(tiny=True, repeats=1), "toy", sides, [(x,)], kernels.logprob_error, x)["sides"]
    assert found["ours"]["agrees"] and not found["off"]["agrees"] and not found["nan"]["agrees"]
    assert found["missing"] == dict(absent="absent: No module named 'elsewhere'")
    assert found["breaks"] == dict(absent="fails: ZeroDivisionError: inside")
    assert capsys.readouterr().out.count("DIFFERS") == 2
    with pytest.raises(ZeroDivisionError):  # ours may not fail
        kernels.compare(kernels.Config(tiny=True), "toy", {"ours": (breaks, 1e-3)}, [(x,)], kernels.logprob_error, x)


def test_kernels_counts_the_memory_of_a_call_without_what_it_returns():
    from bench.kernels import peak_bytes

    def call():
        a = torch.empty(1_000_000)
        del a
        return (torch.empty(250_000) + torch.empty(750_000)[:250_000],)  # 4 MB; then 1 + 3, and the 1 it returns

    def grows():
        kept = torch.empty(1_000_000)
        return (kept + torch.empty(500_000).sum(), kept)

    assert peak_bytes(call, gpu=False)[1] == 4_000_000 and peak_bytes(grows, gpu=False)[1] == 2_000_000 + 4
