"""Reads the compiler's own estimate of the cycles of each operation."""

import re

from phi3_jax.plan import hlo

_CYCLES = re.compile(r'"estimated_cycles"\s*:\s*"?(\d+)')

PRODUCTS, COPIES, COLLECTIVES, OTHERS = "matrix products", "copies", "collectives", "all else"
_PRODUCTS = ("dot", "convolution")
_COPIES = ("copy", "copy-start", "copy-done", "transpose", "slice", "bitcast", "reshape", "concatenate")


def estimated_cycles(text: str) -> dict[str, int]:
    """Returns the estimated cycles of one run of a program by kind of operation, with the largest first.

    The compiler notes them for each of its TPU instructions. It knows nothing of the inside of Pallas
    kernels, which count as all else. A fusion with a product is a product.
    """
    module = hlo.parse(text)
    sums: dict[str, int] = {}
    for call in module.calls():
        if call.caller is not None and call.caller.opcode in ("fusion", "custom-call", "call"):
            continue  # the caller's own note covers them
        for instruction in call.computation.instructions.values():
            if match := _CYCLES.search(instruction.attributes):
                kind = _kind(module, instruction)
                sums[kind] = sums.get(kind, 0) + call.times * int(match[1])
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _kind(module: hlo.Module, instruction: hlo.Instruction) -> str:
    opcodes = _opcodes(module, instruction)
    if opcodes & {*_PRODUCTS}:
        return PRODUCTS
    if any(opcode.startswith(("all-", "reduce-scatter", "collective-")) for opcode in opcodes):
        return COLLECTIVES
    if opcodes <= {*_COPIES, "fusion", "parameter", "constant", "tuple", "get-tuple-element"}:
        return COPIES
    return OTHERS


def _opcodes(module: hlo.Module, instruction: hlo.Instruction) -> set[str]:
    """Returns the opcodes of an instruction and of all that it contains."""
    found = {instruction.opcode}
    for _, name in instruction.called:
        for inner in module.computations[name].instructions.values() if name in module.computations else ():
            found |= _opcodes(module, inner)
    return found
