"""Compile every kernel of generation, in every configuration of its tables, for sm_80 and sm_90; no GPU is needed.

    python tests/ahead_decode.py            one JSON line a kernel: registers, spills, tensor-core and copy instructions

ptxas comes with triton, and the numbers are read from the machine code itself: STL and LDL are stores to and loads
from local memory, that is, spilled registers. In a process of its own, because a kernel is compiled or interpreted
as was decided when it was decorated.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels import attention_triton, layer_triton, sampling_triton  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# The type of an argument, by its name; what is not here is a tensor in the model's dtype.
KINDS = {
    "*fp32": "group_max_ptr group_mass_ptr logits_ptr logprob_ptr total_ptr kept_ptr top_ptr mass_ptr sum_ptr cos_ptr sin_ptr",
    "*fp64": "uniform_ptr", "*i64": "token_ptr length_ptr sequence_ptr position_ptr",
    "i32": "B V T n chunks window top_k", "i64": "seed", "fp32": "scale cap top_p min_shift eps",
}  # fmt: skip
TYPES = {name: kind for kind, names in KINDS.items() for name in names.split()}


def cases():
    """(kernel, dtype, constexprs, options): every row of every table, at SmolLM2's, an 8B model's and Gemma's shapes."""
    s, a, f = sampling_triton, attention_triton, layer_triton
    bf16, f32 = NAMES
    for dtype, D, more in ((bf16, 576, False), (bf16, 4096, True), (f32, 576, True)):
        for _, block_b, block_v, block_d, warps, stages in s.GROUP_STATS_TILES[dtype]:
            yield (s.group_stats_kernel, dtype, dict(D=D, SOFTCAP=more, STORE=more, BLOCK_B=block_b, BLOCK_V=block_v,
                                                     BLOCK_D=block_d), dict(num_warps=warps, num_stages=stages))
    for dtype, G, d, more in ((bf16, 3, 64, False), (bf16, 4, 128, False), (bf16, 2, 256, True), (f32, 3, 64, False),
                              (f32, 4, 128, True), (f32, 2, 256, False)):
        (block_g, block_dim, block_t), warps = a.split_tile(G, d, dtype)
        yield (a.split_kernel, dtype, dict(K=8, G=G, DIM=d, BLOCK_G=block_g, BLOCK_DIM=block_dim, BLOCK_T=block_t,
                                           CHUNK=a.CHUNK, WINDOW=more, SOFTCAP=more),
               dict(num_warps=warps, num_stages=a.SPLIT_STAGES))
    groups, warps = s.row_warps(triton.cdiv(256_000, 32))
    own, options = dict(D=3584, SOFTCAP=True, GROUPS=groups, BLOCK_D=s.DRAW_BLOCK_D), dict(num_warps=warps)
    yield s.draw_kernel, bf16, own, options
    yield s.greedy_kernel, bf16, own, options
    yield s.cut_kernel, bf16, dict(GROUPS=groups, BLOCK=s.CUT_TOKENS), options
    yield s.draw_stored_kernel, bf16, dict(GROUPS=groups), options
    yield s.philox_uniform_kernel, bf16, dict(BLOCK=256), {}
    yield a.combine_kernel, bf16, dict(H=9, DIM=256, BLOCK_DIM=256, CHUNK=a.CHUNK, WINDOW=True), dict(num_warps=1)
    for D in (576, 16384):
        size, warps = f.rmsnorm_tile(D)
        yield f.add_rmsnorm_kernel, bf16, dict(D=D, ADD=True, BLOCK=size), dict(num_warps=warps)
    yield f.rope_write_kernel, bf16, dict(H=9, K=3, HALF=32, BLOCK=32), dict(num_warps=1)
    yield f.swiglu_kernel, bf16, dict(INNER=1536, BLOCK=f.SWIGLU_BLOCK), {}


def look_into(kernel, dtype, constexprs, options, arch):
    """Compile for sm_`arch` and count."""
    types = {name: TYPES.get(name, NAMES[dtype]) for name in kernel.arg_names}
    if kernel is layer_triton.add_rmsnorm_kernel:
        types["sum_ptr"] = NAMES[dtype]  # the residual stream, and not attention's sums
    if kernel is sampling_triton.philox_uniform_kernel:
        types["out_ptr"] = "*fp64"
    signature = {name: "constexpr" if name in constexprs else kind for name, kind in types.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage, code = (subprocess.run([CUOBJDUMP, flag, f.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))

    def count(name):
        return len(re.findall(rf"\b{name}\b", code))

    return dict(kernel=kernel.__name__, arch=arch, dtype=str(dtype), **constexprs, **options,
                registers=int(re.search(r"REG:(\d+)", usage)[1]), stack=int(re.search(r"STACK:(\d+)", usage)[1]),
                shared=compiled.metadata.shared, spills=count("STL") + count("LDL"), wgmma=count("HGMMA"), mma=count("HMMA"),
                async_copies=count("LDGSTS"), instructions=code.count(";"))


if __name__ == "__main__":
    for arch in (80, 90):
        for case in cases():
            print(json.dumps(look_into(*case, arch)), flush=True)
