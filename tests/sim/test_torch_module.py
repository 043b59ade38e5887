"""`torch.sim` is used as `torch.cuda` is; importing and building the simulator."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sim.machines import ROUND

import greenroom.sim as sim
from greenroom.sim import build

MS = pytest.approx


@pytest.fixture(autouse=True)
def machine() -> None:
    sim.configure(ROUND, devices=2)


def work(nbytes: int, device: str = "sim") -> torch.Tensor:
    """A kernel of 10 microseconds for each million bytes; the host issues it in one."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device).zero_()


# ---- names ---------------------------------------------------------------------------------------

AS_TORCH_CUDA = """Event Stream current_device current_stream default_generators default_stream
device device_count empty_cache get_device_capability get_device_name get_device_properties
get_rng_state get_rng_state_all host_memory_stats initial_seed is_available is_bf16_supported
is_initialized manual_seed manual_seed_all max_memory_allocated max_memory_reserved mem_get_info
memory_allocated memory_reserved memory_stats reset_accumulated_memory_stats
reset_peak_memory_stats seed set_device set_rng_state set_rng_state_all set_stream stream
synchronize"""


def test_the_names_are_those_of_torch_cuda() -> None:
    for name in AS_TORCH_CUDA.split():
        assert hasattr(torch.sim, name) and hasattr(torch.cuda, name), name
    assert set(torch.sim.__all__) == {*AS_TORCH_CUDA.split(), "get_amp_supported_dtype"}
    assert all(hasattr(torch.sim, name) for name in torch.sim.__all__)


def test_torch_finds_the_module_and_the_accelerator() -> None:
    assert torch.get_device_module("sim") is torch.sim
    assert torch.get_device_module(torch.device("sim", 1)) is torch.sim
    assert torch.sim.is_available() and torch.sim.is_initialized()
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("sim")
    assert torch.accelerator.device_count() == torch.sim.device_count() == 2
    assert torch._C._get_privateuse1_backend_name() == "sim"


def test_what_the_device_says_of_itself() -> None:
    assert torch.sim.get_device_name(1) == "greenroom simulated round"
    assert torch.sim.get_device_capability() == (0, 0)  # no CUDA kernel fits
    properties = torch.sim.get_device_properties("sim:1")
    assert (properties.name, properties.total_memory) == (torch.sim.get_device_name(), 2**30)
    assert torch.sim.mem_get_info() == (2**30, 2**30)
    assert torch.sim.is_bf16_supported()
    assert torch.bfloat16 in torch.sim.get_amp_supported_dtype()


def test_tensors_and_modules_have_the_methods_of_the_device() -> None:
    x = torch.ones(2)
    assert not x.is_sim and x.sim().is_sim and x.sim(1).device == torch.device("sim", 1)
    assert x.sim(non_blocking=True).device.index == 0
    assert torch.nn.Linear(2, 2).sim(1).weight.device.index == 1


# ---- devices -------------------------------------------------------------------------------------


def test_the_current_device() -> None:
    assert torch.sim.current_device() == torch.accelerator.current_device_index() == 0
    with torch.sim.device(1):
        assert torch.sim.current_device() == 1
        assert torch.ones(1, device="sim").device == torch.device("sim", 1)
        assert torch.sim.current_stream().device_index == 1
        with torch.sim.device("sim:0"):
            assert torch.arange(2, device="sim").device.index == 0
        with torch.accelerator.device_index(0):
            assert torch.sim.current_device() == 0
        assert torch.randn(2, device="sim").device.index == 1
    assert torch.ones(1).to("sim").device.index == 0
    for set_device in (torch.sim.set_device, torch.accelerator.set_device_index):
        set_device(1)
        assert torch.sim.current_device() == 1
        assert torch.zeros(1, device="sim").device.index == 1
        set_device(torch.device("sim", 0))
        assert torch.sim.current_device() == 0
    with pytest.raises(KeyError), torch.sim.device(torch.device("sim", 1)):
        raise KeyError
    assert torch.sim.current_device() == 0


def test_results_stay_on_their_arguments_device() -> None:
    x = torch.ones(3, device="sim:1")
    results = [x + 1, x.sum(), x[1:], torch.zeros_like(x), x.new_ones(2), x.clone(), copy.copy(x)]
    results += [x.bernoulli(), torch.rand_like(x), x.nonzero(), torch.cat([x, x]), x.long()]
    assert {t.device for t in results} == {torch.device("sim", 1)}
    assert torch.sim.current_device() == 0
    y = torch.ones(3, device="sim:1", requires_grad=True)
    (y * 2).sum().backward()
    assert y.grad is not None and y.grad.device.index == 1
    assert torch.empty_like(x, device="sim:0").device.index == 0
    assert torch.zeros_like(x, device="sim:0").device.index == 0
    assert x.new_full((2,), 1.0, device="sim:0").device.index == 0


def test_the_current_device_and_stream_belong_to_the_thread() -> None:
    found: list[Any] = []

    def look() -> None:
        found.append((torch.sim.current_device(), torch.sim.current_stream()))
        torch.sim.set_device(1)
        torch.sim.set_stream(torch.sim.Stream())

    with torch.sim.device(1), torch.sim.Stream(1) as side:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert torch.sim.current_stream() == side
    assert found == [(0, torch.sim.default_stream(0))]
    assert torch.sim.current_device() == 0
    assert torch.sim.current_stream() == torch.sim.default_stream()


MISSING = r"sim:7 does not exist: the simulator is configured with 2 device\(s\)\. Ask for more"
OUT_OF_RANGE: dict[str, Callable[[], Any]] = {
    "empty": lambda: torch.empty(3, device="sim:7"),
    "zeros": lambda: torch.zeros(3, device="sim:7"),
    "arange": lambda: torch.arange(3, device="sim:7"),
    "randn": lambda: torch.randn(3, device="sim:7"),
    "randperm": lambda: torch.randperm(3, device="sim:7"),
    "tensor": lambda: torch.tensor([1], device="sim:7"),
    "from host": lambda: torch.ones(3).to("sim:7"),
    "from device": lambda: torch.ones(3, device="sim").to("sim:7"),
    "module": lambda: torch.nn.Linear(2, 2).to("sim:7"),
    "storage": lambda: torch.UntypedStorage(4, device="sim:7"),
    "set_device": lambda: torch.sim.set_device(7),
    "device": lambda: torch.sim.device(7).__enter__(),
    "Stream": lambda: torch.sim.Stream(7),
    "current_stream": lambda: torch.sim.current_stream(7),
    "synchronize": lambda: torch.sim.synchronize(7),
    "memory_allocated": lambda: torch.sim.memory_allocated(7),
    "mem_get_info": lambda: torch.sim.mem_get_info("sim:7"),
    "Generator": lambda: torch.Generator(device="sim:7"),
    "get_rng_state": lambda: torch.sim.get_rng_state(7),
    "get_device_properties": lambda: torch.sim.get_device_properties(7),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_device_that_does_not_exist(name: str) -> None:
    with pytest.raises(RuntimeError, match=MISSING):
        OUT_OF_RANGE[name]()
    assert torch.sim.current_device() == 0 and torch.ones(2, device="sim").sum() == 2


@pytest.mark.parametrize("other", ["cpu", "cuda:0", "meta"])
@pytest.mark.parametrize(
    "name", ["device", "set_device", "synchronize", "memory_allocated", "get_rng_state", "Stream"]
)
def test_a_device_of_another_kind_is_refused(name: str, other: str) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        getattr(torch.sim, name)(other)


# ---- streams -------------------------------------------------------------------------------------


def test_streams_are_torch_streams() -> None:
    side = torch.sim.Stream()
    assert type(side) is torch.Stream and isinstance(side, torch.sim.Stream)
    assert isinstance(torch.Stream(device="sim"), torch.sim.Stream)
    assert not isinstance(object(), torch.sim.Stream)
    assert isinstance(torch.sim.Event(), torch.sim.Event) and not isinstance(side, torch.sim.Event)
    assert side.device == torch.device("sim", 0) != torch.sim.Stream("sim:1", priority=-1).device
    assert side != torch.sim.Stream() and side != torch.sim.default_stream()
    assert torch.sim.default_stream(1).device_index == 1
    assert len({side, torch.sim.current_stream(), torch.sim.default_stream()}) == 2


@pytest.mark.parametrize("way", [lambda s: s, torch.sim.stream])
def test_a_stream_is_current_inside_its_block(way: Callable[[torch.Stream], Any]) -> None:
    main, side, inner = torch.sim.current_stream(), torch.sim.Stream(), torch.sim.Stream()
    with way(side):
        assert torch.sim.current_stream() == torch.accelerator.current_stream() == side
        with way(inner):
            assert torch.sim.current_stream() == inner
        assert torch.sim.current_stream() == side
        with pytest.raises(KeyError), way(inner):
            raise KeyError
        assert torch.sim.current_stream() == side
    assert torch.sim.current_stream() == main == torch.sim.default_stream()
    with torch.sim.stream(None):
        assert torch.sim.current_stream() == main
    torch.sim.set_stream(side)
    assert torch.sim.current_stream() == side
    torch.sim.set_stream(main)


def test_a_stream_of_another_device_brings_its_device() -> None:
    side = torch.sim.Stream(1)
    with side:
        assert torch.sim.current_device() == 1 and torch.sim.current_stream() == side
        assert torch.sim.current_stream(0) == torch.sim.default_stream(0)
    assert torch.sim.current_device() == 0
    assert torch.sim.current_stream(1) == torch.sim.default_stream(1)


def test_a_stream_is_done_when_its_work_is() -> None:
    side = torch.sim.Stream()
    assert side.query()
    with side:
        work(10**7)  # 100 microseconds
    assert not side.query()
    assert torch.sim.current_stream().query()  # each stream for itself
    before = sim.seconds()
    side.synchronize()
    assert sim.seconds() - before == MS(98e-6, abs=1e-9)  # two queries took one each
    assert side.query()


def test_asking_often_enough_is_waiting() -> None:
    work(10**6)
    asked = 1
    while not torch.sim.current_stream().query():
        asked += 1
    assert asked == 10  # of a microsecond each


def test_synchronize_waits_for_every_stream_of_one_device() -> None:
    side = torch.sim.Stream()
    with side:
        work(10**7)
    work(2 * 10**7, "sim:1")
    torch.sim.synchronize()
    assert side.query() and not torch.sim.current_stream(1).query()
    assert sim.counters().syncs == 1
    torch.accelerator.synchronize(1)
    assert torch.sim.current_stream(1).query()


def test_wait_stream() -> None:
    side = torch.sim.Stream()
    work(10**7)
    side.wait_stream(torch.sim.current_stream())
    assert sim.seconds() == MS(1e-6)  # the host went on
    assert not side.query()
    torch.sim.current_stream().synchronize()
    assert side.query()


def test_wait_event() -> None:
    first, second = torch.sim.Stream(), torch.sim.Stream()
    with first:
        x = work(10**7)
        done = first.record_event()
        work(10**7)
    second.wait_event(done)  # not for what was issued after it
    done.synchronize()
    assert second.query() and not first.query()
    with second:
        y = x + 1
    torch.sim.current_stream().wait_stream(second)
    assert y.sum() == 10**7 and sim.races() == []


def test_events_of_one_device_are_waited_for_on_another() -> None:
    x = work(10**7, "sim:1")
    event = torch.sim.current_stream(1).record_event()
    torch.sim.current_stream(0).wait_event(event)
    assert not torch.sim.current_stream(0).query()
    event.synchronize()
    assert torch.sim.current_stream(0).query() and x.device.index == 1


# ---- events --------------------------------------------------------------------------------------


def test_elapsed_time_is_virtual_milliseconds() -> None:
    start, middle, end = (torch.sim.Event(enable_timing=True) for _ in range(3))
    start.record()
    work(10**7)
    middle.record()
    work(2 * 10**7)
    end.record(torch.sim.current_stream())
    end.synchronize()
    assert start.elapsed_time(middle) == MS(0.101)  # the first waited to be issued
    assert middle.elapsed_time(end) == MS(0.2)
    assert start.elapsed_time(end) == MS(0.301)


def test_events_on_side_streams() -> None:
    start, end, side = (
        *(torch.sim.Event(enable_timing=True) for _ in range(2)),
        torch.sim.Stream(),
    )
    start.record(side)
    with side:
        work(10**6)
        end.record()  # of the current stream
    with pytest.raises(RuntimeError, match="must be completed"):
        start.elapsed_time(end)
    end.synchronize()
    assert start.elapsed_time(end) == MS(0.011)
    work(10**7)
    end.record()  # an event may be recorded again
    end.synchronize()
    assert start.elapsed_time(end) > 0.1


def test_an_event_without_timing_orders_all_the_same() -> None:
    first, second = torch.sim.Event(), torch.sim.Event()
    assert first.query()  # nothing to wait for
    first.synchronize()
    first.wait()
    first.record()
    work(10**7)
    second.record()
    assert first.query() and not second.query()
    side = torch.sim.Stream()
    second.wait(side)
    assert not side.query()
    second.synchronize()
    assert second.query() and side.query()
    with pytest.raises(ValueError, match="enable_timing=True"):
        first.elapsed_time(second)
    with pytest.raises(ValueError, match="must be recorded"):
        torch.sim.Event(enable_timing=True).elapsed_time(torch.sim.Event(enable_timing=True))


def test_an_event_from_before_a_reset_is_over() -> None:
    work(10**7)
    event = torch.sim.current_stream().record_event()
    sim.reset()
    assert sim.seconds() == 0 and event.query()
    event.synchronize()
    torch.sim.current_stream().wait_event(event)
    work(1)
    torch.sim.synchronize()
    assert sim.seconds() < 1e-4


# ---- importing -----------------------------------------------------------------------------------


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_greenroom_alone_brings_no_simulator() -> None:
    code = """
import sys, greenroom, torch
assert not [name for name in sys.modules if name.startswith("greenroom.sim")]
assert not hasattr(torch, "sim")
assert torch._C._get_privateuse1_backend_name() == "privateuseone"
print(torch.accelerator.current_accelerator(check_available=True))
"""
    assert python(code) in ("None", "cuda", "mps", "xpu")


def test_another_device_of_that_kind_is_refused_clearly() -> None:
    code = """
import sys, torch
torch.utils.rename_privateuse1_backend("other")
try:
    import greenroom.sim
except RuntimeError as error:
    print(error)
assert "greenroom.sim" not in sys.modules and not hasattr(torch, "sim")
"""
    said = python(code)
    assert said.startswith("torch has room for one out-of-tree device, and 'other' is already")
    assert "greenroom.sim cannot be imported beside it. Use a process of its own" in said


# torch starts the threads of its backward once, for the devices that it knows of then. These end
# with os._exit(): torch may crash when a process ends while such a thread lets go of its last task.


def test_a_backward_before_the_import() -> None:
    code = """
import os, torch
torch.ones(2, requires_grad=True).sum().backward()
import greenroom.sim
x = torch.ones(2, device="sim", requires_grad=True)
(x * 3).sum().backward()
print(x.grad.tolist(), flush=True)
os._exit(0)
"""
    assert python(code) == "[3.0, 3.0]"


def test_more_devices_after_a_backward() -> None:
    code = """
import os, torch, greenroom.sim as sim
for count in (1, 2, 16):
    sim.configure(devices=count)
    x = torch.ones(2, device=f"sim:{count - 1}", requires_grad=True)
    (x * count).sum().backward()
    print(x.grad.tolist()[0], x.grad.device, flush=True)
os._exit(0)
"""
    assert python(code).split("\n") == ["1.0 sim:0", "2.0 sim:1", "16.0 sim:15"]


# ---- building ------------------------------------------------------------------------------------


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("GREENROOM_CACHE", str(cache))
    return cache


def built(cache: Path) -> list[str]:
    return [path.name for path in cache.glob("*") if not path.name.endswith(".lock")]


def executable(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(sim.SimulatorBuildError) as raised:
        build.load_native()
    words = str(raised.value)
    assert "there is no C++ compiler '/nonexistent/c++' here" in words
    assert "apt-get install g++" in words and "name yours in CXX" in words
    assert built(nothing_built) == []


def test_no_compiler_by_the_usual_name(
    nothing_built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(sim.SimulatorBuildError, match=r"no C\+\+ compiler 'c\+\+' here"):
        build.load_native()
    assert built(nothing_built) == []


def test_no_ninja(nothing_built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", executable(tmp_path / "bin" / "c++", "exit 1"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(sim.SimulatorBuildError) as raised:
        build.load_native()
    assert "compiled with ninja, which is not installed" in str(raised.value)
    assert "pip install 'greenroom[sim]'" in str(raised.value)
    assert built(nothing_built) == []


def test_a_compiler_that_fails(
    nothing_built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    script = """case "$1" in -*version*) echo 13.0.0; exit 0;; esac
echo "world.cpp:1:1: error: this compiler understands nothing" >&2; exit 1"""
    monkeypatch.setenv("CXX", executable(tmp_path / "bin" / "c++", script))
    with pytest.raises(sim.SimulatorBuildError) as raised:
        build.load_native()
    words = str(raised.value)
    assert f"did not compile against torch {torch.__version__}" in words
    assert "it is written for torch 2.13. The compiler said:" in words
    assert "world.cpp:1:1: error: this compiler understands nothing" in words
    assert len(words.splitlines()) <= 7
    assert built(nothing_built) == []  # nothing half-made stays
    assert "compiling the simulated accelerator (once" in capfd.readouterr().err


def test_where_the_compiled_simulator_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENROOM_CACHE", "/somewhere")
    assert build.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("GREENROOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert build.cache_dir() == Path("/caches/greenroom")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert build.cache_dir() == Path("/home/somebody/.cache/greenroom")
