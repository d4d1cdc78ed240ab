"""Kinds of operations: by name, whatever their spelling, what kind of function of its data each is.

A rewrite has rules for kinds and for single operations; what is in none of these sets it refuses.
"""

from torch import Tensor

from esegeta.engine import levels
from esegeta.engine.operators import Operation


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Moves values about, or picks some of them.
MOVES = _names("""
    reshape view view_as reshape_as flatten unflatten ravel permute transpose movedim moveaxis swapaxes
    swapdims t T mT H mH squeeze unsqueeze expand expand_as getitem setitem select narrow split
    split_with_sizes chunk unbind tensor_split index_select gather take take_along_dim masked_select diagonal
    unfold as_strided cat concat concatenate stack hstack vstack dstack repeat tile repeat_interleave roll
    flip fliplr flipud rot90 broadcast_to broadcast_tensors pixel_shuffle tril pixel_unshuffle channel_shuffle
    contiguous clone to float double half bfloat16 type type_as cpu cuda alias view_as_real real dropout
    dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout fold triu atleast_1d
    atleast_2d atleast_3d squeeze_copy meshgrid copy as_tensor asarray column_stack row_stack hsplit vsplit
    dsplit unsafe_split unsafe_chunk adjoint index_fill masked_fill constant_pad_nd identity
""")
# Weighted sums with fixed weights that do not depend on data.
SUMS = _names("""
    add sub neg negative positive sum mean nansum cumsum trace pad diff avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample upsample_nearest
    upsample_bilinear scatter_add index_add lerp upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d max_unpool1d max_unpool2d
    max_unpool3d
""")
# A matrix of weights, and perhaps a bias.
AFFINE = _names("""
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear convolution conv_tbc
""")
# Norms with statistics of their own, over groups of values; batch norm in evaluation mode has fixed ones.
NORMS = _names("instance_norm group_norm layer_norm rms_norm")
# Functions of one value each.
ACTIVATIONS = _names("""
    relu relu6 leaky_relu rrelu prelu elu celu selu gelu silu mish sigmoid tanh softplus softsign hardswish
    hardsigmoid hardtanh logsigmoid log_sigmoid tanhshrink hardshrink softshrink threshold clamp clamp_min
    clamp_max clip expit
""")
ELEMENTWISE = ACTIVATIONS | _names("""
    exp expm1 exp2 log log1p log2 log10 sqrt rsqrt square abs absolute erf erfc sin cos tan atan asinh sinh
    cosh reciprocal pow float_power logit nan_to_num
""")
# Products of data with data, or with weights.
PRODUCTS = _names("""
    mul matmul mm bmm mv dot einsum bilinear baddbmm addmm addbmm outer inner tensordot addcmul kron vdot
    vecdot prod chain_matmul linalg_multi_dot
""")
QUOTIENTS = _names("div addcdiv")
# The largest or smallest of several values.
MAXIMA = _names("""
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices max min amax amin maximum minimum
    fmax fmin aminmax topk kthvalue median sort
""")
SOFTMAX = _names("softmax log_softmax logsumexp softmin")
COMPOSITE = _names("""
    scaled_dot_product_attention multi_head_attention_forward lp_pool1d lp_pool2d lp_pool3d normalize std var
    var_mean std_mean norm linalg_vector_norm vector_norm cosine_similarity glu grid_sample where affine_grid
    batch_norm local_response_norm cdist dist binary_cross_entropy binary_cross_entropy_with_logits
    cross_entropy nll_loss mse_loss l1_loss
""")
KNOWN = MOVES | SUMS | AFFINE | NORMS | ELEMENTWISE | PRODUCTS | QUOTIENTS | MAXIMA | SOFTMAX | COMPOSITE


def rectified(op: Operation) -> bool:
    """Return whether this is a ReLU, as ``clamp(min=0)``, ``maximum(x, 0)``, ``x * (x > 0)`` and others are."""
    name = op.name
    if name == "relu":
        return True
    if name in ("clamp", "clip", "clamp_min"):
        low, high = op.argument(1, "min"), None if name == "clamp_min" else op.argument(2, "max")
        return _is_zero(low) and high is None
    if name in ("maximum", "fmax", "max") and len(op.inputs) == 1 and len(op.args) == 2:
        return any(_is_zero(a) for a in op.args if not op.is_data(a))
    if name == "threshold":
        return op.argument(1, "threshold") == 0 and op.argument(2, "value") == 0
    if name == "leaky_relu":
        return op.argument(1, "negative_slope", 0.01) == 0
    gated = op.gate is not None and op.gate.above_zero and len(op.inputs) == 1 and op.gate.of is op.inputs[0]
    if name == "mul":
        return gated
    return (
        name == "where"
        and gated
        and _is_zero(op.argument(2, "other"))
        and op.is_data(op.argument(1, "input"))
    )


def _is_zero(value: object) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == 0
    return (
        isinstance(value, Tensor)
        and not levels.watched(value)
        and not levels.true_anywhere(value.detach() != 0)
    )
