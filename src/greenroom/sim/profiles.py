"""What the simulator knows about real cards: one `Profile` each, every number with its source.

    get_profile("rtx-4090").link.h2d_pinned              # 25e9, bytes per second
    get_profile("rtx-4090").sources["link"]              # where that comes from
    dataclasses.replace(get_profile("rtx-4090"), memory_bytes=16 * 2**30)   # a smaller sister

A profile predicts which of two schedules is faster and by about how much; it does not predict a
benchmark's last digit. Four choices hold for all of them:

- `flops` are dense, never the doubled figures "with sparsity". Half precision accumulates in
  float32, as torch's matmul does: GeForce cards run that at half of their advertised rate.
- float32 is the CUDA cores' rate, since torch leaves TF32 off for matmul.
- The figures are the vendor's peaks, which large matmuls reach on GeForce cards. Hopper is given
  what it sustains, a fifth below its datasheet; an A100 sustains about 260 of its 312e12.
- `memory_bytes` is what nvidia-smi shows. A CUDA context sees up to two percent less.

In the sources, `owner/repository#7` is issue or pull request 7 on GitHub. A number without a
published source is marked "assumption:", with the reasoning.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

MIB = 2**20

# torch's names of the dtypes a card may have a rate for.
DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")


class UnknownProfile(ValueError):
    """No card goes by the name that was asked for."""


@dataclass(frozen=True)
class Link:
    """The way between host and device: bytes per second for each direction, seconds per copy.

    Pageable memory is slower because the driver copies it through a pinned buffer of its own.
    """

    name: str
    h2d_pinned: float
    d2h_pinned: float
    h2d_pageable: float
    d2h_pageable: float
    latency_s: float

    def __post_init__(self) -> None:
        for part in fields(self):
            if part.name != "name":
                _require_positive(f"Link {self.name!r}", part.name, getattr(self, part.name))


@dataclass(frozen=True)
class Profile:
    """One card: its memory, its speeds and the link it hangs on.

    `flops` maps names of torch dtypes to operations per second; `launch_s` is the host's time to
    issue a kernel, `kernel_s` the least time a kernel takes on the device. Pinning `n` bytes of
    host memory takes `pin_s + n / pin_bytes_per_s`, or `register_bytes_per_s` where they lie,
    copying them within it `n / host_copy_bytes_per_s`. Pageable copies to the device of up to
    `inline_copy_bytes` do not wait for the copy engine. `sources` maps the names of these fields to
    where the numbers come from. Equal profiles hash alike; the two mappings are left out of it.
    """

    name: str
    memory_bytes: int
    flops: Mapping[str, float] = field(hash=False)
    memory_bytes_per_s: float
    link: Link
    launch_s: float
    kernel_s: float
    pin_bytes_per_s: float
    register_bytes_per_s: float
    pin_s: float
    inline_copy_bytes: int
    host_copy_bytes_per_s: float
    sources: Mapping[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        owner = f"Profile {self.name!r}"
        _require_positive(owner, "memory_bytes", self.memory_bytes, whole=True)
        if not self.flops:
            raise ValueError(f"{owner}: flops is empty; expected a rate for at least one dtype")
        for dtype, rate in self.flops.items():
            if dtype not in DTYPES:
                raise ValueError(
                    f"{owner}: flops has the dtype {dtype!r}; expected one of {', '.join(DTYPES)}"
                )
            _require_positive(owner, f"flops[{dtype!r}]", rate)
        for part in fields(self):
            if part.name not in ("name", "memory_bytes", "flops", "link", "sources"):
                _require_positive(owner, part.name, getattr(self, part.name))


def _require_positive(owner: str, name: str, value: object, *, whole: bool = False) -> None:
    kinds = int if whole else (int, float)
    if isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf:
        return
    expected = "a positive whole number" if whole else "a positive, finite number"
    raise ValueError(f"{owner}: {name} is {value!r}; expected {expected}")


_AZURE = "github.com/Azure/AI-benchmarking-guide, ND"

# ---- links

_LATENCY = (
    "latency: what 1 MiB pinned takes beyond its bytes at the 16 MiB rate, RTX 4090 "
    "(NVlabs/cuda-oxide#976)"
)

PCIE_3_X16 = Link("PCIe 3.0 x16", 12.1e9, 12.9e9, 6e9, 6e9, latency_s=2.5e-6)
PCIE_4_X8 = Link("PCIe 4.0 x8", 12e9, 12e9, 7.5e9, 7.5e9, latency_s=2.5e-6)
PCIE_4_X16 = Link("PCIe 4.0 x16", 25e9, 25e9, 11e9, 11e9, latency_s=2.5e-6)
PCIE_5_X16 = Link("PCIe 5.0 x16", 56e9, 57e9, 11e9, 11e9, latency_s=2.5e-6)
# `module.to("cpu")`, which copies to pageable memory, runs at 2.8e9 on an H200.
PCIE_5_X16_SERVER = Link("PCIe 5.0 x16, server", 55e9, 55e9, 10e9, 2.8e9, latency_s=2.5e-6)

LINK_SOURCES = {
    PCIE_3_X16.name: (
        "pinned: P100, bandwidthTest, 12.15 in and 12.89 out (mpicbg-scicomp/gearshifft#82); "
        f"pageable: 5 to 6 where pinned does 11 to 12 (rapidsai/dask-cuda#98); {_LATENCY}"
    ),
    PCIE_4_X8.name: (
        "pinned: assumption: half of x16, rounded down; an RTX 3060 Laptop does 12.1 in and 10.9 "
        "out (github.com/Lennox-Elaphurus/Exercises-for-Advanced-Parallel-Algorithms, ex01); "
        "pageable: assumption: the staging copy of the x16 figures (1/11 - 1/25 = 1/19.6), then "
        f"12 GB/s; {_LATENCY}"
    ),
    PCIE_4_X16.name: (
        "pinned: RTX 4090, nvbandwidth, 24 to 26 in and 26 to 27 out (NVIDIA/nvbandwidth#15), "
        "A100 25.1 in (NVIDIA/nvbandwidth#42); pageable: RTX 4090, 13 to 18 in and 9 to 12 "
        f"out, by size (NVlabs/cuda-oxide#976), 11 among them; {_LATENCY}"
    ),
    PCIE_5_X16.name: (
        "pinned: RTX 5090, nvbandwidth, 56.3 in and 57.3 out (tinygrad/open-gpu-kernel-modules#29);"
        " pageable: assumption: as PCIe 4.0, since one core's staging copy is the limit, not the "
        f"link; 9.6 in was measured for small copies under WSL2 (kekzl/imp#1409); {_LATENCY}"
    ),
    PCIE_5_X16_SERVER.name: (
        f"pinned: 52 ({_AZURE} H200 v5) to 55 (the same in the fork of samuel-bohman), 57 on an "
        "H100 (NVIDIA/nvbandwidth#6); pageable: 2.8 out on an H200 (sgl-project/sglang#32032); in: "
        "assumption: the desktop's 11 less a tenth for a slower core, as no H200 figure was found; "
        f"{_LATENCY}"
    ),
}

# ---- documents and measurements that several cards share

_AMPERE = (
    "NVIDIA Ampere GA102 whitepaper v2, Appendix A, Table 9 (GeForce RTX 3090), "
    "nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
)
_ADA = (
    "NVIDIA Ada whitepaper v2.1, Appendix A, Table 2 (GeForce RTX 4090), images.nvidia.com/aem-dam/"
    "Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf"
)
_BLACKWELL = (
    "NVIDIA RTX Blackwell whitepaper v1.1, pages 46 to 47 (GeForce RTX 5090), images.nvidia.com/"
    "aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_L4 = "NVIDIA L4 datasheet, nvidia.com/en-us/data-center/l4"
_L40S = "NVIDIA L40S datasheet, nvidia.com/en-us/data-center/l40s"
_A100 = (
    "NVIDIA A100 datasheet, nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_A100_RATES = (
    f"{_A100}; float64 on the tensor cores, as cuBLAS runs it; large float16 matmuls sustain about "
    f"260e12, {_AZURE} A100 v4"
)
_HOPPER = (
    "sustained, rounded down: float16 794e12 of the datasheet's 989e12 and float8 1453e12 of "
    "1979e12, the best shapes of mamf-finder on H100 and H200 (github.com/stas00/ml-engineering, "
    "compute/accelerator), bfloat16 789e12 in zzc0721/torch-performance-test-data#21; float32, "
    "float64 (tensor cores): datasheet peaks, nvidia.com/en-us/data-center/h100; int8: assumption: "
    "sustains what float8 does, having the same peak"
)
_FP64 = "float64: a 64th of float32, the ratio of all consumer and graphics dies"
_MODAL = "nvidia-smi (modal-labs/modal-client#2797)"

_PIN = (
    "8 GiB by cuMemHostAlloc in 2.7 s beside an H100 (ai-dynamo/dynamo#13710); assumption: the "
    "same in every host"
)
_HOST_SOURCES = {
    "launch_s": (
        "cudaLaunchKernel, medians of 2.6 and 4.5 us (OpenDiS/OpenDiS#39) and 2.9 us "
        "(github.com/ayush-os/nsight-systems-deep-dive); assumption: the upper end, as torch's "
        "dispatcher comes on top"
    ),
    "kernel_s": (
        "adding ten numbers on an A100, median under nsys 1.82 us "
        "(github.com/ayush-os/nsight-systems-deep-dive); assumption: the same on every card; an "
        "RTX 3060 Laptop needs 2.1 (github.com/R100001/Programming-Massively-Parallel-Processors)"
    ),
    "register_bytes_per_s": (
        "8 GiB mapped, touched in parallel and registered in about 1 s (ai-dynamo/dynamo#13710); "
        "assumption: the same in every host"
    ),
    "inline_copy_bytes": (
        "CUDA driver API, API synchronization behavior: up to 64 KB from pageable memory are "
        "staged when the copy is issued; assumption: they pass what other streams have queued"
    ),
    "pin_s": (
        "assumption: the median cudaHostAlloc of a run, 9.5 us (kekzl/imp#1653); with the free, "
        "a call that maps a fresh region costs up to 1.1 ms (lupinemachines/lupine#208)"
    ),
    "host_copy_bytes_per_s": (
        "torch.Tensor.copy_ of 256 MiB on one core of a cloud machine: 9.1 to 11.4e9; "
        "assumption: the same on every host"
    ),
}


def _card(
    name: str,
    memory_bytes: int,
    *,
    half: float,
    float32: float,
    float64: float,
    int8: float,
    float8: float | None = None,
    gb_per_s: float,
    link: Link,
    memory_from: str,
    flops_from: str,
    gb_per_s_from: str,
    pin_gb_per_s: float = 3.2,
    pin_from: str = _PIN,
) -> Profile:
    """Read one row of the table below: rates in 10^12 a second, bandwidths in 10^9 bytes."""
    flops = {
        "float16": half * 1e12,
        "bfloat16": half * 1e12,
        "float32": float32 * 1e12,
        "float64": float64 * 1e12,
        "int8": int8 * 1e12,
    }
    if float8 is not None:
        flops["float8_e4m3fn"] = float8 * 1e12
    return Profile(
        name=name,
        memory_bytes=memory_bytes,
        flops=flops,
        memory_bytes_per_s=gb_per_s * 1e9,
        link=link,
        launch_s=4.5e-6,
        kernel_s=1.8e-6,
        pin_bytes_per_s=pin_gb_per_s * 1e9,
        register_bytes_per_s=8.6e9,
        pin_s=10e-6,
        inline_copy_bytes=64 * 2**10,
        host_copy_bytes_per_s=10e9,
        sources={
            "memory_bytes": memory_from,
            "flops": flops_from,
            "memory_bytes_per_s": gb_per_s_from,
            "link": LINK_SOURCES[link.name],
            "pin_bytes_per_s": pin_from,
            **_HOST_SOURCES,
        },
    )


# ---- the cards: fmt is off so that the rates of one card stand in one row

# fmt: off
_CARDS = (
    _card("rtx-4060-laptop", 8188 * MIB,
        half=29.1, float32=14.6, float64=0.228, float8=58.2, int8=116.5,
        gb_per_s=256, link=PCIE_4_X8,
        memory_from="nvidia-smi: 8188 MiB; 8.0 GiB in ollama/ollama#7996",
        flops_from=f"assumption: rates per SM and clock of {_ADA}, times 24 SMs at the 2.37 GHz "
            "of a 115 W laptop; float16 reaches 28.4e12 "
            f"(zzc0721/torch-performance-test-data#143); {_FP64}",
        gb_per_s_from="128 bits at 16 Gbit/s, data-check.eu/en/nvidia-geforce-rtx-4060-laptop-gpu",
    ),
    _card("rtx-3060-12gb", 12288 * MIB,
        half=25.5, float32=12.74, float64=0.199, int8=101.9,
        gb_per_s=360, link=PCIE_4_X16,
        memory_from="nvidia-smi (geerlingguy/raspberry-pi-pcie-devices#790)",
        flops_from=f"rates per SM and clock of {_AMPERE}, times 28 SMs at 1.777 GHz; bfloat16 "
            f"reaches 25.5e12 (zzc0721/torch-performance-test-data#131); {_FP64}",
        gb_per_s_from="192 bits at 15 Gbit/s, nvidia.com/en-us/geforce/graphics-cards/30-series",
    ),
    _card("rtx-3090", 24576 * MIB,
        half=71.2, float32=35.6, float64=0.556, int8=284,
        gb_per_s=936, gb_per_s_from=_AMPERE, link=PCIE_4_X16, pin_gb_per_s=4.5,
        memory_from="nvidia-smi (noonghunna/club-3090#390)",
        flops_from=f"{_AMPERE}; {_FP64}",
        pin_from="33.38 GiB by cudaMallocHost in 7.96 s beside two RTX 3090 "
            "(ikawrakow/ik_llama.cpp#1517)",
    ),
    _card("rtx-4080", 16376 * MIB,
        half=97.5, float32=48.7, float64=0.762, float8=195.0, int8=389.9,
        gb_per_s=716.8, link=PCIE_4_X16,
        memory_from="nvidia-smi: 16376 MiB; 15.99 GiB in aigc-apps/sd-webui-EasyPhoto#281",
        flops_from=f"rates per SM and clock of {_ADA}, times 76 SMs at 2.505 GHz; {_FP64}",
        gb_per_s_from="256 bits at 22.4 Gbit/s, db.thegpu.guru/card/RTX%204080",
    ),
    _card("rtx-4090", 24564 * MIB,
        half=165, float32=82.6, float64=1.29, float8=330.3, int8=660.6,
        gb_per_s=1008, gb_per_s_from=_ADA, link=PCIE_4_X16,
        memory_from="nvidia-smi (RLinf/RLinf#255)",
        flops_from=f"{_ADA}; float16 reaches 167e12 (mli/transformers-benchmarks#4); {_FP64}",
    ),
    _card("rtx-5090", 32607 * MIB,
        half=209.5, float32=104.8, float64=1.64, float8=419, int8=838,
        gb_per_s=1792, gb_per_s_from=_BLACKWELL, link=PCIE_5_X16,
        memory_from="nvidia-smi (noonghunna/club-3090#1229)",
        flops_from=f"{_BLACKWELL}; {_FP64}",
    ),
    _card("l4", 23034 * MIB,
        half=121, float32=30.3, float64=0.473, float8=242.5, int8=242.5,
        gb_per_s=300, gb_per_s_from=_L4, link=PCIE_4_X16, pin_gb_per_s=2.2,
        memory_from=_MODAL,
        flops_from=f"half of the figures with sparsity in {_L4}; 72 W sustain less; {_FP64}",
        pin_from="8 GiB by cudaHostAlloc in 3.94 s on a g6.4xlarge (NVIDIA/cudf#23457)",
    ),
    _card("l40s", 46068 * MIB,
        half=362, float32=91.6, float64=1.43, float8=733, int8=733,
        gb_per_s=864, gb_per_s_from=_L40S, link=PCIE_4_X16,
        memory_from=_MODAL,
        flops_from=f"{_L40S}; {_FP64}",
    ),
    _card("a100-40gb", 40960 * MIB,
        half=312, float32=19.5, float64=19.5, int8=624,
        gb_per_s=1555, gb_per_s_from=_A100, link=PCIE_4_X16,
        memory_from=_MODAL, flops_from=_A100_RATES,
    ),
    _card("a100-80gb", 81920 * MIB,
        half=312, float32=19.5, float64=19.5, int8=624,
        gb_per_s=2039, gb_per_s_from=_A100, link=PCIE_4_X16,
        memory_from=_MODAL, flops_from=_A100_RATES,
    ),
    _card("h100-sxm", 81559 * MIB,
        half=790, float32=67, float64=67, float8=1450, int8=1450,
        gb_per_s=3000, link=PCIE_5_X16_SERVER, memory_from=_MODAL, flops_from=_HOPPER,
        gb_per_s_from=f"2.9 (copy) to 3.2 (dot) of the datasheet's 3.35 TB/s, {_AZURE} H100 v5",
    ),
    _card("h200", 141_000_000_000,
        half=790, float32=67, float64=67, float8=1450, int8=1450,
        gb_per_s=4300, link=PCIE_5_X16_SERVER,
        memory_from="NVIDIA H200 datasheet; nvidia-smi: 143771 MiB (NVIDIA/cuda-samples#311)",
        flops_from=_HOPPER,
        gb_per_s_from=f"4.0 (copy) to 4.5 (dot) of the datasheet's 4.8 TB/s, {_AZURE} H200 v5",
    ),
)
# fmt: on

PROFILES: dict[str, Profile] = {profile.name: profile for profile in _CARDS}


def get_profile(name: str) -> Profile:
    """Return the profile called `name`.

    Raises:
        UnknownProfile: there is none. It names the nearest one and all there are.
    """
    if name in PROFILES:
        return PROFILES[name]
    asked = name.strip().lower().replace(" ", "-").replace("_", "-")
    near = difflib.get_close_matches(asked, PROFILES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownProfile(
        f"no profile is called {name!r}.{hint} There are {', '.join(PROFILES)}; for another card, "
        "pass a Profile of your own."
    )
