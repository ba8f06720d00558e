"""Write docs/speed.md from the files in bench/results: for each number which card it comes from, or "not yet".

    python -m bench.speed             # writes docs/speed.md
    python -m bench.speed --check     # status 1 if docs/speed.md says something else than the files

Read: cpu/, h100/, h200/ with what bench/*.py and bench/gpu.sh leave there, and compiled/ (python -m kernels.compiled).
A row of a table is a quantity, a function that finds it in one folder's files, and the command that makes those.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "bench/results", ROOT / "docs/speed.md"
CARDS = {"cpu": "CPU, 2 cores", "h100": "H100", "h200": "H200"}
NOT_YET = "not yet"


def files(card):
    """{name without suffix: the JSON, or for gpu.jsonl its list of lines} of one folder."""
    out = {}
    for path in sorted((RESULTS / card).glob("*.json*")):
        text = path.read_text()
        out[path.stem] = [json.loads(x) for x in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return out


def at(value, *keys):
    """value[k1][k2]..., None where one is missing."""
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def line(found, **wanted):
    """The last line of gpu.jsonl with these values, {} if there is none."""
    rows = [r for r in found.get("gpu", []) if all(r.get(k) == v for k, v in wanted.items())]
    return rows[-1] if rows else {}


def number(x, unit=""):
    return NOT_YET if x is None else f"{x:.3g}{unit}"


# ----------------------------------------------------------------------------------------------------
# Quantities: name -> (function of a folder's files, command).


def cpu_kernels(part, label, side, key="ratio"):
    def find(found):
        value = at(found.get("kernels"), "threads_1", part, label, "sides", side, *([key, "median"] if key == "ratio" else [key]))
        return number(value)

    return find


def k1(shape, N, key):
    return lambda found: number(line(found, part="k1", shape=shape, N=N).get(key))


def over(shape, N, theirs):
    """Their time over ours, for the loss with both gradients."""
    def find(found):
        row = line(found, part="k1", shape=shape, N=N)
        return number(row[theirs] / row["ours_loss_ms"]) if {theirs, "ours_loss_ms"} <= row.keys() else NOT_YET

    return find


def k2(shape, B):
    return lambda found: number(line(found, part="k2", shape=shape, B=B).get("of_floor"))


def attention(shape):
    return lambda found: number(line(found, part="attention", shape=shape).get("of_floor"))


def rl_step(name):
    def find(found):
        for n in (1, 2):
            if r := at(found.get(name), f"threads_{n}"):
                ours, theirs = (1e3 * r[side]["seconds"]["median"] for side in ("ours", "theirs"))
                return f"{r['ratio']['median']:.3g} ({ours:.4g} against {theirs:.4g} ms)"
        return NOT_YET

    return find


def generation(name, workload):
    def find(found):
        r = at(found.get(name), "threads_2", workload)
        if r is None:
            return NOT_YET
        low, high = r["ratio"]["quartiles"]
        return f"{r['ratio']['median']:.3g} ({low:.3g} to {high:.3g})"

    return find


def correct(found):
    rows = [r for r in found.get("gpu", []) if r["part"] == "right"]
    return NOT_YET if not rows else "wrong: " + ", ".join(sum((r["wrong"] for r in rows), [])) if any(
        r["wrong"] for r in rows) else f"yes ({len(rows)} heads)"


def decode_step(found):
    steps = at(found.get("decode"), "step") or {}
    for r in steps.values():
        if "over_floor" in r:
            return number(1 / r["over_floor"])
    return NOT_YET


HEAD = "python -m bench.kernels --device cpu --threads 1 --clock processor"
GPU = "bash bench/gpu.sh kernels"
SECTIONS = {
    "Ratios to others (above 1: ours is faster)": {
        "loss with both gradients, SmolLM2's head, 512 rows, against whole logits with autograd": (
            cpu_kernels("gradients", "smollm2 512 rows", "log_softmax"), HEAD),
        "the same, 8B head, 4,096 rows, against Liger's per-token kernel": (over("llama-8b", 4096, "liger_per_token_ms"), GPU),
        "... against Liger's mean loss": (over("llama-8b", 4096, "liger_mean_ms"), GPU),
        "... against CCE, its filter off": (over("llama-8b", 4096, "cce_exact_ms"), GPU),
        "SmolLM2's head, 16,384 rows, against Liger's per-token kernel": (over("smollm2", 16384, "liger_per_token_ms"), GPU),
        "an outcome RL step against TRL, tiny model": (rl_step("rl_step"), "python -m bench.rl_step"),
        "an outcome RL step against TRL, SmolLM2": (rl_step("rl_step_smollm2"), "python -m bench.rl_step --model smollm2"),
        "generation, one prompt, against transformers": (generation("generate_single", "single"), "python -m bench.generate"),
        "generation, 64 prompts": (generation("generate_batch", "batch"), "python -m bench.generate --workloads batch"),
    },
    "Shares of a floor (1: nothing to gain)": {
        "log-prob, SmolLM2's head, of the bare product": (
            cpu_kernels("logprob", "smollm2 512 rows", "ours", "of_floor"), HEAD),
        "log-prob forward, 8B head, 4,096 rows, of cuBLAS": (k1("llama-8b", 4096, "forward_of_cublas"), GPU),
        "log-prob forward, SmolLM2's head, 16,384 rows": (k1("smollm2", 16384, "forward_of_cublas"), GPU),
        "loss with both gradients, 8B head, 4,096 rows, of three products": (k1("llama-8b", 4096, "loss_of_cublas"), GPU),
        "loss with both gradients, SmolLM2's head, 16,384 rows": (k1("smollm2", 16384, "loss_of_cublas"), GPU),
        "sampling, 8B head, 1 row, of reading the weight": (k2("llama-8b", 1), GPU),
        "sampling, 8B head, 64 rows": (k2("llama-8b", 64), GPU),
        "sampling, 8B head, 256 rows": (k2("llama-8b", 256), GPU),
        "decode attention, SmolLM2, 256 rows of 1,000, of reading the cache": (attention("smollm2 256x1000"), GPU),
        "the whole decode step, SmolLM2, 256 rows of 1,000": (decode_step, GPU),
    },
    "Is it right there?": {
        "every kernel and every row of its table against float64, gradients against float32": (correct, GPU),
    },
}


def table(rows):
    found = {card: files(card) for card in CARDS}
    lines = [f"| what | {' | '.join(CARDS.values())} | command |", "|---" * (len(CARDS) + 2) + "|"]
    for name, (find, command) in rows.items():
        cells = ["-" if card == "cpu" and command == GPU else find(found[card]) for card in CARDS]
        lines.append(f"| {name} | {' | '.join(cells)} | `{command}` |")
    return lines


def side_by_side():
    """bench.cpu's file: an older commit and the peers against this tree, in one run."""
    found = files("cpu").get("cpu", {})
    lines = ["| what | an older commit over this one | a peer over this one |", "|---|---|---|"]

    def cell(r, side):
        ratio = at(r, side, "ratio")
        return "-" if ratio is None else "{:.3g} ({:.3g} to {:.3g})".format(ratio["median"], *ratio["quartiles"])

    for case, r in found.get("cases", {}).items():
        lines.append(f"| {case} | {cell(r, 'before')} | {cell(r, 'peer')} |")
    command = f"`{found['command']}`" if found else NOT_YET
    return [f"{command}: seconds of one thread by the processor's clock, median and quartiles of the rounds.", "", *lines]


def machines():
    """Which processor each CPU file is from."""
    by_cpu = {}
    for name, result in files("cpu").items():
        machine = at(result, "machine") or {}
        by_cpu.setdefault(f"{machine.get('cpu')}, torch {machine.get('torch')}", []).append(name)
    return [f"* {cpu}: {', '.join(names)}" for cpu, names in by_cpu.items()]


def compiled():
    """What the machine code says, for sm_90, by Triton version."""
    found = {path.stem.split("_")[1]: json.loads(path.read_text()) for path in sorted((RESULTS / "compiled").glob("*.json"))}
    lines = ["| kernel | " + " | ".join(f"Triton {v}: registers, KB, blocks, instructions a logit" for v in found) + " |",
             "|---" * (len(found) + 1) + "|"]  # fmt: skip
    def cell(r, label):
        n = at(r, "sm_90", label)
        return NOT_YET if n is None else f"{n['registers']}, {n['shared'] // 1024}, {n['blocks']}, {n['a_logit']:g}"

    labels = [label for label, n in next(iter(found.values()), {}).get("sm_90", {}).items() if n["a_logit"]]
    for label in labels:
        lines.append(f"| {label} | {' | '.join(cell(r, label) for r in found.values())} |")
    return lines


def page():
    lines = ["# Speed", "", "Written by `python -m bench.speed` from the files in `bench/results/`; \"not yet\" where a card has",
             "no number. A column without one means that nothing has run there.", "", "The CPU's files are from:", "",
             *machines(), ""]
    for title, rows in SECTIONS.items():
        lines += [f"## {title}", "", *table(rows), ""]
    lines += ["## Nothing slower than before? (above 1: this tree is faster)", "", *side_by_side(), ""]
    lines += ["## What the compiler makes of the products (sm_90)", "", "`python -m kernels.compiled`; counts, no times. Nothing",
              "spills a register (`tests/test_compile.py`).", "", *compiled(), ""]
    return "\n".join(lines)


def main():
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit("docs/speed.md is not what bench/results says: python -m bench.speed")
        return
    PAGE.write_text(text)
    print(f"-> {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
