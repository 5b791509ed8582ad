"""The machine: what it is, how large its caches are, and how fast it multiplies and reads."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from structmat import _checks
from structmat._version import __version__
from structmat.bench.timing import MODES, clock_of

ROOT = Path(__file__).parents[3]
"""The folder of the checkout, where the library runs from one."""

CPU_COLD_BYTES = 96 * 2**20
"""The bytes of weights that are taken to fit into no cache of a CPU that does not tell how large its caches are."""

BF16_FLAGS = ("amx_bf16", "avx512_bf16", "avx_ne_convert", "sve_bf16", "bf16")
"""The names that Linux gives to the instructions of a CPU for bfloat16."""


@dataclass(frozen=True)
class Peak:
    """What was measured to be possible in a dtype.

    Attributes:
        flops: The floating-point operations per second of a large product of matrices.
        bytes: The bytes per second of reading or copying memory that is in no cache.
    """

    flops: float
    bytes: float


def hardware() -> dict[str, str]:
    """Name the processor with its instructions for bfloat16, the accelerator, the threads and the versions.

    Returns:
        The facts by name. In a checkout that git knows they include the commit, and whether ``src`` or ``benchmarks``
        (without ``benchmarks/results``) differ from it: ``dirty`` is ``"yes"`` or ``"no"``.
    """
    info = _cpuinfo()
    facts = {
        "processor": info.get("model name", platform.processor()),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": bf16_instructions(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "structmat": __version__,
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return facts | _checkout(ROOT)


@functools.cache
def _checkout(root: Path) -> dict[str, str]:
    """The commit of a checkout and whether its files differ from it; nothing where there is no checkout or no git."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return {}
    status = ["status", "--porcelain", "--", "src", "benchmarks", ":(exclude)benchmarks/results"]
    found = [
        subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        for arguments in (["rev-parse", "HEAD"], status)
    ]
    if any(one.returncode for one in found):
        return {}
    return {"commit": found[0].stdout.strip(), "dirty": "yes" if found[1].stdout.strip() else "no"}


def checked_device(device: torch.device | str, mode: str) -> torch.device:
    """The device, if it is one that can be timed in this mode.

    Args:
        device: A CPU or a CUDA device.
        mode: One of ``MODES``.

    Returns:
        The device.

    Raises:
        ValueError: If it is neither a CPU nor a CUDA device, is not there, or cannot run in the mode.
    """
    _checks.one_of(mode, MODES, "mode")
    device = torch.device(device)
    _checks.one_of(device.type, ("cpu", "cuda"), "the device's type")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device that is there, but PyTorch sees none; take the device cpu")
    if mode == "graphs" and device.type != "cuda":
        raise ValueError("expected a CUDA device for the mode 'graphs', got the CPU; take 'eager' or 'compile'")
    return device


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without PyTorch's prefix, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def bf16_instructions() -> str:
    """The CPU's instructions for bfloat16 as Linux names them, ``"none"`` where it names none."""
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return " ".join(flag for flag in BF16_FLAGS if flag in flags) or "none"


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def cold_bytes(device: torch.device) -> int:
    """How many bytes must be read in turn so that none of them is still in a cache.

    Args:
        device: A CPU or a CUDA device.

    Returns:
        The bytes: four times a GPU's L2, twice a CPU's last level and 96 MiB at least.
    """
    if device.type == "cuda":
        return 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return max(CPU_COLD_BYTES, 2 * _last_level_cache())


def _last_level_cache() -> int:
    """Bytes of the last level of the CPU's caches, all of them together, as Linux tells; 0 where it does not."""
    found: dict[tuple[int, str], int] = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        facts = {name: cache / name for name in ("level", "shared_cpu_list", "size")}
        if all(path.exists() for path in facts.values()):
            level, sharing, size = (path.read_text().strip() for path in facts.values())
            found[int(level), sharing] = int(size.removesuffix("K")) * 1024
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


def measure_peak(dtype: torch.dtype, device: torch.device, *, large: bool = True) -> Peak:
    """Measure how fast a device multiplies matrices of a dtype, and how fast it reads.

    Args:
        dtype: The dtype of the matrices.
        device: A CPU or a CUDA device.
        large: Whether to take sizes that show the peak; otherwise small ones, for tests.

    Returns:
        The best of several attempts each.
    """
    clock = clock_of(device)
    largest = (8192 if device.type == "cuda" else 2048) if large else 128
    flops, size = 0.0, min(1024, largest)
    while size <= largest:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        best = min(clock(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for _ in range(6))
        flops, size = max(flops, 2 * size**3 / best), 2 * size
    count = (2 * max(cold_bytes(device), 2**27) if large else 2**20) // 4
    source, target = torch.ones(count, device=device), torch.ones(count, device=device)
    copied = min(clock(lambda: target.copy_(source)) for _ in range(6))
    read = min(clock(lambda: source.sum()) for _ in range(6))
    return Peak(flops, max(8 * count / copied, 4 * count / read))
