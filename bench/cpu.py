"""Nothing slower than before? This tree, an older commit and their peers, side by side on a CPU.

    python -m bench.cpu                      # this tree and peers: 6 minutes, of which 2 are timed
    python -m bench.cpu --before d5e1d49     # and that commit of this repository, as it was
    python -m bench.cpu --tiny               # does it run?

The kernels at the temperatures 1 and 0.05 (most exponentials underflow there), an RL step as in
bench.rl_step, generation as in bench.generate. Peers: cross_entropy over whole logits with
autograd, softmax and multinomial, TRL's GRPOTrainer, transformers' generate(); those that are not
installed are left out. Each side has a process of its own (bench/sides.py), in which all cases
stand ready before the first is timed. Then the sides take turns, one thread each, the order
turning round every time. A ratio is formed within each round, of the processor's seconds, which
other processes disturb less than the wall's (both are kept). Above 1: this tree is faster.

bench.kernels, bench.rl_step and bench.generate have more shapes, more peers and two threads; this
one answers whether a change made something slower.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench import sides, timing
from infra.cli import UserError, opt, parse, script

ROOT = Path(__file__).parent.parent
RL, TRANSFORMERS = ("trl", "transformers", "datasets", "accelerate"), ("transformers",)
NEEDS = {"RL step": RL, "generation": TRANSFORMERS}  # a case's beginning -> packages of its peer
QUIET = dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")


@dataclass
class Config(timing.Flags):
    before: str = opt("", "a commit to compare with (default: the peers alone)", "what")
    cases: list = opt([""], "beginnings of the names of cases (default: all)", "what")
    repeats: int = opt(7, "rounds", "timing", low=1)
    min_seconds: float = opt(0.2, "a side runs this long in every round", "timing", low=0)
    out: str = opt("", "where the numbers go (default: bench/results/cpu/cpu.json)", "timing")


class Worker:
    """A process of bench.sides."""

    def __init__(self, tree, log):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.sides"],
            cwd=tree,
            env=os.environ | QUIET,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def ask(self, *order):
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{order[1]}: its process ended; what it said is above")
        return json.loads(answer)


def checkout(commit, where):
    """The files of a commit, and the cases of this tree among them."""
    done = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise UserError(f"--before {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        files.extractall(where, filter="data")
    shutil.copy(sides.__file__, Path(where) / "bench/sides.py")
    return where


def prepare(cfg, workers, names, where):
    """Makes every case in every process -> {case: {side: its process}}, without absent peers."""
    ready = {}
    for case in names:
        needed = [p for name, packages in NEEDS.items() if case.startswith(name) for p in packages]
        installed = all(map(find_spec, needed))
        ready[case] = {n: worker for n, worker in workers.items() if n != "peer" or installed}
        for name, worker in ready[case].items():
            worker.ask("make", case, cfg.tiny, tempfile.mkdtemp(dir=where), name == "peer")
        print(f"ready: {case}", flush=True)
    return ready


def compare(cfg, case, turns):
    """Rounds of one case -> spread of the seconds of each side, and its ratio to now's."""

    def run(name, times):
        return turns[name].ask("run", case, "peer" if name == "peer" else "ours", times)

    first = {name: run(name, 1)[0] for name in turns}
    times = {name: max(1, round(cfg.min_seconds / max(s, 1e-7))) for name, s in first.items()}
    wall = {name: [] for name in turns}
    cpu = {name: [] for name in turns}
    with timing.Others() as others:
        for r in range(cfg.repeats):
            for name in list(turns)[:: 1 if r % 2 else -1]:
                seconds = run(name, times[name])
                wall[name].append(seconds[0])
                cpu[name].append(seconds[1])
    out = {}
    for name in turns:
        out[name] = dict(
            seconds=timing.spread(wall[name]),
            cpu_seconds=timing.spread(cpu[name]),
            ratio=timing.ratio(cpu[name], cpu["now"]),
            ratio_wall=timing.ratio(wall[name], wall["now"]),
        )
    used, passed = (sum(times[n] * sum(clock[n]) for n in turns) for clock in (cpu, wall))
    busy = others.cores  # the processes of the sides are among those others
    return out | dict(others=None if busy is None else round(max(0.0, busy - used / passed), 2))


def show(case, result):
    cells = [f"{1e3 * result['now']['cpu_seconds']['median']:>10.4g}"]
    for name in ("before", "peer"):
        cell = "-"
        if name in result:
            r = result[name]["ratio"]
            cell = f"{r['median']:.2f} ({r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f})"
        cells.append(f"{cell:>22}")
    print(f"{case:<64}{''.join(cells)}  {result['others']}", flush=True)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.tiny:
        cfg.repeats = 2
        cfg.min_seconds = 0.0
    names = [case for case in sides.CASES if case.startswith(tuple(cfg.cases))]
    if not names:
        known = "; ".join(sides.CASES)
        raise UserError(f"--cases {' '.join(cfg.cases)}: none begins like that; there are {known}")
    packages = [p for p in ("trl", "transformers") if find_spec(p)]
    result = timing.about("bench.cpu", argv, cfg, *packages) | dict(cases={})
    with (
        tempfile.TemporaryDirectory() as where,
        open(Path(where) / "log.txt", "w+") as log,
    ):
        trees = dict(now=ROOT, peer=ROOT)
        if cfg.before:
            trees["before"] = checkout(cfg.before, f"{where}/before")
        workers = {name: Worker(tree, log) for name, tree in trees.items()}
        try:
            ready = prepare(cfg, workers, names, where)
            print(f"\n{'':<64}{'ms of CPU':>10}{'before':>22}{'peer':>22}  others", flush=True)
            for case, turns in ready.items():
                result["cases"][case] = compare(cfg, case, turns)
                show(case, result["cases"][case])
        except (RuntimeError, BrokenPipeError):
            log.seek(0)
            print(log.read()[-3000:], file=sys.stderr)
            raise
        finally:
            for worker in workers.values():
                worker.process.kill()
                worker.process.wait()
    timing.write(cfg.out or timing.results("cpu", "cpu"), result)


if __name__ == "__main__":
    script(main)
