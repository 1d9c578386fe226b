"""STABLE and RSVRB against loops with explicit matrices, and where their answer is known."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import Split, assign, flat, generator, quadratic_bilevel, quadratic_minimax, unflat
from torchbilevel import (
    GD,
    RSVRB,
    STABLE,
    Adam,
    BilevelProblem,
    Decay,
    Direct,
    Implicit,
    Method,
    Tasks,
    sample,
)
from torchbilevel.estimators.rsvrb import Rsvrb, Task

DX, DY, LR, STEP = 3, 4, 0.05, 0.2
Batch = tuple[Tensor, ...]


def g(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    """All its second derivatives depend on x, y and the data."""
    a, p, b = batch
    return 0.5 * (a @ y - b - (p @ x).sin()).square().mean() + 0.5 * x[0].exp() * y @ y + 0.1 * y.pow(4).sum()


def f(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    a, p, b = batch
    return 0.5 * (a @ y - b).square().mean() + (p @ x).cos().mean() + 0.5 * x @ x


def rows(seed: int, n: int = 12) -> Batch:
    normal = generator(seed)
    return normal(n, DY), normal(n, DX), normal(n)


def lower_loss(upper: Split, lower: Split, batch: Batch) -> Tensor:
    return g(upper.flat(), lower.flat(), batch)


def upper_loss(upper: Split, lower: Split, batch: Batch) -> Tensor:
    return f(upper.flat(), lower.flat(), batch)


def problem() -> BilevelProblem:
    normal = generator(5)
    upper, lower = Split(0.3 * normal(DX), ((2,), ())), Split(normal(DY), ((2,), (1, 1), ()))
    return BilevelProblem(upper, lower, upper_loss=upper_loss, lower_loss=lower_loss)


class Recorder:
    """A source of random rows that keeps what it gave."""

    def __init__(self, batch: Batch, seed: int) -> None:
        self.source, self.given = sample(batch, seed), []

    def __call__(self, n: int | None) -> Batch:
        self.given.append(self.source(n))
        return self.given[-1]


def run(method: Method, steps: int, **data: Any) -> Tensor:
    """(x, v, y) after each step, one row each."""
    path = []
    for _ in range(steps):
        method.zero_grad()
        method.backward(**data)
        v = flat(p.grad for p in method.problem.upper_parameters)
        method.step()
        path.append(torch.cat([flat(method.problem.x), v, flat(method.problem.y)]))
    return torch.stack(path)


def second(x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """g_xy and g_yy."""
    blocks = torch.autograd.functional.hessian(lambda x, y: g(x, y, batch), (x, y))
    return blocks[0][1], blocks[1][1]


def gradients(loss: Callable[..., Tensor], x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """By x and by y."""
    x, y = x.requires_grad_(), y.requires_grad_()
    in_x, in_y = torch.autograd.grad(loss(x, y, batch), (x, y))
    x.requires_grad_(False), y.requires_grad_(False)
    return in_x, in_y


def at_least(matrix: Tensor, low: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors @ torch.diag(values.clamp(min=low)) @ vectors.T


def at_most(t: Tensor, bound: float | None) -> Tensor:
    return t if bound is None else t * min(1.0, bound / float(t.norm()))


# --- STABLE ---------------------------------------------------------------------------------------


def stable_loop(
    q: BilevelProblem,
    lower: Iterator[Batch],
    upper: Iterator[Batch],
    steps: int,
    tau: float,
    mu: float,
    C: float | None,
) -> Tensor:
    x, y, path = flat(q.x), flat(q.y), []
    V = H = x_old = y_old = torch.empty(0)
    for t in range(steps):
        if t > 0:
            y = y - torch.linalg.inv(H) @ V.T @ (x - x_old)
        zeta, xi = next(lower), next(upper)
        V_new, H_new = second(x, y, zeta)
        if t > 0:
            V_old, H_old = second(x_old, y_old, zeta)
            V_new = (1 - tau) * (V - V_old) + V_new
            H_new = (1 - tau) * (H - H_old) + H_new
        V, H = at_most(V_new, C), at_least(H_new, mu)
        f_x, f_y = gradients(f, x, y, xi)
        v = f_x - V @ torch.linalg.inv(H) @ f_y
        x_old, y_old = x, y
        x, y = x - LR * v, y - STEP * gradients(g, x, y, next(lower))[1]
        path.append(torch.cat([x, v, y]))
    return torch.stack(path)


def stable(q: BilevelProblem, weight: float = 0.3, mu: float = 0.05, **options: Any) -> STABLE:
    sizes = {"batch_size": 3, "lower_batch_size": 4, "hvp_batch_size": 2}
    solver = GD(lr=STEP, steps=1)
    return STABLE(q, LR, weight=weight, min_curvature=mu, lower_solver=solver, **{**sizes, **options})


@pytest.mark.parametrize(
    ("weight", "mu", "C"), [(0.3, 0.05, None), (0.3, 2.0, 0.5), (1.0, 0.05, None), (1.0, 2.0, 0.5)]
)
def test_stable_is_its_loop(weight: float, mu: float, C: float | None) -> None:
    q, lower, upper = problem(), Recorder(rows(1), 1), Recorder(rows(2), 2)
    start = copy.deepcopy(q)
    method = stable(q, weight, mu, max_jacobian=C)
    path = run(method, 7, lower=lower, upper=upper)
    assert [len(b[2]) for b in lower.given[:4]] == [2, 4, 2, 4] and len(lower.given) == 14
    assert [len(b[2]) for b in upper.given] == [3] * 7
    expected = stable_loop(start, iter(lower.given), iter(upper.given), 7, weight, mu, C)
    torch.testing.assert_close(path, expected, rtol=1e-11, atol=1e-12)
    tracked = method.estimator.memory.tracked
    lowest = torch.linalg.eigvalsh(tracked["hessian"][0])[0]
    assert (abs(lowest - mu) < 1e-12) == (mu == 2.0)
    assert C is None or abs(tracked["jacobian"][0].norm() - C) < 1e-12


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_stable_without_noise_is_implicit_differentiation(weight: float) -> None:
    q, data = problem(), {"lower": rows(1), "upper": rows(2)}
    method, twin = stable(q, weight, 1e-3, reuse_batch=True), problem()
    exact = Implicit(None, Direct()).bind(twin)
    for _ in range(4):
        v = run(method, 1, **data)[0, DX : 2 * DX]
        tracked = method.estimator.memory.tracked
        assign(twin.upper, flat(tracked["x"]))
        assign(twin.lower, flat(tracked["y"]))
        for p in twin.upper_parameters:
            p.grad = None
        exact.backward(**data)
        torch.testing.assert_close(v, flat(p.grad for p in twin.upper_parameters), rtol=1e-11, atol=1e-12)


def test_stable_stays_at_the_answer_of_a_quadratic_lower_problem() -> None:
    """Where y* is affine in x, its step by the derivative is exact: from y*(x_0) the run is gradient descent on Phi."""
    q = quadratic_bilevel()
    assign(q.problem.lower, q.y_star(q.x0))
    method = stable(q.problem, 0.2, 1e-3, reuse_batch=True)
    method.param_groups[0]["lr"] = 0.005
    x = q.x0
    for _ in range(6):
        v = run(method, 1, lower=q.lower_batch, upper=q.upper_batch)[0, 4:8]
        torch.testing.assert_close(flat(method.estimator.memory.tracked["y"]), q.y_star(x), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(v, q.grad_phi(x), rtol=1e-11, atol=1e-11)
        x = x - 0.005 * q.grad_phi(x)


@pytest.mark.parametrize(("weight", "ends"), [(0.5, 2), (1.0, 1)])
def test_stable_costs_what_it_says(weight: float, ends: int) -> None:
    method = stable(problem(), weight)
    data = {"lower": sample(rows(1), 1), "upper": sample(rows(2), 2)}
    run(method, 1, **data)
    first = copy.copy(method.estimator.counts)
    assert (first.hessian_products, first.jacobian_products) == (DY, DY)
    assert (first.upper_gradients, first.lower_gradients) == (1, 2)
    run(method, 1, **data)
    second = method.estimator.counts
    assert (second.hessian_products, second.jacobian_products) == (DY * (1 + ends), DY * (1 + ends))
    assert (second.upper_gradients, second.lower_gradients) == (2, 3 + ends)


# --- RSVRB ----------------------------------------------------------------------------------------


def rsvrb_loop(
    q: BilevelProblem,
    lower: list[Iterator[Batch]],
    upper: list[Iterator[Batch]],
    drawn: list[list[int]],
    weight: float,
    decay: Decay | None,
    mu: float,
    bounds: tuple[float | None, float | None],
) -> Tensor:
    m, x, x_old, path = len(lower), flat(q.x), torch.empty(0), []
    ys, before = [flat(q.y)] * m, [flat(q.y)] * m
    e: list[Any] = [None] * m

    def observe(x: Tensor, y: Tensor, draws: tuple[Batch, ...]) -> list[Tensor]:
        xi, s, j, h = draws
        return [
            *gradients(f, x, y, xi),
            gradients(g, x, y, s)[1],
            second(x, y, j)[0],
            second(x, y, h)[1],
        ]

    for t, chosen in enumerate(drawn):
        s = 1.0 if decay is None else (decay.offset / (decay.offset + t)) ** decay.power
        s_old = 1.0 if decay is None or t == 0 else (decay.offset / (decay.offset + t - 1)) ** decay.power
        b, n, now = min(1.0, weight * s_old**2), len(chosen), list(ys)
        for i in chosen:
            draws = (next(upper[i]), next(lower[i]), next(lower[i]), next(lower[i]))
            new = observe(x, ys[i], draws)
            if t > 0:
                old = observe(x_old, before[i], draws)
                new = [p + (1 - b) * (u - o) + (m / n - 1) * (p - o) for p, u, o in zip(new, e[i], old, strict=True)]
            f_x, f_y, g_y, V, H = new
            e[i] = [at_most(f_x, bounds[0]), at_most(f_y, bounds[0]), g_y, at_most(V, bounds[1]), at_least(H, mu)]
            now[i] = ys[i] - STEP * s * g_y
        v = sum(a - V @ torch.linalg.inv(H) @ c for a, c, _, V, H in e) / m
        x_old, before, ys = x, ys, now
        x = x - LR * s * v
        path.append(torch.cat([x, v, ys[chosen[-1]]]))
    return torch.stack(path)


def rsvrb(q: BilevelProblem, weight: float = 0.4, mu: float = 0.05, **options: Any) -> RSVRB:
    sizes = {"batch_size": 3, "lower_batch_size": 4, "jvp_batch_size": 5, "hvp_batch_size": 2}
    solver = GD(lr=STEP, steps=1)
    return RSVRB(q, LR, weight=weight, min_curvature=mu, **{"lower_solver": solver, **sizes, **options})


@pytest.mark.parametrize("weight", [0.4, 1.0])
@pytest.mark.parametrize("decay", [None, Decay(1 / 3, offset=2)])
@pytest.mark.parametrize(("mu", "bounds"), [(0.05, (None, None)), (2.0, (0.7, 0.5))])
def test_one_task_is_its_loop(weight: float, decay: Decay | None, mu: float, bounds: Any) -> None:
    q, lower, upper = problem(), Recorder(rows(1), 1), Recorder(rows(2), 2)
    start = copy.deepcopy(q)
    method = rsvrb(q, weight, mu, decay=decay, max_gradient=bounds[0], max_jacobian=bounds[1])
    path = run(method, 6, lower=lower, upper=upper)
    assert [len(b[2]) for b in lower.given] == [4, 5, 2] * 6
    expected = rsvrb_loop(start, [iter(lower.given)], [iter(upper.given)], [[0]] * 6, weight, decay, mu, bounds)
    torch.testing.assert_close(path, expected, rtol=1e-11, atol=1e-12)


SCRIPTS = {1: [[0, 1, 2], [1], [1], [0], [2], [1]], 2: [[0, 1, 2], [0, 2], [1, 2], [0, 1], [0, 2]]}


@pytest.mark.parametrize(("n", "weight"), [(1, 0.4), (1, 1.0), (2, 0.4)])
def test_many_tasks_are_their_loop(n: int, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    q, drawn = problem(), SCRIPTS[n]
    script = iter(drawn[1:])
    monkeypatch.setattr(Rsvrb, "_draw_tasks", lambda self, m, draws: next(script))
    lower = [Recorder(rows(10 + i), i) for i in range(3)]
    upper = [Recorder(rows(20 + i), i) for i in range(3)]
    start = copy.deepcopy(q)
    method = rsvrb(q, weight, tasks_per_step=n, decay=None)
    path = run(method, len(drawn), lower=Tasks(lower), upper=Tasks(upper))
    expected = rsvrb_loop(
        start,
        [iter(s.given) for s in lower],
        [iter(s.given) for s in upper],
        drawn,
        weight,
        None,
        0.05,
        (None, None),
    )
    torch.testing.assert_close(path, expected, rtol=1e-10, atol=1e-11)
    last = drawn[-1][-1]
    assert all(torch.equal(s, t) for s, t in zip(method.estimator.y_of(last), q.y, strict=True))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_expected_error_contracts(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all equally likely choices of n tasks, the error of every estimate is (1 - b n / m) times that before."""
    q, m, b, normal = problem(), 3, 0.4, generator(0)
    data = {
        "lower": Tasks([rows(10 + i) for i in range(m)]),
        "upper": Tasks([rows(20 + i) for i in range(m)]),
    }
    method = rsvrb(q, b, 1e-6, tasks_per_step=n, decay=None, reuse_batch=True, lower_solver=GD(0.02, 1))
    run(method, 1, **data)
    estimator = method.estimator
    assert isinstance(estimator, Rsvrb)

    def exact(x: Tensor, y: Tensor, i: int) -> list[Tensor]:
        low, up = rows(10 + i), rows(20 + i)
        f_x, f_y = gradients(f, x, y, up)
        return [f_x, f_y, gradients(g, x, y, low)[1], *second(x, y, low)]

    kept = {i: Task(*estimator.memory.tracked[str(i)]) for i in range(m)}
    x_old, x = flat(estimator.memory.tracked["x"]), flat(q.x)
    past, tracked = {}, dict(estimator.memory.tracked)
    for i, task in kept.items():
        truth = exact(x_old, task.y_before, i)
        errors = [0.1 * normal(*t.shape) for t in truth]
        errors[4] = errors[4] + errors[4].T
        past[i] = errors
        wrong = [t + error for t, error in zip(truth, errors, strict=True)]
        tracked[str(i)] = (*task[:2], *wrong, task.v)
    memory = copy.copy(estimator.memory)
    object.__setattr__(memory, "tracked", tracked)
    choices = [list(map(int, c)) for c in torch.combinations(torch.arange(m), n)]
    mean = {i: [torch.zeros_like(error) for error in past[i]] for i in range(m)}
    for choice in choices:
        monkeypatch.setattr(Rsvrb, "_draw_tasks", lambda self, m, draws, choice=choice: choice)
        draws = q.draws(None, data["lower"], data["upper"], 0, estimator.batch_sizes)
        new = estimator.evaluate(q.x, q.y, memory, draws).tracked
        for i in range(m):
            truth = exact(x, kept[i].y, i)
            for total, e, t in zip(mean[i], new[str(i)][2:7], truth, strict=True):
                total += (e - t) / len(choices)
    for i in range(m):
        for total, error in zip(mean[i], past[i], strict=True):
            torch.testing.assert_close(total, (1 - b * n / m) * error, rtol=1e-9, atol=1e-11)


def test_equal_tasks_all_drawn_are_one_task() -> None:
    data = {"lower": rows(1), "upper": rows(2)}
    one = run(rsvrb(problem(), reuse_batch=True), 5, **data)
    many = rsvrb(problem(), tasks_per_step=3, reuse_batch=True)
    path = run(many, 5, **{name: Tasks([batch] * 3) for name, batch in data.items()})
    torch.testing.assert_close(path, one, rtol=1e-13, atol=1e-13)


def test_a_source_that_all_tasks_share_may_stand_alone() -> None:
    data = {"lower": Tasks([rows(1), rows(3)]), "upper": rows(2)}
    alone = run(rsvrb(problem(), reuse_batch=True), 5, **data)
    torch.testing.assert_close(
        run(rsvrb(problem(), reuse_batch=True), 5, lower=data["lower"], upper=Tasks([rows(2)] * 2)), alone
    )


def test_tasks_are_drawn_evenly_and_by_seed() -> None:
    def drawn(seed: int) -> list[list[int]]:
        estimator, data = rsvrb(problem(), tasks_per_step=2, seed=seed).estimator, Tasks([sample(rows(1), 1)] * 4)
        assert isinstance(estimator, Rsvrb)
        draws = (estimator.problem.draws(None, data, data, 1000 * seed + t, estimator.batch_sizes) for t in range(400))
        return [estimator._draw_tasks(4, d) for d in draws]

    choices = drawn(0)
    assert choices == drawn(0) != drawn(1)
    assert all(len(set(c)) == 2 for c in choices)
    often = torch.tensor(choices).flatten().bincount(minlength=4)
    assert often.min() > 160 and often.max() < 240
    tasks = Tasks([sample(rows(1), 1)] * 4)
    draws = problem().draws(None, tasks, tasks, 0, rsvrb(problem()).estimator.batch_sizes)
    assert len({task.at(0).lower.seed for task in draws.tasks}) == 4


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_rsvrb_costs_what_it_says(weight: float) -> None:
    method = rsvrb(problem(), weight, tasks_per_step=1, decay=None)
    data = {name: Tasks([sample(rows(i), i) for i in range(3)]) for name in ("lower", "upper")}
    run(method, 1, **data)
    first = copy.copy(method.estimator.counts)
    assert (first.hessian_products, first.jacobian_products) == (3 * DY, 3 * DY)
    assert (first.upper_gradients, first.lower_gradients) == (3, 9)
    run(method, 1, **data)
    second = method.estimator.counts
    assert (second.hessian_products - first.hessian_products, second.upper_gradients - first.upper_gradients) == (
        2 * DY,
        2,
    )
    assert second.lower_gradients - first.lower_gradients == 6


# --- both -----------------------------------------------------------------------------------------

MAKE: dict[str, tuple[Callable[..., Any], int]] = {
    "STABLE": (stable, 0),
    "SVRB": (rsvrb, 0),
    "RSVRB": (partial(rsvrb, tasks_per_step=2), 3),
}


def sources(tasks: int, seed: int) -> dict[str, Any]:
    if not tasks:
        return {"lower": sample(rows(1), seed), "upper": sample(rows(2), seed)}
    return {
        "lower": Tasks([sample(rows(10 + i), seed) for i in range(tasks)]),
        "upper": Tasks([sample(rows(20 + i), seed) for i in range(tasks)]),
    }


@pytest.mark.parametrize("name", MAKE)
def test_resumed_equals_uninterrupted(name: str) -> None:
    make, tasks = MAKE[name]
    whole = make(problem())
    run(whole, 4, **sources(tasks, 1))
    buffer = io.BytesIO()
    torch.save([whole.state_dict(), whole.problem.upper.state_dict()], buffer)
    expected = run(whole, 4, **sources(tasks, 2))
    buffer.seek(0)
    state, upper = torch.load(buffer, weights_only=True)
    resumed = make(problem())
    resumed.problem.upper.load_state_dict(upper)
    resumed.load_state_dict(state)
    assert torch.equal(run(resumed, 4, **sources(tasks, 2)), expected)


@pytest.mark.parametrize("name", MAKE)
def test_a_probe_repeats_and_commits_nothing(name: str) -> None:
    make, tasks = MAKE[name]
    method = make(problem())
    method.estimator.keeps_past = True
    data = sources(tasks, 1)
    run(method, 3, **data)
    method.zero_grad()
    loss = method.backward(**data)
    copied = copy.deepcopy(method)
    v = flat(p.grad for p in method.problem.upper_parameters)
    before = str(method.estimator.state_dict()["tracked"])
    for probe in (method.estimator.probe(), copied.estimator.probe()):
        q = probe._estimator.problem
        x = flat(q.x)
        assign(q.upper, x + 0.1)
        assert probe() != loss
        assign(q.upper, x)
        assert probe() == loss
        assert torch.equal(flat(p.grad for p in q.upper_parameters), v)
    assert str(method.estimator.state_dict()["tracked"]) == before


@pytest.mark.parametrize("name", MAKE)
def test_goes_down_under_noise(name: str) -> None:
    make, tasks = MAKE[name]
    method = make(problem(), weight=0.2)
    method.param_groups[0]["lr"] = 0.2
    assign(method.problem.upper, 2 * flat(method.problem.x) + 1)
    pairs = [(rows(10 + i), rows(20 + i)) for i in range(tasks)] if tasks else [(rows(1), rows(2))]

    def phi() -> float:
        total = 0.0
        for low, up in pairs:
            q = problem()
            assign(q.upper, flat(method.problem.x))
            exact = Implicit(GD(lr=0.2, steps=60), Direct()).bind(q)
            total += float(exact.backward(lower=low, upper=up)) / len(pairs)
        return total

    start = phi()
    run(method, 30, **sources(tasks, 1))
    assert phi() < start - 0.1


@pytest.mark.parametrize("name", MAKE)
def test_what_is_not_finite_is_refused_and_changes_nothing(name: str) -> None:
    make, tasks = MAKE[name]
    method = make(problem(), reuse_batch=True)
    clean = [tuple(rows(i)) for i in range(max(tasks, 1))]
    data = {"lower": Tasks(clean) if tasks else clean[0], "upper": rows(2)}
    run(method, 2, **data)
    method.zero_grad()
    state = str(method.estimator.state_dict()["tracked"])
    bad = [tuple(t * float("nan") for t in rows(i)) for i in range(max(tasks, 1))]
    with pytest.raises(FloatingPointError):
        method.backward(lower=Tasks(bad) if tasks else bad[0], upper=rows(2))
    assert str(method.estimator.state_dict()["tracked"]) == state
    assert all(p.grad is None for p in method.problem.upper_parameters)


@pytest.mark.parametrize("make", [stable, rsvrb])
def test_refusals(make: Callable[..., Any]) -> None:
    for bad, match in (
        ({"max_size": 3}, r"4 x 4 entries, more than max_size\^2 with max_size=3"),
        ({"mu": 0.0}, "min_curvature must be positive and finite, got 0.0"),
        ({"weight": 0.0}, r"weight must be in \(0, 1\], got 0.0"),
        ({"max_jacobian": -1.0}, "max_jacobian must be positive and finite, got -1.0"),
        ({"lower_solver": GD(0.1, 2)}, "steps=1, got 2"),
    ):
        with pytest.raises(ValueError, match=match):
            options = {"lower_solver": GD(0.1, 1), "weight": 0.5, "min_curvature": bad.pop("mu", 1.0), **bad}
            (STABLE if make is stable else RSVRB)(problem(), LR, **options)
    make(problem(), max_size=4)
    with pytest.raises(ValueError, match="is for bilevel problems"):
        make(quadratic_minimax().problem)
    with pytest.raises(ValueError, match="this method draws several independent ones"):
        make(problem()).backward(lower=rows(1), upper=rows(2))


def test_refusals_of_tasks() -> None:
    for bad, match in (
        ({"tasks_per_step": 0}, "tasks_per_step must be a positive integer, got 0"),
        ({"max_gradient": 0.0}, "max_gradient must be positive and finite, got 0.0"),
    ):
        with pytest.raises(ValueError, match=match):
            rsvrb(problem(), **bad)
    for solver in (GD(0.1, 1, momentum=0.5), Adam(0.1, 1)):
        with pytest.raises(ValueError, match="RSVRB moves y by plain steps"):
            RSVRB(problem(), LR, weight=0.5, min_curvature=1.0, lower_solver=solver)  # type: ignore[arg-type]
    two, three = Tasks([sample(rows(1), 1)] * 2), Tasks([sample(rows(1), 1)] * 3)
    with pytest.raises(ValueError, match=r"the same number of tasks, got \[2, 3\]"):
        rsvrb(problem()).backward(lower=two, upper=three)
    method = rsvrb(problem(), tasks_per_step=3)
    for few, n in ((two, 2), (two[0], 1)):
        with pytest.raises(ValueError, match=f"tasks_per_step=3 exceeds the number of tasks, {n}"):
            method.backward(lower=few, upper=few)
    with pytest.raises(ValueError, match="number of a task that a backward has met, below 0, got 0"):
        method.estimator.y_of(0)  # type: ignore[attr-defined]
    assert method.estimator.memory.calls == 0
    method = rsvrb(problem())
    run(method, 1, lower=three, upper=three)
    before = method.estimator.memory
    for other, n in ((two, 2), (Tasks([sample(rows(1), 1)] * 4), 4), (three[0], 1)):
        with pytest.raises(ValueError, match=rf"have {n} task\(s\), and those of the calls before 3"):
            method.backward(lower=other, upper=other)
    assert method.estimator.memory is before
    with pytest.raises(ValueError, match="number of a task that a backward has met, below 3, got 3"):
        method.estimator.y_of(3)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="only RSVRB draws among tasks"):
        stable(problem()).backward(lower=two, upper=sample(rows(1), 1))
    with pytest.raises(ValueError, match="Tasks needs a source or a batch per task"):
        Tasks([])


def test_variables_of_a_task_have_the_shapes_of_the_module() -> None:
    method = rsvrb(problem(), reuse_batch=True)
    run(method, 3, lower=Tasks([rows(1), rows(3)]), upper=rows(2))
    assert isinstance(method.estimator, Rsvrb)
    for i in range(2):
        y = method.estimator.y_of(i)
        assert [t.shape for t in y] == [p.shape for p in method.problem.y]
        assert unflat(flat(y), y)[0].equal(y[0])
    with pytest.raises(RuntimeError, match="RSVRB keeps a y for every task"):
        method.refresh()
    one = rsvrb(problem(), reuse_batch=True)
    run(one, 3, lower=rows(1), upper=rows(2))
    expected = flat(one.problem.y) - STEP * gradients(g, flat(one.problem.x), flat(one.problem.y), rows(1))[1] * 4 ** (
        -1 / 3
    )
    one.refresh()
    torch.testing.assert_close(flat(one.problem.y), expected)
    run(one, 1, lower=rows(1), upper=rows(2))
    torch.testing.assert_close(Task(*one.estimator.memory.tracked["0"]).y_before, expected)


def test_a_task_whose_gradient_alone_is_not_finite_is_noticed() -> None:
    a, p, b = rows(1)
    method = rsvrb(problem(), reuse_batch=True)
    with pytest.raises(FloatingPointError, match="gradient of the lower loss is not finite"):
        method.backward(lower=Tasks([(a, p, b / 0.0), rows(3)]), upper=rows(2))
    assert not method.estimator.memory.tracked
