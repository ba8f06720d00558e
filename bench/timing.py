"""What the benchmarks share: sides that alternate, medians with their spread, and how quiet the machine was.

Times on a shared machine wander by tens of percent within minutes. So the sides of a comparison take turns in one
process, a ratio is formed within each round, and the median of those ratios is the result; seconds are context.
`others` is the number of cores that other processes kept busy meanwhile (from /proc, Linux only). Where they left
fewer than our threads need, two threads wait for each other in slices of the scheduler, 8 or 16 ms, and even the ratio
says nothing: such a result is marked "disturbed" (and "*" in the table), and --wait measures it again.
"""

import os
import platform
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from infra.cli import UserError, opt
from infra.runs import write_json
from infra.seeds import derive


@dataclass
class Flags:
    """What every benchmark can be told."""

    wait: float = opt(0.0, "seconds to spend on waiting for others and repeating what they disturbed", "timing", low=0)
    seed: int = opt(0, "fixes every random choice", "timing", low=0)
    tiny: bool = opt(False, "small shapes and hardly any rounds: does it run?", "timing")


def card(device=None):
    """Which folder of bench/results a result belongs to: cpu, h100, h200 or another GPU's name."""
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name()
    model = re.search(r"\b[ABHL]\d{2,3}S?\b|\bRTX \d+", name)
    return re.sub(r"\W+", "_", model[0] if model else name).lower()


def results(name, device=None):
    """Where the numbers go that were made here."""
    return f"bench/results/{card(device)}/{name}.json"


def normal(*shape, seed, device, dtype=torch.float32, scale=1.0):
    """Normal numbers drawn where they are used: on a GPU the head of an 8B model takes milliseconds, on its host a minute."""
    generator = torch.Generator(device).manual_seed(derive(seed, "bench", *shape))
    return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)


def machine(*packages):
    """Processor, cores and versions, for the JSON."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        rows = [row.partition(":") for row in info.read_text().split("\n\n")[0].splitlines()]
        cpu = {key.strip(): value.strip() for key, _, value in rows}
        cpu = f"{cpu.get('model name')} (family {cpu.get('cpu family')}, model {cpu.get('model')})"
    gpu = dict(gpu=torch.cuda.get_device_name()) if torch.cuda.is_available() else {}
    return gpu | dict(cpu=cpu, cores=os.cpu_count(), system=platform.system(), python=platform.python_version(),
                torch=torch.__version__, **{name: metadata.version(name) for name in packages})


def need(*packages):
    """UserError that names the first package which is missing."""
    for name in packages:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed, and it is what this compares with: pip install {name}") from None


def _busy():
    """Seconds of CPU that all processes have used so far, and this one with its ended children."""
    mine = sum(os.times()[:4])
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return mine, mine
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK"), mine  # less idle and iowait; steal counts


class Others:
    """with Others() as o: ...; o.cores is then the number of cores that other processes kept busy."""

    def __enter__(self):
        self.start = time.time(), *_busy()
        return self

    def __exit__(self, *_):
        wall, all_, mine = (b - a for a, b in zip(self.start, (time.time(), *_busy())))
        self.cores = round(max(0.0, all_ - mine) / wall, 2) if wall > 1 else None  # the clock ticks in 10 ms


def alternate(sides, repeats, min_seconds=0.0, clock=time.perf_counter):
    """sides {name: function()} -> {name: [seconds a call]}, one number a round. The order turns round every time.
    A first call of each, untimed, warms up; a function shorter than min_seconds runs many times a round.
    clock: time.process_time counts the processor's seconds of all threads instead, which others disturb far less."""
    count = {}
    for name, f in sides.items():
        f()
        start = clock()
        if min_seconds:
            f()
        count[name] = max(1, round(min_seconds / max(clock() - start, 1e-7))) if min_seconds else 1
    times = {name: [] for name in sides}
    for r in range(repeats):
        for name in list(sides)[:: 1 if r % 2 else -1]:
            start = clock()
            for _ in range(count[name]):
                sides[name]()
            times[name].append((clock() - start) / count[name])
    return times


def waiting(calls, gpu):
    """A function that does all the calls and waits until the GPU has done them."""
    def run():
        for call in calls:
            call()
        if gpu:
            torch.cuda.synchronize()

    return run


def recorded(calls, gpu):
    """A function that does all the calls; on a GPU a graph of them, so that no side waits for Python. It does not wait either."""
    if not gpu:
        return waiting(calls, gpu)
    waiting(calls, gpu)()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _digits(x):
    return float(f"{x:.4g}")


def spread(values):
    """Median, quartiles and minimum of a list, to four digits."""
    low, middle, high = statistics.quantiles(values * 2 if len(values) == 1 else values, n=4, method="inclusive")
    return dict(median=_digits(middle), quartiles=[_digits(low), _digits(high)], min=_digits(min(values)))


def ratio(theirs, ours):
    """How many times as fast `ours` is, from the rounds' own ratios: median, quartiles; and minimum over minimum."""
    out = spread([a / b for a, b in zip(theirs, ours)])
    return dict(median=out["median"], quartiles=out["quartiles"], of_minima=_digits(min(theirs) / min(ours)))


def compare(times, others):
    """alternate()'s times of "ours" and "theirs" -> seconds of both and their ratio."""
    sides = {name: dict(seconds=spread(times[name])) for name in ("ours", "theirs")}
    return sides | dict(ratio=ratio(times["theirs"], times["ours"]), others=others.cores)


def undisturbed(cfg, measure):
    """measure(), and again while others leave less than our threads' cores free and cfg.wait lasts: it is used up."""
    room = os.cpu_count() - torch.get_num_threads() + 0.15
    while True:
        start, quiet = time.time(), Others()
        while cfg.wait > time.time() - start:
            with quiet:
                time.sleep(1.1)
            if quiet.cores <= room:
                break
        result = measure()
        cfg.wait -= time.time() - start
        result["disturbed"] = (result["others"] or 0) > room
        if not result["disturbed"] or cfg.wait <= 0:
            return result


def compare_calls(cfg, ours, theirs, min_seconds=0.0):
    def measure():
        with Others() as others:
            times = alternate(dict(ours=ours, theirs=theirs), cfg.repeats, min_seconds)
        return compare(times, others)

    return undisturbed(cfg, measure)


def header(label, unit):
    print(f"{label:<34}{'ours ' + unit:>14}{'theirs ' + unit:>16}{'ratio':>8}   {'quartiles':<16}others")


def line(label, result, number):
    """One row; number(seconds) is what to print for a side's median."""
    a, b = (number(result[side]["seconds"]["median"]) for side in ("ours", "theirs"))
    low, high = result["ratio"]["quartiles"]
    print(f"{label:<34}{a:>14.4g}{b:>16.4g}{result['ratio']['median']:>8.2f}   {f'{low:.2f} - {high:.2f}':<16}"
          f"{result['others']}{' *' if result['disturbed'] else ''}", flush=True)


def write(path, result):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"-> {path}")


def about(module, argv, cfg, *packages):
    """The head of every JSON: the command, the machine, the settings."""
    given = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--out=")]
    settings = {name: value for name, value in asdict(cfg).items() if name != "out"}  # a path of this machine
    return dict(command=" ".join(["python", "-m", module, *given]), machine=machine(*packages), settings=settings)
