"""Resource usage of the CUDA kernels as reported by nvcc: registers, spills, blocks per processor.

Compiles every kernel for sm_80 and sm_90, fails if one spills registers, and compares with the
table in docs/cuda.md, which --write updates.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- by tools/kernel_account.py -->", "<!-- end -->"
SOURCES = sorted(
    path.name for path in (ROOT / "cuda").glob("*.cu") if "_kernel" in path.read_text()
)
# Shared memory per multiprocessor that blocks may use, in bytes.
SHARED = {80: 164 * 1024, 90: 228 * 1024}
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32

# The shape for which shared memory and blocks are given: Llama-2-7B on 132 multiprocessors.
HIDDEN, NEURONS, HEAD_DIM, PROCESSORS = 4096, 11008, 128, 132
GROUPS = max(1, min(64, 2 * PROCESSORS // (HIDDEN // 256)))


def attend_shared(heads: int) -> int:
    return 4 * (heads * (HEAD_DIM + 8 * (2 + HEAD_DIM) + 64) + 1)


def launch(kernel: str) -> tuple[int, int]:
    """Threads per block and shared memory in bytes, as launched in cuda/*.cu."""
    name, _, arguments = kernel.partition("<")
    arguments = arguments.rstrip(">").split(", ")
    vector = 4 * (HIDDEN + 8)
    if name == "attend_kernel":
        return 256, attend_shared(int(arguments[1]))
    if name == "append_kernel":
        return 256, 0
    if name == "gate_up_kernel":
        return 256, vector + 4 * 8
    if name in ("join_kernel", "linear_kernel", "norm_kernel"):
        return 256, vector
    if name == "down_kernel":
        most = NEURONS // GROUPS + 1
        return 256, 4 * (8 * 256 + 8 + 1 + (1 if arguments[1] == "all" else 2) * most)
    if name == "draw_kernel":
        return 256, 8 * (256 + 8) + 4
    if name == "mma_kernel":
        return 256, 2 * (64 + 128) * 36 * 4
    if name == "rank_kernel":
        return 256, 256 * 4
    if name in ("gemm_kernel", "dropped_kernel"):
        return 256, 2 * 16 * 65 * 4
    return 256, 64


def blocks_per_processor(arch: int, threads: int, registers: int, shared: int) -> int:
    of_warp = (registers * 32 + 255) // 256 * 256
    by_registers = REGISTERS // of_warp // (threads // 32)
    return min(BLOCKS, THREADS // threads, by_registers, SHARED[arch] // (shared + 1024))


def find_nvcc() -> str:
    for candidate in (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    sys.exit(
        "tools/kernel_account.py: found no CUDA compiler, expected nvcc in PATH, CUDACXX or "
        "/usr/local/cuda/bin (Debian: nvidia-cuda-toolkit)"
    )


def compile_one(nvcc: str, source: str, arch: int, folder: str) -> str:
    command = [nvcc, "-cubin", f"-arch=sm_{arch}", "-std=c++20", "-O3", "-Xptxas", "-v"]
    command += ["-I", ROOT / "cpp", "-I", ROOT / "cpp" / "include", ROOT / "cuda" / source]
    done = subprocess.run(
        [*command, "-o", f"{folder}/{source}.{arch}"], capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{source} for sm_{arch}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def plain(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"^void |\((?!tda::cuda::Select\)).*$", "", name.strip())
    name = re.sub(r"tda::cuda::(?=\w+_kernel)", "", name)
    for old, new in (
        ("unsigned short", "bf16"),
        ("(tda::cuda::Select)0", "all"),
        ("(tda::cuda::Select)1", "contribution"),
        ("(tda::cuda::Select)2", "gate"),
    ):
        name = name.replace(old, new)
    return name


def usage(log: str) -> dict[str, tuple[int, int]]:
    """Per kernel: registers, and bytes spilled or on a stack."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        mangled = part.partition("'")[0]
        registers = re.search(r"Used (\d+) registers", part)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part)
        if not registers or not memory:
            sys.exit(f"{mangled}: cannot read what ptxas says:\n{part}")
        found[plain(mangled)] = int(registers[1]), sum(map(int, memory.groups()))
    return found


def table(kernels: dict[int, dict[str, tuple[int, int]]], version: str) -> str:
    lines = [
        f"nvcc {version}; shared memory and blocks at Llama-2-7B's shape.",
        "",
        "Registers and blocks: sm_80, sm_90.",
        "",
        "| kernel | threads | registers | shared bytes | blocks per processor |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(kernels[80]):
        threads, shared = launch(name)
        registers = [kernels[arch][name][0] for arch in (80, 90)]
        blocks = [
            blocks_per_processor(arch, threads, r, shared)
            for arch, r in zip((80, 90), registers, strict=True)
        ]
        lines.append(
            f"| `{name}` | {threads} | {registers[0]}, {registers[1]} | {shared} "
            f"| {blocks[0]}, {blocks[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="update the table in docs/cuda.md")
    args = parser.parse_args()
    nvcc = find_nvcc()
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release [\d.]+, V([\d.]+)", said)[1]
    jobs = [(source, arch) for source in SOURCES for arch in SHARED]
    kernels: dict[int, dict[str, tuple[int, int]]] = {arch: {} for arch in SHARED}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = pool.map(lambda job: compile_one(nvcc, *job, folder), jobs)
        for (_, arch), log in zip(jobs, logs, strict=True):
            kernels[arch] |= usage(log)
    text = table(kernels, version)
    print(text)
    spilling = [
        f"{name} for sm_{arch}: {spilled} bytes"
        for arch, found in kernels.items()
        for name, (_, spilled) in found.items()
        if spilled
    ]
    if spilling:
        sys.exit("kernels that spill registers or use a stack:\n" + "\n".join(spilling))
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    stored, _, after = rest.partition(END)
    if args.write:
        DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    elif f"nvcc {version};" not in stored:
        print(f"{DOCUMENT.name}'s table is from another compiler version: not compared")
    elif stored.strip() != text:
        sys.exit("docs/cuda.md's table is out of date: tools/kernel_account.py --write")


if __name__ == "__main__":
    main()
