"""Sample calls of operators: for each the arguments, tensors given by their shapes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class T:
    """A floating-point operand of a shape."""

    shape: tuple[int, ...]


def t(*shape: int) -> T:
    """A floating-point operand of a shape."""
    return T(shape)


def i(*values: Any) -> Tensor:
    """A constant tensor of integers."""
    return torch.tensor(list(values))


def mask(*shape: int) -> Tensor:
    """A constant tensor of truth values."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 3 == 1


Call = tuple[tuple[Any, ...], dict[str, Any]]
CALLS: dict[str, list[Call]] = {}


def calls(names: str, *samples: Any) -> None:
    """Adds samples (each a tuple of arguments, or of arguments and a dict of keywords) to every operator named."""
    for name in names.split():
        for sample in samples:
            keywords = sample[-1] if sample and isinstance(sample[-1], dict) else {}
            CALLS.setdefault(f"aten.{name}", []).append((sample[: len(sample) - bool(keywords)], keywords))


# contraction
calls("conv1d.default", (t(2, 4, 7), t(6, 4, 3), t(6)), (t(2, 4, 7), t(6, 4, 1), None, [2]), (t(1, 1, 7), t(3, 1, 2)))
calls(
    "conv1d.default", (t(2, 6, 7), t(4, 3, 3), t(4), [1], [1], [1], 2), (t(2, 4, 7), t(4, 1, 3), None, [1], [0], [1], 4)
)
calls(
    "conv2d.default",
    (t(2, 4, 5, 5), t(6, 4, 3, 3), t(6)),
    (t(2, 6, 5, 4), t(4, 3, 1, 2), None, [1, 1], [0, 0], [1, 1], 2),
)
calls("conv2d.padding", (t(2, 4, 5, 5), t(6, 4, 3, 3), t(6), [1, 1], "same"))
calls("conv3d.default", (t(2, 4, 3, 3, 3), t(5, 4, 2, 2, 1), t(5)))
calls("conv_transpose1d.default", (t(2, 4, 5), t(4, 6, 3), t(6)), (t(2, 4, 5), t(4, 3, 3), t(6), [2], [0], [0], 2))
calls("conv_transpose2d.input", (t(2, 4, 3, 3), t(4, 6, 2, 2), None, [2, 2], [0, 0], [1, 1]))
calls("conv_transpose3d.input", (t(2, 4, 2, 2, 2), t(4, 3, 2, 2, 2), t(3)))
calls("convolution.default", (t(2, 4, 5, 5), t(6, 4, 3, 3), t(6), [1, 1], [0, 0], [1, 1], False, [0, 0], 1))
calls("convolution.default", (t(2, 4, 5, 5), t(4, 6, 3, 3), t(6), [1, 1], [0, 0], [1, 1], True, [0, 0], 1))
calls("linear.default", (t(2, 4), t(5, 4), t(5)), (t(2, 3, 4), t(5, 4)), (t(4), t(5, 4)), (t(1, 4), t(5, 4), t(5)))
calls("mm.default", (t(3, 4), t(4, 5)), (t(1, 4), t(4, 5)))
calls("bmm.default", (t(2, 3, 4), t(2, 4, 5)), (t(1, 3, 4), t(1, 4, 5)))
calls("addmm.default", (t(5), t(3, 4), t(4, 5)))
calls("baddbmm.default", (t(2, 3, 5), t(2, 3, 4), t(2, 4, 5)))
calls("mv.default", (t(3, 4), t(4)))
calls("dot.default", (t(4), t(4)))
calls("outer.default", (t(3), t(4)))
calls("bilinear.default", (t(2, 3), t(2, 4), t(5, 3, 4), t(5)), (t(2, 6, 3), t(2, 6, 4), t(5, 3, 4)))
calls("matmul.default", (t(3, 4), t(4, 5)), (t(4), t(4)), (t(3, 4), t(4)), (t(4), t(4, 5)), (t(2, 3, 4), t(4, 5)))
calls("matmul.default", (t(2, 3, 4, 5), t(2, 3, 5, 6)), (t(2, 1, 4, 5), t(3, 5, 6)), (t(2, 3, 4), t(2, 4, 1)))
calls("einsum.default", ("bij,bjk->bik", [t(2, 3, 4), t(2, 4, 5)]), ("...i,ij->...j", [t(2, 3, 4), t(4, 5)]))
calls(
    "einsum.default",
    ("ij,kj", [t(3, 4), t(5, 4)]),
    ("bhd , bhe -> hde", [t(2, 3, 4), t(2, 3, 5)]),
    ("ij->ji", [t(3, 4)]),
)
calls("embedding.default", (t(7, 4), i(1, 3, 5)), (t(7, 4), i([1, 2, 3], [4, 5, 6])))
calls("linalg_vecdot.default", (t(2, 4), t(2, 4)))
calls("scaled_dot_product_attention.default", (t(2, 3, 5, 4), t(2, 3, 6, 4), t(2, 3, 6, 7)))
# normalisation
calls("batch_norm.default", (t(2, 4, 5), t(4), t(4), t(4), t(4), False, 0.1, 1e-5, False))
calls("batch_norm.default", (t(2, 4), None, None, t(4), t(4), False, 0.1, 1e-5, False))
calls("batch_norm.default", (t(3, 4, 5, 2), t(4), t(4), None, None, True, 0.1, 1e-5, False))
calls("instance_norm.default", (t(2, 4, 5, 3), t(4), t(4), None, None, True, 0.1, 1e-5, False))
calls("layer_norm.default", (t(2, 3, 4), [4], t(4), t(4)), (t(2, 3, 4), [3, 4], t(3, 4), t(3, 4)), (t(2, 4), [4], t(4)))
calls("rms_norm.default", (t(2, 3, 4), [4], t(4)), (t(2, 4), [4]))
calls("group_norm.default", (t(2, 6, 4), 2, t(6), t(6)), (t(2, 6, 4), 6, t(6), t(6)), (t(2, 6, 4, 3), 1, t(6), t(6)))
calls("_weight_norm.default", (t(4, 3, 2), t(4, 1, 1)), (t(4, 3), t(1, 3), 1))
# reduction
_REDUCE = ((t(2, 3, 4), [1]), (t(2, 3, 4), [-1, 0]), (t(2, 3, 4), [-2], True), (t(2, 1, 4), [1]))
calls("sum.dim_IntList mean.dim amax.default amin.default any.dims all.dims", *_REDUCE)
calls("sum.default mean.default any.default all.default max.default min.default", (t(2, 3),), (t(4),))
calls("nansum.default", *_REDUCE)
calls("logsumexp.default", *_REDUCE)
calls("std.correction var.correction", *_REDUCE[:2], (t(2, 3, 4), [-2], {"correction": 0, "keepdim": True}))
calls("var_mean.correction std_mean.correction", *_REDUCE[:2])
calls("prod.dim_int argmax.default argmin.default any.dim", (t(2, 3, 4), 1), (t(2, 3, 4), -1, True))
calls("max.dim min.dim median.dim", (t(2, 3, 4), 1), (t(2, 3, 4), -1, True))
calls("norm.ScalarOpt_dim", (t(2, 3, 4), 2, [1]), (t(2, 3, 4), 1, [0, -1], True))
calls("linalg_vector_norm.default", (t(2, 3, 4), 2, [1]), (t(2, 3, 4), 1, [-1], True))
calls("count_nonzero.dim_IntList", (t(2, 3, 4), [1]))
calls("softmax.int log_softmax.int", (t(2, 3, 4), 1), (t(2, 3, 4), -1))
calls("_softmax.default _log_softmax.default", (t(2, 3, 4), -2, False))
calls("cumsum.default cumprod.default logcumsumexp.default", (t(2, 3, 4), 1), (t(2, 3, 4), -1))
calls("sort.default argsort.default", (t(2, 3, 4), 1), (t(2, 3, 4), -1, True))
calls("topk.default", (t(2, 5, 4), 2, 1), (t(2, 5), 3))
# sampling
calls("avg_pool1d.default", (t(2, 3, 6), [2]), (t(2, 3, 6), [3], [1], [1]))
calls("avg_pool2d.default", (t(2, 3, 6, 6), [2, 2]), (t(2, 3, 6, 6), [3, 3], [1, 1], [1, 1]))
calls("avg_pool3d.default", (t(2, 3, 4, 4, 4), [2, 2, 2]))
calls("max_pool1d.default max_pool1d_with_indices.default", (t(2, 3, 6), [2]))
calls(
    "max_pool2d.default max_pool2d_with_indices.default",
    (t(2, 3, 6, 6), [2, 2]),
    (t(1, 3, 6, 6), [3, 3], [2, 2], [1, 1]),
)
calls("max_pool3d.default max_pool3d_with_indices.default", (t(2, 3, 4, 4, 4), [2, 2, 2]))
calls("adaptive_avg_pool1d.default adaptive_max_pool1d.default", (t(2, 3, 6), [2]), (t(2, 3, 6), [1]))
calls("adaptive_avg_pool2d.default adaptive_max_pool2d.default", (t(2, 3, 6, 6), [2, 3]), (t(2, 3, 5, 5), [1, 1]))
calls("adaptive_avg_pool3d.default adaptive_max_pool3d.default", (t(2, 3, 4, 4, 4), [2, 1, 2]))
calls("upsample_nearest1d.vec upsample_linear1d.vec", (t(2, 3, 4), [8], *((),) * 0, None, None))
calls("upsample_nearest2d.vec", (t(2, 3, 4, 4), [8, 6], None))
calls("upsample_nearest3d.vec", (t(2, 3, 2, 2, 2), [4, 4, 4], None))
calls("upsample_bilinear2d.vec upsample_bicubic2d.vec", (t(2, 3, 4, 4), [8, 6], False, None))
calls("upsample_trilinear3d.vec", (t(2, 3, 2, 2, 2), [4, 4, 4], False, None))
calls("_upsample_nearest_exact1d.vec", (t(2, 3, 4), [8], None))
calls("_upsample_nearest_exact2d.vec", (t(2, 3, 4, 4), [8, 8], None))
calls("_upsample_nearest_exact3d.vec", (t(2, 3, 2, 2, 2), [4, 4, 4], None))
calls("_upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec", (t(2, 3, 6, 6), [4, 4], False, None))
CALLS["aten.upsample_nearest1d.vec"] = [((t(2, 3, 4), [8], None), {})]
CALLS["aten.upsample_linear1d.vec"] = [((t(2, 3, 4), [8], False, None), {})]
calls("grid_sampler.default grid_sampler_2d.default", (t(2, 3, 4, 4), t(2, 5, 6, 2), 0, 0, False))
# movement
calls(
    "view.default reshape.default _unsafe_view.default",
    (t(2, 6), [2, 2, 3]),
    (t(2, 3, 4), [6, 4]),
    (t(2, 3), [2, 3, 1]),
)
calls("reshape.default", (t(2, 12), [-1, 3, 4]), (t(2, 3, 4), [2, -1]), (t(2, 3), [1, 2, 3]))
calls("flatten.using_ints", (t(2, 3, 4), 1), (t(2, 3, 4), -2, -1), (t(2, 1, 4), 0))
calls("squeeze.dim squeeze.dims", (t(2, 1, 4), 1), (t(2, 1, 4), -2))
CALLS["aten.squeeze.dims"] = [((t(2, 1, 4, 1), [1, -1]), {})]
calls("squeeze.default ravel.default atleast_1d.default", (t(3, 1),), (t(4),))
calls("unsqueeze.default", (t(2, 3), 1), (t(2, 3), -1))
calls("view_as.default reshape_as.default", (t(2, 6), t(2, 3, 2)), (t(2, 3), t(2, 3)))
calls("unflatten.int", (t(2, 6), 1, [2, 3]), (t(6, 2), -2, [3, -1]))
calls("permute.default", (t(2, 3, 4), [2, 0, 1]), (t(2, 3, 4), [0, -1, -2]))
calls("transpose.int", (t(2, 3, 4), 0, 2), (t(2, 3, 4), -1, 1))
calls("swapaxes.default swapdims.default", (t(2, 3, 4), 0, 2), (t(2, 3, 4), -1, 1), (t(2, 3, 4), 1, 2))
calls("t.default numpy_T.default", (t(2, 3),), (t(3),))
calls("movedim.int", (t(2, 3, 4), 0, -1), (t(2, 3, 4), -1, 0))
calls("movedim.intlist", (t(2, 3, 4), [0, 1], [2, 0]))
calls("expand.default broadcast_to.default", (t(2, 1, 4), [2, 3, 4]), (t(3, 1), [2, 3, 5]), (t(2, 3), [2, 3]))
calls("expand_as.default", (t(2, 1, 4), t(2, 3, 4)))
calls("repeat.default tile.default", (t(2, 3), [1, 2]), (t(2, 3), [2, 1, 1]), (t(2, 1), [1, 4]))
calls("tile.default", (t(2, 3, 4), [2]))
calls("repeat_interleave.self_int", (t(2, 3), 2, 1), (t(2, 3), 3, -2))
calls("cat.default concat.default concatenate.default", ([t(2, 3), t(2, 4)], 1), ([t(2, 3), t(1, 3), t(4, 3)], -2))
calls("stack.default", ([t(2, 3), t(2, 3)], 1), ([t(2, 3), t(2, 3)], -1))
calls("flip.default", (t(2, 3, 4), [1]), (t(2, 3, 4), [-1, 0]))
calls("roll.default", (t(2, 5, 4), [2], [1]), (t(2, 5, 4), [-1, 7], [-1, -2]), (t(5), [3]))
calls("constant_pad_nd.default", (t(2, 3), [1, 2]), (t(2, 5), [-1, -2]), (t(2, 3), [0, 0, 2, 0], 1.5))
calls("pad.default", (t(2, 3, 4), [1, 0]), (t(2, 3, 4, 5), [1, 2, 0, 1], "reflect"), (t(2, 3, 4), [1, 1], "circular"))
calls("reflection_pad1d.default replication_pad1d.default", (t(2, 3, 5), [1, 2]))
calls("reflection_pad2d.default replication_pad2d.default", (t(2, 3, 5, 5), [1, 2, 2, 0]))
calls("reflection_pad3d.default replication_pad3d.default", (t(2, 2, 3, 3, 3), [1, 1, 1, 1, 1, 1]))
calls("pixel_shuffle.default", (t(2, 8, 3, 3), 2))
calls("pixel_unshuffle.default", (t(2, 3, 4, 4), 2))
calls("channel_shuffle.default", (t(2, 6, 3), 2), (t(2, 6, 3, 2), 3))
calls("native_channel_shuffle.default", (t(2, 6, 3, 2), 3))
calls("im2col.default", (t(2, 3, 5, 5), [2, 2], [1, 1], [0, 0], [1, 1]))
calls("col2im.default", (t(2, 12, 16), [5, 5], [2, 2], [1, 1], [0, 0], [1, 1]))
calls("unfold.default", (t(2, 3, 6), 2, 2, 2), (t(2, 6, 3), -2, 3, 1))
calls("tril.default triu.default", (t(2, 4, 4),), (t(4, 5), 1))
calls("clone.default contiguous.default detach.default alias.default positive.default", (t(2, 3),))
calls("lift_fresh_copy.default lift_fresh.default resolve_conj.default resolve_neg.default", (t(2, 3),))
calls("_to_copy.default", (t(2, 3), {"dtype": torch.float64}))
calls("to.dtype", (t(2, 3), torch.float64))
calls("type_as.default", (t(2, 3), t(4)))
calls(
    "dropout.default feature_dropout.default alpha_dropout.default feature_alpha_dropout.default",
    (t(2, 3, 4), 0.5, False),
)
# selection
calls(
    "slice.Tensor", (t(2, 6), 1, 1, 4), (t(2, 6), -1, -3), (t(2, 6), 1, 0, 100, 2), (t(6, 2), 0, -5, -1, 3), (t(2, 6),)
)
calls("narrow.default", (t(2, 6), 1, 2, 3), (t(2, 6), -1, 0, 6))
calls("split.Tensor unsafe_split.Tensor", (t(2, 6), 4, 1), (t(2, 6), 2, -1), (t(3, 2), 1))
calls("split_with_sizes.default", (t(2, 6), [1, 5], 1), (t(2, 6), [2, 2, 2], -1))
calls("chunk.default unsafe_chunk.default", (t(2, 6), 4, 1), (t(2, 5), 2, -1))
calls("tensor_split.indices", (t(2, 6), [2, 3], 1))
calls("tensor_split.sections", (t(2, 7), 3, -1))
calls("unbind.int", (t(2, 3, 4), 1), (t(2, 3), -1))
calls("select.int", (t(2, 3, 4), 1, 2), (t(2, 3, 4), -1, -2))
calls("index_select.default", (t(2, 5), 1, i(0, 3, 3)), (t(2, 5), -1, i(4, 1)))
calls("index.Tensor", (t(2, 5), [None, i(0, 3, 3)]), (t(5, 2), [i([0, 1], [4, 2])]), (t(4, 5), [i(0, 1), i(3, 4)]))
calls("index.Tensor", (t(4, 5), [mask(4)]), (t(2, 3, 4), [i(1, 0), None, i(3, 2)]))
calls("gather.default", (t(2, 5), 1, i([0, 1, 2], [3, 4, 0])))
calls("take_along_dim.default", (t(2, 5), i([0, 1, 2], [3, 4, 0]), 1))
calls("slice_scatter.default", (t(2, 6), t(2, 3), 1, 1, 4), (t(2, 6), t(2, 3), -1, 0, 6, 2))
calls("select_scatter.default", (t(2, 3, 4), t(2, 4), 1, 2), (t(2, 3), t(2), -1, 0))
calls("scatter.src scatter_add.default", (t(2, 5), 1, i([0, 1, 2], [3, 4, 0]), t(2, 3)))
# like
calls("zeros_like.default ones_like.default", (t(2, 3),))
calls("full_like.default", (t(2, 3), 1.5))
# pointwise
_PAIRS = ((t(2, 3), t(2, 3)), (t(2, 3), t(3)), (t(2, 1, 3), t(4, 1)), (t(2, 3), t(1, 3)), (t(3), t(4, 2, 1)))
calls("add.Tensor sub.Tensor mul.Tensor div.Tensor maximum.default minimum.default pow.Tensor_Tensor", *_PAIRS)
calls("rsub.Tensor true_divide.Tensor multiply.Tensor divide.Tensor subtract.Tensor atan2.default", *_PAIRS)
calls("max.other min.other clamp_min.Tensor clamp_max.Tensor floor_divide.default copysign.Tensor", *_PAIRS[:3])
calls(
    "relu.default gelu.default silu.default sigmoid.default tanh.default exp.default log.default",
    (t(2, 3),),
    (t(2, 1, 4),),
)
calls("sqrt.default rsqrt.default abs.default neg.default erf.default sin.default cos.default", (t(2, 3),))
calls("hardswish.default log1p.default square.default reciprocal.default selu.default relu6.default", (t(2, 3),))
calls("hardsigmoid.default hardtanh.default clamp.default leaky_relu.default elu.default softplus.default", (t(2, 3),))
CALLS["aten.clamp.default"] = [((t(2, 3), 0.2, 0.9), {})]
calls("clamp_min.default clamp_max.default add.Scalar mul.Scalar rsub.Scalar pow.Tensor_Scalar", (t(2, 3), 2))
calls("lerp.Scalar", (t(2, 3), t(3), 0.3))
calls("addcmul.default", (t(2, 3), t(3), t(2, 1)))
calls("where.self", (mask(2, 3), t(2, 3), t(3)), (mask(3), t(2, 1), t(2, 3)))
calls("masked_fill.Scalar", (t(2, 3), mask(2, 3), 0.5), (t(2, 3), mask(3), 0.0))
calls("copy.default", (t(2, 3), t(2, 3)), (t(2, 3), t(3)))
calls("fill.Tensor", (t(2, 3), t()))
calls("isnan.default isinf.default", (t(2, 3),))
calls("prelu.default", (t(2, 3, 4), t(3)), (t(2, 3), t(1)))
calls("glu.default", (t(2, 6), 1), (t(2, 6, 3), -2))

# recurrent
calls("lstm_cell.default", (t(2, 4), [t(2, 3), t(2, 3)], t(12, 4), t(12, 3), t(12), t(12)))
calls("gru_cell.default", (t(2, 4), t(2, 3), t(9, 4), t(9, 3), t(9), t(9)))
calls("rnn_tanh_cell.default rnn_relu_cell.default", (t(2, 4), t(2, 3), t(3, 4), t(3, 3)))
calls(
    "lstm.input",
    (t(2, 5, 4), [t(1, 2, 3), t(1, 2, 3)], [t(12, 4), t(12, 3), t(12), t(12)], True, 1, 0.0, False, False, True),
)
calls("gru.input", (t(2, 5, 4), t(1, 2, 3), [t(9, 4), t(9, 3), t(9), t(9)], True, 1, 0.0, False, False, True))
calls(
    "rnn_tanh.input rnn_relu.input",
    (t(2, 5, 4), t(1, 2, 3), [t(3, 4), t(3, 3), t(3), t(3)], True, 1, 0.0, False, False, True),
)

# complex numbers
calls("polar.default complex.default", (t(3, 4), t(3, 4)), (t(3, 4), t(4)))
calls("view_as_complex.default", (t(3, 4, 2),))
