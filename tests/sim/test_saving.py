"""Saving, loading, copying and moving whole objects keep values, sharing and devices."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from sim.comparing import assert_same, seeded

import greenroom.sim as sim


def in_a_child(work: Callable[[], None]) -> None:
    """Where a mistake of the simulator kills the process, not the whole test run."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("target", [None, "cpu", "sim", "sim:0", torch.device("sim")], ids=str)
def test_save_and_load(target: Any) -> None:
    x = seeded(torch.randn, 4, 3).to("sim")
    saved = {"x": x, "row": x[1], "parameter": torch.nn.Parameter(x.t())}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, map_location=target)
    assert loaded["x"].device.type == ("cpu" if target == "cpu" else "sim")
    assert torch.equal(loaded["x"].cpu(), x.cpu())
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    assert loaded["parameter"].stride() == (1, 3)
    loaded["row"].zero_()  # what shared memory does so again
    assert loaded["x"][1].tolist() == [0, 0, 0] and x[1].count_nonzero() == 3


def test_save_and_load_without_zip() -> None:
    def work() -> None:
        file, x = io.BytesIO(), torch.arange(3, device="sim")
        torch.save([x, x[1:]], file, _use_new_zipfile_serialization=False)
        file.seek(0)
        assert_same([x.cpu(), x.cpu()[1:]], torch.load(file))

    in_a_child(work)


def test_load_onto_the_device_from_a_mapped_file(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(5)}, tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", mmap=True, map_location="sim")
    assert_same(torch.arange(5), loaded["a"])


def test_load_from_another_device() -> None:
    sim.configure("rtx-4090", devices=2)
    file = io.BytesIO()
    torch.save(torch.arange(3, device="sim:1"), file)
    for target, index in ((None, 1), ({"sim:1": "sim:0"}, 0), ("sim:0", 0)):
        file.seek(0)
        assert torch.load(file, map_location=target).device.index == index
    sim.configure("rtx-4090", devices=1)
    file.seek(0)
    with pytest.raises(RuntimeError, match=r"SIM device 1 but torch\.sim\.device_count"):
        torch.load(file)


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = torch.nn.Linear(3, 2, device="sim")
    safetensors.torch.save_model(model, str(path))
    other = torch.nn.Linear(3, 2, device="sim")
    safetensors.torch.load_model(other, path)
    assert_same(model.weight.cpu(), other.weight)
    # safetensors knows no device by the name "sim"; a number means the current accelerator's.
    loaded = safetensors.torch.load_file(path, device=0)
    assert_same(model.bias.cpu(), loaded["bias"])


@pytest.mark.parametrize("assign", [True, False])
def test_state_dicts(assign: bool) -> None:
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, device="sim")
    weight = target.weight
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target.weight.device.type == ("cpu" if assign else "sim")
    assert (target.weight is weight) is not assign
    assert torch.equal(target.weight.cpu(), source.weight)
    back = torch.nn.Linear(3, 2)
    back.load_state_dict(target.to("sim").state_dict())
    assert back.weight.device.type == "cpu" and torch.equal(back.weight, source.weight)


def test_deep_copies_keep_sharing() -> None:
    x = torch.arange(6, device="sim")
    a, b = copy.deepcopy([x, x[2:]])
    b.zero_()
    assert a.tolist() == [0, 1, 0, 0, 0, 0] and x.tolist() == [0, 1, 2, 3, 4, 5]
    model = torch.nn.Linear(2, 2, device="sim")
    twin = copy.deepcopy(model)
    assert_same(model.weight.cpu(), twin.weight)
    assert twin.weight.data_ptr() != model.weight.data_ptr()


def test_pickle() -> None:
    def work() -> None:
        x = torch.arange(6.0, device="sim").reshape(2, 3)
        loaded = pickle.loads(pickle.dumps([x, x.t(), torch.nn.Parameter(x)]))
        assert_same([x.cpu(), x.cpu().t(), x.cpu()], loaded)
        loaded[0].zero_()
        assert x.sum() == 15 and isinstance(loaded[2], torch.nn.Parameter)

    in_a_child(work)


def test_modules_move_there_and_back() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    for move in (lambda: model.to("sim"), model.cpu, model.sim, lambda: model.to("cpu")):
        move()
    model.sim(0)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device for t in tensors} == {torch.device("sim", 0)}
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert_same(list(state.values()), list(model.state_dict().values()))
    assert model[0].weight.is_sim and not state["0.weight"].is_sim
    half = model.half()
    assert half[0].weight.dtype == torch.float16 and half[0].weight.is_sim
    assert half.to_empty(device="sim")[0].weight.isnan().all()


def test_data_swapped_between_host_and_device_keeps_the_parameter() -> None:
    model = torch.nn.Linear(3, 2)
    weight, values = model.weight, model.weight.detach().clone()
    weight.data = weight.data.to("sim")
    model.bias.data = model.bias.data.to("sim")
    assert model.weight is weight and weight.is_leaf and weight.requires_grad
    x = torch.ones(1, 3, device="sim")
    model(x).sum().backward()
    assert weight.grad is not None and weight.grad.device.type == "sim"
    weight.grad = None
    weight.data = torch.zeros(2, 3)
    assert weight.device.type == "cpu" and weight.tolist() == [[0, 0, 0], [0, 0, 0]]
    weight.data = values.to("sim")
    assert_same(values, weight.data)
    (weight * 2).sum().backward()
    assert weight.grad.tolist() == [[2, 2, 2], [2, 2, 2]]
