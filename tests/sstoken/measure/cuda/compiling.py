"""Compiles the kernels to machine code of NVIDIA GPUs, for which none is needed. Prints a JSON object a kernel.

Run without TRITON_INTERPRET.
"""

import json

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sstoken.measure.cuda import prompt_attention, token_loss

MASS = {"response_mask": "*i1", "offsets": "*i32", "sinks": "*fp32", "out": "*fp32"}
LOSS = {"logits": "*fp32", "targets": "*i64", "highest": "*fp32", "total": "*fp32", "target_logit": "*fp32"}
FLOATS = {"scaling": "fp32", "scale": "fp32", "softcap": "fp32"}


def report(name, capability, kernel, types, constants):
    types = dict.fromkeys(kernel.arg_names, "i32") | FLOATS | types | dict.fromkeys(constants, "constexpr")
    types = {argument: types[argument] for argument in kernel.arg_names}
    compiled = compile_kernel(
        ASTSource(fn=kernel, signature=types, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
    )
    facts = {
        "kernel": name,
        "capability": capability,
        "machine_code": len(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "tensor_cores": "mma" in compiled.asm["ptx"],
    }
    print(json.dumps(facts))


def main():
    switches = {"HAS_SOFTCAP": True, "HAS_SINKS": True, "HAS_WINDOW": True}
    for capability, dtype, head_size, block in [
        (80, "bf16", 128, 64),
        (90, "bf16", 256, 32),
        (100, "fp16", 64, 64),
        (75, "fp32", 128, 32),
    ]:
        types = MASS | {"query": f"*{dtype}", "key": f"*{dtype}"}
        sizes = {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_D": head_size}
        report(f"mass {dtype}", capability, prompt_attention._compiled()[1], types, switches | sizes)
    constants = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "BLOCK": 2048}
    report("loss bf16", 90, token_loss._compiled()[1], LOSS | {"bias": "*bf16"}, constants)


if __name__ == "__main__":
    main()
