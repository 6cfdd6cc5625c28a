"""Tensors behave as an accelerator's do: storages, views, in-place changes, copies, pickles, new tensors."""

import copy
import io
import warnings
import weakref

import pytest
import torch
from torch import nn

DEVICE = torch.device("standin")


def test_a_tensor_is_a_plain_tensor_of_the_device():
    tensor = torch.arange(6.0).reshape(2, 3).to("standin")
    assert type(tensor) is torch.Tensor
    assert tensor.device == torch.device("standin:0")
    assert tensor.is_standin
    assert "device='standin:0'" in repr(tensor)
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(TypeError, match="convert standin:0 device type tensor to numpy"):
        tensor.numpy()


def test_views_share_the_storage_and_its_address():
    base = torch.zeros(4, 6, device=DEVICE)
    views = [
        base.T,
        base[1:, ::2],
        base.view(2, 12),
        base.reshape(-1),
        base.detach(),
        base.diagonal(),
        base.unfold(1, 2, 2),
        base.expand(3, 4, 6),
        base.chunk(2)[1],
        base.view(torch.int32),
        base.as_strided((2, 2), (1, 2), 3),
        base.unsqueeze(0).squeeze(),
    ]
    address = base.untyped_storage().data_ptr()
    assert {view.untyped_storage().data_ptr() for view in views} == {address}
    assert len({address, torch.zeros(4, 6, device=DEVICE).untyped_storage().data_ptr()}) == 2
    assert hash(base.untyped_storage()) == hash(base.T.untyped_storage())
    assert base[1].data_ptr() == address + 6 * 4


def test_in_place_changes_reach_the_base_and_autograd():
    base = torch.zeros(3, 4, device=DEVICE)
    base[1].add_(1)
    base[:, 2].fill_(7)
    base.T[0, 0] = 5
    base.view(-1)[-1].copy_(torch.tensor(9.0))
    base[base == 7] = 8
    assert base.tolist() == [[5, 0, 8, 0], [1, 1, 8, 1], [0, 0, 8, 9]]

    leaf = torch.ones(3, device=DEVICE, requires_grad=True)
    changed = leaf * 2
    changed[0:2].mul_(3)
    changed.sum().backward()
    assert leaf.grad.tolist() == [6, 6, 2]
    saved = leaf.exp()
    saved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_shapes_change_in_place():
    tensor = torch.arange(6.0, device=DEVICE)
    assert tensor.resize_(2, 2).tolist() == [[0, 1], [2, 3]]
    assert tensor.resize_(8)[:4].tolist() == [0, 1, 2, 3]
    matrix = torch.arange(6.0, device=DEVICE).reshape(2, 3)
    assert matrix.transpose_(0, 1).shape == (3, 2)
    assert matrix.unsqueeze_(0).squeeze_(0).shape == (3, 2)
    other = torch.ones(5, device=DEVICE)
    matrix.set_(other)
    assert matrix.data_ptr() == other.data_ptr()
    matrix.data = torch.zeros(7, device=DEVICE)
    assert matrix.shape == (7,)
    result = torch.empty(0, device=DEVICE)
    torch.add(other, 1, out=result)
    assert result.tolist() == [2] * 5


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
def test_new_tensors_know_their_device(dtype):
    like = torch.zeros(2, 3, dtype=dtype, device="standin:1")
    made = [
        torch.zeros_like(like),
        torch.empty_like(like),
        torch.full_like(like, 1),
        like.new_zeros(3),
        like.new_tensor([1, 0]),
        torch.tensor([1, 0], dtype=dtype, device="standin:1"),
        torch.full((2,), 1, dtype=dtype, device="standin:1"),
        like.clone(),
        like.to(dtype=torch.float32).to(dtype),
    ]
    assert all(tensor.device == like.device and tensor.dtype is dtype for tensor in made)
    assert torch.equal(torch.arange(5, device=DEVICE).cpu(), torch.arange(5))
    assert torch.equal(torch.linspace(0, 1, 5, device=DEVICE).cpu(), torch.linspace(0, 1, 5))
    assert torch.equal(torch.eye(3, device=DEVICE).cpu(), torch.eye(3))
    assert torch.equal(torch.tril(torch.ones(3, 3, device=DEVICE)).cpu(), torch.ones(3, 3).tril())
    assert torch.ones(2, device="meta").to("meta").device.type == "meta"
    assert torch.empty_like(torch.ones(2, device="meta"), device=DEVICE).device.type == "standin"


def test_the_default_device():
    torch.set_default_device("standin")
    try:
        assert torch.ones(2).device == torch.device("standin:0")
        assert nn.Linear(2, 2).weight.device == torch.device("standin:0")
        assert torch.dropout(torch.ones(4), 0.5, True).device.type == "standin"
        query = torch.randn(1, 1, 2, 4)
        assert nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.5).device.type == "standin"
    finally:
        torch.set_default_device(None)
    with torch.device("standin:1"):
        assert torch.randn(2).device == torch.device("standin:1")


def test_uninitialised_memory_is_nan_in_deterministic_mode():
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert torch.empty_like(torch.ones(3, device=DEVICE)).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_ops_agree_with_the_cpu():
    torch.manual_seed(0)
    values = torch.randn(5, 6)
    index = torch.tensor([[0, 2, 1], [3, 3, 0]])
    for compute in (
        lambda x, i: x.sort(1).values,
        lambda x, i: x.topk(2).indices,
        lambda x, i: x.cumsum(1),
        lambda x, i: x.gather(1, i),
        lambda x, i: x.scatter(1, i, 1.0),
        lambda x, i: x.masked_scatter(x > 0, -x),
        lambda x, i: x[x.isfinite()],
        lambda x, i: x.argmax(-1),
        lambda x, i: x.nonzero(),
        lambda x, i: torch.histc(x, 4),
        lambda x, i: torch.bincount(i.flatten()),
        lambda x, i: torch.where(x > 0, x, torch.tensor(2.0)),
        lambda x, i: nn.functional.one_hot(i),
        lambda x, i: nn.functional.pad(x, (1, 2)),
        lambda x, i: nn.functional.cross_entropy(x, i.flatten()[:5]),
        lambda x, i: torch.stack([x, x]).mean((0, 1)),
        lambda x, i: torch.einsum("ab,cb->ac", x, x),
        lambda x, i: torch.split(x, 2)[1],
        lambda x, i: torch.view_as_real(torch.view_as_complex(x.reshape(5, 3, 2)) * 1j),
        lambda x, i: x.repeat_interleave(2, 0),
        lambda x, i: x.unique(),
        lambda x, i: torch.linalg.vector_norm(x),
        lambda x, i: torch.as_strided_copy(x, (2, 2), (1, 2), 3),
        lambda x, i: x[2:].as_strided_scatter(torch.ones(2, device=x.device), (2,), (1,), 14),
        lambda x, i: torch.ones(3, dtype=torch.uint8, device=x.device) << 1,
    ):
        expected = compute(values, index)
        found = compute(values.to(DEVICE), index.to(DEVICE))
        assert found.device.type == "standin"
        assert found.dtype is expected.dtype
        assert found.stride() == expected.stride()
        assert torch.equal(found.cpu(), expected)


def test_gradients_agree_with_the_cpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 10))
    twin = copy.deepcopy(model).to(DEVICE)
    ids = torch.randint(0, 10, (4, 7))
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    nn.functional.cross_entropy(twin(ids.to(DEVICE)).flatten(0, 1), ids.flatten().to(DEVICE)).backward()
    for expected, found in zip(model.parameters(), twin.parameters(), strict=True):
        assert found.grad.device.type == "standin"
        torch.testing.assert_close(found.grad.cpu(), expected.grad)


def test_gradients_on_the_second_index():
    weight = torch.randn(4, 4, device="standin:1", requires_grad=True)
    (weight @ weight).relu().sum().backward()
    assert weight.grad.device == torch.device("standin:1")
    first = weight.detach().to("standin:0").requires_grad_()
    (first.to("standin:1") * 2).sum().backward()
    assert first.grad.tolist() == torch.full((4, 4), 2.0).tolist()


def test_the_current_index_in_a_backward_pass():
    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            indices.append(torch.ones(1, device="standin").device.index)
            return grad * 2

    indices = []
    for index in (1, 0, 1):
        x = torch.ones(2, device=f"standin:{index}", requires_grad=True)
        Noting.apply(x).square().sum().backward()
    assert indices == [1, 0, 1]
    assert torch.standin.current_device() == 0


def test_modules_move_and_convert():
    model = nn.Linear(3, 3)
    weight = model.weight
    seen = weakref.ref(weight)
    weight.note = "stays"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    model(torch.ones(3)).sum().backward()
    model.to("standin")
    assert seen() is weight
    assert weight.note == "stays"
    before = weight.tolist()
    optimizer.step()
    assert model.weight.tolist() != before
    assert model.weight is weight
    assert model.weight.grad.device == torch.device("standin:0")
    assert type(model.weight) is nn.Parameter
    assert model.weight.device == torch.device("standin:0")
    assert model.double().weight.dtype is torch.float64
    assert model.standin(1).weight.device == torch.device("standin:1")
    assert model.cpu().weight.device.type == "cpu"
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert nn.Linear(3, 3).to("standin").weight.device == torch.device("standin:0")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_data_moves_between_devices():
    weight = nn.Parameter(torch.ones(2))
    (weight * 3).sum().backward()
    value = torch.zeros(2, device=DEVICE)
    weight.data = value
    assert type(weight) is nn.Parameter
    assert weight.requires_grad
    assert weight.data_ptr() == value.data_ptr()
    assert weight.grad.device == value.device
    weight.data = weight.data.cpu()
    assert weight.device.type == "cpu"
    assert not value.requires_grad
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        weight.data = torch.ones(2, device="meta")


def test_copies_and_pickles():
    model = nn.Linear(3, 3).to(DEVICE)
    model.tied = nn.Linear(3, 3)
    model.tied.weight = model.weight
    model.cpu().to(DEVICE)
    assert model.weight is model.tied.weight
    twin = copy.deepcopy(model)
    assert twin.weight is twin.tied.weight
    assert twin.weight.data_ptr() != model.weight.data_ptr()
    pair = copy.deepcopy([base := torch.ones(4, device=DEVICE), base[1:]])
    assert pair[1].untyped_storage().data_ptr() == pair[0].untyped_storage().data_ptr()
    pair[0][1] = 5
    assert pair[1].tolist() == [5, 1, 1]

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    for location, device in ((None, "standin:0"), ("cpu", "cpu"), ("standin:1", "standin:1")):
        buffer.seek(0)
        state = torch.load(buffer, map_location=location, weights_only=True)
        assert state["weight"].device == torch.device(device)
        assert torch.equal(state["weight"].cpu(), model.weight.detach().cpu())


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}])
def test_optimizers_agree_with_the_cpu(options):
    results = []
    for device in ("cpu", "standin"):
        weight = torch.arange(6.0).reshape(2, 3).to(device).requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
        results.append(weight.detach().cpu())
    torch.testing.assert_close(*results)


def test_inference_mode_and_no_grad():
    with torch.inference_mode():
        made = torch.ones(2, 2, device=DEVICE)
        assert (made @ made).is_inference()
        made.add_(1)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        made.add_(1)
    with torch.no_grad(), warnings.catch_warnings():
        weight = torch.ones(2, device=DEVICE, requires_grad=True)
        weight.mul_(2)
    assert weight.tolist() == [2, 2]
