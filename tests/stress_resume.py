"""The long version of test_resume.py: kill -9 at random moments, many times, and compare every bit at the end.

    python tests/stress_resume.py --kills 200            # about 6 minutes of one core; Ctrl-C prints what was seen so far
    python tests/stress_resume.py --kills 3 --scripts train_rl pav

Each round starts one tiny run, kills it again and again (before a random file operation, or at a random moment of
generation, update or writing), lets it end, and holds weights, moments, rollouts, state and metrics against a run that
was never killed. Exit code 1 and the kept directory, if a bit differs.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

import torch  # noqa: E402
from test_resume import TINY, command, outcome, stage  # noqa: E402
from toy import ToyTask, tiny_model  # noqa: E402

from model import save_model  # noqa: E402
from verifier import Verifier, save_verifier  # noqa: E402


def run(context, script, argv, log, **kill):
    process = context.Process(target=stage, args=(script, argv, str(log)), kwargs=kill)
    process.start()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        sys.exit(f"{script} failed by itself:\n{log.read_text()}")
    return process.exitcode == 0


def make_inputs(folder):
    tokenizer = ToyTask().tokenizer()
    save_model(folder / "policy", tiny_model(), tokenizer)
    verifier = Verifier(tiny_model(seed=1), fingerprint=tokenizer.fingerprint)
    torch.nn.init.normal_(verifier.head.weight, generator=torch.Generator().manual_seed(0))
    (folder / "verifier").mkdir()
    save_verifier(folder / "verifier", verifier, tokenizer, {})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills of each script")
    parser.add_argument("--scripts", nargs="*", default=list(TINY), choices=list(TINY))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*TINY, "toy", "torch._dynamo"])
    home = Path(tempfile.mkdtemp(prefix="stress_resume_"))
    make_inputs(home)
    for script in args.scripts:
        whole_run, killed_run, log = home / f"{script}_whole", home / f"{script}_killed", home / "log"
        run(context, script, command(script, home, whole_run), log)
        operations, seconds = map(float, log.read_text().split("file operations: ")[1].split(" in "))
        want, rng, kills, rounds = outcome(whole_run), random.Random(f"{args.seed}/{script}"), 0, 0
        while kills < args.kills:
            shutil.rmtree(killed_run, ignore_errors=True)
            rounds += 1
            for _ in range(rng.randint(1, 12)):
                moment = dict(die_after=rng.uniform(0.05, 1.0) * seconds) if rng.random() < 0.5 else dict(
                    die_at=rng.randint(1, int(operations)))
                kills += not run(context, script, command(script, home, killed_run), log, **moment)
            run(context, script, command(script, home, killed_run), log)
            if outcome(killed_run) != want:
                sys.exit(f"{script}: after {kills} kills the bits differ; both runs are kept in {home}")
        print(f"{script}: {kills} kills in {rounds} rounds, every bit the same", flush=True)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
