r"""A second opinion on formulas: math-verify, where it is installed (pip install math-verify).

It knows inequalities and identities, which answers.py leaves out, and is lenient: alone it takes
3=3 for 8=8. So it is asked about single formulas that ours leaves open: for a second number in
evaluation, for the reward with --grader math-verify (a time limit can change it: not bit for bit).
Sympy can take for ever and all memory: it runs in a process of its own, ended at the limit.
"""

import importlib.util
import itertools
import json
import os
import select
import subprocess
import sys
import threading

TIME_LIMIT = 1.0  # seconds a question, after the process has started
START_LIMIT = 60.0  # importing sympy takes a second or two, on a busy machine more
MEMORY_LIMIT = 4 << 30  # bytes of address space


def available():
    """Is math-verify installed? (Not on Windows: no limit on waiting for a pipe there.)"""
    return os.name == "posix" and importlib.util.find_spec("math_verify") is not None


class Judge:
    """Asks the process. Safe for threads and after a fork."""
    lock, child, owner, timeouts = threading.Lock(), None, 0, 0

    def line(self, seconds):
        ready = select.select([self.child.stdout], [], [], seconds)[0]
        return self.child.stdout.readline() if ready else b""

    def ask(self, prediction, gold):
        """-> equal or not; None: no answer in time."""
        with self.lock:
            if not self.child or self.owner != os.getpid() or self.child.poll() is not None:
                self.owner, command = os.getpid(), [sys.executable, "-P", __file__]
                self.child = subprocess.Popen(command, bufsize=0, stdin=-1, stdout=-1, stderr=-3)
                self.line(START_LIMIT)
            try:
                self.child.stdin.write((json.dumps([prediction, gold]) + "\n").encode())
                return json.loads(self.line(TIME_LIMIT))
            except (OSError, ValueError):
                self.timeouts += 1
                self.child.kill()
                self.child.communicate()


_judge = Judge()


def symbolically_equal(prediction, gold):
    """answers_equal, but math-verify has a say where two formulas differ for all that it knows."""
    from tasks.answers import answers_equal  # here: the process that runs this file needs no torch

    return answers_equal(prediction, gold, _judge.ask if available() else None)


def serve():
    """One JSON pair a line in, true or false a line out. LaTeX is parsed, nothing evaluated."""
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the libraries print goes nowhere
    from math_verify import LatexExtractionConfig, parse, verify

    latex, options = [LatexExtractionConfig()], dict(parsing_timeout=None, raise_on_error=True)
    for line in itertools.chain(['["x+1", "1+x"]'], sys.stdin):  # what is imported late, before all
        signal.alarm(30)  # if the parent is gone before its limit
        try:
            a, b = (parse(rf"\boxed{{{e}}}", latex, **options) for e in json.loads(line))
            verdict = bool(verify(b, a, float_rounding=12, timeout_seconds=None))
        except Exception:  # whatever sympy makes of hostile text: not equal
            verdict = False
        signal.alarm(0)
        print(json.dumps(verdict), file=out)


if __name__ == "__main__":
    serve()
