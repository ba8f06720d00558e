"""Every Triton kernel, as its wrapper would launch it for real models, compiled for GPUs that need not be here.

    pytest tests/test_compile.py                              # two minutes; a few seconds once Triton has them in its cache

Asserted: nothing spills, nothing is float64 that need not be, the tensor cores of that GPU are used, the shared memory fits,
matrices are stored by 16 bytes, `logits_to_gradient` takes 20 instructions a logit at most, and the tables in the kernels'
docstrings say what comes out. What it does not say: whether it is fast. A process whose kernels are interpreted cannot compile;
there, one test runs this file in a process that can.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no wheel for this machine")

if triton.knobs.runtime.interpret:

    def test_kernels_compile_in_a_process_of_their_own():
        environment = os.environ | dict(TRITON_INTERPRET="0")
        out = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__], env=environment,
                             capture_output=True, text=True)
        assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]

else:
    from kernels import attention_triton, layer_triton, logprob_triton, sampling_triton
    from kernels.compiled import MODELS, SHARED, look, of_decoding, of_head, record

    MMA = {80: "HMMA", 90: "HGMMA"}  # the tensor cores' instruction: of a warp, of a warpgroup
    COPY = {80: "LDGSTS", 90: "UTMALDG"}  # asynchronous copies: of a thread, of the copy engine
    MODULES = (attention_triton, layer_triton, logprob_triton, sampling_triton)
    EXACT_SUMS = {"draw", "greedy", "cut", "draw_stored", "philox_uniform"}  # cumulative sums and uniforms are float64

    def check(launch):
        """Compile one launch, assert what holds for all. Returns the code."""
        code = launch.compile()
        assert code.spills == 0 and code.stack == 0, code
        assert code.shared <= SHARED[launch.arch], code
        assert code.scratch == 0, code  # autograd's threads would not know where it is
        if code.name.removesuffix("_kernel") not in EXACT_SUMS:
            assert code.count("DFMA", "DADD", "DMUL") == 0, f"{code}: float64"
        return code

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("arch", [80, 90])
    def test_the_head(arch, model):
        made = {label: (check(launch), launch, logits) for label, (launch, logits) in of_head(arch, model).items()}
        for label, (code, launch, logits) in made.items():
            is_product = not label.startswith(("logits_to_gradient", "draw"))
            if is_product:
                assert code.count(MMA[arch]) > 0, code
                assert code.count("LDGSTS" if label.startswith("group_stats") else COPY[arch]) > 0, code
            if label.startswith(("tile, stored", "d_logits", "logits_to_gradient")):  # bfloat16 or float16: 8 to 16 bytes
                assert look(code)["stores_128"] == logits / 8, f"{code}: {code.instructions}"
            if label.startswith("logits_to_gradient"):
                assert sum(code.instructions.values()) / logits <= 20, code
            if launch.kernel is logprob_triton.persistent_tile_kernel:
                assert code.count("USETMAXREG") > 0, f"{code}: its warps are not specialised"
        if arch == 90 and model == "smollm2":
            assert made["tile"][0].blocks == made["tile, stored"][0].blocks == 2
            assert made["group_stats, 64 rows"][0].blocks == 3

    @pytest.mark.parametrize("arch", [80, 90])
    def test_the_rest(arch):
        launches = of_decoding(arch)
        for label, launch in launches.items():
            code = check(launch)
            if "bf16" in label or label == "swiglu":
                assert code.count("LDG", "LDGSTS") and not [x for x in code.instructions if x.startswith("LDG.E.U16")], code

    def test_every_kernel_is_compiled():
        launches = [x.kernel for x in of_decoding(90).values()]
        launches += [x.kernel for model in MODELS for x, _ in of_head(90, model).values()]
        made = {x.fn.__name__ for x in launches}
        written = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
        missing = set() if logprob_triton.WARPS_SPECIALISE else {"persistent_tile_kernel"}
        assert made == written - missing and len(written) == 15

    @pytest.mark.skipif(triton.__version__ != "3.6.0", reason="the tables are Triton 3.6.0's, which the GPU machines have")
    def test_the_tables_of_the_docstrings():
        """Lines of "model  kernel  registers  KB  blocks  a logit" for sm_90."""
        line = rf"^    ({'|'.join(MODELS)}) +(.+?)  +(\d+) +(\d+) +(\d+) +([\d.]+|-)$"
        rows = [row for module in (logprob_triton, sampling_triton) for row in re.findall(line, module.__doc__, re.M)]
        assert len(rows) == 15
        heads = {model: of_head(90, model) for model in MODELS}
        for model, label, *claimed in rows:
            launch, logits = heads[model][label]
            n = look(launch.compile(), logits)
            a_logit = "-" if logits is None else f"{n['a_logit']:g}"
            assert claimed == [*map(str, (n["registers"], round(n["shared"] / 1024), n["blocks"])), a_logit], (model, label)

    def test_no_literal_is_below_the_smallest_float32():
        """Triton 3.6 takes a literal below 2^-126 for a float64, and all that follows with it."""
        for module in MODULES:
            for text in re.findall(r"(?<![\w.])\d+(?:\.\d*)?e-\d+", Path(module.__file__).read_text()):
                assert float(text) >= 2.0**-126 or text in ("1e-300", "1.1102230246251565e-16"), (module.__name__, text)

    def test_the_number_of_tokens_compiles_nothing_anew():
        """It differs in every batch. Triton compiles for what it finds aligned: all of it must be, always."""
        def train(hidden, weight, target):
            a, b, c = logprob_triton.linear_logprob(hidden, weight, target, 0.7)
            (a + b + c).sum().backward()
            logprob_triton.linear_logprob_loss(hidden, weight, target, 0.7, lambda logprob, entropy: (logprob + entropy).sum())

        for N in (37, 130):
            hidden, weight = (torch.ones(n, 72, dtype=torch.bfloat16, requires_grad=True) for n in (N, 304))
            launches = record(90, train, hidden, weight, torch.zeros(N, dtype=torch.int64))
            assert {x.kernel.fn.__name__ for x in launches} >= {"tile_kernel", "combine_kernel", "logits_to_gradient_kernel"}
            assert not [x for one in launches for x in one.args.values() if isinstance(x, torch.Tensor) and x.data_ptr() % 16]
