"""Copies share nothing and use nothing of the original; pickles load, or fail in words."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.problems import FACTORIES, Split, flat, quadratic_bilevel
from torchbilevel import BilevelProblem, MinimaxProblem, projections


def storages(problem: Any) -> set[int]:
    tensors = (t for m in (problem.upper, problem.lower) for t in (*m.parameters(), *m.buffers()))
    return {t.untyped_storage().data_ptr() for t in tensors}


def perturb(problem: Any) -> None:
    with torch.no_grad():
        for p in (*problem.upper_parameters, *problem.lower_parameters):
            p += 1.0


@pytest.fixture(params=FACTORIES)
def case(request: pytest.FixtureRequest) -> Any:
    return FACTORIES[request.param]()


ROUTES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda problem: pickle.loads(pickle.dumps(problem)),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_copy_is_equal_and_shares_nothing(case: Any, route: str) -> None:
    problem = case.problem
    data = case.batch if problem.minimax else case.lower_batch
    value = problem.lower_value(problem.x, problem.y, data, 0)
    twin = ROUTES[route](problem)
    assert type(twin) is type(problem)
    assert not storages(problem) & storages(twin)
    # The copy's parameters are those of the copy's modules, and moving one problem leaves the other where it is.
    assert {id(p) for p in twin.upper_parameters} <= {id(p) for p in twin.upper.parameters()}
    assert {id(p) for p in twin.lower_parameters} <= {id(p) for p in twin.lower.parameters()}
    perturb(problem)
    assert torch.equal(twin.lower_value(twin.x, twin.y, data, 0), value)
    assert not torch.equal(problem.lower_value(problem.x, problem.y, data, 0), value)
    assert torch.equal(flat(twin.project_y(twin.y)), flat(problem.project_y(twin.y)))
    if problem.minimax:
        twin.check(data)
    else:
        twin.check(lower=data, upper=case.upper_batch)


def test_modules_and_problem_are_copied_together() -> None:
    problem = quadratic_bilevel().problem
    twin, upper = copy.deepcopy((problem, problem.upper))
    assert twin.upper is upper and twin.upper is not problem.upper


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight = nn.Linear(2, 2), nn.Parameter(torch.ones(2))


def apart(upper: Any, lower: Any, batch: Any) -> Tensor:
    return (lower.weight - upper.weight).square().sum() + lower.body.weight.square().sum()


def make(loss: Callable[..., Tensor], upper: nn.Module, lower: nn.Module, **options: Any) -> BilevelProblem:
    return BilevelProblem(upper, lower, apart, loss, **options)


# Globals that losses below read, bound to the modules of a test.
net: Any = None
table: dict[str, Any] = {}


def reads_global(upper: Any, lower: Any, batch: Any) -> Tensor:
    return apart(upper, net, batch)


def helper(lower: Any) -> Tensor:
    return (lower.weight * table["nets"][0].weight).sum()


def calls_helper(upper: Any, lower: Any, batch: Any) -> Tensor:
    return (lambda: apart(upper, lower, batch) + helper(lower))()


class Holder:
    def __init__(self, module: nn.Module) -> None:
        self.parts = [{"model": module}]


def capturing(lower: Any) -> dict[str, Callable[..., Tensor]]:
    holder, wrapper, weight = Holder(lower), nn.Sequential(lower.body, nn.ReLU()), lower.weight
    bound, partial = nn.Module.eval.__get__(lower), functools.partial(apart, lower=lower)

    def default(upper: Any, other: Any, batch: Any, module: Any = lower) -> Tensor:
        return apart(upper, module, batch)

    return {
        "module": lambda upper, other, batch: apart(upper, lower, batch),
        "part of it": lambda upper, other, batch, part=None: apart(upper, other, batch) + weight.sum(),
        "an object that holds it": lambda upper, other, batch: apart(upper, holder.parts[0]["model"], batch),
        "a module around a part": lambda upper, other, batch: apart(upper, other, batch) + wrapper(batch).sum(),
        "a bound method": lambda upper, other, batch: apart(upper, bound(), batch),
        "a partial in the closure": lambda upper, other, batch: partial(upper, batch=batch),
        "a default argument": default,
        "a partial of such a function": functools.partial(default, batch=None),
        "a function inside the function": lambda upper, other, batch: (lambda: apart(upper, lower, batch))(),
        "a global": reads_global,
        "a global read by a helper": calls_helper,
    }


@pytest.mark.parametrize("how", list(capturing(Net())))
def test_a_loss_that_captures_a_copied_module_is_refused(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upper, lower = Net(), Net()
    monkeypatch.setitem(globals(), "net", lower)
    monkeypatch.setitem(table, "nets", [lower])
    problem = make(capturing(lower)[how], upper, lower)
    with pytest.raises(
        ValueError, match=r"^lower_loss captures .* which is or holds lower.* of the copied problem; .* take"
    ):
        copy.deepcopy(problem)


def test_lower_init_and_projections_are_searched_too() -> None:
    upper, lower = Net(), Net()
    with pytest.raises(ValueError, match="^lower_init captures 'upper', which is or holds upper of the copied"):
        copy.deepcopy(make(apart, upper, lower, lower_init=lambda _: [p.detach() for p in upper.parameters()]))
    with pytest.raises(ValueError, match=r"^upper_projection\['weight'\] captures 'lower'"):
        copy.deepcopy(make(apart, upper, lower, upper_projection={"weight": lambda t: t.clamp(max=lower.weight.max())}))


def test_what_a_copy_takes_along_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    upper, lower, other = Net(), Net(), Net()
    # A global with the name of an attribute is not read by `upper.weight`.
    monkeypatch.setitem(globals(), "weight", lower)
    monkeypatch.setitem(globals(), "body", lower.body)
    copy.deepcopy(make(apart, upper, lower))
    # Somebody else's module is shared, as any other constant.
    copy.deepcopy(make(lambda up, lo, b: apart(up, lo, b) + other.weight.sum() + F.relu(lo.weight).sum(), upper, lower))

    class Loss:
        def __init__(self, module: Any) -> None:
            self.module = module

        def __call__(self, upper: Any, _: Any, batch: Any) -> Tensor:
            return apart(upper, self.module, batch)

    # deepcopy copies what callable objects, bound methods and partials hold.
    for loss in (Loss(lower), Loss(lower).__call__, functools.partial(lambda m, up, lo, b: apart(up, m, b), lower)):
        twin = copy.deepcopy(make(loss, upper, lower))
        value = twin.lower_value(twin.x, twin.y, None, 0)
        perturb(make(apart, upper, lower))
        assert torch.equal(twin.lower_value(twin.x, twin.y, None, 0), value)
        perturb(twin)
        got = twin.lower_value(twin.x, tuple(2 * t for t in twin.y), None, 0)
        want = (2 * twin.y[0] - twin.x[0]).square().sum() + (2 * twin.y[1]).square().sum()
        torch.testing.assert_close(got, want)


def test_losses_that_cannot_be_imported_are_refused_in_words() -> None:
    upper, lower = Net(), Net()

    def nested(upper: Any, lower: Any, batch: Any) -> Tensor:
        return apart(upper, lower, batch)

    class Local:
        def __call__(self, upper: Any, lower: Any, batch: Any) -> Tensor:
            return apart(upper, lower, batch)

    for loss in (lambda up, lo, b: apart(up, lo, b), nested, functools.partial(nested, batch=None), Local()):
        with pytest.raises(
            pickle.PicklingError, match=r"^lower_loss is .* cannot be imported by name; .*state_dict\(\)"
        ):
            pickle.dumps(make(loss, upper, lower))
    with pytest.raises(pickle.PicklingError, match="^lower_init is"):
        pickle.dumps(make(apart, upper, lower, lower_init=lambda upper: upper.parameters()))
    with pytest.raises(pickle.PicklingError, match=r"^projection\['weight'\] is"):
        pickle.dumps(MinimaxProblem(upper, lower, apart, projection={"weight": lambda t: t}))
    pickle.dumps(make(functools.partial(apart, batch=None), upper, lower))


def test_projections_of_the_package_are_pickled_along() -> None:
    problem = MinimaxProblem(Net(), Net(), apart, projection={"weight": projections.simplex()})
    twin = pickle.loads(pickle.dumps(problem))
    assert twin.project_y(twin.y)[0].tolist() == [0.5, 0.5]


def test_a_module_and_its_problem_survive_torch_save(tmp_path: Any) -> None:
    case = quadratic_bilevel()
    torch.save(case.problem, tmp_path / "problem.pt")
    twin = torch.load(tmp_path / "problem.pt", weights_only=False)
    assert isinstance(twin.upper, Split)
    torch.testing.assert_close(
        twin.upper_value(twin.x, twin.y, case.upper_batch, 0),
        case.problem.upper_value(case.problem.x, case.problem.y, case.upper_batch, 0),
    )
