"""PRGDA on samples: loops written by hand, identities, escapes, the data of a certificate, checkpoints, refusals."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import octopus
from tests.methods import noisy
from tests.methods.noisy import Feed
from tests.problems import Split, assign, flat, generator, quadratic_bilevel, quadratic_minimax
from torchbilevel import (
    CG,
    GD,
    PRGDA,
    Danskin,
    Implicit,
    Method,
    MinimaxProblem,
    Neumann,
    Spider,
    Verify,
    optim,
    projections,
    sample,
)
from torchbilevel.tensors import ball, mix_seed

# --- a minimax problem all of whose derivatives are noisy ------------------------------------------------------------

X_SHAPES, Y_SHAPES = ((2,), ()), ((2,), (), (1,))
Project = Callable[[Tensor], Tensor]


def loss(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    """Of the rows of g: nonconvex in x, strongly concave in y."""
    return (batch[1] @ x).cos().mean() + x.square().sum() - noisy.g(x, y, batch)


def minimax(bound: float | None = None) -> MinimaxProblem:
    return MinimaxProblem(
        Split(noisy.X0, X_SHAPES),
        Split(noisy.Y0 / 4, Y_SHAPES),
        loss=lambda upper, lower, batch: loss(upper.flat(), lower.flat(), batch),
        projection=None if bound is None else projections.linf_ball(bound),
    )


def gradients(x: Tensor, y: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """f_x and f_y."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    return torch.autograd.grad(loss(x, y, batch), (x, y))  # type: ignore[return-value]


# --- the paper's algorithms, by hand ---------------------------------------------------------------------------------

LR, ESCAPE_LR, RADIUS, GRAD_TOL, WAIT, MOVEMENT = 0.03, 0.05, 0.05, 0.5, 5, 6e-4
LAMBDA, K, PERIOD, ALPHA, Q = 1.35, 4, 3, 0.3, 5
S1, S2, S3, S4, S5, B = 40, 2, 45, 3, 7, 4


class Algorithm1:
    """How x moves."""

    def __init__(self, x: Tensor, seed: int) -> None:
        self.x, self.seed, self.t, self.escape, self.told = x, seed, 0, False, list[tuple[int, str]]()

    def move(self, v: Tensor) -> None:
        x, t = self.x, self.t
        if not self.escape and v.norm() >= GRAD_TOL:
            self.x = x - LR * v / v.norm()
        elif not self.escape:
            self.escape, self.m, self.esc, self.A = True, t, 0, 0.0
            xi = ball([torch.empty(shape, dtype=x.dtype) for shape in X_SHAPES], RADIUS, mix_seed(self.seed, t, 0))
            self.x = x + flat(xi)
            self.told.append((t, "perturbation"))
        elif self.A + ESCAPE_LR**2 * v @ v > (t - self.m) * MOVEMENT:
            self.x = x - math.sqrt((t - self.m) * MOVEMENT - self.A) / v.norm() * v
            self.escape = False
            self.told.append((t, "escaped"))
        else:
            self.x, self.A, self.esc = x - ESCAPE_LR * v, self.A + ESCAPE_LR**2 * v @ v, self.esc + 1
            if self.esc == WAIT:
                self.escape = False
                self.told.append((t, "escape test passed"))
        self.t += 1


class Algorithm2:
    """The estimate of f_x, and y, for minimax problems."""

    def __init__(self, y: Tensor, feed: Feed, project: Project, selects: str, as_printed: bool) -> None:
        self.y, self.feed, self.project, self.selects, self.as_printed = y, feed, project, selects, as_printed

    def estimate(self, t: int, x: Tensor) -> Tensor:
        refresh, y = t % PERIOD == 0, self.y
        if refresh:
            self.v, self.u = gradients(x, y, self.feed(S1))
        old = (x, y) if refresh and (t == 0 or not self.as_printed) else (self.x, y)
        kept: list[tuple[float, Tensor, Tensor, Tensor]] = []
        for k in range(K):
            if k > 0 or old[0] is not x:
                batch = self.feed(S2)
                new, past = gradients(x, y, batch), gradients(*old, batch)
                self.v, self.u = self.v + new[0] - past[0], self.u + new[1] - past[1]
            ahead = self.project(y + LAMBDA * self.u)
            kept.append((float((y - ahead).norm()) / LAMBDA, y, self.v, self.u))
            old, y = (x, y), ahead
        s = min(range(K), key=lambda k: kept[k][0]) if self.selects == "argmin" else K - 1
        _, self.y, self.v, self.u = kept[s]
        self.x, self.chosen = x, s
        return self.v


class Algorithm3:
    """The estimates of f_x, f_y and g_y, the hypergradient from them, and y."""

    def __init__(self, y: Tensor, lower: Feed, upper: Feed) -> None:
        self.y, self.lower, self.upper = y, lower, upper

    def estimate(self, t: int, x: Tensor) -> Tensor:
        y, old = self.y, (x, self.y)
        if t % PERIOD == 0:
            self.v, self.u = flat(noisy.d_f(x, y, self.upper(S1))), noisy.g_y(x, y, self.lower(S3))
        else:
            old = (self.x, y)
        kept: list[tuple[float, Tensor, Tensor, Tensor]] = []
        for k in range(K):
            if k > 0 or old[0] is not x:
                xi, zeta = self.upper(S2), self.lower(S4)
                self.v = self.v + flat(noisy.d_f(x, y, xi)) - flat(noisy.d_f(*old, xi))
                self.u = self.u + noisy.g_y(x, y, zeta) - noisy.g_y(*old, zeta)
            kept.append((float(self.u.norm()), y, self.v, self.u))
            old, y = (x, y), y - LAMBDA * self.u
        self.chosen = min(range(K), key=lambda k: kept[k][0])
        _, self.y, self.v, self.u = kept[self.chosen]
        self.x = x
        v1, v2 = self.v.split([noisy.DX, noisy.DY])
        r = z = v2
        for _ in range(Q):
            r = r - ALPHA * noisy.second(x, self.y, r, self.lower(B))[1]
            z = z + r
        return v1 - noisy.second(x, self.y, ALPHA * z, self.lower(S5))[0]


OPTIONS: dict[str, Any] = {
    "escape_lr": ESCAPE_LR,
    "radius": RADIUS,
    "grad_tol": GRAD_TOL,
    "escape_steps": WAIT,
    "mean_movement": MOVEMENT,
    "period": PERIOD,
    "lower_solver": GD(LAMBDA, K),
    "batch_size": S2,
    "anchor_size": S1,
}
BILEVEL: dict[str, Any] = {
    "linear_solver": Neumann(Q, ALPHA),
    "lower_batch_size": S4,
    "jvp_batch_size": S5,
    "hvp_batch_size": B,
    "lower_anchor_size": S3,
}


def step(method: Method, **data: Any) -> None:
    method.zero_grad()
    method.backward(**data)
    method.step()


def compare(method: PRGDA, outer: Algorithm1, inner: Any, data: dict[str, Any], steps: int) -> set[int]:
    """Run both side by side, and return which of the K estimates were chosen."""
    chosen = set()
    for t in range(steps):
        step(method, **data)
        v = inner.estimate(t, outer.x)
        outer.move(v)
        chosen.add(inner.chosen)
        torch.testing.assert_close(flat(p.grad for p in method.problem.upper_parameters), v, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(flat(method.problem.x), outer.x, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(flat(method.problem.y), inner.y, rtol=1e-11, atol=1e-12)
        assert method.phase == ("escape" if outer.escape else "descent")
    assert [(e.step, e.kind) for e in method.events] == outer.told
    assert {kind for _, kind in outer.told} == {"perturbation", "escaped", "escape test passed"}
    return chosen


@pytest.mark.parametrize(
    ("bound", "as_printed", "selects"),
    [(None, False, "argmin"), (0.4, False, "argmin"), (0.4, True, "argmin"), (None, True, "last")],
)
def test_algorithms_1_and_2_step_for_step(bound: float | None, as_printed: bool, selects: Any) -> None:
    problem, theirs, mine = minimax(bound), Feed(noisy.LOWER), Feed(noisy.LOWER)
    method = PRGDA(problem, LR, **OPTIONS, selects=selects, as_printed=as_printed, seed=1)
    project: Project = (lambda y: y) if bound is None else (lambda y: y.clamp(-0.4, 0.4))
    inner = Algorithm2(flat(problem.y).clone(), mine, project, selects, as_printed)
    chosen = compare(method, Algorithm1(noisy.X0, 1), inner, {"batch": theirs}, 50)
    assert theirs.asked == mine.asked and (chosen == {K - 1} if selects == "last" else len(chosen) > 1)
    assert bound is None or bool((inner.y.abs() == bound).any())


def test_algorithms_1_and_3_step_for_step() -> None:
    problem, theirs, mine = noisy.problem(), noisy.feeds(), noisy.feeds()
    method = PRGDA(problem, LR, **OPTIONS, **BILEVEL, seed=1)
    inner = Algorithm3(noisy.Y0, **mine)
    assert len(compare(method, Algorithm1(noisy.X0, 1), inner, theirs, 50)) > 1
    for name, feed in theirs.items():
        assert feed.asked == mine[name].asked


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_printed", [False, True])
def test_a_large_sample_counts_the_last_move_of_x_once_or_as_printed_twice(as_printed: bool) -> None:
    """On F = x^3 from x = 1 to x = 1.1: 3 x^2 = 3.63, and 3.63 + (3.63 - 3) = 4.26."""
    x, y = (Split(torch.tensor([value], dtype=torch.float64), ((1,),)) for value in (1.0, 0.0))
    problem = MinimaxProblem(x, y, loss=lambda x, y, batch: (x.p0**3 - y.p0**2 / 2).sum())
    method = PRGDA(problem, LR, **{**OPTIONS, "period": 1, "lower_solver": GD(0.5, 2)}, as_printed=as_printed)
    method.backward()
    assert float(x.p0.grad) == 3.0
    assign(x, torch.tensor([1.1], dtype=torch.float64))
    method.zero_grad()
    method.backward()
    assert float(x.p0.grad) == pytest.approx(4.26 if as_printed else 3.63, rel=1e-12)


@pytest.mark.parametrize("kind", ["minimax", "bilevel"])
def test_a_phase_pulled_back_has_moved_by_its_budget_exactly(kind: str) -> None:
    method, data = noisy_method(kind)
    path = [flat(method.problem.x).clone()]
    for _ in range(40):
        step(method, **data)
        path.append(flat(method.problem.x).clone())
    begun, budgets = 0, []
    for event in method.events:
        if event.kind == "perturbation":
            begun = event.step
        elif event.kind == "escaped":
            moves = [path[t + 1] - path[t] for t in range(begun + 1, event.step + 1)]
            budgets.append((sum(float(move @ move) for move in moves), (event.step - begun) * MOVEMENT))
    assert len(budgets) >= 2
    for moved, budget in budgets:
        assert moved == pytest.approx(budget, rel=1e-10)


@pytest.mark.parametrize("kind", ["minimax", "bilevel"])
def test_without_a_tolerance_it_is_the_recursion_with_steps_of_one_length(kind: str) -> None:
    """As SREDA, but for when a large sample is taken: the same parts with normalised steps, and no phase begins."""
    method, data = noisy_method(kind, grad_tol=0.0)
    problem, feeds = (minimax(), {"batch": Feed(noisy.LOWER)}) if kind == "minimax" else parts()
    estimator = Danskin if kind == "minimax" else Implicit
    options = {} if kind == "minimax" else {"linear_solver": Neumann(Q, ALPHA), "warm_start_adjoint": False}
    sizes = method.estimator.batch_sizes
    inner = estimator(GD(LAMBDA, K), recursion=Spider(PERIOD), batch_sizes=sizes, **options)  # type: ignore[arg-type]
    plain = Method(problem, inner, optim.NormalizedGD(problem.upper_parameters, LR))
    for _ in range(10):
        before = flat(problem.x).clone()
        step(method, **data)
        step(plain, **feeds)
        torch.testing.assert_close(flat(method.problem.x), flat(problem.x), rtol=1e-12, atol=1e-12)
        assert float((flat(problem.x) - before).norm()) == pytest.approx(LR, rel=1e-12)
    assert method.events == [] and method.phase == "descent" and method.result().claim == "running"


def parts() -> tuple[Any, dict[str, Any]]:
    return noisy.problem(), noisy.feeds()


def noisy_method(kind: str, **options: Any) -> tuple[PRGDA, dict[str, Any]]:
    options = {**OPTIONS, "seed": 1, **options}
    if kind == "minimax":
        return PRGDA(minimax(), LR, **options), {"batch": Feed(noisy.LOWER)}
    problem, feeds = parts()
    return PRGDA(problem, LR, **{**BILEVEL, **options}), feeds


def test_cost_of_a_step() -> None:
    for kind in ("minimax", "bilevel"):
        method, data = noisy_method(kind)
        for anchor in (True, False, False, True):
            before = method.estimator.counts.state_dict()
            step(method, **data)
            spent = {name: n - before[name] for name, n in method.estimator.counts.state_dict().items()}
            gradients = 1 + 2 * (K - 1) if anchor else 2 * K
            assert spent["upper_gradients"] == gradients
            assert spent["lower_gradients"] == (gradients if kind == "bilevel" else 0)
            products = (spent["hessian_products"], spent["jacobian_products"])
            assert products == ((Q, 1) if kind == "bilevel" else (0, 0))


def test_any_lower_solver_may_bring_y_close_before_the_first_step() -> None:
    q = quadratic_minimax()
    options = {**OPTIONS, "batch_size": None, "anchor_size": None}
    method = PRGDA(q.problem, LR, **options, initial_solver=GD(0.9, 400), reuse_batch=True)
    method.backward(q.batch)
    torch.testing.assert_close(flat(q.problem.y), q.y_star(q.x0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flat(p.grad for p in q.problem.upper_parameters), q.grad_phi(q.x0), rtol=1e-9, atol=1e-9)


# --- escapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["minimax", "bilevel"])
def test_leaves_a_saddle_of_the_octopus_and_passes_at_its_minimum(kind: str, seed: int) -> None:
    """From exactly the last saddle; the bilevel claim is certified, with the tolerances of the method."""
    problem = getattr(octopus, kind)(2, 1.0, kappa=2.0, start=octopus.saddle(1, 2))
    assign(problem.lower, octopus.saddle(1, 2))
    settings: dict[str, Any] = {"radius": 0.02, "grad_tol": 0.5, "curvature_tol": 1.0, "period": 4, "stop": True}
    if kind == "bilevel":
        settings |= {"linear_solver": Neumann(8, 1.0), "verify": Verify(step_length=0.5)}
    method = PRGDA(problem, 0.4, escape_lr=0.4, **settings, lower_solver=GD(1.0, 5), seed=seed)
    seen = {}
    while not method.done and method.steps < 300:
        method.zero_grad()
        method.backward()
        seen[method.steps] = method.problem.x[0].clone(), method.problem.y[0].clone()
        method.step()
    told = ["perturbation", "escaped", "perturbation", "escape test passed"]
    claim = "verified" if kind == "bilevel" else "escape test passed"
    assert [e.kind for e in method.events] == (told if kind == "minimax" else [*told, "verified"])
    result = method.result()
    assert method.done and result.claim == claim and result.step == method.events[2].step
    assert torch.equal(result.x[0], seen[result.step][0]) and torch.equal(result.y[0], seen[result.step][1])
    torch.testing.assert_close(result.x[0].abs(), octopus.minimum(2), rtol=0, atol=0.3)
    with pytest.raises(RuntimeError, match="the run has ended"):
        method.backward()
    if kind == "bilevel":
        certificate = method.certificate
        assert certificate is not None and (certificate.grad_tol, certificate.curvature_tol) == (0.5, 1.0)
        assert certificate.lambda_min == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_leaves_a_saddle_on_mini_batches(seed: int) -> None:
    """Phi = |A x|^2 / 2 + (x_2^2 - x_1^2) / 2 + x_1^4 / 4, A = diag(1, 1) / 2 seen through noise, as is the slope 0."""
    normal = generator(seed)
    rows = tuple(t - t.mean(0) for t in (normal(400, 2), 0.02 * normal(400, 2)))
    rows = (rows[0] + 0.5, rows[1])

    def loss(upper: Any, lower: Any, batch: Any) -> Tensor:
        x, y = upper.p0, lower.p0
        own = (x[1] ** 2 - x[0] ** 2) / 2 + x[0] ** 4 / 4 + batch[1].mean(0) @ x
        return own + y @ (batch[0].mean(0) * x) - y @ y / 2

    zero = torch.zeros(2, dtype=torch.float64)
    problem = MinimaxProblem(Split(zero, ((2,),)), Split(zero, ((2,),)), loss=loss)
    options = {"escape_lr": 0.3, "radius": 0.03, "grad_tol": 0.1, "curvature_tol": 0.5, "period": 5}
    method = PRGDA(problem, 0.03, **options, lower_solver=GD(0.6, 4), batch_size=20, anchor_size=300, seed=seed)
    source = sample(rows, seed=seed)
    for _ in range(120):
        step(method, batch=source)
    x = flat(problem.x)
    assert [e.kind for e in method.events[:2]] == ["perturbation", "escaped"]
    assert abs(float(x[0])) == pytest.approx(math.sqrt(0.75), abs=0.1) and abs(float(x[1])) < 0.1


@pytest.mark.parametrize("given", [False, True])
def test_verify_is_about_the_data_given_else_about_all_data_of_the_sources(given: bool) -> None:
    """A test of one step sees nothing at a saddle; the certificate does, in closed form, and leads off it."""
    q = quadratic_minimax()
    problem, zero = q.problem, torch.zeros(4, dtype=torch.float64)
    assign(problem.upper, zero)
    assign(problem.lower, q.y_star(zero))
    # On other data the gradient at 0 is C Q^-1 times the change of b, and that point then is no stationary one.
    other = (q.batch[0] + torch.linspace(1, 2, 6, dtype=torch.float64),)
    slope = q.C @ torch.linalg.solve(q.Q, other[0].mean(0))
    verify = Verify(step_length=0.25, batch=other) if given else Verify(step_length=0.25)
    options = {**OPTIONS, "radius": 1e-6, "escape_steps": 1, "grad_tol": 0.3, "lower_solver": GD(1.0, 30)}
    options |= {"batch_size": 7, "curvature_tol": 0.5, "verify": verify}
    method, source = PRGDA(problem, LR, **options), sample(q.batch, seed=0)
    while not any(event.kind in ("saddle left", "claim withdrawn") for event in method.events) and method.steps < 60:
        step(method, batch=source)
    certificate = method.certificate
    assert certificate is not None and certificate.curvature_tol == 0.5
    assert certificate.lambda_min == pytest.approx(-1.0, abs=1e-3)
    assert certificate.grad_norm == pytest.approx(float(slope.norm()) if given else 0.0, abs=2e-2)
    if given:
        assert method.events[-1].kind == "claim withdrawn"
    else:
        assert method.events[-1].kind == "saddle left"
        assert abs(float(q.V[:, 0] @ flat(problem.x))) == pytest.approx(0.25, abs=1e-2)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def sources(kind: str) -> dict[str, Any]:
    if kind == "minimax":
        return {"batch": sample(noisy.LOWER, seed=5)}
    return {"lower": sample(noisy.LOWER, seed=5), "upper": sample(noisy.UPPER, seed=6)}


@pytest.mark.parametrize("kind", ["minimax", "bilevel"])
def test_resumed_within_an_escape_phase_it_equals_the_uninterrupted_run(kind: str) -> None:
    method, data = noisy_method(kind)[0], sources(kind)
    while method.phase == "descent" or method.steps < 8 or not method.rule.escaping:  # type: ignore[attr-defined]
        step(method, **data)
    saved = io.BytesIO()
    streams = {name: source.state_dict() for name, source in data.items()}
    torch.save((method.state_dict(), method.problem.upper.state_dict(), streams), saved)
    for _ in range(12):
        step(method, **data)
    saved.seek(0)
    state, upper, streams = torch.load(saved, weights_only=True)
    again, others = noisy_method(kind, seed=9)[0], sources(kind)
    again.problem.upper.load_state_dict(upper)
    again.load_state_dict(state)
    for name, source in others.items():
        source.load_state_dict(streams[name])
    assert again.phase == "escape"
    for _ in range(12):
        step(again, **others)
    for mine, theirs in zip(again.problem.x + again.problem.y, method.problem.x + method.problem.y, strict=True):
        assert torch.equal(mine, theirs)
    assert again.events == method.events and again.estimator.counts == method.estimator.counts
    assert again.result().claim == method.result().claim and again.result().step == method.result().step


# --- arguments -------------------------------------------------------------------------------------------------------


def test_mean_movement_is_the_square_of_the_larger_step_at_the_tolerance() -> None:
    settings = {**OPTIONS, "mean_movement": None}
    for lr, want in ((0.03, 0.03**2), (0.02, 0.025**2)):
        assert PRGDA(minimax(), lr, **settings).rule.mean_movement == pytest.approx(want)  # type: ignore[attr-defined]


def test_escape_steps_follow_from_the_curvature() -> None:
    settings = {**OPTIONS, "escape_steps": None}
    steps = [PRGDA(minimax(), LR, **settings, curvature_tol=tol).rule.escape_steps for tol in (0.2, 0.1)]  # type: ignore
    assert 1.8 * steps[0] < steps[1] < 2.5 * steps[0]
    assert PRGDA(minimax(), LR, **OPTIONS, curvature_tol=0.2).rule.escape_steps == WAIT  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_solver": Neumann(2, 0.1)}, "linear_solver is for bilevel problems, .* leave out Neumann"),
        ({"lower_batch_size": 3}, "lower_batch_size is for bilevel problems, .* leave out 3"),
        ({"jvp_batch_size": 3}, "jvp_batch_size is for bilevel problems"),
        ({"hvp_batch_size": 3}, "hvp_batch_size is for bilevel problems"),
        ({"lower_anchor_size": 3}, "lower_anchor_size is for bilevel problems"),
        ({"escape_steps": None}, "give curvature_tol, the curvature to escape from, or escape_steps, got neither"),
        ({"escape_steps": None, "curvature_tol": 0.0}, "curvature_tol must be positive and finite, got 0.0"),
        ({"escape_steps": None, "curvature_tol": 0.1, "radius": 0.0}, "radius must be positive .* escape_steps, got 0"),
        ({"period": 0}, "period must be a positive integer, got 0"),
        ({"selects": "best"}, "selects must be one of 'argmin', 'last', got 'best'"),
        ({"lower_solver": GD(0.1, 1)}, "give the lower solver steps >= 2, got 1"),
        ({"batch_size": 0}, r"batch_size \(upper\) must be a positive integer or None, got 0"),
        ({"grad_tol": -1.0}, "grad_tol must be non-negative, got -1"),
        ({"mean_movement": 0.0}, "mean_movement must be positive, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRGDA(minimax(), LR, **{**OPTIONS, **options})


def test_problems_and_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match="problem must be a BilevelProblem or MinimaxProblem, got Linear"):
        PRGDA(torch.nn.Linear(1, 1), LR, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="linear_solver must be given for a BilevelProblem, such as Neumann"):
        PRGDA(quadratic_bilevel().problem, LR, **OPTIONS)
    with pytest.raises(TypeError, match="verify must be Verify"):
        PRGDA(minimax(), LR, **OPTIONS, verify=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch= got one batch .* or set reuse_batch=True"):
        PRGDA(minimax(), LR, **OPTIONS).backward(noisy.LOWER)
    q = quadratic_bilevel()
    PRGDA(q.problem, LR, **OPTIONS, linear_solver=CG(6), reuse_batch=True).backward(
        lower=q.lower_batch, upper=q.upper_batch
    )
