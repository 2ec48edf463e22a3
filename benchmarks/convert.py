"""Time conversions of checkpoints against `dd` on the same disk, and show the memory they need.

    python benchmarks/convert.py --output FOLDER [--size 0.6B --size 4B] [--rounds 3] [--without-fsdp]

Random weights of each size are written as a checkpoint under FOLDER (kept, and used again); it needs about three times their
size free, or six times with FSDP's float32. Each conversion runs in a process of its own, up to the last fsync and with every
tensor read back and compared. Directly before and after it, dd copies the checkpoint's bytes (bs=16M conv=fsync): the speed of
a shared disk changes by the second, so the ratio is to the mean time of the two. Prints medians over rounds, and what dd varied
between, as a Markdown table, and writes convert.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from qwench.checkpoints.convert import Conversion, Converter, Ranks
from qwench.checkpoints.formats.sources import Format, find_checkpoint
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.hf import load_hf_config
from qwench.models.random_qwen3 import make_checkpoint

Target = Literal["hf", "torch_dist", "fsdp"]
CONVERSIONS: tuple[tuple[Format, Target], ...] = (
    ("hf", "torch_dist"),
    ("torch_dist", "hf"),
    ("torch_dist", "fsdp"),
    ("fsdp", "torch_dist"),
)
"""Each reads what one before it wrote."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One conversion of one round."""

    size: str
    name: str
    gigabytes: float
    rate: float
    """GB/s written."""
    dd_rate: float
    """GB/s that dd wrote, just before and just after."""
    peak_gigabytes: float
    """Resident memory of the process."""
    base_gigabytes: float
    """Resident memory before it began, most of it PyTorch."""
    load_average: float

    @property
    def ratio(self) -> float:
        """Return the rate as a share of dd's."""
        return self.rate / self.dd_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints and convert.json")
    parser.add_argument("--size", action="append", help="name of a size (qwench.models.random_qwen3); may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each conversion")
    parser.add_argument("--without-fsdp", action="store_true", help="leave out FSDP's checkpoints, which take the most space")
    arguments = parser.parse_args()
    results: list[Result] = []
    for size in arguments.size or ["0.6B"]:
        results += measure(arguments.output / size, size, rounds=arguments.rounds, with_fsdp=not arguments.without_fsdp)
    (arguments.output / "convert.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    print(table(results))


def measure(folder: Path, size: str, *, rounds: int, with_fsdp: bool) -> list[Result]:
    """Run all conversions of one size."""
    conversions = [pair for pair in CONVERSIONS if with_fsdp or "fsdp" not in pair]
    if not (folder / "hf").exists():
        make_checkpoint(folder / "hf", size=size, tokenizer=build_small_tokenizer())
    results = []
    for _ in range(rounds):
        for source, to in conversions:
            before = dd_seconds_per_gb(folder)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                gigabytes, seconds, base, peak = pool.submit(convert, folder, source, to).result()
            disk_rate = 2 / (before + dd_seconds_per_gb(folder))
            rate = gigabytes / seconds
            result = Result(
                size=size,
                name=f"{source} -> {to}",
                gigabytes=gigabytes,
                rate=rate,
                dd_rate=disk_rate,
                peak_gigabytes=peak,
                base_gigabytes=base,
                load_average=os.getloadavg()[0],
            )
            print(f"{size}: {result.name} {rate:.3f} GB/s, {result.ratio:.2f} of dd's {disk_rate:.3f}", flush=True)
            results.append(result)
        for leftover in ("torch_dist", "fsdp"):
            shutil.rmtree(folder / leftover, ignore_errors=True)
    return results


def dd_seconds_per_gb(folder: Path) -> float:
    """Time dd copying the checkpoint's files."""
    files = sorted((folder / "hf").glob("*.safetensors"))
    copy = folder / "dd-copy"
    began = time.perf_counter()
    for file in files:
        subprocess.run(["dd", f"if={file}", f"of={copy}", "bs=16M", "conv=fsync", "status=none"], check=True)
    seconds = time.perf_counter() - began
    copy.unlink()
    return seconds / sum(file.stat().st_size for file in files) * 1e9


def convert(folder: Path, source: Format, to: Target) -> tuple[float, float, float, float]:
    """Convert; return the gigabytes written, the seconds, and the resident memory before and at its peak in gigabytes."""
    output = folder / ("hf-again" if to == "hf" else to)
    if output.exists():
        shutil.rmtree(output)
    base = peak_gigabytes()
    began = time.perf_counter()
    conversion = Conversion(
        source=find_checkpoint(folder / source),
        output=output,
        to=to,
        hf_folder=folder / "hf",
        config=load_hf_config(folder / "hf"),
    )
    converted = Converter(conversion).run(Ranks(), lambda nbytes: None)
    seconds = time.perf_counter() - began
    if to == "hf":
        shutil.rmtree(output)
    return converted.nbytes / 1e9, seconds, base, peak_gigabytes()


def peak_gigabytes() -> float:
    """Return the most memory that was resident; ru_maxrss would count that of the parent, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def table(results: list[Result]) -> str:
    """Return medians over rounds as Markdown."""
    lines = [
        "| size | conversion | GB | GB/s | of dd | dd GB/s | peak memory (before) | load average |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size, name in dict.fromkeys((result.size, result.name) for result in results):
        rounds = [result for result in results if (result.size, result.name) == (size, name)]
        rate = statistics.median(result.rate for result in rounds)
        ratio = statistics.median(result.ratio for result in rounds)
        peak = max(result.peak_gigabytes for result in rounds)
        base = rounds[0].base_gigabytes
        load = max(result.load_average for result in rounds)
        disk = [result.dd_rate for result in rounds]
        speed = f"{rate:.3f} | {ratio:.2f} | {min(disk):.2f} to {max(disk):.2f}"
        cells = (f"{rounds[0].gigabytes:.2f}", speed, f"{peak:.2f} GB ({base:.2f})", f"{load:.1f}")
        lines.append(f"| {size} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
