"""Products of matrices, decompositions, solvers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax import lax

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla.lowerings._promotion import cast, precise

# -- products -------------------------------------------------------------------------------------------------


@lowers("aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default", "aten.mm.dtype", "aten.bmm.dtype")
def matmul(x: jax.Array, y: jax.Array, out_dtype: Any = None, *, out: Out) -> jax.Array:
    if x.dtype == np.bool_:
        return jnp.matmul(x.astype(np.int32), y.astype(np.int32)) > 0
    return jnp.matmul(x, y, preferred_element_type=out.dtype)


@lowers("aten.vdot.default")
def vdot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.vdot(x, y)


@lowers("aten._grouped_mm.default")
def grouped_mm(
    x: jax.Array,
    y: jax.Array,
    offs: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """A product for each group: an axis without a group axis is cut into them, at `offs`.

    `lax.ragged_dot` has no rule for `vmap`; and but on TPUs it multiplies everything with everything, too.
    """
    x, y = precise(x), precise(y)
    if offs is None:
        return jnp.matmul(x, y)
    ends = offs[:, None]
    starts = jnp.pad(ends, ((1, 0), (0, 0)))[:-1]

    def inside(n: int) -> jax.Array:
        return (starts <= np.arange(n)) & (np.arange(n) < ends)

    if x.ndim == y.ndim:  # what is multiplied is cut
        within = inside(x.shape[1])
        return jnp.matmul(jnp.where(within[:, None], x, 0), jnp.where(within[..., None], y, 0))
    within = inside(x.shape[0])[..., None] if x.ndim == 2 else inside(y.shape[1])[:, None]
    return jnp.sum(jnp.where(within, jnp.matmul(x, y), 0), axis=0)


@lowers("aten._int_mm.default")
def int_mm(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=np.int32)


def _sum_of(x: jax.Array, product: jax.Array, beta: Any, alpha: Any, out: Out) -> jax.Array:
    """`beta x + alpha product`; with `beta=0`, torch does not look at `x`."""
    product = product if alpha == 1 else product * jnp.asarray(alpha, product.dtype)
    if beta == 0:
        return jnp.broadcast_to(product, out.shape)
    return product + (x if beta == 1 else x * jnp.asarray(beta, x.dtype))


@lowers("aten.addmm.default", "aten.addmv.default", "aten.baddbmm.default")
def addmm(x: jax.Array, y: jax.Array, z: jax.Array, *, beta: Any = 1, alpha: Any = 1, out: Out) -> jax.Array:
    return _sum_of(x, jnp.matmul(y, z), beta, alpha, out)


@lowers("aten.addbmm.default")
def addbmm(x: jax.Array, y: jax.Array, z: jax.Array, *, beta: Any = 1, alpha: Any = 1, out: Out) -> jax.Array:
    return _sum_of(x, jnp.einsum("bij,bjk->ik", y, z), beta, alpha, out)


@lowers("aten.addr.default")
def addr(x: jax.Array, y: jax.Array, z: jax.Array, *, beta: Any = 1, alpha: Any = 1, out: Out) -> jax.Array:
    y, z = y.astype(out.dtype), z.astype(out.dtype)
    return _sum_of(x.astype(out.dtype), jnp.outer(y, z), beta, alpha, out)


@lowers("aten.linalg_cross.default")
def cross(x: jax.Array, y: jax.Array, *, dim: int = -1) -> jax.Array:
    x, y = jnp.broadcast_arrays(x, y)
    return jnp.cross(x, y, axis=dim)


@lowers("aten._trilinear.default")
def trilinear(
    x: jax.Array,
    y: jax.Array,
    z: jax.Array,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> jax.Array:
    ndim = x.ndim + len(expand1)
    letters = "abcdefghijklmnop"[:ndim]

    def without(dims: Sequence[int]) -> str:
        return "".join(c for i, c in enumerate(letters) if i not in {d % ndim for d in dims})

    terms = ",".join(map(without, (expand1, expand2, expand3)))
    # In this order, like torch: in half precision, it is seen.
    return jnp.einsum(f"{terms}->{without(sumdim)}", x, y, z, optimize=[(0, 1), (0, 1)])


# -- distances ------------------------------------------------------------------------------------------------


@lowers("aten._cdist_forward.default", "aten._euclidean_dist.default")
def cdist(x: jax.Array, y: jax.Array, p: float = 2.0, compute_mode: Any = None) -> jax.Array:
    return _norm(x[..., :, None, :] - y[..., None, :, :], p)


@lowers("aten._pdist_forward.default")
def pdist(x: jax.Array, p: float = 2.0) -> jax.Array:
    first, second = np.triu_indices(x.shape[0], 1)
    return _norm(x[first] - x[second], p)


def _norm(x: jax.Array, p: float) -> jax.Array:
    """The norm of the last axis; its derivative at zero is zero, as in torch."""
    if p == 0:
        return jnp.sum((x != 0).astype(x.dtype), axis=-1)
    if p == float("inf"):
        return jnp.max(jnp.abs(x), axis=-1) if x.shape[-1] else jnp.zeros(x.shape[:-1], x.dtype)
    if p == 1:
        return jnp.sum(jnp.abs(x), axis=-1)
    size = jnp.abs(x)
    zero = size == 0
    total = jnp.sum(jnp.where(zero, 0, jnp.where(zero, 1, size) ** p), axis=-1)
    nothing = total == 0
    return jnp.where(nothing, 0, jnp.where(nothing, 1, total) ** (1 / p))


# -- decompositions -------------------------------------------------------------------------------------------


def _info(x: jax.Array) -> jax.Array:
    """Torch's report of success for each matrix: all well. XLA has NaN in results that it could not compute."""
    return jnp.zeros(x.shape[:-2], np.int32)


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _from_triangle(upper: bool, symmetrised: bool, x: jax.Array) -> jax.Array:
    """The Hermitian matrix with this triangle, the only one that torch reads.

    Torch's derivatives are those of a function of the whole matrix; some are made symmetric.
    """
    strict = jnp.triu(x, 1) if upper else jnp.tril(x, -1)
    diagonal = jnp.real(jnp.diagonal(x, axis1=-2, axis2=-1)).astype(x.dtype)
    return strict + _adjoint(strict) + jnp.eye(x.shape[-1], dtype=x.dtype) * diagonal[..., None, :]


@_from_triangle.defjvp
def _from_triangle_jvp(upper: bool, symmetrised: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return _from_triangle(upper, symmetrised, x), (dx + _adjoint(dx)) / 2 if symmetrised else dx


@lowers("aten.linalg_cholesky_ex.default")
def cholesky_ex(x: jax.Array, *, upper: bool = False, check_errors: bool = False) -> tuple[jax.Array, jax.Array]:
    return cholesky(x, upper), _info(x)


@lowers("aten.cholesky.default")
def cholesky(x: jax.Array, upper: bool = False) -> jax.Array:
    lower = lax.linalg.cholesky(_from_triangle(upper, True, x), symmetrize_input=False)
    return _adjoint(lower) if upper else lower


@lowers("aten.linalg_inv_ex.default")
def inv_ex(x: jax.Array, *, check_errors: bool = False) -> tuple[jax.Array, jax.Array]:
    return jnp.linalg.inv(x), _info(x)


@lowers("aten.linalg_qr.default")
def qr(x: jax.Array, mode: str = "reduced", *, out: Sequence[Out]) -> tuple[jax.Array, jax.Array]:
    m, n = x.shape[-2:]
    if mode == "r":
        return jnp.zeros(out[0].shape, out[0].dtype), jnp.linalg.qr(x, mode="r")
    if m >= n:
        q, r = jnp.linalg.qr(x, mode=mode)
        return q, r
    q, r = jnp.linalg.qr(x[..., :m])  # of wide matrices, JAX has no derivative
    return q, jnp.concatenate([r, _adjoint(q) @ x[..., m:]], axis=-1)


@lowers("aten._linalg_svd.default")
def svd(
    x: jax.Array, full_matrices: bool = False, compute_uv: bool = True, *, driver: Any = None, out: Sequence[Out]
) -> tuple[jax.Array, ...]:
    if not compute_uv:
        values = jnp.linalg.svd(x, compute_uv=False)
        return jnp.zeros(out[0].shape, out[0].dtype), values, jnp.zeros(out[2].shape, out[2].dtype)
    return tuple(jnp.linalg.svd(x, full_matrices=full_matrices))


@lowers("aten._linalg_eigh.default")
def eigh(x: jax.Array, UPLO: str = "L", compute_v: bool = True, *, out: Sequence[Out]) -> tuple[jax.Array, jax.Array]:  # noqa: N803
    vectors, values = lax.linalg.eigh(_from_triangle(UPLO.upper() == "U", False, x), symmetrize_input=False)
    return values, vectors if compute_v else jnp.zeros(out[1].shape, out[1].dtype)


@lowers("aten._linalg_det.default")
def det(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    lu, pivots, _ = lax.linalg.lu(lax.stop_gradient(x))
    value = jnp.linalg.det(x) if x.shape[-1] else jnp.ones(x.shape[:-2], x.dtype)
    return value, lu, pivots + 1


@lowers("aten._linalg_slogdet.default")
def slogdet(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    lu, pivots, _ = lax.linalg.lu(lax.stop_gradient(x))
    sign, size = jnp.linalg.slogdet(x)
    return sign, size, lu, pivots + 1


@lowers("aten.linalg_lu_factor_ex.default")
def lu_factor(
    x: jax.Array, *, pivot: bool = True, check_errors: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    lu, pivots, _ = lax.linalg.lu(x)
    return lu, pivots + 1, _info(x)


@lowers("aten.linalg_lu.default")
def lu(x: jax.Array, *, pivot: bool = True) -> tuple[jax.Array, jax.Array, jax.Array]:
    factors, _, permutation = lax.linalg.lu(x)
    return _unpacked(factors, permutation)


def _unpacked(factors: jax.Array, permutation: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    m, n = factors.shape[-2:]
    k = min(m, n)
    lower = jnp.tril(factors[..., :k], -1) + jnp.eye(m, k, dtype=factors.dtype)
    rows = jax.nn.one_hot(permutation, m, dtype=factors.dtype, axis=-2)
    return rows, lower, jnp.triu(factors[..., :k, :])


@lowers("aten.lu_unpack.default")
def lu_unpack(
    factors: jax.Array, pivots: jax.Array, unpack_data: bool = True, unpack_pivots: bool = True, *, out: Sequence[Out]
) -> tuple[jax.Array, ...]:
    m = factors.shape[-2]
    permutation = lax.linalg.lu_pivots_to_permutation(pivots - 1, m)
    results = _unpacked(factors, permutation)
    wanted = (unpack_pivots, unpack_data, unpack_data)
    return tuple(r if w else jnp.zeros(o.shape, o.dtype) for r, w, o in zip(results, wanted, out, strict=True))


@lowers("aten.linalg_pinv.atol_rtol_tensor")
def pinv(x: jax.Array, *, atol: Any = None, rtol: Any = None, hermitian: bool = False) -> jax.Array:
    real = jnp.finfo(x.dtype).dtype
    if rtol is None:
        usual = jnp.asarray(jnp.finfo(x.dtype).eps * max(x.shape[-2:]), real)
        rtol = usual if atol is None else jnp.where(atol > 0, 0, usual)
    atol, rtol = (jnp.asarray(0 if t is None else t, real)[..., None] for t in (atol, rtol))
    return _pinv(hermitian, x, atol, rtol)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pinv(hermitian: bool, x: jax.Array, atol: jax.Array, rtol: jax.Array) -> jax.Array:
    if 0 in x.shape[-2:]:
        return jnp.swapaxes(jnp.zeros_like(x), -1, -2)
    if hermitian:
        right, values = lax.linalg.eigh(_from_triangle(False, False, x), symmetrize_input=False)
        left = _adjoint(right)
    else:
        u, values, vh = jnp.linalg.svd(x, full_matrices=False)
        left, right = _adjoint(u), _adjoint(vh)
    size = jnp.abs(values)
    large = size > jnp.maximum(atol, rtol * jnp.max(size, axis=-1, keepdims=True))
    inverse = jnp.where(large, 1 / jnp.where(large, values, 1), 0).astype(x.dtype)
    return (right * inverse[..., None, :]) @ left


@_pinv.defjvp
def _pinv_jvp(hermitian: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative that does not need singular values to differ (Golub and Pereyra)."""
    a, da = primals[0], tangents[0]
    p = _pinv(hermitian, *primals)
    ph, dah = _adjoint(p), _adjoint(da)
    right = dah - (dah @ a) @ p  # dA^H (I - A P)
    left = dah - p @ (a @ dah)  # (I - P A) dA^H
    return p, p @ ph @ right + left @ ph @ p - p @ da @ p


# -- solvers --------------------------------------------------------------------------------------------------


def _columns(solve: Callable[[jax.Array, jax.Array], jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
    """Solve with matrices as right sides, batches broadcast."""
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return solve(jnp.broadcast_to(a, (*batch, *a.shape[-2:])), jnp.broadcast_to(b, (*batch, *b.shape[-2:])))


@lowers("aten._linalg_solve_ex.default")
def solve_ex(
    a: jax.Array, b: jax.Array, *, left: bool = True, check_errors: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    factors, pivots, _ = lax.linalg.lu(lax.stop_gradient(a))
    vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    right = b[..., None] if vector else b
    if left:
        x = _columns(jnp.linalg.solve, a, right)
    else:
        x = jnp.swapaxes(_columns(jnp.linalg.solve, jnp.swapaxes(a, -1, -2), jnp.swapaxes(right, -1, -2)), -1, -2)
    return (x[..., 0] if vector else x), factors, pivots + 1, _info(a)


@lowers("aten.linalg_solve_triangular.default")
def solve_triangular(
    a: jax.Array, b: jax.Array, *, upper: bool, left: bool = True, unitriangular: bool = False, out: Out
) -> jax.Array:
    def solve(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.linalg.triangular_solve(a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular)

    return _columns(solve, cast(a, out.dtype), cast(b, out.dtype))


@lowers("aten.triangular_solve.default")
def triangular_solve(
    b: jax.Array, a: jax.Array, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[jax.Array, jax.Array]:
    def solve(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.linalg.triangular_solve(
            a, b, left_side=True, lower=not upper, transpose_a=transpose, unit_diagonal=unitriangular
        )

    return _columns(solve, a, b), jnp.broadcast_to(
        a, (*jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *a.shape[-2:])
    )


@lowers("aten.cholesky_solve.default", "aten._cholesky_solve_helper.default")
def cholesky_solve(b: jax.Array, factor: jax.Array, upper: bool = False) -> jax.Array:
    def solve(a: jax.Array, b: jax.Array) -> jax.Array:
        lower = _adjoint(a) if upper else a
        half = lax.linalg.triangular_solve(lower, b, left_side=True, lower=True)
        return lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True, conjugate_a=True)

    return _columns(solve, factor, b)


@lowers("aten.cholesky_inverse.default")
def cholesky_inverse(factor: jax.Array, upper: bool = False) -> jax.Array:
    return cholesky_solve(jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape), factor, upper)


@lowers("aten.linalg_lu_solve.default")
def lu_solve(
    factors: jax.Array, pivots: jax.Array, b: jax.Array, *, left: bool = True, adjoint: bool = False
) -> jax.Array:
    if not left:  # X A = B is A^H X^H = B^H
        return _adjoint(lu_solve(factors, pivots, _adjoint(b), adjoint=not adjoint))
    solve = _solve_adjoint_of_factors if adjoint else _solve_factors
    permutation = lax.linalg.lu_pivots_to_permutation(pivots - 1, factors.shape[-2])
    batch = jnp.broadcast_shapes(factors.shape[:-2], b.shape[:-2])
    factors, b = (jnp.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (factors, b))
    return solve(factors, jnp.broadcast_to(permutation, (*batch, permutation.shape[-1])), b)


def _solve_factors(factors: jax.Array, permutation: jax.Array, b: jax.Array) -> jax.Array:
    """`A X = B` where `A = P L U`."""
    b = jnp.take_along_axis(b, permutation[..., None], axis=-2)
    b = lax.linalg.triangular_solve(factors, b, left_side=True, lower=True, unit_diagonal=True)
    return lax.linalg.triangular_solve(factors, b, left_side=True, lower=False)


def _solve_adjoint_of_factors(factors: jax.Array, permutation: jax.Array, b: jax.Array) -> jax.Array:
    """`A^H X = B` where `A = P L U`."""
    adjoint = {"left_side": True, "transpose_a": True, "conjugate_a": True}
    b = lax.linalg.triangular_solve(factors, b, lower=False, **adjoint)
    b = lax.linalg.triangular_solve(factors, b, lower=True, unit_diagonal=True, **adjoint)
    return jnp.take_along_axis(b, jnp.argsort(permutation, axis=-1)[..., None], axis=-2)


# -- reflections ----------------------------------------------------------------------------------------------


@lowers("aten.geqrf.default")
def geqrf(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    transposed, scales = jnp.linalg.qr(x, mode="raw")
    return jnp.swapaxes(transposed, -1, -2), scales


def _reflections(x: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`V` and `T` for which the product of the reflections in `x` is `I - V T V^H`."""
    m, k = x.shape[-2], scales.shape[-1]
    v = jnp.tril(x[..., :k], -1) + jnp.eye(m, k, dtype=x.dtype)
    angles = jnp.triu(_adjoint(v) @ v, 1)
    diagonal = scales[..., :, None] * jnp.eye(k, dtype=x.dtype)
    unit = jnp.eye(k, dtype=x.dtype) + scales[..., :, None] * angles
    return v, lax.linalg.triangular_solve(unit, diagonal, left_side=True, lower=False, unit_diagonal=True)


@lowers("aten.linalg_householder_product.default")
def householder_product(x: jax.Array, tau: jax.Array) -> jax.Array:
    v, t = _reflections(x, tau)
    m, n = x.shape[-2:]
    return jnp.eye(m, n, dtype=x.dtype) - v @ t @ _adjoint(v)[..., :n]


@lowers("aten.ormqr.default")
def ormqr(x: jax.Array, tau: jax.Array, other: jax.Array, left: bool = True, transpose: bool = False) -> jax.Array:
    v, t = _reflections(x, tau)
    t = _adjoint(t) if transpose else t
    return other - (v @ (t @ (_adjoint(v) @ other)) if left else ((other @ v) @ t) @ _adjoint(v))


# -- functions ------------------------------------------------------------------------------------------------


@lowers("aten.linalg_matrix_exp.default")
def matrix_exp(x: jax.Array) -> jax.Array:
    return jsl.expm(precise(x))
