r"""A second opinion on two LaTeX answers: math-verify, where it is installed (pip install math-verify).

It knows inequalities, sets and much else that answers.py leaves out, and it is lenient and asymmetric: so it counts for
evaluation, as a number of its own, and is never a reward (a verdict that a time limit can change is not bit for bit).

    python symbolic.py '\frac{x+2}{7}' '\frac{x}{7}+\frac{2}{7}'

It runs in a process of its own, started by exec (no fork of a process with threads and a GPU in it), one for all
questions. Sympy can take for ever and all memory: an answer that takes longer than TIME_LIMIT ends that process, the next
question starts another. math-verify's own limit is a signal and works in the main thread alone, so it is off.
"""

import atexit
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time

from tasks.answers import MAX_ANSWER, answers_equal, canonical, parse_number

TIME_LIMIT = 1.0  # seconds a question, after the process has started
START_LIMIT = 60.0  # importing sympy takes a second or two, on a busy machine more
MEMORY_LIMIT = 4 << 30  # bytes of address space


def available():
    """Is math-verify installed? (Not asked on Windows, where a pipe cannot be waited for with a limit.)"""
    return os.name == "posix" and importlib.util.find_spec("math_verify") is not None


class Judge:
    """Asks the process; verdicts None: timed out, or it died over the question. Safe for threads and after a fork."""

    def __init__(self):
        self.lock, self.child, self.owner, self.rest, self.timeouts = threading.Lock(), None, 0, b"", 0

    def start(self):
        self.owner, self.rest = os.getpid(), b""
        self.child = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--serve"], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)

    def stop(self):
        if self.child and self.owner == os.getpid():
            self.child.kill()
            self.child.wait()
            self.child.stdin.close()
            self.child.stdout.close()
        self.child = None

    def line(self, seconds):
        """The next line of the process, or None when the time is up or it has died."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(self.child.stdout.fileno(), 65536) if ready else b""
            if not more:
                return None
            self.rest += more
        line, self.rest = self.rest.split(b"\n", 1)
        return line

    def ask(self, prediction, gold):
        with self.lock:
            if self.child is None or self.owner != os.getpid() or self.child.poll() is not None:
                self.child = self.child if self.owner == os.getpid() else None  # a fork's copy belongs to the parent
                self.stop()
                self.start()
                if self.line(START_LIMIT) is None:
                    self.stop()
                    return None
            try:
                self.child.stdin.write((json.dumps([prediction, gold]) + "\n").encode())
                answer = self.line(TIME_LIMIT)
            except OSError:
                answer = None
            if answer is None:
                self.timeouts += 1
                self.stop()
                return None
            return json.loads(answer)


_judge = Judge()
atexit.register(_judge.stop)


def symbolically_equal(prediction, gold):
    """answers_equal, or math-verify says so. False where it is not installed, or undecided within TIME_LIMIT."""
    if answers_equal(prediction, gold):
        return True
    if prediction is None or gold is None or max(len(prediction), len(gold)) > MAX_ANSWER or not available():
        return False
    a, b = canonical(prediction), canonical(gold)
    if not a or not b or parse_number(a) or parse_number(b) or ("," in a and "," in b):
        return False  # math-verify takes 2+2 for 4 and (3,2,1) for 1,2,3; numbers and lists are decided already
    return bool(_judge.ask(prediction, gold))


def serve():
    """One JSON pair a line in, true or false a line out. Only LaTeX is parsed (a grammar, no eval); what the libraries
    print goes nowhere."""
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text):
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=True)

    verify(read("x+1"), read("1+x"))  # what is imported at first use is not on a question's time
    print("ready", file=out)
    for line in sys.stdin:
        signal.alarm(30)  # if the parent is gone before its limit
        prediction, gold = json.loads(line)
        try:
            verdict = bool(verify(read(gold), read(prediction), float_rounding=12, timeout_seconds=None))
        except Exception:  # whatever sympy makes of hostile text: not equal
            verdict = False
        signal.alarm(0)
        print(json.dumps(verdict), file=out)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    elif len(sys.argv) == 3:
        print("equal" if symbolically_equal(*sys.argv[1:]) else "not equal")
    else:
        sys.exit(__doc__)
