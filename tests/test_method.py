"""A method is one torch optimizer: its rule's groups and state, its estimator's memory, one checkpoint, one copy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from benchmarks import octopus
from examples.lightning_stand_in import LightningOptimizer
from tests.problems import assign, flat, quadratic_bilevel, quadratic_minimax, ridge_regression
from torchbilevel import (
    CG,
    GD,
    AIDBiO,
    Batches,
    BilevelProblem,
    Danskin,
    GDmax,
    Implicit,
    ITDBiO,
    Method,
    PerturbedAID,
    PerturbedGDmax,
    Unrolled,
    optim,
    projections,
    sample,
    stream,
)
from torchbilevel.problem import Problem

Data = dict[str, Any]
Case = tuple[Method, Data]

# A tolerance that every gradient meets, so that displacements come at steps 0, 5, 10, ... whatever the problem.
EAGER: dict[str, Any] = {"radius": 0.1, "grad_tol": 1e3, "escape_steps": 4}
TESTED: dict[str, Any] = {**EAGER, "value_test": True, "value_tol": 1e-3}
# A drop that no window reaches, so that the tests at steps 4, 9, ... are passed.
PASSED: dict[str, Any] = {**TESTED, "value_tol": 1e3}


def bilevel() -> tuple[Problem, Data]:
    q = quadratic_bilevel(curved=True)
    return q.problem, {"lower": q.lower_batch, "upper": q.upper_batch}


def minimax() -> tuple[Problem, Data]:
    q = quadratic_minimax()
    return q.problem, {"batch": q.batch}


def solver(**options: Any) -> GD:
    return GD(lr=0.4, steps=3, momentum=0.5, **options)


def implicit(**options: Any) -> Implicit:
    return Implicit(solver(), CG(max_iter=2), **options)


FIVE: dict[str, Callable[..., Case]] = {
    "AIDBiO": lambda **o: case(AIDBiO, bilevel, 0.01, lower_solver=solver(), linear_solver=CG(max_iter=2), **o),
    "ITDBiO": lambda **o: case(ITDBiO, bilevel, 0.01, lower_solver=solver(), **o),
    "GDmax": lambda **o: case(GDmax, minimax, 0.05, lower_solver=solver(), **o),
    "PerturbedAID": lambda **o: case(
        PerturbedAID, bilevel, 0.01, lower_solver=solver(), linear_solver=CG(max_iter=2), **EAGER, **o
    ),
    "PerturbedGDmax": lambda **o: case(PerturbedGDmax, minimax, 0.05, lower_solver=solver(), **EAGER, **o),
}
MORE: dict[str, Callable[..., Case]] = {
    **FIVE,
    "value test": lambda **o: case(PerturbedGDmax, minimax, 0.05, lower_solver=solver(tol=1e-4), **PASSED, **o),
    "Perturbed(Adam)": lambda: pair(bilevel, implicit(), lambda p: optim.Perturbed(torch.optim.Adam(p, 0.1), **EAGER)),
    "LBFGS": lambda: pair(minimax, Danskin(solver()), lambda p: torch.optim.LBFGS(p, 0.3, max_iter=3, history_size=4)),
}
every_method = pytest.mark.parametrize("make", FIVE.values(), ids=FIVE.keys())
every_case = pytest.mark.parametrize("make", MORE.values(), ids=MORE.keys())


def case(cls: type[Method], problem: Callable[[], tuple[Problem, Data]], lr: float, **options: Any) -> Case:
    made, data = problem()
    return cls(made, lr, **options), data  # type: ignore[call-arg, arg-type]


def pair(problem: Callable[[], tuple[Problem, Data]], estimator: Any, rule: Callable[[Iterable[Any]], Any]) -> Case:
    made, data = problem()
    return Method(made, estimator, rule(made.upper_parameters)), data


def advance(method: Method, data: Data, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        method.zero_grad()
        losses.append(method.backward(**data).item())
        method.step()
    return losses


def plain(tree: Any) -> Any:
    """Nested containers with tensors as lists, so that == compares everything."""
    if isinstance(tree, Tensor):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


def standing(method: Method) -> Any:
    """Everything that decides how a run goes on; not the oracle counts."""
    state = plain(method.state_dict())
    del state["method"]["estimator"]["counts"]
    gradients = [p.grad for p in method.problem.upper_parameters]
    return state, plain(method.problem.x), plain(method.problem.y), plain(gradients), method.events


def hypergradient(method: Method) -> Tensor:
    return flat(p.grad for p in method.problem.upper_parameters if p.grad is not None)


# --- one torch optimizer: the estimator's gradient, the rule's step --------------------------------------------------

RULES: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.05, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}
ESTIMATORS: dict[str, Callable[[], tuple[Callable[[], tuple[Problem, Data]], Any]]] = {
    "Implicit": lambda: (bilevel, implicit()),
    "Unrolled": lambda: (bilevel, Unrolled(solver())),
    "Danskin": lambda: (minimax, Danskin(solver())),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("parts", ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_is_its_rule_on_the_estimators_gradient_bitwise(parts: Callable[[], Any], rule: Callable[..., Any]) -> None:
    method, data = pair(*parts(), rule)
    make, estimator = parts()
    problem, _ = make()
    estimator.bind(problem)
    optimizer = rule(problem.upper_parameters)
    for _ in range(10):
        optimizer.zero_grad()
        loss = estimator.backward(**data)
        optimizer.step()
        assert advance(method, data, 1) == [loss.item()]
        assert plain(method.problem.x) == plain(problem.x) and plain(method.problem.y) == plain(problem.y)
    assert method.state is method.rule.state and method.defaults is method.rule.defaults
    assert method.steps == 10 and method.events == [] and method.phase == "descent" and not method.done


def test_lbfgs_minimises_through_the_probe() -> None:
    q = quadratic_minimax()
    problem = q.problem
    assign(problem.upper, q.minimum + 0.3)
    rule = torch.optim.LBFGS(problem.upper_parameters, tolerance_change=1e-16, line_search_fn="strong_wolfe")
    method = Method(problem, Danskin(GD(lr=1.0, steps=100, tol=1e-12)), rule)
    advance(method, {"batch": q.batch}, 1)
    assert q.grad_phi(flat(problem.x)).norm() < 1e-6


def test_lbfgs_takes_exactly_one_backward() -> None:
    method, data = MORE["LBFGS"]()
    with pytest.raises(RuntimeError, match=r"LBFGS .* exactly one backward .* got 0"):
        method.step()
    method.backward(**data)
    method.backward(**data)
    before = standing(method)
    with pytest.raises(RuntimeError, match=r"got 2: .* Batches"):
        method.step()
    assert standing(method) == before


def test_lbfgs_that_meets_a_non_finite_value_leaves_x_and_goes_on() -> None:
    upper, lower = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    problem = BilevelProblem(
        upper,
        lower,
        upper_loss=lambda upper, lower, batch: 10 * lower.weight.sum() - lower.weight.log().sum(),
        lower_loss=lambda upper, lower, batch: (lower.weight - upper.weight).square().sum(),
    )
    nn.init.constant_(upper.weight, 1.0)
    nn.init.constant_(lower.weight, 1.0)
    rule = torch.optim.LBFGS(upper.parameters(), lr=2.0, max_iter=5)
    method = Method(problem, Implicit(GD(lr=0.5, steps=1), CG(max_iter=1)), rule)
    method.backward()
    before = plain(method.problem.x), plain(method.problem.y), hypergradient(method).tolist()
    with pytest.raises(FloatingPointError):  # the first trial step of length 2 ends where the logarithm is not real
        method.step()
    assert (plain(method.problem.x), plain(method.problem.y), hypergradient(method).tolist()) == before
    method.param_groups[0]["lr"] = 0.1
    advance(method, {}, 20)
    assert upper.weight.item() == pytest.approx(0.1, rel=1e-3)


def test_a_probing_rule_that_fails_leaves_x_and_the_gradient() -> None:
    class Failing(torch.optim.SGD):
        needs_probe = True

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(0.1)
            assert closure().item() != loss.item()
            raise FloatingPointError("after a trial point")

    method, data = pair(bilevel, implicit(), lambda p: Failing(p, 0.1))
    loss = method.backward(**data)
    before = standing(method)
    with pytest.raises(FloatingPointError, match="after a trial point"):
        method.step()
    assert standing(method) == before


def test_adam_with_displacements_leaves_the_saddle_where_adam_stays() -> None:
    values = []
    for radius in (0.0, 0.05):
        problem = octopus.minimax(d=2, L=1.0, start=octopus.saddle(0, 2))
        rule = optim.Perturbed(torch.optim.Adam(problem.upper_parameters, 0.3), radius=radius, grad_tol=1e-3)
        advance(Method(problem, Danskin(GD(lr=1.0, steps=5)), rule), {}, 60)
        values.append(octopus.octopus(flat(problem.x), L=1.0).item())
    assert values[0] == 0.0
    assert values[1] == pytest.approx(-2 * octopus.drop(1.0, 1.0), rel=0.05)  # past the next saddle, at the minimum


# --- groups and schedules --------------------------------------------------------------------------------------------


def test_each_group_has_its_lr_and_groups_can_be_added() -> None:
    problem, data = bilevel()
    first, second = problem.upper_parameters
    method = Method(problem, implicit(), torch.optim.SGD([first], lr=0.1))
    start = [p.detach().clone() for p in problem.upper_parameters]
    method.backward(**data)
    v, w = (p.grad for p in problem.upper_parameters)
    assert v is not None and w is not None
    method.step()
    assert torch.equal(first, start[0].add(v, alpha=-0.1)) and torch.equal(second, start[1])
    method.add_param_group({"params": (p for p in [second]), "lr": 0.01})
    assert [group["lr"] for group in method.param_groups] == [0.1, 0.01]
    method.step()
    assert torch.equal(second, start[1].add(w, alpha=-0.01))


@pytest.mark.parametrize("foreign", ["lower", "frozen", "stray"])
def test_a_foreign_parameter_is_refused(foreign: str) -> None:
    problem, _ = bilevel()
    other = {
        "lower": problem.lower_parameters[0],
        "frozen": nn.Parameter(torch.zeros(5)).requires_grad_(False),
        "stray": nn.Parameter(torch.zeros(5)),
    }[foreign]
    message = rf"trainable parameters of problem\.upper.* shape \({other.shape[0]}"
    with pytest.raises(ValueError, match=message):
        Method(problem, implicit(), torch.optim.SGD([*problem.upper_parameters, other], lr=0.1))
    first, second = problem.upper_parameters
    method = Method(problem, implicit(), torch.optim.SGD([first], lr=0.1))
    for params in ([second, other], other, [("second", second), ("other", other)]):
        with pytest.raises(ValueError, match=message):
            method.add_param_group({"params": params})
    assert [group["params"] for group in method.param_groups] == [[first]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda p: (p.upper, implicit(), torch.optim.SGD(p.upper_parameters)), TypeError, "problem must be .*Split"),
        (lambda p: (p, GD(0.1, 1), torch.optim.SGD(p.upper_parameters)), TypeError, "estimator must be .*GD"),
        (lambda p: (p, implicit(), [0.1]), TypeError, "rule must be a torch optimizer .* got list"),
        (lambda p: (p, implicit(), AIDBiO(p, 0.1, lower_solver=None)), TypeError, "rule must be .* got AIDBiO"),
        (lambda p: (p, Danskin(None), torch.optim.SGD(p.upper_parameters)), ValueError, "use Implicit or Unrolled"),
        (
            lambda p: (p, implicit().bind(bilevel()[0]), torch.optim.SGD(p.upper_parameters)),
            ValueError,
            "another problem already; make a new",
        ),
        (
            lambda p: (p, implicit(), optim.PerturbedGD(p.upper_parameters, 0.1, **TESTED)),
            ValueError,
            r"lower solver a tol below value_tol=0\.001, .* got tol=None",
        ),
        (
            lambda p: (p, Implicit(solver(tol=1e-3)), optim.PerturbedGD(p.upper_parameters, 0.1, **TESTED)),
            ValueError,
            r"below value_tol=0\.001, .* got tol=0\.001",
        ),
    ],
)
def test_parts_that_cannot_work_together_are_refused(
    arguments: Callable[[Problem], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Method(*arguments(bilevel()[0]))


# --- several backwards before a step ---------------------------------------------------------------------------------


@every_method
def test_gradients_of_several_backwards_add_up(make: Callable[[], Case]) -> None:
    (method, data), (twin, _) = make(), make()
    separate = []
    for _ in range(3):
        method.backward(**data)
        twin.zero_grad()
        twin.backward(**data)
        separate.append(hypergradient(twin))
    assert torch.equal(hypergradient(method), separate[0] + separate[1] + separate[2])
    assert plain(method.problem.y) == plain(twin.problem.y)


def tasks(data: Data) -> list[Data]:
    """Three data sets of two data points each."""
    return [{name: tuple(t[i : i + 2] for t in batch) for name, batch in data.items()} for i in (0, 2, 4)]


@every_method
def test_several_tasks_before_a_step_need_a_cold_start(make: Callable[..., Case]) -> None:
    warm, data = make()
    first, second, third = tasks(data)
    warm.backward(**first)
    before = standing(warm)
    with pytest.raises(RuntimeError, match=r"another (lower )?batch, .* warm_start=False, .*Batches"):
        warm.backward(**second)
    assert standing(warm) == before
    warm.backward(**first)
    warm.step()
    warm.backward(**second)
    warm.zero_grad()
    warm.backward(**third)

    cold = make(warm_start=False)[0]
    separate = []
    for task in (first, second, third):
        cold.backward(**task)
        alone = make(warm_start=False)[0]
        alone.backward(**task)
        separate.append(hypergradient(alone))
    assert torch.equal(hypergradient(cold), separate[0] + separate[1] + separate[2])


def test_an_object_of_its_class_may_stand_before_it() -> None:
    """As Lightning's does, which looks up what it lacks behind it and keeps for itself what is assigned to it."""

    def end(wrapped: bool) -> Tensor:
        problem, data = bilevel()
        method = PerturbedAID(problem, lr=0.1, lower_solver=solver(tol=1e-6), **TESTED)
        front = LightningOptimizer(method) if wrapped else method
        for _ in range(12):
            front.zero_grad()
            front.backward(**data)
            front.step()
        assert method.steps == 12 and any(event.kind == "perturbation" for event in method.events)
        with pytest.raises(RuntimeError, match="backward was called again before step"):
            front.backward(**data)
            front.backward(lower=torch.zeros(1), upper=data["upper"])
        return flat(problem.x)

    assert torch.equal(end(True), end(False))


def test_micro_batches_of_one_upper_loss_go_with_a_warm_start() -> None:
    (method, data), (twin, _) = FIVE["AIDBiO"](), FIVE["AIDBiO"]()
    separate = []
    for task in tasks(data):
        method.backward(lower=data["lower"], upper=task["upper"])
        twin.zero_grad()
        twin.backward(lower=data["lower"], upper=task["upper"])
        separate.append(hypergradient(twin))
    assert torch.equal(hypergradient(method), separate[0] + separate[1] + separate[2])


def test_one_batch_is_known_by_its_tensors() -> None:
    """The tuple or dict around them may be made anew for each call."""
    q, data = quadratic_bilevel(), bilevel()[1]
    rows, other = data["lower"][0], data["lower"][0].clone()
    problem = BilevelProblem(
        *q.modules(),
        upper_loss=q.upper_loss,
        lower_loss=lambda upper, lower, batch: q.lower_loss(upper, lower, batch["rows"]),
    )
    method = AIDBiO(problem, 0.01, lower_solver=solver())
    for batch in ({"rows": (rows, 1)}, {"rows": [rows, 1]}):
        method.backward(lower=batch, upper=data["upper"])
    for batch in ({"rows": (other, 1)}, {"rows": (rows,)}, {"rows": (rows, 1), "more": rows}, rows):
        with pytest.raises(RuntimeError, match="another lower batch"):
            method.backward(lower=batch, upper=data["upper"])


def test_one_source_is_not_one_batch() -> None:
    method, data = FIVE["AIDBiO"]()
    source = sample(data["lower"], seed=0)
    method.backward(lower=source, upper=data["upper"])
    with pytest.raises(RuntimeError, match="another lower batch"):
        method.backward(lower=source, upper=data["upper"])
    method.step()
    parts = Batches([task["lower"] for task in tasks(data)])
    for _ in range(2):
        method.backward(lower=parts, upper=data["upper"])


@every_method
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops_the_backwards_since_the_last_step(make: Callable[[], Case], set_to_none: bool) -> None:
    (method, data), (twin, _) = make(), make()
    method.backward(**data)
    method.zero_grad(set_to_none)
    gradients = [p.grad for p in method.problem.upper_parameters]
    assert all(g is None if set_to_none else g is not None and not g.any() for g in gradients)
    assert all(p.grad is None for p in method.problem.lower_parameters)
    method.backward(**data)
    twin.backward(**data)
    twin.zero_grad()
    twin.backward(**data)
    assert torch.equal(hypergradient(method), hypergradient(twin))


def test_without_zero_grad_gradients_go_on_adding_up_as_in_torch() -> None:
    (method, data), (twin, _) = FIVE["AIDBiO"](), FIVE["AIDBiO"]()
    method.backward(**data)
    method.step()
    advance(twin, data, 1)
    first = hypergradient(twin)
    twin.zero_grad()
    twin.backward(**data)
    second = hypergradient(twin)
    method.backward(**data)
    assert torch.equal(hypergradient(method), first + second)


@pytest.mark.parametrize(
    ("cls", "problem", "closed_form"),
    [(AIDBiO, bilevel, quadratic_bilevel(curved=True)), (GDmax, minimax, quadratic_minimax())],
)
def test_refresh_brings_y_up_to_date(cls: type[Method], problem: Any, closed_form: Any) -> None:
    method, data = case(cls, problem, 0.05, lower_solver=GD(lr=0.5, steps=3))
    with pytest.raises(RuntimeError, match="call backward first"):
        method.refresh()
    advance(method, data, 3)
    x, before, gradient = plain(method.problem.x), flat(method.problem.y), hypergradient(method)
    star = closed_form.y_star(flat(method.problem.x))
    method.refresh()
    assert plain(method.problem.x) == x and torch.equal(hypergradient(method), gradient)
    after = flat(method.result().y)
    assert (after - star).norm() < 0.9 * (before - star).norm()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def through_a_file(tree: Any) -> Any:
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_case
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(make: Callable[[], Case]) -> None:
    method, data = make()
    advance(method, data, 7)
    assert method.phase == ("escape" if isinstance(method.rule, optim.Rule) else "descent")
    saved = through_a_file({"method": method.state_dict(), "x": method.problem.upper.state_dict()})
    resumed = make()[0]
    advance(resumed, data, 2)  # whatever it was before, it is now the run that was saved
    resumed.problem.upper.load_state_dict(saved["x"])
    resumed.load_state_dict(saved["method"])
    resumed.zero_grad()
    method.zero_grad()
    assert standing(resumed) == standing(method) and resumed.steps == method.steps == 7
    assert vars(resumed.estimator.counts) == vars(method.estimator.counts)
    for _ in range(7):
        a, b = resumed.result(), method.result()
        assert (plain(a.x), plain(a.y), a.claim, a.step) == (plain(b.x), plain(b.y), b.claim, b.step)
        assert advance(resumed, data, 1) == advance(method, data, 1)
    assert standing(resumed) == standing(method)


@every_method
def test_a_cold_start_resumes_too(make: Callable[..., Case]) -> None:
    method, data = make(warm_start=False)
    advance(method, data, 3)
    resumed = make(warm_start=False)[0]
    resumed.problem.upper.load_state_dict(method.problem.upper.state_dict())
    nn.init.zeros_(resumed.problem.lower_parameters[0])  # not where the saved run resets y to
    resumed.load_state_dict(method.state_dict())
    assert advance(resumed, data, 3) == advance(method, data, 3)


@every_method
def test_a_state_dict_is_not_changed_by_the_run_that_goes_on(make: Callable[[], Case]) -> None:
    method, data = make()
    advance(method, data, 7)
    saved = method.state_dict()
    before = plain(saved)
    advance(method, data, 7)
    assert plain(saved) == before


def two_groups(p: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [q]} for q in p], lr=0.1)


FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "plain optimizer": (
        lambda: torch.optim.SGD(bilevel()[0].upper_parameters, lr=0.1).state_dict(),
        r"entry 'method', got \['param_groups', 'state'\].* torch\.distributed\.checkpoint",
    ),
    "other estimator": (lambda: FIVE["ITDBiO"]()[0].state_dict(), "with Implicit, GD, SGD .* one with Unrolled"),
    "other rule": (lambda: FIVE["PerturbedAID"]()[0].state_dict(), "with Implicit, GD, SGD .* PerturbedGD"),
    "other plain rule": (lambda: pair(bilevel, implicit(), RULES["Adam"])[0].state_dict(), "Implicit, GD, Adam"),
    "other lower solver": (
        lambda: pair(bilevel, Implicit(None), RULES["SGD"])[0].state_dict(),
        "Implicit, NoneType, SGD",
    ),
    "other shapes of y": (
        lambda: case(AIDBiO, lambda: (ridge_regression().problem, {}), 0.1, lower_solver=solver())[0].state_dict(),
        r"shapes \[\(2, 2\), .* got .* shapes \[\(4,\)",
    ),
    "other groups": (lambda: pair(bilevel, implicit(), two_groups)[0].state_dict(), "parameter group"),
}


@pytest.mark.parametrize(("foreign", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_state_dict_is_refused_before_anything_changed(foreign: Callable[[], Any], message: str) -> None:
    method, data = FIVE["AIDBiO"]()
    advance(method, data, 3)
    before = standing(method)
    with pytest.raises(ValueError, match=message):
        method.load_state_dict(foreign())
    assert standing(method) == before
    method.refresh()  # the samples of the last backward are still there


# --- copies ----------------------------------------------------------------------------------------------------------


def storages(method: Method) -> set[int]:
    tensors: list[Tensor] = [*method.problem.x, *method.problem.y]
    seen: list[Any] = [method.state_dict()]
    while seen:
        node = seen.pop()
        if isinstance(node, Tensor):
            tensors.append(node)
        elif isinstance(node, dict | list | tuple):
            seen += node.values() if isinstance(node, dict) else node
    return {t.data_ptr() for t in tensors if t.numel()}


@every_case
def test_a_copy_shares_nothing_and_goes_on_alike(make: Callable[[], Case]) -> None:
    method, data = make()
    scheduler = lr_scheduler.StepLR(method, 3, 0.5)
    called: list[Any] = []
    method.register_step_post_hook(lambda *_: called.append(1))
    for _ in range(7):
        advance(method, data, 1)
        scheduler.step()
    method.backward(**data)
    twin = copy.deepcopy(method)  # in the middle of a step
    assert "step" in vars(method) and "step" not in vars(twin)
    assert twin.rule is not method.rule and twin.problem is not method.problem
    assert twin.estimator.problem is twin.problem and not storages(method) & storages(twin)
    method.zero_grad()  # a copied parameter has no gradient, as in torch
    before, hooked = standing(method), len(called)
    assert standing(twin) == before
    losses = advance(twin, data, 6)
    assert standing(method) == before and len(called) == hooked
    after = standing(twin)
    assert advance(method, data, 6) == losses
    assert standing(method) == after == standing(twin)


def test_a_copy_in_the_middle_of_a_step_leaves_the_source_alone() -> None:
    method, data = FIVE["AIDBiO"]()
    source = stream(data["lower"] for _ in range(2))  # a generator, which nothing can copy
    method.backward(lower=source, upper=data["upper"])
    twin = copy.deepcopy(method)
    twin.backward(lower=source, upper=data["upper"])  # the copy is at the beginning of its step
    twin.step()
    assert source.served == 2 and twin.steps == 1 and method.steps == 0


def test_a_loss_that_cannot_be_copied_or_pickled_is_refused() -> None:
    q = quadratic_bilevel()
    upper, lower = q.modules()
    local = BilevelProblem(upper, lower, upper_loss=lambda u, v, b: q.upper_loss(u, v, b), lower_loss=q.lower_loss)
    with pytest.raises(pickle.PicklingError, match="upper_loss"):
        pickle.dumps(AIDBiO(local, 0.1, lower_solver=solver()))
    holding = BilevelProblem(upper, lower, upper_loss=lambda u, v, b: upper.flat().sum(), lower_loss=q.lower_loss)
    with pytest.raises(ValueError, match="upper_loss captures 'upper'"):
        copy.deepcopy(AIDBiO(holding, 0.1, lower_solver=solver()))


def test_hooks_may_replace_the_state_dict() -> None:
    method, data = FIVE["AIDBiO"]()
    method.register_state_dict_post_hook(lambda _, state: {"wrapped": state})
    method.register_load_state_dict_pre_hook(lambda _, state: state["wrapped"])
    advance(method, data, 2)
    saved = method.state_dict()
    assert list(saved) == ["wrapped"]
    advance(method, data, 2)
    method.load_state_dict(saved)
    assert method.steps == 2


# --- what cannot be, and what must not happen ------------------------------------------------------------------------


@every_case
def test_a_step_with_lr_zero_moves_nothing(make: Callable[[], Case]) -> None:
    method, data = make()
    method.param_groups[0]["lr"] = 0.0
    x = plain(method.problem.x)
    advance(method, data, 3)
    assert plain(method.problem.x) == x and method.events == []
    assert method.steps == (0 if isinstance(method.rule, optim.Rule) else 3)


def test_a_step_with_lr_zero_does_not_even_project() -> None:
    q = quadratic_bilevel()
    problem = BilevelProblem(
        *q.modules(), upper_loss=q.upper_loss, lower_loss=q.lower_loss, upper_projection=projections.box(-0.01, 0.01)
    )
    x = plain(problem.x)
    method = AIDBiO(problem, 0.0, lower_solver=solver())
    data = {"lower": q.lower_batch, "upper": q.upper_batch}
    advance(method, data, 1)
    assert plain(problem.x) == x
    method.param_groups[0]["lr"] = 0.1
    advance(method, data, 1)
    assert flat(problem.x).abs().max() <= 0.01


@every_method
def test_an_exhausted_source_changes_nothing(make: Callable[[], Case]) -> None:
    method, data = make()
    name, batch = next(iter(data.items()))
    short = {**data, name: stream(iter([batch] * 7))}
    advance(method, short, 7)
    before = standing(method)
    with pytest.raises(RuntimeError, match="exhausted after 7 batches"):
        method.backward(**short)
    assert standing(method) == before
    advance(method, data, 1)


@every_case
def test_the_global_random_state_is_neither_read_nor_changed(make: Callable[[], Case]) -> None:
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        method, data = make()
        advance(method, data, 7)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(standing(method))
    assert ends[0] == ends[1]


def test_shows_its_parts() -> None:
    text = repr(FIVE["PerturbedAID"]()[0])
    assert text.startswith("PerturbedAID(") and "CG(max_iter=2" in text and "lr: 0.01" in text
