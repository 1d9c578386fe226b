"""``TaskBatch``: tasks side by side give the numbers of a loop over tasks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.problems import generator, spd
from torchbilevel import (
    CG,
    GD,
    Adam,
    AIDBiO,
    BilevelProblem,
    Chebyshev,
    Danskin,
    Direct,
    Implicit,
    ITDBiO,
    LinearSolver,
    MinimaxProblem,
    Neumann,
    RandomTruncation,
    SGDSolve,
    SignGD,
    TaskBatch,
    TorchOptim,
    Trace,
    Unrolled,
    certify,
    check_hypergradient,
    projections,
)
from torchbilevel.lower import Unrollable
from torchbilevel.tensors import Tensors

M, N, LAM = 3, 7, 0.8  # tasks, rows per task, weight of the proximal term
Batch = tuple[Tensor, Tensor]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(seed: int) -> Batch:
    """Tasks whose inputs are of different size, so that their lower problems are unlike."""
    normal = generator(seed)
    scales = torch.tensor([0.1, 0.7, 2.0], dtype=torch.float64)[:, None, None]
    return normal(M, N, 4) * scales, (normal(M, N) > 0).long()


TRAIN, TEST = batch(1), batch(2)


def losses(tasks: TaskBatch, batch: Batch) -> Tensor:
    return tasks.losses(F.cross_entropy, *batch)


def total(upper: nn.Module, lower: TaskBatch, batch: Batch) -> Tensor:
    return losses(lower, batch).sum()


def mean(upper: nn.Module, lower: TaskBatch, batch: Batch) -> Tensor:
    return losses(lower, batch).mean()


def distance(lower: nn.Module, upper: nn.Module) -> Tensor:
    pairs = zip(lower.parameters(), upper.parameters(), strict=True)
    return torch.stack([(p - q).square().sum() for p, q in pairs]).sum()


def proximal(upper: nn.Module, lower: TaskBatch, batch: Batch) -> Tensor:
    return losses(lower, batch).sum() + LAM / 2 * distance(lower, upper)


def single(upper: nn.Module, lower: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(lower(batch[0]), batch[1])


def single_proximal(upper: nn.Module, lower: nn.Module, batch: Batch) -> Tensor:
    return single(upper, lower, batch) + LAM / 2 * distance(lower, upper)


def start(upper: nn.Module) -> Any:
    return upper.parameters()


def task(batch: Batch, i: int) -> Batch:
    return batch[0][i], batch[1][i]


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])


def imaml(net: nn.Module, lower: nn.Module | None = None, init: Any = start) -> BilevelProblem:
    return BilevelProblem(net, lower or TaskBatch(net, M), upper_loss=mean, lower_loss=proximal, lower_init=init)


def maml(net: nn.Module) -> BilevelProblem:
    return BilevelProblem(net, TaskBatch(net, M), upper_loss=mean, lower_loss=total, lower_init=start)


# --- the module ---------------------------------------------------------------------------------------------------


def test_outputs_and_losses_are_those_of_each_task() -> None:
    net = network()
    tasks = TaskBatch(net, M)
    with torch.no_grad():
        for p in tasks.parameters():
            p.add_(torch.randn_like(p))
    outputs, values = tasks(TRAIN[0]), losses(tasks, TRAIN)
    assert outputs.shape == (M, N, 2) and values.shape == (M,)
    for i in range(M):
        own = {name.removeprefix("net."): p[i] for name, p in tasks.named_parameters()}
        torch.testing.assert_close(outputs[i], functional_call(net, own, TRAIN[0][i]))
        torch.testing.assert_close(values[i], F.cross_entropy(outputs[i], TRAIN[1][i]))


def test_every_task_starts_as_the_network_which_stays_as_it_is() -> None:
    net = network()
    before = [p.clone() for p in net.parameters()]
    tasks = TaskBatch(net, M)
    for p, q in zip(tasks.parameters(), net.parameters(), strict=True):
        assert p.shape == (M, *q.shape) and all(torch.equal(p[i], q) for i in range(M))
        p.data.zero_()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert "tasks=3" in repr(tasks)


def test_several_inputs_and_nested_ones() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2).double()

        def forward(self, a: Tensor, rest: dict[str, Tensor]) -> Tensor:
            return self.linear(a) * rest["gain"]

    tasks, gain = TaskBatch(Two(), M), {"gain": torch.arange(3.0, dtype=torch.float64)}
    outputs = tasks(TRAIN[0], gain)
    assert not outputs[0].any() and outputs[1].any()
    values = tasks.losses(F.cross_entropy, (TRAIN[0], gain), TRAIN[1])
    torch.testing.assert_close(values[2], F.cross_entropy(outputs[2], TRAIN[1][2]))


def test_tied_frozen_and_buffers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
            self.two.weight = self.one.weight
            self.two.bias.requires_grad_(False)
            self.register_buffer("gain", torch.tensor(2.0, dtype=torch.float64))

        def forward(self, a: Tensor) -> Tensor:
            return self.gain * self.two(self.one(a))

    net = Odd()
    tasks = TaskBatch(net, M)
    assert [name for name, p in tasks.named_parameters() if p.dim() > 1 + name.endswith("weight")] == [
        "net.one.weight",
        "net.one.bias",
    ]
    assert tasks.net.two.weight is tasks.net.one.weight and tasks.net.two.bias.shape == (4,)
    with torch.no_grad():
        tasks.net.one.weight[1] *= 3
    expected = 2 * F.linear(F.linear(TRAIN[0][1], 3 * net.one.weight, net.one.bias), 3 * net.one.weight, net.two.bias)
    torch.testing.assert_close(tasks(TRAIN[0])[1], expected)
    tasks.net.two.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lower.net.two.bias was frozen when the TaskBatch was made"):
        maml_with(tasks)


def maml_with(lower: nn.Module) -> BilevelProblem:
    return BilevelProblem(network(), lower, upper_loss=mean, lower_loss=total)


def test_dropout_differs_by_task_and_is_replayed() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.arange(8).reshape(2, 4))
    tasks, ones = TaskBatch(net, M), torch.ones(M, N, 4, dtype=torch.float64)
    outputs = tasks(ones)
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    problem = BilevelProblem(network(), tasks, upper_loss=mean, lower_loss=proximal_of_all)
    values = [problem.lower_value(problem.x, problem.y, TRAIN, seed) for seed in (0, 0, 1)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    tasks.eval()
    outputs = tasks(ones)
    assert torch.equal(outputs[0], outputs[1])


def proximal_of_all(upper: nn.Module, lower: TaskBatch, batch: Batch) -> Tensor:
    squares = [p.square().sum() for p in (*lower.parameters(), *upper.parameters())]
    return losses(lower, batch).sum() + torch.stack(squares).sum()


def test_moves_of_dtype_and_state_dict() -> None:
    tasks = TaskBatch(network(), M).float()
    assert tasks(TRAIN[0].float()).dtype == torch.float32
    other = TaskBatch(network(1), M).float()
    other.load_state_dict(tasks.state_dict())
    assert torch.equal(other(TRAIN[0].float()), tasks(TRAIN[0].float()))
    assert next(TaskBatch(network(), M).to("meta").parameters()).device.type == "meta"


# --- numbers equal the loop over tasks ----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [CG(50, 1e-8), CG(4, None), Neumann(8, 0.2), Direct()], ids=str)
def test_imaml_equals_the_loop(solver: LinearSolver) -> None:
    net = network()
    problem = imaml(net)
    estimator = Implicit(GD(0.3, 90, tol=1e-3), solver, warm_start=False).bind(problem)
    value = estimator.backward(lower=TRAIN, upper=TEST)
    together = gradients(net)
    assert estimator.last is not None and estimator.last.solve is not None
    last, alone = estimator.last, []
    v, values = torch.zeros_like(together), []
    for i in range(M):
        net.zero_grad()
        own = BilevelProblem(net, copy.deepcopy(net), single, single_proximal, lower_init=start)
        one = Implicit(GD(0.3, 90, tol=1e-3), solver, warm_start=False).bind(own)
        values.append(one.backward(lower=task(TRAIN, i), upper=task(TEST, i)))
        v += gradients(net) / M
        assert one.last is not None and one.last.solve is not None
        alone.append(one.last)
        for p, q in zip(problem.y, own.y, strict=True):
            torch.testing.assert_close(p[i], q, rtol=0, atol=1e-12)
        torch.testing.assert_close(last.lower.residual[i], one.last.lower.residual)
        torch.testing.assert_close(last.solve.residual[i], one.last.solve.residual / M, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(together, v, rtol=0, atol=1e-12)
    torch.testing.assert_close(value, torch.stack(values).mean())
    steps, iterations = ([getattr(e, part) for e in alone] for part in ("lower", "solve"))
    assert len({e.steps for e in steps}) == M and last.lower.steps == max(e.steps for e in steps) < 90
    assert last.solve.iterations == max(e.iterations for e in iterations)
    assert last.solve.status == iterations[0].status
    if isinstance(solver, CG) and solver.tol is not None:
        assert len({e.iterations for e in iterations}) == M


def inner_loop(net: nn.Module, x: dict[str, Tensor], i: int, lr: float, steps: int) -> Tensor:
    """MAML's loss of one task, by hand."""

    def loss(y: dict[str, Tensor], batch: Batch) -> Tensor:
        return F.cross_entropy(functional_call(net, y, batch[0][i]), batch[1][i])

    y = x
    for _ in range(steps):
        g = torch.func.grad(loss)(y, TRAIN)
        y = {name: p - lr * g[name] for name, p in y.items()}
    return loss(y, TEST)


@pytest.mark.parametrize("recompute", [False, True])
def test_maml_equals_the_loop(recompute: bool) -> None:
    net = network()
    estimator = Unrolled(GD(0.4, 5), recompute=recompute, warm_start=False).bind(maml(net))
    value = estimator.backward(lower=TRAIN, upper=TEST)
    x = {name: p.detach() for name, p in net.named_parameters()}

    def outer(x: dict[str, Tensor]) -> Tensor:
        return torch.stack([inner_loop(net, x, i, 0.4, 5) for i in range(M)]).mean()

    gradient, loss = torch.func.grad_and_value(outer)(x)
    torch.testing.assert_close(value, loss)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, gradient[name])


@pytest.mark.parametrize(
    "solver",
    [GD(0.1, 4, momentum=0.9, nesterov=True), Adam(0.05, 4), SignGD(0.01, 4)],
    ids=str,
)
def test_other_solvers_unrolled_equal_the_loop(solver: Unrollable) -> None:
    net = network()
    Unrolled(solver, warm_start=False).bind(maml(net)).backward(lower=TRAIN, upper=TEST)
    together = gradients(net)
    net.zero_grad()
    for i in range(M):
        own = BilevelProblem(net, copy.deepcopy(net), single, single, lower_init=start)
        Unrolled(solver, warm_start=False).bind(own).backward(lower=task(TRAIN, i), upper=task(TEST, i))
    torch.testing.assert_close(together, gradients(net) / M)


class Anil(nn.Module):
    """A body for all tasks, the start of their heads, and one learned rate."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.body, self.head = net[:2], net[2]
        self.log_lr = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))


def test_anil_equals_the_loop() -> None:
    upper = Anil()

    def loss(upper: nn.Module, lower: nn.Module, batch: Batch) -> Tensor:
        return lower.losses(F.cross_entropy, upper.body(batch[0]), batch[1])

    problem = BilevelProblem(
        upper,
        TaskBatch(upper.head, M),
        upper_loss=lambda upper, lower, batch: loss(upper, lower, batch).mean(),
        lower_loss=lambda upper, lower, batch: loss(upper, lower, batch).sum(),
        lower_init=lambda upper: upper.head.parameters(),
    )
    with pytest.warns(UserWarning, match="no loss uses upper.log_lr"):
        problem.check(lower=TRAIN, upper=TEST)
    solver = GD(lambda upper: upper.log_lr.exp(), 3)
    Unrolled(solver, warm_start=False).bind(problem).backward(lower=TRAIN, upper=TEST)
    x = tuple(upper.parameters())
    values = []
    for i in range(M):
        w, b = upper.head.weight, upper.head.bias
        for _ in range(3):
            inner = F.cross_entropy(F.linear(upper.body(TRAIN[0][i]), w, b), TRAIN[1][i])
            g = torch.autograd.grad(inner, (w, b), create_graph=True)
            w, b = w - upper.log_lr.exp() * g[0], b - upper.log_lr.exp() * g[1]
        values.append(F.cross_entropy(F.linear(upper.body(TEST[0][i]), w, b), TEST[1][i]))
    expected = torch.autograd.grad(torch.stack(values).mean(), x)
    for p, g in zip(x, expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_minimax_equals_the_loop() -> None:
    net = network().requires_grad_(True)

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs + self.shift

    def robust(upper: nn.Module, lower: nn.Module, batch: Batch) -> Tensor:
        logits = upper(lower(batch[0]))
        entropies = F.cross_entropy(logits.flatten(0, -2), batch[1].flatten(), reduction="none")
        return entropies.reshape(-1, N).mean(1).sum() - lower_square(lower)

    def lower_square(lower: nn.Module) -> Tensor:
        return torch.stack([p.square().sum() for p in lower.parameters()]).sum()

    problem = MinimaxProblem(net, TaskBatch(Shift(), M), robust, projection=projections.linf_ball(0.02))
    problem.check(TRAIN)
    solver = GD(0.2, 40, tol=1e-4)
    Danskin(solver).bind(problem).backward(TRAIN)
    together = gradients(net)
    net.zero_grad()
    for i in range(M):
        own = MinimaxProblem(net, Shift(), robust, projection=projections.linf_ball(0.02))
        Danskin(solver).bind(own).backward(task(TRAIN, i))
        torch.testing.assert_close(problem.y[0][i], own.y[0])
    torch.testing.assert_close(together, gradients(net))


# --- solvers, block by block --------------------------------------------------------------------------------------

SHAPES = ((2, 3), (), (5,))


class Blocks:
    """One matrix per task, as a product on tuples of tensors of shapes (tasks, ...)."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.matrices, self.products = matrices, 0

    def __call__(self, s: Tensors) -> Tensors:
        self.products += 1
        return joined([A @ rows for A, rows in zip(self.matrices, row_of(s), strict=True)])


def row_of(s: Tensors) -> list[Tensor]:
    return list(torch.cat([t.reshape(len(t), -1) for t in s], 1))


def joined(rows: list[Tensor]) -> Tensors:
    pieces = torch.stack(rows).split([torch.Size(shape).numel() for shape in SHAPES], 1)
    return tuple(piece.reshape(-1, *shape) for piece, shape in zip(pieces, SHAPES, strict=True))


def of(s: Tensors, i: int) -> Tensors:
    return tuple(t[i : i + 1] for t in s)


def systems(seed: int = 0) -> tuple[list[Tensor], Tensors, Tensors]:
    normal = generator(seed)
    matrices = [spd(normal, 12, low, 1.0) for low in (0.9, 0.5, 0.01)]
    return matrices, joined([normal(12) for _ in matrices]), joined([normal(12) for _ in matrices])


SOLVERS = [
    CG(40, 1e-9),
    CG(5, None),
    Neumann(6, 0.5),
    RandomTruncation(6, 0.5),
    SGDSolve(6, 0.5),
    Chebyshev(6, 0.01, 1.0),
    Direct(12),
]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solvers_treat_each_task_as_by_itself(solver: LinearSolver, warm: bool) -> None:
    matrices, b, z0 = systems()
    product = Blocks(matrices)
    result = solver.solve(product, b, z0 if warm else None, len(matrices))
    iterations = []
    for i, A in enumerate(matrices):
        alone = solver.solve(Blocks([A]), of(b, i), of(z0, i) if warm else None)
        for s, t in zip(result.z, alone.z, strict=True):
            torch.testing.assert_close(s[i], t[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(result.residual[i], alone.residual, rtol=1e-4, atol=1e-13)
        torch.testing.assert_close(result.scale[i], alone.scale)
        assert bool(result.diverged[i]) == bool(alone.diverged) and result.tol == alone.tol
        iterations.append(alone.iterations)
    assert result.iterations == max(iterations) == product.products
    if solver is SOLVERS[0]:
        assert len(set(iterations)) == 3 and result.status == "converged"


@pytest.mark.parametrize("solver", [CG(40, 1e-9), Direct()], ids=str)
def test_what_is_wrong_with_one_task_stays_there(solver: LinearSolver) -> None:
    matrices, b, _ = systems()
    good = solver.solve(Blocks(matrices), b, None, 3).z
    indefinite = solver.solve(Blocks([matrices[0], -matrices[1], matrices[2]]), b, None, 3)
    assert indefinite.status == "non-positive curvature" and indefinite.nonpositive.tolist() == [False, True, False]
    alone = solver.solve(Blocks([-matrices[1]]), of(b, 1), None)
    for s, u in zip(indefinite.z, alone.z, strict=True):
        torch.testing.assert_close(s[1], u[0])
    if isinstance(solver, Direct):
        torch.testing.assert_close(row_of(indefinite.z)[1], -torch.linalg.solve(matrices[1], row_of(b)[1]))
    broken = solver.solve(Blocks([matrices[0], matrices[1] * torch.nan, matrices[2]]), b, None, 3)
    assert broken.status == "non-finite" and torch.isfinite(broken.residual).tolist() == [True, False, True]
    for i in (0, 2):
        for s, t, u in zip(good, indefinite.z, broken.z, strict=True):
            assert torch.equal(s[i], t[i]) and torch.equal(s[i], u[i])


def test_a_task_without_right_hand_side_has_the_solution_zero() -> None:
    matrices, b, z0 = systems()
    b = joined([row * (i != 1) for i, row in enumerate(row_of(b))])
    result = CG(60, 1e-9).solve(Blocks(matrices), b, z0, 3)
    assert result.status == "converged" and all(not t[1].any() for t in result.z)
    assert CG(60, 1e-9).solve(Blocks(matrices), tuple(0 * t for t in b), z0, 3).iterations == 0


def test_direct_takes_the_products_of_one_task() -> None:
    matrices, b, _ = systems()
    product = Blocks(matrices)
    Direct(12).solve(product, b, None, 3)
    assert product.products == 12
    with pytest.raises(ValueError, match="Direct forms a matrix with 12 rows, more than max_size=11"):
        Direct(11).solve(product, b, None, 3)


class Valleys:
    """g and g_y of 1/2 y_i'A_i y_i - b_i'y_i, summed over tasks; every call adds noise of its own number."""

    def __init__(self, matrices: list[Tensor], b: Tensors, noise: list[Tensors]) -> None:
        self.product, self.b, self.noise, self.calls = Blocks(matrices), b, noise, 0

    def __call__(self, y: Tensors) -> tuple[Tensor, Tensors]:
        noise = self.noise[self.calls]
        self.calls += 1
        g = tuple(s - t + u for s, t, u in zip(self.product(y), self.b, noise, strict=True))
        return torch.zeros(()), g


def free(y: Tensors) -> Tensors:
    return y


@pytest.mark.parametrize(
    "make",
    [lambda k: GD(0.8, k, tol=0.3), lambda k: GD(0.3, k, momentum=0.6, tol=0.3), lambda k: Adam(0.2, k, tol=0.5)],
    ids=["GD", "momentum", "Adam"],
)
def test_lower_solvers_stop_task_by_task(make: Callable[[int], Unrollable]) -> None:
    matrices, b, start = systems(3)
    normal = generator(5)
    noise = [joined([0.02 * normal(12) for _ in range(3)]) for _ in range(400)]
    solver = make(200)
    together = solver.run(Valleys(matrices, b, noise), start, None, free, 3)
    warm = isinstance(solver, GD)
    again = solver.run(Valleys(matrices, b, noise[::-1]), start, together.state, free, 3) if warm else together
    steps = []
    for i, A in enumerate(matrices):
        own = [of(n, i) for n in noise]
        alone = solver.run(Valleys([A], of(b, i), own), of(start, i), None, free)
        after = solver.run(Valleys([A], of(b, i), own[::-1]), of(start, i), alone.state, free) if warm else alone
        for side, one in ((together, alone), (again, after)):
            for s, t in zip(side.y, one.y, strict=True):
                torch.testing.assert_close(s[i], t[0], rtol=0, atol=1e-12)
            assert side.residual is not None and one.residual is not None
            torch.testing.assert_close(side.residual[i], one.residual)
        steps.append(alone.steps)
    assert len(set(steps)) == 3 and together.steps == max(steps) < 200


def test_a_task_that_stops_at_once_keeps_a_momentum_of_zero() -> None:
    matrices, b, start = systems(3)
    start = joined([torch.linalg.solve(matrices[0], row_of(b)[0]), *row_of(start)[1:]])
    none = [tuple(torch.zeros_like(t) for t in b)] * 20
    result = GD(0.3, 5, momentum=0.6, tol=1e-8).run(Valleys(matrices, b, none), start, None, free, 3)
    assert all(torch.equal(s[0], t[0]) for s, t in zip(result.y, start, strict=True))
    assert all(not m[0].any() and m[1].any() for m in result.state)


# --- in a method --------------------------------------------------------------------------------------------------


def method(net: nn.Module, problem: BilevelProblem | None = None) -> AIDBiO:
    return AIDBiO(problem or imaml(net, init=None), lr=0.5, lower_solver=GD(0.2, 30, 0.5, tol=1e-3))


def run(method: Any, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        method.zero_grad()
        values.append(float(method.backward(lower=TRAIN, upper=TEST)))
        method.step()
    return values


def test_a_resumed_run_equals_an_uninterrupted_one() -> None:
    whole = run(method(network()), 6)
    first = method(network())
    values = run(first, 3)
    buffer = io.BytesIO()
    torch.save({"method": first.state_dict(), "upper": first.problem.upper.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    net = network(4)
    net.load_state_dict(state["upper"])
    resumed = method(net)
    resumed.load_state_dict(state["method"])
    assert values + run(resumed, 3) == whole and whole[-1] < whole[0]


def test_copies_share_nothing() -> None:
    original = method(network())
    run(original, 2)
    for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert other.problem.tasks == M and isinstance(other.problem.lower, TaskBatch)
        before = [p.clone() for p in (*original.problem.x, *original.problem.y)]
        values = run(other, 2)
        assert all(torch.equal(p, q) for p, q in zip((*original.problem.x, *original.problem.y), before, strict=True))
    assert run(original, 2) == values


def test_a_trace_has_the_largest_residual() -> None:
    aid, trace = method(network()), Trace()
    loss = aid.backward(lower=TRAIN, upper=TEST)
    aid.step()
    trace.record(aid, loss)
    last = aid.estimator.last
    assert last is not None and last.solve is not None and last.lower.residual is not None
    assert trace.rows[0]["linear_residual"] == float((last.solve.residual / last.solve.scale).max())
    assert trace.rows[0]["lower_residual"] == float(last.lower.residual.max())


def test_meta_learning_lowers_the_loss_after_adaptation() -> None:
    itd = ITDBiO(maml(network()), lr=0.3, lower_solver=GD(0.4, 5), warm_start=False)
    values = run(itd, 30)
    assert values[-1] < 0.95 * values[0]


def test_check_hypergradient_and_certify() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, t: Tensor) -> Tensor:
            return self.w * t

    # g_i = h_i/2 |y_i - a_i x|^2 and f_i = 1/2 |y_i - b_i|^2, so that Phi = 1/(2m) sum_i |a_i x - b_i|^2.
    a, b = torch.tensor([[1.0, 2.0], [0.5, 3.0]]).double(), torch.tensor([[1.0, -1.0], [2.0, 0.0]]).double()
    h = torch.tensor([1.0, 5.0]).double()
    minimum = (a * b).sum(0) / a.square().sum(0)

    def lower_loss(upper: nn.Module, lower: TaskBatch, batch: Any) -> Tensor:
        y = lower(torch.ones(2, 1, dtype=torch.float64))
        return 0.5 * (h * (y - a * upper.w).square().sum(1)).sum()

    def upper_loss(upper: nn.Module, lower: TaskBatch, batch: Any) -> Tensor:
        return 0.5 * (lower(torch.ones(2, 1, dtype=torch.float64)) - b).square().sum(1).mean()

    upper = Scale()
    problem = BilevelProblem(upper, TaskBatch(Scale(), 2), upper_loss, lower_loss)
    report = check_hypergradient(problem, Implicit(GD(0.1, 400, tol=1e-13), CG(10, 1e-13)))
    assert report.error < 1e-9 and report.finite_differences < 1e-6 and not report.trouble
    with torch.no_grad():
        upper.w.copy_(minimum)
    certificate = certify(problem, grad_tol=1e-6, curvature_tol=1e-3)
    assert certificate.verdict == "epsilon-local minimum"
    assert certificate.lambda_min == pytest.approx(float(a.square().mean(0).min()))
    assert certificate.lower_lambda_min == pytest.approx(1.0)


def test_start_may_be_given_for_all_tasks_or_for_each() -> None:
    net = network()
    for init, spread in (
        (start, 0.0),
        (lambda upper: [p + torch.ones(M, *[1] * p.dim()) for p in upper.parameters()], 1),
    ):
        problem = BilevelProblem(net, TaskBatch(net, M), upper_loss=mean, lower_loss=total, lower_init=init)
        for t, p in zip(problem.start(problem.x) or (), net.parameters(), strict=True):
            torch.testing.assert_close(t, (p + spread).expand(M, *p.shape), check_dtype=False)


def test_an_iterator_as_start_is_read_at_x() -> None:
    net = network()
    lower = copy.deepcopy(net)
    problem = BilevelProblem(net, lower, upper_loss=single, lower_loss=single, lower_init=lambda net: net.parameters())
    x = tuple((2 * p).requires_grad_() for p in problem.x)
    with torch.enable_grad():
        found = problem.start(x)
    assert found is not None and all(s is t for s, t in zip(found, x, strict=True))


# --- what is refused ----------------------------------------------------------------------------------------------


def test_check_accepts_separate_tasks_and_refuses_coupled_ones() -> None:
    net = network()
    imaml(net).check(lower=TRAIN, upper=TEST)

    def coupled(upper: nn.Module, lower: TaskBatch, batch: Batch) -> Tensor:
        middle = [(p - p.mean(0)).square().sum() for p in lower.parameters()]
        return proximal(upper, lower, batch) + 0.1 * torch.stack(middle).sum()

    problem = BilevelProblem(net, TaskBatch(net, M), upper_loss=mean, lower_loss=coupled)
    with pytest.raises(ValueError, match="lower_loss couples the tasks of the TaskBatch: moving y of tasks 0 to 0"):
        problem.check(lower=TRAIN, upper=TEST)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TaskBatch(network(), 0), "tasks must be a positive integer, got 0"),
        (lambda: TaskBatch(network(), True), "tasks must be a positive integer, got True"),
        (lambda: TaskBatch(network(), 2.0), r"tasks must be a positive integer, got 2\.0"),
        (lambda: TaskBatch(network().requires_grad_(False), 2), "net has no trainable parameter"),
        (lambda: TaskBatch(nn.LazyLinear(2), 2), "net.weight has no shape yet"),
        (
            lambda: TaskBatch(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), 2),
            r"net\.1 \(BatchNorm1d\) keeps running statistics.*track_running_stats=False",
        ),
        (lambda: TaskBatch(network(), 3)(TRAIN[0][0]), r"leading dimension of tasks=3.*got the shape \(7, 4\)"),
        (lambda: losses(TaskBatch(network(), 3), (TRAIN[0], TRAIN[1][:2])), r"got the shape \(2, 7\)"),
        (
            lambda: maml_with(nn.Sequential(TaskBatch(network(), 3), nn.Linear(2, 2))),
            r"lower\.0 is a TaskBatch; make it the lower module itself",
        ),
        (
            lambda: AIDBiO(imaml(network()), lr=1, lower_solver=Adam(0.1, 5, tol=0.1)),
            "Adam counts steps, and the tasks of a TaskBatch would stop at different ones: with tol=0.1",
        ),
        (
            lambda: AIDBiO(imaml(network()), lr=1, lower_solver=TorchOptim(torch.optim.SGD, 5, tol=0.1, lr=0.1)),
            "cannot stop for one task of a TaskBatch and go on for others",
        ),
    ],
)
def test_what_cannot_work_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_network_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="net must be an nn.Module, got str"):
        TaskBatch("net", 3)


def test_batch_statistics_without_running_ones_are_those_of_each_task() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)).double()
    outputs = TaskBatch(net, M)(TRAIN[0])
    for i in range(M):
        torch.testing.assert_close(outputs[i], net(TRAIN[0][i]))
