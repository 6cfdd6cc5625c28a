"""Memory is counted and limited; copies to the CPU are late until something synchronizes."""

import gc

import pytest
import torch


def test_memory_is_counted_for_each_index():
    gc.collect()
    before = [torch.standin.memory_allocated(index) for index in range(2)]
    tensor = torch.zeros(1000, device="standin:1")
    view = tensor[10:]
    assert torch.standin.memory_allocated(1) == before[1] + 4000
    assert torch.standin.memory_allocated(0) == before[0]
    del tensor
    assert torch.standin.memory_allocated(1) == before[1] + 4000
    del view
    assert torch.standin.memory_allocated(1) == before[1]


def test_peaks():
    torch.standin.reset_peak_memory_stats()
    start = torch.standin.memory_allocated()
    tensor = torch.zeros(1000, device="standin")
    (tensor + 1).mul_(2)
    assert torch.standin.max_memory_allocated() == start + 8000
    assert torch.standin.memory_allocated() == start + 4000
    torch.standin.reset_peak_memory_stats()
    assert torch.standin.max_memory_allocated() == start + 4000
    assert torch.standin.memory_reserved() >= torch.standin.memory_allocated()
    torch.standin.empty_cache()
    free, total = torch.standin.mem_get_info("standin:0")
    assert total - free == start + 4000


def test_the_graph_of_autograd_takes_memory():
    weight = torch.ones(1000, device="standin", requires_grad=True)
    before = torch.standin.memory_allocated()
    loss = weight.exp().exp().sum()
    assert torch.standin.memory_allocated() >= before + 8000
    loss.backward()
    del loss
    assert torch.standin.memory_allocated() == before + 4000


def test_memory_is_limited():
    held = torch.zeros(1 << 18, device="standin")
    with torch.standin.memory_limit(torch.standin.memory_allocated() + (1 << 20)):
        torch.zeros(1 << 18, device="standin")
        with pytest.raises(torch.OutOfMemoryError, match=r"standin out of memory. Tried to allocate 20.00 MiB. .*free"):
            torch.zeros(20 << 18, device="standin")
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            torch.stack([held, held])
        leaf = held.requires_grad_()
        with pytest.raises(torch.OutOfMemoryError):
            (leaf * 2).cos().sum().backward()
    assert torch.stack([held, held]).shape[0] == 2


def late_copy():
    source = torch.ones(3, device="standin")
    target = torch.zeros(3, pin_memory=True)
    target.copy_(source, non_blocking=True)
    source.fill_(5)
    return target


def test_an_unsynchronized_read_is_stale():
    event = torch.standin.Event()
    target = late_copy()
    event.record()
    assert target.tolist() == [0, 0, 0]
    event.synchronize()
    assert target.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "wait",
    [
        lambda: torch.standin.current_stream().synchronize(),
        torch.standin.synchronize,
        torch.accelerator.synchronize,
        lambda: torch.ones(1, device="standin").item(),
        lambda: torch.ones(1, device="standin").cpu(),
    ],
)
def test_what_completes_a_copy(wait):
    target = late_copy()
    assert target.tolist() == [0, 0, 0]
    wait()
    assert target.tolist() == [1, 1, 1]


def test_torch_event_waits():
    event = torch.Event(device="standin")
    target = late_copy()
    event.record()
    assert target.tolist() == [0, 0, 0]
    event.synchronize()
    assert target.tolist() == [1, 1, 1]


def test_a_new_tensor_is_late_too():
    source = torch.arange(3.0, device="standin")
    late = source.to("cpu", non_blocking=True)
    assert late.isnan().all()
    torch.standin.synchronize()
    assert late.tolist() == [0, 1, 2]
    assert source.to("cpu").tolist() == [0, 1, 2]


def test_an_event_covers_what_came_before_it():
    first = late_copy()
    event = torch.standin.current_stream().record_event()
    second = late_copy()
    event.synchronize()
    assert (first.tolist(), second.tolist()) == ([1, 1, 1], [0, 0, 0])
    assert not torch.standin.current_stream().query()
    assert torch.standin.current_stream().query()
    assert second.tolist() == [1, 1, 1]


def test_streams_are_apart():
    side = torch.standin.Stream()
    with torch.standin.stream(side):
        assert torch.standin.current_stream() is side
        target = late_copy()
    torch.standin.current_stream().synchronize()
    assert target.tolist() == [0, 0, 0]
    torch.standin.current_stream().wait_stream(side)
    torch.standin.current_stream().synchronize()
    assert target.tolist() == [1, 1, 1]


def test_late_copies_can_be_turned_off():
    torch.standin.set_late_copies(False)
    try:
        assert late_copy().tolist() == [1, 1, 1]
    finally:
        torch.standin.set_late_copies(True)


def test_pinned_memory():
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned()
    assert pinned.pin_memory() is pinned
    assert not torch.ones(3).is_pinned()
    assert not torch.ones(3, device="standin").is_pinned()
    assert torch.empty(3, pin_memory=True).device.type == "cpu"
    assert pinned.to("standin", non_blocking=True).sum() == 3
