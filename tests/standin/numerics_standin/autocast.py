"""Autocast by CUDA's lists.

A backend brings its own kernels for the autocast key: without them a region of `torch.autocast("standin")` changes
nothing. The lists are those of `ATen/autocast_mode.h` (AT_FORALL_LOWER_PRECISION_FP and so on).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from numerics_standin.memory import NAME

aten = torch.ops.aten
_KEY = "AutocastPrivateUse1"
_BELOW = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_guard = torch._C._ExcludeDispatchKeyGuard

LOWER_PRECISION = """
    _convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm
    bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention
""".split()  # noqa: SIM905 - a list would take a line per name
FLOAT32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
    pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm
    nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss
    kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp
    upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
    upsample_bicubic2d _upsample_bicubic2d_aa
""".split()  # noqa: SIM905 - a list would take a line per name
FLOAT32_OUTPUT = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
""".split()  # noqa: SIM905 - a list would take a line per name
PROMOTE = """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
""".split()  # noqa: SIM905 - a list would take a line per name

_cache: dict[int, tuple[Any, Tensor]] = {}


def _eligible(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.get_device() >= 0
        and value.is_floating_point()
        and value.dtype is not torch.float64
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        if not _eligible(value) or value.dtype is dtype:
            return value
        return _cast_tensor(value, dtype)
    if type(value) in (list, tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _cast_tensor(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; a float32 leaf is cast once in a region, so that gradients of its uses add up in the lower precision."""
    cached = (
        torch.is_autocast_cache_enabled()
        and value.is_leaf
        and value.requires_grad
        and not value._is_view()
        and value.dtype is torch.float32
        and dtype is torch.get_autocast_dtype(NAME)
    )
    if not cached:
        return value.to(dtype)
    entry = _cache.get(id(value))
    if entry is not None and entry[0]() is value:
        return entry[1]
    lower = value.to(dtype)
    _cache[id(value)] = (weakref.ref(value), lower)
    return lower


def _tensors(values: Any):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _casting(name: str, dtype: torch.dtype | None) -> Any:
    op = _overload(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _guard(_BELOW):
            to = dtype or torch.get_autocast_dtype(NAME)
            return op(*[_cast(value, to) for value in args], **{key: _cast(value, to) for key, value in kwargs.items()})

    return kernel


def _float32_output(name: str) -> Any:
    op = _overload(name)
    place = [argument.name for argument in op._schema.arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _guard(_BELOW):
            given = args[place] if place < len(args) else kwargs.get("dtype")
            if given is None and _eligible(args[0]):
                args = args[:place]
                kwargs = {**kwargs, "dtype": torch.float32}
            return op(*args, **kwargs)

    return kernel


def _norm(name: str, target: str) -> Any:
    op, typed = _overload(name), _overload(target)

    def kernel(value: Tensor, p: Any = 2, *args: Any, **kwargs: Any) -> Any:
        with _guard(_BELOW):
            if not _eligible(value):
                return op(value, p, *args, **kwargs)
            if not args and "dim" not in kwargs:
                return typed(value, p, dtype=torch.float32)
            dim = args[0] if args else kwargs["dim"]
            keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
            return typed(value, p, dim, keepdim, dtype=torch.float32)

    return kernel


def _promoting(name: str) -> Any:
    op = _overload(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _guard(_BELOW):
            dtypes = {value.dtype for value in _tensors((*args, *kwargs.values())) if _eligible(value)}
            if len(dtypes) > 1:
                widest = torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype(NAME)
                args = [_cast(value, widest) for value in args]
                kwargs = {key: _cast(value, widest) for key, value in kwargs.items()}
            return op(*args, **kwargs)

    return kernel


def _banned(*_: Any, **__: Any) -> Any:
    message = (
        "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.\n"
        "Many models use a sigmoid layer right before the binary cross entropy layer. In this case, combine the two "
        "layers using torch.nn.functional.binary_cross_entropy_with_logits or torch.nn.BCEWithLogitsLoss."
    )
    raise RuntimeError(message)


def register(library: torch.library.Library, everything: torch.library.Library) -> None:
    """Register the kernels, pass every other op through, and drop cached casts where torch drops its own."""
    everything.fallback(torch.library.fallthrough_kernel, _KEY)
    for names, make in (
        (LOWER_PRECISION, lambda name: _casting(name, None)),
        (FLOAT32, lambda name: _casting(name, torch.float32)),
        (FLOAT32_OUTPUT, _float32_output),
        (PROMOTE, _promoting),
    ):
        for name in names:
            library.impl(name, make(name), _KEY)
    library.impl("norm.Scalar", _norm("norm.Scalar", "norm.ScalarOpt_dtype"), _KEY)
    library.impl("norm.ScalarOpt_dim", _norm("norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype"), _KEY)
    library.impl("binary_cross_entropy", _banned, _KEY)

    clear = torch.clear_autocast_cache

    def clear_autocast_cache() -> None:
        _cache.clear()
        clear()

    torch.clear_autocast_cache = clear_autocast_cache
