"""What every operator is to an analysis: one table, by names, and one reader of a node's arguments.

A name is the operator's in its schema: `linear`, `squeeze.dim` for an overload, `library::name` outside of aten. The
copy of a view (`squeeze_copy.dim`) is what the view is. An operator that this torch does not have may stand here too.
"""

import functools
from enum import Flag, auto
from typing import Any

import torch
from torch import fx

from ..base.borrowed import OpOverload, schema_of


class Kind(Flag):
    """What an operator does; with views, what its result is of its first argument."""

    SAME = auto()  # the same entries
    CAST = auto()  # the same entries in another dtype, on another device
    RESHAPE = auto()  # the same entries in the same order, in other dimensions
    TRANSPOSE = auto()  # the dimensions in another order
    BROADCAST = auto()  # dimensions of size 1, and new ones in front, repeated
    SLICE = auto()  # a range of one dimension
    SELECT = auto()  # one place of one dimension
    SPLIT = auto()  # all parts of one dimension, as a list
    UNBIND = auto()  # all places of one dimension, as a list
    INDEX = auto()  # places that a list of tensors names
    PICK = auto()  # places of one dimension that another tensor names
    REORDER = auto()  # places of a dimension in another order, each several times, or in windows
    REPEAT = auto()  # all of it several times
    PAD = auto()  # with a border
    JOIN = auto()  # a list of tensors, one after the other along a dimension
    STACK = auto()  # a list of tensors, side by side
    BITS = auto()  # the same memory, read otherwise
    PIECE = auto()  # a part of a sparse, nested or dual tensor

    LINEAR = auto()  # x Wᵀ + b
    ADDMM = auto()  # b + x W
    MATMUL = auto()  # x W
    EINSUM = auto()
    GROUPED = auto()  # rows of x times the matrix of their group
    CONVOLUTION = auto()
    TRANSPOSED_CONVOLUTION = auto()
    LOOKUP = auto()  # rows of a table
    BADDBMM = auto()  # b + x W of stacks
    WHOLE = auto()  # layers that take their weights as a whole
    QUANTISED = auto()  # products of integers, or of floats of 8 bits

    ADD = auto()
    SUBTRACT = auto()
    MULTIPLY = auto()
    DIVIDE = auto()
    NEGATE = auto()
    MASKED = auto()  # a number in some places
    WAVE = auto()  # cosine and sine
    EQUALITY = auto()  # with a number
    DIAGONAL = auto()  # a matrix of its diagonal

    RANGE = auto()  # numbers that count
    FILL = auto()  # a tensor of one number
    SIZE = auto()  # a size of a tensor
    ARGMAX = auto()
    LOSS = auto()  # of scores and of targets that are indices
    ASSERTION = auto()


K = Kind
VIEWS = K.SAME | K.CAST | K.RESHAPE | K.TRANSPOSE | K.BROADCAST  # every entry of the first argument, and no other
SEEN = VIEWS | K.SLICE | K.SELECT  # entries of the first argument, each where it can be told
PARTS = K.SLICE | K.SELECT | K.SPLIT | K.UNBIND
PICKED = K.INDEX | K.PICK | K.REORDER | K.REPEAT | K.PAD
SHAPED = VIEWS | PARTS | PICKED | K.JOIN | K.STACK | K.BITS | K.PIECE  # entries of the first argument, however laid out
SUMS = K.ADD | K.SUBTRACT
MULTIPLES = K.MULTIPLY | K.DIVIDE | K.NEGATE
ELEMENTWISE = SUMS | MULTIPLES
LAYERS = K.LINEAR | K.ADDMM | K.CONVOLUTION | K.TRANSPOSED_CONVOLUTION | K.LOOKUP  # have an argument that is a weight
CONTRACTIONS = LAYERS | K.MATMUL | K.EINSUM | K.GROUPED | K.BADDBMM | K.WHOLE | K.QUANTISED

TABLE: dict[Kind, str] = {
    K.SAME: "alias detach contiguous clone positive lift lift_fresh pin_memory conj _conj conj_physical"
    " resolve_conj resolve_neg data to_dense",
    K.CAST: "to.dtype to.dtype_layout to.device to.other type_as _to_copy _cast_Float _cast_Double _cast_Half _cast_Int"
    " _cast_Long dequantize.self _autocast_to_full_precision _autocast_to_reduced_precision",
    K.RESHAPE: "view reshape view_as reshape_as _unsafe_view _reshape_alias _reshape_copy ravel flatten.using_ints"
    " unflatten.int squeeze squeeze.dim squeeze.dims unsqueeze atleast_1d atleast_2d atleast_3d",
    K.TRANSPOSE: "t numpy_T mT mH adjoint matrix_H transpose.int swapaxes swapdims permute movedim.int movedim.intlist"
    " moveaxis.int moveaxis.intlist",
    K.BROADCAST: "expand expand_as broadcast_to _sparse_broadcast_to",
    K.SLICE: "slice.Tensor narrow narrow.Tensor",
    K.SELECT: "select.int",
    K.SPLIT: "split.Tensor split.sizes split_with_sizes unsafe_split.Tensor unsafe_split_with_sizes chunk unsafe_chunk"
    " tensor_split.sections tensor_split.indices tensor_split.tensor_indices_or_sections hsplit.int hsplit.array"
    " vsplit.int vsplit.array dsplit.int dsplit.array",
    K.UNBIND: "unbind.int",
    K.INDEX: "index.Tensor _unsafe_index.Tensor",
    K.PICK: "index_select gather take take_along_dim masked_select",
    K.REORDER: "flip fliplr flipud roll rot90 unfold diagonal linalg_diagonal as_strided"
    " pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle repeat_interleave.self_int"
    " repeat_interleave.self_Tensor",
    K.REPEAT: "repeat tile",
    K.PAD: "pad constant_pad_nd",
    K.JOIN: "cat concat concatenate",
    K.STACK: "stack hstack vstack dstack column_stack row_stack",
    K.BITS: "view.dtype view_as_real view_as_complex real imag _neg_view",
    K.PIECE: "values _values indices _indices crow_indices col_indices ccol_indices row_indices coalesce _fw_primal"
    " _make_dual _unpack_dual _nested_get_values _nested_view_from_buffer _nested_view_from_jagged"
    " _test_autograd_multiple_dispatch_view slice_inverse",
    K.LINEAR: "linear",
    K.ADDMM: "addmm",
    K.MATMUL: "matmul mm bmm",
    K.EINSUM: "einsum",
    K.GROUPED: "_grouped_mm grouped_mm transformers::grouped_mm_fallback",
    K.CONVOLUTION: "conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding convolution",
    K.TRANSPOSED_CONVOLUTION: "conv_transpose1d conv_transpose2d.input conv_transpose3d.input",
    K.LOOKUP: "embedding",
    K.WHOLE: "lstm.input gru.input rnn_tanh.input rnn_relu.input bilinear embedding_bag embedding_bag.padding_idx",
    K.BADDBMM: "baddbmm",
    K.QUANTISED: "_int_mm _scaled_mm",
    K.ADD: "add.Tensor add.Scalar",
    K.SUBTRACT: "sub.Tensor sub.Scalar",
    K.MULTIPLY: "mul.Tensor mul.Scalar",
    K.DIVIDE: "div.Tensor div.Scalar",
    K.NEGATE: "neg",
    K.MASKED: "masked_fill.Scalar masked_fill.Tensor",
    K.WAVE: "cos sin",
    K.EQUALITY: "eq.Scalar ne.Scalar",
    K.DIAGONAL: "diag diag_embed",
    K.RANGE: "arange arange.start arange.start_step",
    K.FILL: "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor",
    K.SIZE: "sym_size.int sym_numel",
    K.ARGMAX: "argmax",
    K.LOSS: "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward nll_loss2d_forward",
    K.ASSERTION: "_assert_tensor_metadata _assert_async.msg _assert_scalar sym_constrain_range_for_size"
    " sym_constrain_range",
}
KINDS: dict[str, Kind] = {name: kind for kind, names in TABLE.items() for name in names.split()}


def operator_text(target: Any) -> str:
    """The name under which an operator stands in the table: `squeeze.dim`; empty for what is none of torch's."""
    return target.name().removeprefix("aten::") if isinstance(target, OpOverload) else ""


def kind_of(name: str) -> Kind:
    """The kind of an operator by its name, none where it is not in the table."""
    packet, dot, overload = name.partition(".")
    return KINDS.get(name) or KINDS.get(packet.removesuffix("_copy") + dot + overload) or Kind(0)


def is_a(node: Any, kinds: Kind) -> bool:
    """Whether a node calls an operator of one of these kinds."""
    return isinstance(node, fx.Node) and bool(kind_of(operator_text(node.target)) & kinds)


def found(*names: str) -> list[OpOverload]:
    """Those of the operators that this torch has."""
    operators = []
    for name in names:
        library, _, name = name.rpartition("::")
        packet, _, overload = name.partition(".")
        held = getattr(getattr(torch.ops, library or "aten"), packet, None)
        operators += [getattr(held, overload or "default")] if hasattr(held, overload or "default") else []
    return operators


@functools.cache  # operators live as long as the process, and so do their schemas
def schema(operator: OpOverload) -> dict[str, tuple[int, Any]]:
    """Argument name -> its position, its default."""
    return {a.name: (i, a.default_value) for i, a in enumerate(schema_of(operator).arguments)}


def argument(node: fx.Node, name: str) -> Any:
    """An operator's argument by the name in its schema, its default where it is not given."""
    at, default = schema(node.target)[name]
    return node.args[at] if at < len(node.args) else node.kwargs.get(name, default)


def set_argument(node: fx.Node, name: str, value: object) -> None:
    at, _ = schema(node.target)[name]
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


def arguments(node: fx.Node) -> list[Any]:
    """All arguments of an operator, in the order of its schema."""
    return [argument(node, name) for name in schema(node.target)]


def operand(node: fx.Node) -> Any:
    """An operator's first argument: that of which a view is one, a list where it joins several."""
    return argument(node, next(iter(schema(node.target))))


def extent(node: fx.Node) -> tuple[int, Any, Any, Any]:
    """(dimension, start, stop, step) of a slice; start and stop may be None, or nodes."""
    dimension, start = argument(node, "dim"), argument(node, "start")
    if "length" not in schema(node.target):
        return dimension, start, argument(node, "end"), argument(node, "step")
    length = argument(node, "length")
    if not isinstance(start, int) or not isinstance(length, int):
        return dimension, start, length, 1
    return dimension, start, None if start + length == 0 > start else start + length, 1


def dimensions(node: fx.Node) -> tuple[int, ...]:
    """The dimensions along which an operator acts, counted from the front; all where it names none."""
    rank = operand(node).meta["val"].ndim
    name = next((name for name in ("dim", "dims", "dimension", "dim0") if name in schema(node.target)), None)
    given = argument(node, name) if name else None
    given = given if isinstance(given, (list, tuple)) else [given]
    return tuple(dim % rank for dim in given if isinstance(dim, int)) or tuple(range(rank))


def permutation(node: fx.Node) -> tuple[int, ...]:
    """For each dimension of a transpose's result, the one of its operand: read off how it moves distinct sizes."""
    probe = torch.empty(tuple(range(2, operand(node).meta["val"].ndim + 2)), device="meta")
    return tuple(size - 2 for size in node.target(probe, *node.args[1:], **node.kwargs).shape)
