"""What cannot work, or does not, with the reason for each.

An operator, check and dtype that is refused or fails has to be listed here, and what is listed has to be refused or
fail: `report.complaints` says where it is not so.
"""

from __future__ import annotations

import os
from typing import NamedTuple

BACKEND = os.environ.get("PYTORCH2JAX_CONFORMANCE_BACKEND", "torch")
"""Which engine is checked."""


class Known(NamedTuple):
    """Why an operator does not pass.

    Attributes:
        verdict: what is expected: `"refused"`, by an error of the library's own; `"failed"`, in another way;
            `"skipped"`: it is not tried.
        reason: why.
        operators: their names.
        checks: in which checks; empty: in all.
        dtypes: with which dtypes; empty: with all.
    """

    verdict: str
    reason: str
    operators: tuple[str, ...]
    checks: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()

    def covers(self, operator: str, check: str, dtype: str) -> bool:
        """Whether this is about an operator in a check with a dtype."""
        return (
            operator in self.operators
            and (not self.checks or check in self.checks)
            and (not self.dtypes or dtype in self.dtypes)
        )


_PAIRS = "pairs of dtypes"
_FORWARD = ("forward mode", "vmap of jacfwd")
_SECOND = ("second order", "vmap of hessian")

_TORCH = (
    Known(
        "refused",
        "The shape of the output depends on values, which is found out at run time.",
        (
            "argwhere",
            "bincount",
            "masked_select",
            "nn.functional.one_hot",
            "nonzero",
            "tensor_split",
            "unique_consecutive",
        ),
    ),
    Known(
        "refused",
        "The output is sparse.",
        ("to_sparse",),
        ("forward", "narrow", "vmap", "vmap twice"),
    ),
    Known("refused", "The output is complex32, which JAX does not have.", ("chalf",)),
    Known(
        "refused",
        "The output is uint64 and does not fit into 32 bits.",
        ("hash_tensor",),
        ("narrow",),
    ),
    Known(
        "failed",
        "Pivots have to be int32, and int32 arrays reach torch as int64 while `jax_enable_x64` is off: "
        "`widen_ints=False` keeps them.",
        ("linalg.lu_solve", "lu_solve", "lu_unpack"),
        ("narrow",),
    ),
    Known(
        "failed",
        "Torch's double backward, the oracle, is NaN where a norm has a kink or a mask has left nothing; forward over "
        "reverse is 0 there.",
        ("linalg.norm.subgradients_at_zero", "masked.logaddexp"),
        _SECOND,
    ),
    Known(
        "failed",
        "Integers whose values are unknown are tried out as zeros, and no weights may be that: `output_shapes` helps.",
        ("cov",),
        ("vmap twice",),
    ),
    Known(
        "refused",
        "Of a pseudo-inverse of no matrices, `torch.vmap` loses the batch.",
        ("linalg.pinv",),
        ("vmap twice",),
    ),
)


_XLA: tuple[Known, ...] = (
    Known(
        "refused",
        "For arguments of several dtypes, torch's fake tensors tell another dtype of the result than its kernel has. "
        "`output_shapes` says which.",
        (
            "_batch_norm_with_update",
            "_native_batch_norm_legit",
            "_softmax_backward_data",
            "ldexp",
            "native_batch_norm",
            "native_dropout_backward",
            "native_group_norm",
            "native_layer_norm",
            "nn.functional.huber_loss",
            "nn.functional.soft_margin_loss",
            "normal",
        ),
        (_PAIRS,),
    ),
    Known(
        "refused",
        "Fake tensors do not take bytes for conditions, masks or classes: convert them (`x.bool()`, `x.long()`).",
        (
            "_unsafe_masked_index",
            "_unsafe_masked_index_put_accumulate",
            "nn.functional.cross_entropy",
            "nn.functional.nll_loss",
            "where",
        ),
        (_PAIRS,),
    ),
    Known(
        "refused",
        "It computes its gradients together with its value, and torch has no kernel for those.",
        ("nn.functional.linear_cross_entropy.chunked", "nn.functional.linear_cross_entropy.chunked_none"),
        (_PAIRS,),
        ("bfloat16",),
    ),
    Known(
        "refused",
        "Whether anything is left by the mask is a value, which a graph does not have.",
        ("masked.median",),
        (_PAIRS,),
    ),
    Known(
        "failed",
        "The imaginary part of an infinite loss is arbitrary.",
        ("nn.functional.soft_margin_loss",),
        (_PAIRS,),
        ("complex64",),
    ),
    Known(
        "refused",
        "The shape of the output depends on values, which XLA has to know before.",
        (
            "argwhere",
            "bincount",
            "masked_select",
            "nn.functional.one_hot",
            "nonzero",
            "tensor_split",
            "unique",
            "unique_consecutive",
        ),
    ),
    Known(
        "refused",
        "The output is a Python number made of values, which a graph does not have.",
        ("allclose", "equal", "item"),
    ),
    Known("refused", "The output is sparse.", ("to_sparse",)),
    Known("refused", "The output is complex32, which JAX does not have.", ("chalf",)),
    Known(
        "refused",
        "The output is uint64 and does not fit into 32 bits.",
        ("hash_tensor",),
        ("narrow",),
    ),
    Known(
        "failed",
        "Pivots have to be int32, and int32 arrays reach torch as int64 while `jax_enable_x64` is off: "
        "`widen_ints=False` keeps them.",
        ("linalg.lu_solve", "lu_solve", "lu_unpack"),
        ("narrow",),
    ),
    Known(
        "failed",
        "Which of equal elements comes first is not defined, and torch's choice is its algorithm's.",
        ("argsort", "kthvalue", "sort", "topk"),
        ("forward", "narrow", _PAIRS),
        ("bfloat16", "bool", "uint8", "int32", "int64"),
    ),
    Known(
        "failed",
        "Eigenvectors have any sign. Of a matrix that is given by its upper triangle, jaxlib's LAPACK finds others "
        "than torch's.",
        ("linalg.eigh",),
        ("forward", "narrow", "vmap", "vmap twice", _PAIRS),
    ),
    Known(
        "failed",
        "Torch's own matrix exponential is NaN in half precision.",
        ("matrix_exp",),
        ("forward", _PAIRS),
        ("bfloat16",),
    ),
    Known(
        "failed",
        "Torch adds up in bfloat16 here; this is in single precision, and nearer to the exact value.",
        ("nn.functional.adaptive_avg_pool3d", "nn.functional.interpolate.trilinear"),
        ("forward",),
        ("bfloat16",),
    ),
    Known(
        "failed",
        "Torch's forward derivative is NaN for complex numbers (2.13); its reverse one agrees with JAX's.",
        ("logcumsumexp",),
        ("forward mode",),
        ("complex128",),
    ),
    Known(
        "failed",
        "Where several elements go to one place, torch's forward mode has the tangent of one, and its reverse mode "
        "gradients for all; here both modes are its reverse mode.",
        ("nn.functional.max_unpool3d",),
        _FORWARD,
    ),
    Known(
        "failed",
        "Torch's derivative by the first argument is wrong (2.13): it is 1 where that was written over.",
        ("as_strided_scatter",),
        ("reverse", "vmap of gradients", "vmap of jacrev", *_SECOND),
    ),
    Known(
        "failed",
        "Torch's double backward, the oracle, is NaN where a norm has a kink or a mask has left nothing; here it is 0.",
        ("linalg.norm.subgradients_at_zero", "masked.logaddexp"),
        _SECOND,
    ),
    Known(
        "failed",
        "Torch runs it, and refuses gradients that depend on the phase of eigenvectors; to second order these are "
        "taken of it alone, without what makes its result independent of the phase.",
        ("linalg.eig",),
        _SECOND,
    ),
    Known(
        "failed",
        "Sums of hundreds of products that almost cancel: what is left is what each of the two has rounded.",
        ("nn.functional.conv_transpose3d",),
        ("forward",),
        ("bfloat16",),
    ),
    Known(
        "failed",
        "Torch has no forward derivative of its gradients in chunks, and takes it for 0 (2.13).",
        ("nn.functional.linear_cross_entropy.chunked_none",),
        _FORWARD,
    ),
    Known(
        "failed",
        "Torch computes the gradients in the forward pass, so that their own derivatives are 0.",
        ("nn.functional.linear_cross_entropy.chunked",),
        _SECOND,
    ),
)

KNOWN = _XLA if BACKEND == "xla" else _TORCH


def reasons(operator: str, check: str, dtype: str) -> list[Known]:
    """What is known about an operator in a check with a dtype."""
    return [known for known in KNOWN if known.covers(operator, check, dtype)]


def skipped(operator: str, check: str, dtype: str) -> bool:
    """Whether something is not tried."""
    return any(known.verdict == "skipped" for known in reasons(operator, check, dtype))
