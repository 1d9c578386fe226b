"""Exact solves of small systems."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbilevel.blocks import flatten_rows, unflatten_rows
from torchbilevel.linear_solve.base import LinearSolver, MatVec, SolveResult, positive_int
from torchbilevel.tensors import Tensors, accumulator, numel


class Direct(LinearSolver):
    """Exact solve by forming A column by column and factorising it: for small problems and for reference.

    Args:
        max_size: largest number of unknowns accepted, of one task where there are several; default 2000.

    Raises:
        ValueError: from ``solve``, if b has more unknowns than ``max_size``.

    Cost: one product per unknown (of one task) and O(n^3) arithmetic; n^2 numbers of memory. A warm start is of no use
    and ignored.

    Reference: Cholesky factorisation of the symmetrised matrix; where it fails, A is not positive definite, and the
    least-squares solution of least norm is returned under the status ``"non-positive curvature"``.

    >>> Direct().solve(lambda s: (2 * s[0],), (torch.ones(2),)).z
    (tensor([0.5000, 0.5000]),)
    """

    def __init__(self, max_size: int = 2000) -> None:
        self.max_size = positive_int("max_size", max_size)

    def __repr__(self) -> str:
        return f"Direct(max_size={self.max_size})"

    @torch.no_grad()
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None, tasks: int | None = None) -> SolveResult:
        """Form A and solve; see the class."""
        n = numel(b) // (tasks or 1)
        if n > self.max_size:
            raise ValueError(
                f"Direct forms a matrix with {n} rows, more than max_size={self.max_size}; use CG, or raise max_size"
            )
        matrix, rhs = accumulator(dense(matvec, b, tasks)), accumulator(flatten_rows(b, tasks))[..., None]
        factor, info = torch.linalg.cholesky_ex(matrix)
        nonpositive = (info > 0) & torch.isfinite(matrix).flatten(-2).all(-1)
        solution = torch.cholesky_solve(rhs, factor)
        if bool(nonpositive.any()):
            solution[nonpositive] = torch.linalg.pinv(matrix[nonpositive], hermitian=True) @ rhs[nonpositive]
        z, tol = unflatten_rows(solution[..., 0], b, tasks), torch.finfo(b[0].dtype).eps ** 0.5
        residual, size = (t[..., 0].norm(dim=-1) for t in (rhs - matrix @ solution, rhs))
        return SolveResult(z, residual, size, n, tol, nonpositive, torch.zeros_like(nonpositive))


def dense(matvec: MatVec, like: Tensors, tasks: int | None = None) -> Tensor:
    """The symmetrised matrix of a product, formed column by column; with tasks one for each, of all at once."""
    rows = flatten_rows(like, tasks)
    basis = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    columns = (matvec(unflatten_rows(e.expand_as(rows), like, tasks)) for e in basis)
    matrix = torch.stack([flatten_rows(column, tasks) for column in columns], -2)
    return 0.5 * (matrix + matrix.mT)
