#!/usr/bin/env python3
"""Compiles every CUDA kernel with the pinned compiler, and says what the compiler made of it.

    scripts/kernels.py            write docs/kernels.md
    scripts/kernels.py --check    fail where docs/kernels.md is out of date; for continuous integration
    scripts/kernels.py --nvcc     only install the compiler, and print where it is

Either way it fails where a kernel spills registers, uses local memory, or lacks the tensor-core instruction that it is written
for. The compiler comes from PyPI (no GPU and no driver are needed) and lies in target/nvcc.
"""

import argparse
import concurrent.futures
import math
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
DOCUMENT = ROOT / "docs" / "kernels.md"
WORK = ROOT / "benches" / "work.toml"
PACKAGES = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-cuobjdump==13.2.86",
    "nvidia-cuda-nvdisasm==13.2.86",
]
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-cubin", "-Xptxas", "-v", "-Wno-deprecated-gpu-targets"]
ARCHITECTURES = ["sm_80", "sm_90a"]

# Kernels that may spill or use local memory, with the reason.
ALLOWED = {}

# What the first matching kernels must contain, on the architectures where they are meant to run.
TENSOR_CORES = [
    (r".*_wgmma.*", {"sm_90a": "HGMMA"}),
    (r"linear_(?!bias).*|attention_(?!.*(combine|delta|gather|sum)).*|patch_embed_forward.*", {"sm_80": "HMMA", "sm_90a": "HMMA"}),
]

# Registers and threads of a multiprocessor, shared memory of which a block has `reserved` bytes for the system.
LIMITS = {"sm_80": (65536, 2048, 164 << 10, 32), "sm_90a": (65536, 2048, 228 << 10, 32)}

# Dense bf16 operations and bytes of memory a second, as the vendor's data sheets have them.
CARDS = {"A100 80GB SXM": (312e12, 2.039e12), "H200": (989e12, 4.8e12)}
FLOAT = 2  # bytes that go from operation to operation on a GPU

SHOWN = ["HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "MUFU", "LDG", "STG"]


def compiler():
    """The folder of nvcc and cuobjdump; installs them on first use."""
    home = Path(os.environ.get("VARFT_NVCC_ENV", ROOT / "target" / "nvcc"))
    found = lambda: sorted(home.glob("lib/python3*/site-packages/nvidia/cu13/bin"))
    stamp = home / "packages"
    if not found() or not stamp.is_file() or stamp.read_text().split() != PACKAGES:
        print(f"installing nvcc into {home}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([home / "bin" / "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
        stamp.write_text("\n".join(PACKAGES))
    return found()[0]


def compile_one(tools, source, arch, out):
    """The figures of the kernels in a file: {name: {registers, stack, spills, shared, instructions}}."""
    cubin = out / f"{source.stem}.{arch}.cubin"
    run = subprocess.run(
        [tools / "nvcc", *FLAGS, f"-arch={arch}", "-I", KERNELS, source, "-o", cubin], capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(f"{source.relative_to(ROOT)}, {arch}:\n{run.stderr}")
    figures = {}
    name = None
    for line in run.stderr.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name = m[1]
            figures[name] = {"spills": 0, "stack": 0, "registers": 0, "shared": 0}
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if name:
                figures[name]["stack"], figures[name]["spills"] = int(m[1]), int(m[2]) + int(m[3])
        elif m := re.search(r"Used (\d+) registers", line):
            figures[name]["registers"] = int(m[1])
            if s := re.search(r"(\d+) bytes smem", line):
                figures[name]["shared"] = int(s[1])
    sass = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for part in sass.split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", part, re.M)
        figures[name]["instructions"] = {op: instructions.count(op) for op in SHOWN}
        figures[name]["length"] = len(instructions)
    # Threads of a block, as __launch_bounds__ says them.
    elf = subprocess.run([tools / "cuobjdump", "-elf", cubin], capture_output=True, text=True, check=True).stdout
    for part in elf.split("\n.nv.info.")[1:]:
        sides = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", part)
        if sides:
            figures[part.split(None, 1)[0]]["threads"] = math.prod(int(side, 16) for side in sides.groups())
    return figures


def occupancy(figures, threads, arch):
    """Warps that a multiprocessor holds, of 64, as far as registers and static shared memory decide."""
    registers, most, shared, _ = LIMITS[arch]
    warps = threads // 32
    per_warp = -(-figures["registers"] * 32 // 256) * 256
    blocks = min(registers // (per_warp * warps), most // threads, 32)
    if figures["shared"]:
        blocks = min(blocks, shared // (figures["shared"] + 1024))
    return blocks * warps


def complaints(name, arch, figures):
    if name not in ALLOWED and (figures["spills"] or figures["stack"]):
        yield f"{name} on {arch}: {figures['spills']} bytes of spills, {figures['stack']} bytes of local memory"
    for pattern, wanted in TENSOR_CORES:
        if re.fullmatch(pattern, name):
            if arch in wanted and not figures["instructions"][wanted[arch]]:
                yield f"{name} on {arch}: no {wanted[arch]}"
            break


def work():
    """Of each operation: its name, its first shape on a GPU, the kernels that do it, its FLOPs and its bytes there."""
    for op, entry in tomllib.loads(WORK.read_text()).items():
        shape = entry["gpu"][0]
        numbers = dict(zip(entry["dims"].split(), map(int, shape.split("x")), strict=True), f=FLOAT)
        value = lambda what: eval(entry[what], {"__builtins__": {}}, numbers)
        yield op, shape, entry.get("kernels"), value("flops"), value("reads") + value("writes")


def unaccounted(names):
    """Kernels of which the table of work says nothing."""
    patterns = [kernels for _, _, kernels, _, _ in work() if kernels]
    for name in sorted(names):
        if not any(re.fullmatch(pattern, name) for pattern in patterns):
            yield f"{name}: no operation of benches/work.toml names it among its kernels"


def work_table(names):
    cards = " | ".join(f"floor on an {card}, us" for card in CARDS)
    lines = [
        "## Work",
        "",
        "What each operation cannot do without, from `benches/work.toml`, which says what the numbers of a shape are: multiply-adds",
        "(two operations each) and bytes, each input read once and each result written once. The floor is what either takes at the",
        "rates of the vendor's data sheets, "
        + ", ".join(f"{flops / 1e12:.0f} TFLOP/s and {copies / 1e12:g} TB/s ({card})" for card, (flops, copies) in CARDS.items())
        + ": nothing here was measured.",
        "Gradients of products are cuBLASLt's.",
        "",
        f"| operation | shape | kernels | GFLOP | MB | FLOP/byte | {cards} |",
        "|---|---|---|---|---|---|" + "---|" * len(CARDS),
    ]
    for op, shape, pattern, flops, moved in work():
        found = sorted(name for name in names if pattern and re.fullmatch(pattern, name))
        # Kernels of one name with other tiles or heads are one entry.
        families = dict.fromkeys(re.sub(r"_\d+(x\d+)?(_f32)?(_gated)?$", r"_*\3", name) for name in found)
        floors = " | ".join(f"{1e6 * max(flops / f, moved / b):.1f}" for f, b in CARDS.values())
        kernels = ", ".join(f"`{name}`" for name in families) or "-"
        lines.append(f"| {op} | {shape} | {kernels} | {flops / 1e9:.2f} | {moved / 1e6:.2f} | {flops / moved:.1f} | {floors} |")
    return lines + [""]


def page(rows):
    lines = [
        "# What the compiler made of the kernels",
        "",
        "Written by `scripts/kernels.py` with " + PACKAGES[0].replace("==", " ") + "; continuous integration fails where it is out of",
        "date, where a kernel spills registers or uses local memory, and where the tensor-core instruction that it is written for is missing.",
        "Warps: how many of a multiprocessor's 64 registers and static shared memory allow; dynamic shared memory comes with the launch.",
        "**No GPU has run these kernels yet.**",
        "",
    ]
    if ALLOWED:
        lines += ["Exceptions: " + "; ".join(f"`{k}`: {v}" for k, v in ALLOWED.items()) + ".", ""]
    for arch in ARCHITECTURES:
        lines += [
            f"## {arch}",
            "",
            "| kernel | threads | registers | static shared, bytes | warps that registers allow | instructions | of these |",
            "|---|---|---|---|---|---|---|",
        ]
        for (name, a), (threads, f) in sorted(rows.items()):
            if a == arch:
                of_these = ", ".join(f"{n} {op}" for op, n in f["instructions"].items() if n)
                warps = occupancy(f, threads, arch) if threads else "?"
                lines.append(
                    f"| {name} | {threads} | {f['registers']} | {f['shared']} | {warps} | {f['length']} | {of_these} |"
                )
        lines.append("")
    return "\n".join(lines + work_table({name for name, _ in rows}))


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="fail where docs/kernels.md is out of date")
    arguments.add_argument("--nvcc", action="store_true", help="only install the compiler, and print where it is")
    options = arguments.parse_args()
    tools = compiler()
    if options.nvcc:
        print(tools / "nvcc")
        return
    check = options.check
    sources = sorted(KERNELS.rglob("*.cu"))
    rows, wrong = {}, []
    with tempfile.TemporaryDirectory() as out, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(a, pool.submit(compile_one, tools, s, a, Path(out))) for s in sources for a in ARCHITECTURES]
        for arch, job in jobs:
            for name, figures in job.result().items():
                rows[name, arch] = (figures.get("threads"), figures)
                wrong += complaints(name, arch, figures)
    wrong += unaccounted({name for name, _ in rows})
    text = page(rows)
    if not check:
        DOCUMENT.write_text(text)
        print(f"{DOCUMENT.relative_to(ROOT)}: {len(rows)} kernels and architectures")
    elif not DOCUMENT.is_file() or DOCUMENT.read_text() != text:
        wrong.append("docs/kernels.md is out of date: run scripts/kernels.py and commit it")
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{len(rows)} kernels and architectures: no spills, no local memory, tensor cores where they are meant")


if __name__ == "__main__":
    main()
