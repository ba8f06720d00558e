"""Compile the Triton kernels for GPUs that are not here, and read the machine code.

    python -m kernels.compiled                        # registers, shared memory, blocks, instructions of every kernel
    python -m kernels.compiled --arch 90 --out bench/results/compiled/triton_3.6.0.json     # one GPU, kept

    with Recorder(arch=90) as launches:
        some_wrapper(tensors on the "meta" device, ...)      # shapes without memory
    code = launches[0].compile()
    code.spills, code.registers, code.blocks, code.count("HGMMA")

Nothing is written down twice: the wrapper itself says with which types, constants, tiles and warps it would launch each
kernel. Triton brings the assembler and cuobjdump, so no GPU and no driver is needed. Spills are STL and LDL in the machine
code: a register goes to memory and comes back. `blocks` is how many fit a multiprocessor by registers, shared memory and warps.
Instructions are counted as they stand, loops once; "a logit" is their number over the logits of a thread. What none of
this says: how fast it is.

Not in a process with TRITON_INTERPRET=1: the decorator decides what a kernel is. tests/test_compile.py starts its own.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int64: "i64",
         torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8"}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a thread block may have
SHARED_SM = {80: 164 * 1024, 90: 228 * 1024}  # bytes of a multiprocessor; each block takes 1 KB more than it asks for
REGISTERS_SM, WARPS_SM, BLOCKS_SM = 65536, 64, 32
MODELS = {"smollm2": (49152, 576, None), "llama-8b": (128256, 4096, None), "gemma2-9b": (256000, 3584, 30.0)}  # V, D, cap


class Code:
    """A kernel's machine code. registers (a thread), shared memory in bytes, warps, blocks a multiprocessor, stack, spills,
    scratch (memory that the launcher must find), instructions: Counter of opcodes."""

    def __init__(self, compiled, arch):
        data = compiled.metadata
        self.name, self.shared, self.warps, self.scratch = data.name, data.shared, data.num_warps, data.global_scratch_size
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            Path(f.name).write_bytes(compiled.asm["cubin"])
            usage, self.sass = (subprocess.run([cuobjdump, flag, f.name], capture_output=True, text=True, check=True).stdout
                                for flag in ("-res-usage", "-sass"))  # fmt: skip
        self.registers, self.stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
        line = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)"
        self.instructions = Counter(re.findall(line, self.sass, re.M))
        self.spills = self.count("STL") + self.count("LDL")
        a_warp = -(-self.registers * 32 // 256) * 256
        self.blocks = min(REGISTERS_SM // (a_warp * self.warps), SHARED_SM[arch] // (self.shared + 1024),
                          WARPS_SM // self.warps, BLOCKS_SM)  # fmt: skip

    def count(self, *opcodes):
        """How often these stand in the code, all their variants together: STG counts STG.E.128."""
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] in opcodes)

    def __str__(self):
        return f"{self.name}: {self.registers} registers, {self.stack} bytes of stack, {self.spills} spills, {self.shared} shared"


class Launch:
    """One kernel[grid](*args, **options) as it was asked for."""

    def __init__(self, kernel, grid, args, kwargs, arch):
        self.kernel, self.grid, self.arch = kernel, grid, arch
        self.options = {k: v for k, v in kwargs.items() if k in OPTIONS}
        named = {k: v for k, v in kwargs.items() if k not in OPTIONS}
        bound = kernel.signature.bind(*args, **named)
        bound.apply_defaults()
        self.args = bound.arguments

    def source(self):
        """Types, constants and alignments as Triton derives them from the arguments of a launch."""
        signature, constants, attributes = {}, {}, {}
        for i, (p, value) in enumerate(zip(self.kernel.params, self.args.values())):
            one = type(value) is int and value == 1 and not p.do_not_specialize
            if p.is_constexpr or value is None or one:
                signature[p.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[p.name] = "*" + NAMES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            elif hasattr(value, "block_shape"):
                signature[p.name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
            elif isinstance(value, bool):
                signature[p.name] = "i1"
            elif isinstance(value, int):
                signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
                if value % 16 == 0 and not p.do_not_specialize:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[p.name] = "fp32"
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)

    def compile(self):
        target = GPUTarget("cuda", self.arch, 32)
        return Code(triton.compile(self.source(), target=target, options=dict(self.options)), self.arch)


class Recorder:
    """Within it kernels are not launched but noted. A list of Launch."""

    def __init__(self, arch):
        self.arch = arch

    def __enter__(self):
        launches, arch, self.original = [], self.arch, JITFunction.run

        def note(kernel, *args, grid, warmup, **kwargs):
            launches.append(Launch(kernel, grid, args, kwargs, arch))

        JITFunction.run = note
        return launches

    def __exit__(self, *_):
        JITFunction.run = self.original


# ----------------------------------------------------------------------------------------------------
# What is compiled: every kernel as its wrapper launches it for real models.


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def record(arch, function, *args, **options):
    """The launches of one call, under the tables of that GPU."""
    from kernels import common_triton

    original = common_triton.generation
    common_triton.generation = lambda x: arch // 10
    try:
        with Recorder(arch) as launches:
            function(*args, **options)
    finally:
        common_triton.generation = original
    return launches


def of_head(arch, model, dtype=torch.bfloat16):
    """{label: (launch, logits a thread or None)} of a model's head: log-probs, their gradients, sampling."""
    from kernels import logprob_triton as lp
    from kernels import sampling_triton as sp

    (V, D, cap), N, f32 = MODELS[model], 4096, torch.float32
    hidden, weight, target = meta(N, D, dtype=dtype), meta(V, D, dtype=dtype), meta(N, dtype=torch.int64)
    exps, dz = meta(N, V, dtype=torch.float16 if dtype == torch.bfloat16 else f32), meta(N, V, dtype=dtype)
    stats, rows, d3, d2 = (meta(*shape, dtype=f32) for shape in ((3, 1, N), (5, N), (3, N), (2, N)))
    found = {
        "tile": record(arch, lp.tile_statistics, hidden, weight, target, 0.7, cap),
        "tile, stored": record(arch, lp.tile_statistics, hidden, weight, target, 0.7, cap, exps),
        "d_logits": record(arch, lp.d_logits, hidden, weight, target, rows, d3, 0.7, cap, dz),
    }  # fmt: skip
    width = found["tile, stored"][0].args["BLOCK_V"]
    for entropy in (False, True):
        found[f"logits_to_gradient{', entropy' * entropy}"] = record(
            arch, lp.logits_to_gradient, exps, stats, target, rows, d2, 0.7, cap, dz, entropy, width)
    for B in (64, 256):
        found[f"group_stats, {B} rows"] = record(arch, sp.group_stats, meta(B, D, dtype=dtype), weight, 0.7, cap)
    out = {}
    for label, (launch,) in found.items():
        a = launch.args
        logits = a["BLOCK_V"] * (a.get("BLOCK_N") or a.get("BLOCK_B") or a.get("TILES"))
        out[label] = launch, logits / (32 * launch.options["num_warps"])
    uniform = meta(64, 2, dtype=torch.float64)
    out["draw"] = record(arch, sp.linear_draw, meta(64, D, dtype=dtype), weight, 0.7, uniform, cap)[1], None
    return out


def of_decoding(arch):
    """The rest: of every kernel that is no product, the largest shapes; attention of each kind of model and dtype."""
    from kernels import attention_triton as at
    from kernels import layer_triton as la
    from kernels import logprob_triton as lp
    from kernels import sampling_triton as sp

    i64, f32, (V, D, cap) = torch.int64, torch.float32, MODELS["gemma2-9b"]
    out = {"combine": record(arch, lp.combine, meta(3, 1000, 4096, dtype=f32), meta(4096, dtype=f32))[0]}
    hidden, weight, uniform = meta(64, D), meta(V, D), meta(64, 2, dtype=torch.float64)
    out["greedy"] = record(arch, sp.linear_greedy, hidden, weight, cap)[1]
    stored, cut, draw = record(arch, sp.linear_draw_filtered, hidden, weight, 0.7, uniform, 50, 0.9, 0.1, cap)
    out |= {"group_stats, stored": stored, "cut": cut, "draw_stored": draw}
    out["philox_uniform"] = record(arch, sp.philox_uniform, 7, meta(64, dtype=i64), meta(64, dtype=i64))[0]
    for dtype in (torch.bfloat16, f32):
        for H, K, d, window in ((9, 3, 64, None), (32, 8, 128, None), (16, 8, 256, 4096)):
            q, cache = meta(64, H, d, dtype=dtype), meta(64, K, 4096, d, dtype=dtype)
            split, combine = record(arch, at.decode_attention, q, cache, cache, meta(64, dtype=i64), window=window,
                                    softcap=50.0 if window else None)  # fmt: skip
            out[f"attention {H}/{K} heads of {d}, {NAMES[dtype]}"] = split
    out["attention's combine"] = combine
    for width in (576, 16384):
        x = meta(64, width)
        out[f"add_rmsnorm {width}"] = record(arch, la.add_rmsnorm, x, x, meta(width), 1e-5)[0]
    table = meta(4096, 64, dtype=f32)
    cache, position = meta(64, 3, 4096, 64), meta(64, dtype=i64)
    out["rope_write"] = record(arch, la.rope_write, meta(64, 15, 64), table, table, position, cache, cache)[0]
    out["swiglu"] = record(arch, la.swiglu, meta(64, 3072))[0]
    for label, (launch, _) in of_head(arch, "smollm2", f32).items():
        out[f"{label}, fp32"] = launch
    return out


def look(code, logits=None):
    """The numbers of one kernel, for a table and for JSON."""
    total = sum(code.instructions.values())
    return dict(registers=code.registers, shared=code.shared, warps=code.warps, blocks=code.blocks, spills=code.spills,
                stack=code.stack, instructions=total, a_logit=logits and round(total / logits, 1),
                float64=code.count("DFMA", "DADD", "DMUL"), tensor_cores=code.count("HGMMA", "HMMA"),
                stores_128=sum(n for name, n in code.instructions.items() if name.startswith("STG") and "128" in name),
                stores=code.count("STG"))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90], choices=sorted(SHARED), help="80: A100, 90: H100, H200")
    parser.add_argument("--out", help="a JSON file for the numbers")
    flags = parser.parse_args()
    result = dict(command="python -m kernels.compiled", triton=triton.__version__)
    print(f"triton {triton.__version__:<37}{'registers':>10}{'shared':>8}{'blocks':>7}{'spills':>7}{'instr.':>8}{'a logit':>8}")
    for arch in flags.arch:
        launches = {f"{model} {label}": found for model in MODELS for label, found in of_head(arch, model).items()}
        launches |= {label: (launch, None) for label, launch in of_decoding(arch).items()}
        for label, (launch, logits) in launches.items():
            n = look(launch.compile(), logits)
            result.setdefault(f"sm_{arch}", {})[label] = n
            print(f"sm_{arch} {label:<38}{n['registers']:>10}{n['shared']:>8}{n['blocks']:>7}{n['spills']:>7}"
                  f"{n['instructions']:>8}{n['a_logit'] or '':>8}", flush=True)  # fmt: skip
    if flags.out:
        Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.out).write_text(json.dumps(result, indent=1) + "\n")
        print(f"-> {flags.out}")


if __name__ == "__main__":
    main()
