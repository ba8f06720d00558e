"""Compile Triton kernels for GPUs that are not here, and look at the machine code.

    with Recorder(arch=90) as launches:
        some_wrapper(tensors on the "meta" device, ...)      # shapes without memory
    code = launches[0].compile()
    code.spills, code.registers, code.count("HGMMA")

Nothing is written down twice: the wrapper itself says with which types, constants, tiles and warps it would launch each
kernel. Spills are counted in the machine code (STL and LDL: a register goes to memory and comes back). Where Triton
brings no cuobjdump, its assembler, which it cannot do without, translates the PTX once more and reports them (ptxas -v).

Not in a process with TRITON_INTERPRET=1: the decorator decides what a kernel is. tests/test_compile.py starts its own.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int64: "i64",
         torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8"}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
FROM_PTX = {"HGMMA": "wgmma.mma_async", "HMMA": "mma.sync", "UTMALDG": "cp.async.bulk.tensor", "LDGSTS": "cp.async.c",
            "USETMAXREG": "setmaxnreg"}  # what becomes of these where only PTX can be read


class Code:
    """A kernel's machine code: name, registers (a thread), stack and spills, shared memory in bytes, instructions."""

    def __init__(self, compiled, arch, options):
        self.name, self.shared, self.ptx = compiled.metadata.name, compiled.metadata.shared, compiled.asm["ptx"]
        self.scratch = compiled.metadata.global_scratch_size  # memory the launcher must find (triton.set_allocator)
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: E731
        with tempfile.NamedTemporaryFile(suffix=".bin") as f:
            if (tools / "cuobjdump").exists():
                Path(f.name).write_bytes(compiled.asm["cubin"])
                usage = run(tools / "cuobjdump", "-res-usage", f.name).stdout
                self.sass = run(tools / "cuobjdump", "-sass", f.name).stdout
                self.registers, self.stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
                self.spills = self.count("STL") + self.count("LDL")
            else:
                Path(f.name).write_text(self.ptx)
                limit = ["--maxrregcount", str(options["maxnreg"])] if options.get("maxnreg") else []
                target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
                usage = run(tools / "ptxas", "-v", target, *limit, f.name, "-o", "/dev/null").stderr
                self.sass, self.registers = None, int(re.search(r"Used (\d+) registers", usage)[1])
                stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", usage).groups()
                self.stack, self.spills = int(stack), int(stores) + int(loads)

    def count(self, instruction):
        """How often it stands in the code, all its variants together."""
        if self.sass is None:
            return self.ptx.count(FROM_PTX[instruction])
        return len(re.findall(rf"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?{instruction}\b", self.sass, re.M))

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
        return Code(triton.compile(self.source(), target=GPUTarget("cuda", self.arch, 32), options=dict(self.options)),
                    self.arch, self.options)


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
