"""Every Triton kernel, as its wrapper would launch it for real models, compiled for GPUs that need not be here.

    pytest tests/test_compile.py                              # two minutes; a few seconds once Triton has them in its cache

Asserted: nothing spills, the tensor cores of that GPU are used, the shared memory fits. What it does not say: whether it
is fast. A process whose kernels are interpreted cannot compile; there, one test runs this file in a process that can.
"""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no wheel for this machine")

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a thread block may have


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def record(arch, function, *args, **options):
    from compile_triton import Recorder

    with Recorder(arch) as launches:
        function(*args, **options)
    return launches


def check(launch, *required):
    """Compile one launch; required: instructions that must be there. Returns the code."""
    code = launch.compile()
    assert code.spills == 0, code
    assert code.shared <= SHARED[launch.arch], code
    for instruction in required:
        assert code.count(instruction) > 0, f"{code}: no {instruction}"
    return code


if triton.knobs.runtime.interpret:

    def test_kernels_compile_in_a_process_of_their_own():
        environment = os.environ | dict(TRITON_INTERPRET="0")
        out = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__], env=environment,
                             capture_output=True, text=True)
        assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]

else:
    MMA = {80: "HMMA", 90: "HGMMA"}  # the tensor cores' instruction: of a warp, of a warpgroup

    @pytest.mark.parametrize("arch, B, V, D", [
        (80, 16, 49152, 576), (90, 16, 49152, 576), (90, 256, 128256, 4096),
        pytest.param(80, 256, 128256, 4096, marks=pytest.mark.xfail(reason="two registers of the large tile spill on sm_80")),
    ])
    def test_sampling(arch, B, V, D):
        from kernels import sampling_triton

        (launch,) = record(arch, sampling_triton.group_stats, meta(B, D), meta(V, D), 0.7)
        check(launch, MMA[arch], "LDGSTS")

    @pytest.mark.parametrize("arch, V, D, dtype, softcap", [
        (80, 49152, 576, torch.bfloat16, None), (90, 49152, 576, torch.bfloat16, None), (90, 128256, 4096, torch.bfloat16, None),
        (80, 256000, 3584, torch.bfloat16, 30.0), (90, 256000, 3584, torch.bfloat16, 30.0),
        (80, 49152, 576, torch.float32, None), (90, 49152, 576, torch.float32, None),
    ])
    def test_logprob(arch, V, D, dtype, softcap, monkeypatch):
        from kernels import logprob_triton as file

        monkeypatch.setattr(file, "generation", lambda x: arch // 10)
        N, small = 4096, torch.float16 if dtype == torch.bfloat16 else torch.float32
        hidden, weight, target = meta(N, D, dtype=dtype), meta(V, D, dtype=dtype), meta(N, dtype=torch.int64)
        row, kept, out = meta(N, dtype=torch.float32), meta(N, V, dtype=small), meta(N, V, dtype=dtype)
        products = [
            record(arch, file.tile_statistics, hidden, weight, target, 0.7, softcap),
            record(arch, file.tile_statistics, hidden, weight, target, 0.7, softcap, kept),
            record(arch, file.d_logits, hidden, weight, target, [row] * 3, [row] * 3, 0.7, softcap, out),
        ]
        for (launch,) in products:
            need = [MMA[arch]] if dtype == torch.bfloat16 else []
            code = check(launch, *need, "UTMALDG" if arch == 90 else "LDGSTS")
            assert code.scratch == 0  # autograd's threads would not know where it is
            if arch == 90 and dtype == torch.bfloat16 and D <= file.NARROW:
                assert code.registers <= 128 and 2 * (code.shared + 1024) <= SHARED[90] + 1024  # two blocks
        part = meta(3, triton.cdiv(V, file.tile_for(weight)[1]), N, dtype=torch.float32)
        block_v = file.tile_for(weight)[1]
        for (launch,) in (record(arch, file.combine, part, row), record(
                arch, file.turn, kept, part[0], target, row, [row] * 3, [row] * 2, 0.7, softcap, out, block_v)):
            check(launch)

    def test_the_number_of_tokens_compiles_nothing_anew():
        """It differs in every batch. Triton compiles for what it finds aligned: all of it must be, always."""
        from kernels import logprob_triton as file

        def train(hidden, weight, target):
            a, b, c = file.linear_logprob(hidden, weight, target, 0.7)
            (a + b + c).sum().backward()
            file.linear_logprob_loss(hidden, weight, target, 0.7, lambda logprob, entropy: (logprob + entropy).sum())

        for N in (37, 130):
            hidden, weight = (torch.ones(n, 72, dtype=torch.bfloat16, requires_grad=True) for n in (N, 301))
            launches = record(90, train, hidden, weight, torch.zeros(N, dtype=torch.int64))
            assert {x.kernel.fn.__name__ for x in launches} == {
                "tile_kernel", "keep_tile_kernel", "combine_kernel", "d_logits_kernel", "turn_kernel"}
            assert not [x for one in launches for x in one.args.values() if isinstance(x, torch.Tensor) and x.data_ptr() % 16]
