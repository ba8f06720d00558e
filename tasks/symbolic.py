r"""A second opinion on formulas: math-verify, where it is installed (pip install math-verify).

It knows inequalities and identities, which answers.py leaves out, and it is lenient: alone it takes
3=3 for 8=8 and "5 thousandths" for 5. So it is asked about single formulas that ours cannot decide:
in evaluation for a second number, as the reward with --grader math-verify (which a time limit can
change: such a run is not bit for bit). Sympy can take for ever and all memory, so it runs in a
process of its own, started by exec: a question beyond the limit ends it, the next starts another.
"""

import atexit
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
MAX_QUESTIONS = 4  # about the parts of one answer


def available():
    """Is math-verify installed? (Not on Windows: no limit on waiting for a pipe there.)"""
    return os.name == "posix" and importlib.util.find_spec("math_verify") is not None


class Judge:
    """Asks the process. Safe for threads and after a fork."""

    lock, child, owner, timeouts = threading.Lock(), None, 0, 0

    def stop(self):
        if self.child and self.owner == os.getpid():  # a fork's copy belongs to the parent
            self.child.kill()
            self.child.communicate()
        self.child = None

    def line(self, seconds):
        ready = select.select([self.child.stdout], [], [], seconds)[0]
        return self.child.stdout.readline() if ready else b""

    def ask(self, prediction, gold):
        """-> equal or not; None: no answer in time."""
        with self.lock:
            try:
                if not self.child or self.owner != os.getpid() or self.child.poll() is not None:
                    self.stop()
                    self.owner, pipe = os.getpid(), subprocess.PIPE
                    self.child = subprocess.Popen([sys.executable, "-P", __file__], bufsize=0, stdin=pipe,
                                                  stdout=pipe, stderr=subprocess.DEVNULL)
                    self.line(START_LIMIT)
                self.child.stdin.write((json.dumps([prediction, gold]) + "\n").encode())
                return json.loads(self.line(TIME_LIMIT))
            except (OSError, ValueError):
                self.timeouts += 1
                return self.stop()


_judge = Judge()
atexit.register(_judge.stop)


def symbolically_equal(prediction, gold):
    """answers_equal, but math-verify has a say where two formulas differ for all that it knows."""
    from tasks.answers import answers_equal  # here: the process that runs this file does not need it

    left = iter(range(MAX_QUESTIONS))
    ask = lambda a, b: next(left, None) is not None and bool(_judge.ask(a, b))  # noqa: E731
    return answers_equal(prediction, gold, ask if available() else None)


def serve():
    """One JSON pair a line in, true or false a line out. Only LaTeX is parsed (a grammar, no eval)."""
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the libraries print goes nowhere
    from math_verify import LatexExtractionConfig, parse, verify

    for line in itertools.chain(['["x+1", "1+x"]'], sys.stdin):  # what is imported at first use is on nobody's time
        signal.alarm(30)  # if the parent is gone before its limit
        try:
            a, b = (parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None,
                          raise_on_error=True) for text in json.loads(line))
            verdict = bool(verify(b, a, float_rounding=12, timeout_seconds=None))
        except Exception:  # whatever sympy makes of hostile text: not equal
            verdict = False
        signal.alarm(0)
        print(json.dumps(verdict), file=out)


if __name__ == "__main__":
    serve()
