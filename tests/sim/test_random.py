"""Random numbers on the simulated device are those of the CPU with the same seed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sim.comparing import assert_same, seed

import greenroom.sim as sim

RANDOM: dict[str, Callable[[str], torch.Tensor]] = {
    "rand": lambda d: torch.rand(50, device=d),
    "randn": lambda d: torch.randn(50, device=d),
    "randn half": lambda d: torch.randn(50, dtype=torch.float16, device=d),
    "randn complex": lambda d: torch.randn(50, dtype=torch.complex64, device=d),
    "randint": lambda d: torch.randint(-5, 99, (50,), device=d),
    "randperm": lambda d: torch.randperm(50, device=d),
    "normal": lambda d: torch.normal(torch.zeros(50, device=d), torch.ones(50, device=d)),
    "randn_like": lambda d: torch.randn_like(torch.empty(50, device=d)),
    "normal_": lambda d: torch.empty(50, device=d).normal_(1, 2),
    "uniform_": lambda d: torch.empty(50, device=d).uniform_(1, 2),
    "random_": lambda d: torch.empty(50, device=d).random_(7),
    "bernoulli_": lambda d: torch.empty(50, device=d).bernoulli_(0.3),
    "bernoulli": lambda d: torch.full((50,), 0.3, device=d).bernoulli(),
    "exponential_": lambda d: torch.empty(50, device=d).exponential_(),
    "cauchy_": lambda d: torch.empty(50, device=d).cauchy_(),
    "geometric_": lambda d: torch.empty(50, device=d).geometric_(0.2),
    "log_normal_": lambda d: torch.empty(50, device=d).log_normal_(),
    "poisson": lambda d: torch.poisson(torch.full((50,), 4.0, device=d)),
    "binomial": lambda d: torch.binomial(
        torch.full((50,), 9.0, device=d), torch.rand(50, device=d)
    ),
    "multinomial": lambda d: torch.multinomial(torch.arange(50.0, device=d), 20),
    "multinomial again": lambda d: torch.multinomial(torch.arange(5.0, device=d), 20, True),
    "dropout": lambda d: F.dropout(torch.ones(50, device=d), 0.3),
    "dropout2d": lambda d: F.dropout2d(torch.ones(2, 20, 3, 1, device=d), 0.3),
    "alpha dropout": lambda d: F.alpha_dropout(torch.ones(50, device=d), 0.3, training=True),
    "rrelu": lambda d: F.rrelu(-torch.ones(50, device=d), training=True),
    "gumbel": lambda d: F.gumbel_softmax(torch.ones(5, 10, device=d)),
    "trunc_normal_": lambda d: torch.nn.init.trunc_normal_(torch.empty(50, device=d)),
    "kaiming_uniform_": lambda d: torch.nn.init.kaiming_uniform_(torch.empty(5, 10, device=d)),
    "orthogonal_": lambda d: torch.nn.init.orthogonal_(torch.empty(5, 10, device=d)),
    "Linear": lambda d: torch.nn.Linear(5, 10, device=d).weight,
    "Categorical": lambda d: torch.distributions.Categorical(torch.ones(9, device=d)).sample((9,)),
    "Dirichlet": lambda d: torch.distributions.Dirichlet(torch.ones(9, device=d)).sample(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_those_of_the_cpu_with_the_same_seed(name: str) -> None:
    results = []
    for device in ("cpu", "sim"):
        seed(device)
        results.append([RANDOM[name](device), RANDOM[name](device)])
    assert_same(*results)
    assert not torch.equal(*results[1])  # the generator moved on


@pytest.mark.parametrize("draw", [torch.rand, torch.randn, torch.randperm])
def test_a_generator_of_ones_own(draw: Callable[..., torch.Tensor]) -> None:
    ours = torch.Generator(device="sim").manual_seed(5)
    its = torch.Generator().manual_seed(5)
    assert ours.device == torch.device("sim", 0) and ours.initial_seed() == 5
    before = torch.sim.get_rng_state()
    assert_same(draw(40, generator=its), draw(40, device="sim", generator=ours))
    assert torch.equal(before, torch.sim.get_rng_state())  # the device's own has not moved
    state = ours.get_state()
    first = draw(40, device="sim", generator=ours)
    ours.set_state(state)
    assert torch.equal(first, draw(40, device="sim", generator=ours))
    twin = ours.clone_state()
    assert torch.equal(draw(9, device="sim", generator=ours), draw(9, device="sim", generator=twin))


def test_a_generator_can_be_copied_and_pickled() -> None:
    ours = torch.Generator(device="sim").manual_seed(5)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.device.type == "sim" and torch.equal(twin.get_state(), ours.get_state())


def test_a_generator_of_another_device_is_refused() -> None:
    words = "Expected a '{}' device type for generator but found '{}'"
    ours, its = torch.Generator(device="sim"), torch.Generator()
    with pytest.raises(RuntimeError, match=words.format("sim", "cpu")):
        torch.randn(3, device="sim", generator=its)
    with pytest.raises(RuntimeError, match=words.format("cpu", "sim")):
        torch.randn(3, generator=ours)
    x = torch.zeros(3)
    with pytest.raises(RuntimeError, match=words.format("cpu", "sim")):
        x.normal_(generator=ours)
    assert x.tolist() == [0, 0, 0]


def test_states_of_the_devices_generators() -> None:
    sim.configure("rtx-4090", devices=2)
    torch.sim.manual_seed_all(3)
    states = torch.sim.get_rng_state_all()
    assert len(states) == 2 and torch.equal(*states)
    first = torch.rand(4, device="sim:1")
    assert torch.equal(states[0], torch.sim.get_rng_state("sim:0"))  # each device has its own
    assert not torch.equal(states[1], torch.sim.get_rng_state(1))
    torch.sim.set_rng_state_all(states)
    assert torch.equal(first.cpu(), torch.rand(4, device="sim:0").cpu())
    assert torch.equal(first, torch.rand(4, device="sim:1"))
    torch.sim.manual_seed(9)
    assert torch.sim.initial_seed() == 9
    torch.sim.seed()
    assert torch.sim.initial_seed() != 9


def test_fork_rng_puts_the_state_back() -> None:
    torch.manual_seed(1)
    expected = torch.randn(5, device="sim")
    torch.manual_seed(1)
    with torch.random.fork_rng(device_type="sim"):
        torch.manual_seed(2)
        torch.randn(5, device="sim")
    assert torch.equal(expected, torch.randn(5, device="sim"))
