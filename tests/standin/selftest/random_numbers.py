"""The device draws from random states of its own."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def draws(device="standin"):
    return [
        torch.randn(3, device=device),
        torch.rand(3, device=device),
        torch.randint(0, 100, (3,), device=device),
        torch.randperm(5, device=device),
        torch.empty(3, device=device).normal_(),
        torch.empty(3, device=device).uniform_(-1, 1),
        torch.empty(3, device=device).bernoulli_(0.5),
        torch.bernoulli(torch.full((3,), 0.5, device=device)),
        torch.multinomial(torch.ones(4, device=device), 2),
        torch.rand_like(torch.ones(3, device=device)),
        torch.normal(torch.zeros(3, device=device), 1.0),
        nn.functional.dropout(torch.ones(8, device=device)),
        torch.native_dropout(torch.ones(8, device=device), 0.5, True)[0],
    ]


def test_drawing_leaves_the_cpu_alone():
    state = torch.get_rng_state()
    draws()
    nn.init.xavier_uniform_(torch.empty(3, 3, device="standin"))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cpu_leaves_the_device_alone():
    state = torch.standin.get_rng_state()
    draws("cpu")
    assert torch.equal(torch.standin.get_rng_state(), state)


@pytest.mark.parametrize("seed", [torch.manual_seed, torch.standin.manual_seed, torch.standin.manual_seed_all])
def test_seeds_repeat_and_differ(seed):
    seed(3)
    first = draws()
    assert torch.standin.initial_seed() == 3
    seed(3)
    again = draws()
    seed(4)
    other = draws()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_each_index_has_its_own_state():
    torch.manual_seed(0)
    first = torch.randn(3, device="standin:1")
    torch.manual_seed(0)
    torch.randn(3, device="standin:0")
    assert torch.equal(torch.randn(3, device="standin:1").cpu(), first.cpu())
    states = torch.standin.get_rng_state_all()
    assert len(states) == 2
    drawn = torch.randn(3, device="standin:1")
    torch.standin.set_rng_state_all(states)
    assert torch.equal(torch.randn(3, device="standin:1"), drawn)


def test_fork_rng():
    torch.manual_seed(0)
    with torch.random.fork_rng(devices=[0, 1], device_type="standin"):
        inside = torch.randn(3, device="standin:1")
    assert torch.equal(torch.randn(3, device="standin:1"), inside)
    with torch.random.fork_rng(devices=[0]):
        inside = torch.randn(3, device="standin")
    assert torch.equal(torch.randn(3, device="standin"), inside)


def test_generators():
    generator = torch.Generator(device="standin").manual_seed(5)
    assert generator.device == torch.device("standin:0")
    assert isinstance(generator, torch.Generator)
    assert isinstance(torch.Generator(), torch.Generator)
    assert isinstance(torch.default_generator, torch.Generator)
    state = torch.standin.get_rng_state()
    drawn = torch.randn(3, device="standin", generator=generator)
    assert torch.equal(torch.standin.get_rng_state(), state)
    assert torch.equal(torch.randn(3, device="standin", generator=generator.manual_seed(5)), drawn)
    with pytest.raises(RuntimeError, match="Expected a 'standin' device type for generator but found 'cpu'"):
        torch.randn(3, device="standin", generator=torch.Generator())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_dropout(reentrant):
    torch.manual_seed(0)
    weight = torch.ones(64, device="standin", requires_grad=True)
    output = checkpoint(lambda x: nn.functional.dropout(x * 2), weight, use_reentrant=reentrant)
    output.sum().backward()
    assert torch.equal(weight.grad, output)
