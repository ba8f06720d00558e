"""triton has wheels for Linux only. Here it is hidden from a process: everything else must work as on macOS."""

import json
import os
import subprocess
import sys
from pathlib import Path

from toy import tiny_model

from model import save_model
from tasks import get_task

ROOT = Path(__file__).parent.parent
HIDE = """
import importlib.machinery as machinery
found = machinery.PathFinder.find_spec
hidden = lambda name: name.split(".")[0] == "triton"
machinery.PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if hidden(name) else found(name, *rest))
"""
WORK = """
import importlib, sys
try:
    import triton
except ImportError:
    pass
else:
    sys.exit("triton was not hidden")
for name in sys.argv[1].split():
    importlib.import_module(name)
import train_rl
train_rl.main(sys.argv[2:])
"""


def test_every_module_is_imported_and_rl_trains_without_triton(tmp_path):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    tokenizer = get_task("planted").tokenizer()
    save_model(tmp_path / "policy", tiny_model(vocab=tokenizer.n_vocab), tokenizer)
    modules = [path.stem for path in ROOT.glob("*.py")]
    # Not those about the Triton kernels alone, which no script loads: kernels/compiled.py, kernels/steps.py, bench/gpu.py.
    modules += [f"{folder}.{path.stem}" for folder in ("kernels", "bench") for path in (ROOT / folder).glob("*.py")
                if not path.stem.endswith(("_triton", "compiled", "steps", "gpu", "__init__"))]  # fmt: skip
    argv = [f"--policy={tmp_path / 'policy'}", f"--run-dir={tmp_path / 'run'}", "--reward=outcome", "--steps=2",
            "--num-prompts=2", "--num-generations=4", "--eval-problems=4"]  # fmt: skip
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(tmp_path / "hide"), str(ROOT)]))
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", WORK, " ".join(modules), *argv], cwd=tmp_path, env=env, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 2
