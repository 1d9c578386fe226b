"""One quasi-Newton inverse of g_yy for both y and z, built from the products that the adjoint needs anyway."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchbilevel.draws import Draws
from torchbilevel.estimators.base import Estimator
from torchbilevel.estimators.evaluation import Evaluation, Memory
from torchbilevel.estimators.vetting import SILENT_ZERO
from torchbilevel.linear_solve import SolveResult
from torchbilevel.lower import GD, LowerResult
from torchbilevel.problem import Problem
from torchbilevel.tensors import Tensors, flatten, sub, unflatten

Pairs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class SharedInverse(Estimator):
    """Implicit differentiation in which every product with g_yy serves y as well as z.

    B is the limited-memory BFGS inverse of the last pairs (s, g_yy s). After a first call, in which ``lower_solver``
    moves y and z starts from 0, call t takes

        y <- y - B g_y(x, y),   r = f_y - g_yy z,
        ``products`` times: s = B r,  a = <s, r> / <s, g_yy s>,  z += a s,  r -= a g_yy s,  and B learns (s, g_yy s),
        z += B r,   v = f_x - g_xy z.

    On one fixed quadratic the directions s are those of conjugate gradients. The pairs outlive the call, so that B
    nears the inverse over the calls, and one gradient and a few products per call are enough for y and z to follow x.
    They outlive the data too: a run may begin on part of the rows and double them from call to call
    (``docs/rates.md``).

    Args:
        lower_solver: ``GD``, which moves y while there are no pairs, that is, in the first call.
        products: directions per call, at least 1.
        memory: pairs kept, at least 1.
        seed: of the random numbers inside the losses.

    Raises:
        ValueError: if ``products`` or ``memory`` is not a positive integer; on binding to a minimax problem or to a
            ``TaskBatch``, whose tasks would share one inverse.

    Cost: per ``backward`` one gradient of f, one of g (in the first call the steps of ``lower_solver``), ``products``
    + 1 Hessian-vector products (one less in the first call), one Jacobian-vector product. Keeps z and ``memory`` pairs
    of vectors like y. The step of y has no line search, so that y must not start far from y*(x), and mini-batches
    change g_yy under the pairs: give all rows, or growing parts of them.

    Reference: Morales and Nocedal, SIAM J. Optim. 2000 (products of one solve precondition the next); Ramzi et al.,
    ICLR 2022 (SHINE: one inverse for the lower solve and the adjoint).

    Differs from the paper: it is ours. SHINE builds the inverse from the gradients of the lower solve and spends no
    products; here the exact products of the adjoint build it, and y uses it.
    """

    def __init__(self, lower_solver: GD, *, products: int = 1, memory: int = 20, seed: int = 0) -> None:
        super().__init__(lower_solver, seed=seed)
        for name, value in (("products", products), ("memory", memory)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(lower_solver, GD):
            raise ValueError(f"lower_solver must be GD(lr=..., steps=...), got {lower_solver}")
        self.products, self.kept = products, memory

    def refuse(self, problem: Problem) -> None:
        """Minimax problems need no linear system; tasks would share one inverse."""
        if problem.minimax:
            raise ValueError("SharedInverse is for bilevel problems; a MinimaxProblem needs no z: use Danskin")
        if problem.tasks is not None:
            raise ValueError("SharedInverse would share one inverse between the tasks of a TaskBatch: use Implicit")

    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> Evaluation:
        """Move y, improve z and take the hypergradient; see the class."""
        draw = draws.at(0)
        pairs: Pairs = (memory.tracked.get("directions", ()), memory.tracked.get("products", ()))
        if pairs[0]:
            g = self.oracle.lower_gradient(x, y, draw.lower)[1]
            y = sub(y, unflatten(inverse(pairs, flatten(g)), y))
            lower = LowerResult(y, None, 1, None)
        else:
            lower = self.solve_lower(x, y, memory, draws)
            y = lower.y
        value, f_x, f_y, in_f = self.oracle.upper_gradient(x, y, draw.upper)

        def product(s: Tensor) -> Tensor:
            return flatten(self.oracle.hessian_product(x, y, unflatten(s, y), draw.lower))

        z = None if memory.z is None else flatten(memory.z)
        solve, pairs = improve(product, flatten(f_y), z, pairs, self.products)
        adjoint = unflatten(solve.z[0], y)
        g_xy_z, in_g = self.oracle.jacobian_product(x, y, adjoint, draw.lower)
        if not in_f and not in_g:
            raise ValueError(SILENT_ZERO)
        tracked = {"directions": pairs[0][-self.kept :], "products": pairs[1][-self.kept :]}
        return Evaluation(value, sub(f_x, g_xy_z), None, y, adjoint, lower, solve, tracked)


def inverse(pairs: Pairs, r: Tensor) -> Tensor:
    """The limited-memory BFGS inverse of A applied to r, by the two-loop recursion.

    Args:
        pairs: directions s and products A s, the oldest first, all with <s, A s> > 0.
        r: a vector.

    Returns:
        B r, with B A s = s for the last pair; r itself without pairs.

    >>> inverse(((torch.ones(2),), (2 * torch.ones(2),)), torch.tensor([1.0, 3.0]))
    tensor([0.5000, 1.5000])
    """
    alphas = []
    for s, product in zip(*map(reversed, pairs), strict=True):
        alpha = s.dot(r) / s.dot(product)
        alphas.append(alpha)
        r = r - alpha * product
    if alphas:
        s, product = pairs[0][-1], pairs[1][-1]
        r = (s.dot(product) / product.dot(product)) * r
    for s, product, alpha in zip(*pairs, reversed(alphas), strict=True):
        r = r + (alpha - product.dot(r) / s.dot(product)) * s
    return r


@torch.no_grad()
def improve(
    matvec: Callable[[Tensor], Tensor], b: Tensor, z: Tensor | None, pairs: Pairs, products: int
) -> tuple[SolveResult, Pairs]:
    """Some steps towards A z = b along directions of the inverse, which learns from each.

    Args:
        matvec: s -> A s.
        b: right-hand side.
        z: where to start, ``None`` for zero.
        pairs: of the inverse so far.
        products: directions to take.

    Returns:
        The solve, and the pairs with the new ones at the end. A direction with <s, A s> <= 0, up to round-off, ends the
        solve and is not learned. The residual is that before the last step, which needs no product.
    """
    r, taken = (b.clone(), 0) if z is None else (b - matvec(z), 1)
    z = torch.zeros_like(b) if z is None else z
    eps, nonpositive = torch.finfo(b.dtype).eps, torch.zeros((), dtype=torch.bool, device=b.device)
    for _ in range(products):
        if not r.norm() > eps * b.norm():
            break
        s = inverse(pairs, r)
        product = matvec(s)
        taken += 1
        curvature = s.dot(product)
        if curvature <= eps * s.norm() * product.norm():
            nonpositive = ~nonpositive
            break
        alpha = s.dot(r) / curvature
        z, r = z + alpha * s, r - alpha * product
        pairs = ((*pairs[0], s), (*pairs[1], product))
    residual, no = r.norm(), torch.zeros_like(nonpositive)
    if not nonpositive:
        z = z + inverse(pairs, r)
    return SolveResult((z,), residual, b.norm(), taken, None, nonpositive, no), pairs
