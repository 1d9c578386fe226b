"""Methods on plain losses: the papers' loops, reductions, sampling at two points, super epochs, copies, arguments."""

from __future__ import annotations

import copy
import io
import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import torchbilevel as tb
from torchbilevel.optim import Pullback, Rule
from torchbilevel.optim.recursive import Recursive
from torchbilevel.tensors import ball, mix_seed

# The loss at x on the rows s of S is the mean of (1 + s1) x1^2 - (1 + s2) x2^2 + x2^4 / 4 + s3 x1 + s4 x2. Over all
# rows s averages to zero: the origin is exactly a saddle, and the minima are at |x2| = sqrt(2).
DATA = 0.02 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA -= DATA.mean(0)
LEAST = math.sqrt(2.0)

Batch = tuple[float, ...]  # the mean of its rows is all that the loss needs
EVERYTHING: Batch = (0.0, 0.0, 0.0, 0.0)


def loss_of(x: Tensor, batch: Batch) -> Tensor:
    (a, b), s = x.unbind(), batch
    return (1 + s[0]) * a**2 - (1 + s[1]) * b**2 + b**4 / 4 + s[2] * a + s[3] * b


def gradient(x: Tensor, batch: Batch) -> Tensor:
    (a, b), s = x.tolist(), batch
    return torch.tensor((2 * (1 + s[0]) * a + s[2], -2 * (1 + s[1]) * b + b**3 + s[3]), dtype=x.dtype)


@cache
def batch_of(step: int, size: int | None) -> Batch:
    """A batch for each step, the same however a run came there."""
    if size is None:
        return EVERYTHING
    rows = torch.randint(len(DATA), (size,), generator=torch.Generator().manual_seed(mix_seed(17, step)))
    return tuple(DATA[rows].mean(0).tolist())


def at(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64, requires_grad=True)


def closure_on(rule: Rule, x: Tensor, batch: Batch) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        rule.zero_grad()
        x.grad = gradient(x, batch)
        return loss_of(x.detach(), batch)

    return closure


def walk(rule: Rule, x: Tensor, steps: int, size: Any = ...) -> list[Tensor]:
    """Run, and return x_0, ..., x_steps; on batches of a given size instead of those that the rule wants."""
    path = [x.detach().clone()]
    for _ in range(steps):
        if rule.done:
            break
        wanted = rule.next_batch_size if size is ... else size  # type: ignore[attr-defined]
        rule.step(closure_on(rule, x, batch_of(rule.steps, wanted)))
        path.append(x.detach().clone())
    return path


def kinds(rule: Rule) -> list[tuple[int, str]]:
    return [(e.step, e.kind) for e in rule.events]


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(torch.stack(a), torch.stack(b), rtol=0, atol=tolerance)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


PULLBACK: dict[str, Any] = {"radius": 1e-3, "grad_tol": 0.05, "escape_steps": 60, "mean_movement": 1e-4}
SPIDER: dict[str, Any] = {"period": 5, "anchor_size": None, "batch_size": 20}
STORM: dict[str, Any] = {"weight": 0.2, "anchor_size": None, "batch_size": 20}
MOVEMENT: dict[str, Any] = {
    "radius": 1e-3, "grad_tol": 0.02, "escape_steps": 60,
    "period": 8, "anchor_size": None, "batch_size": 20, "max_movement": 0.1,
}  # fmt: skip
VALUE: dict[str, Any] = {**MOVEMENT, "max_movement": None, "value_tol": 1e-3}

Build = Callable[..., Any]
RULES: dict[str, Build] = {
    "SSRGD": lambda params, **kw: tb.SSRGD(params, 0.1, **{**MOVEMENT, **kw}),
    "SSRGD, value test": lambda params, **kw: tb.SSRGD(params, 0.1, **{**VALUE, **kw}),
    "PullbackSPIDER": lambda params, **kw: tb.PullbackSPIDER(params, 0.02, 0.1, **{**PULLBACK, **SPIDER, **kw}),
    "PullbackSTORM": lambda params, **kw: tb.PullbackSTORM(params, 0.02, 0.1, **{**PULLBACK, **STORM, **kw}),
}
every_rule = pytest.mark.parametrize("build", RULES.values(), ids=RULES.keys())


# PGD


def pgd_loop(
    z: Tensor, eta: float, r: float, g_thres: float, t_thres: int, f_thres: float | None, seed: int, steps: int
) -> tuple[list[Tensor], Tensor | None, int]:
    """The papers' loop; the points at which it takes gradients, what it returns, and how often it added noise."""
    t_noise, points, noises = -t_thres - 1, [], 0
    for t in range(steps):
        v = gradient(z, EVERYTHING)
        if v.norm() <= g_thres and t - t_noise > t_thres:
            points.append(z)
            z_tilde, t_noise = z, t
            z = z + ball((z,), r, mix_seed(seed, t + noises, 0))[0]
            noises += 1
        if f_thres and t - t_noise == t_thres and loss_of(z, EVERYTHING) - loss_of(z_tilde, EVERYTHING) > -f_thres:
            return points, z_tilde, noises
        points.append(z)
        z = z - eta * gradient(z, EVERYTHING)
    return points, None, noises


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("f_thres", [None, 1e-3])
def test_pgd_is_the_loop_of_its_papers(seed: int, f_thres: float | None) -> None:
    x = at(0.3, 0.0)
    rule = tb.PGD(
        [x], 0.1, radius=1e-2, grad_tol=1e-2, escape_steps=30, value_tol=f_thres, stop=f_thres is not None, seed=seed
    )
    points, returned, noises = pgd_loop(x.detach().clone(), 0.1, 1e-2, 1e-2, 30, f_thres, seed, 200)
    path = walk(rule, x, len(points) + 1, None)
    close(path[: len(points)], points)
    assert [e.kind for e in rule.events].count("perturbation") == noises >= 2
    assert rule.done is (f_thres is not None)
    if returned is not None:
        assert rule.result().claim == "escape test passed"
        close([rule.result().x[0], x.detach()], [returned, returned])
        assert abs(float(returned[1].abs()) - LEAST) < 1e-2


def test_pgd_constants() -> None:
    theory = {"smoothness": 2.0, "hessian_lipschitz": 4.0, "grad_tol": 0.25, "gap": 3.0, "failure": 0.1}
    new = tb.PGD.constants(10, **theory, c=2.0)
    iota = 2 * math.log(10 * 2 * 3 / (4 * 0.25 * 0.1))
    assert new == {
        "lr": 0.5,
        "radius": pytest.approx(0.5 * 0.25 / (400 * iota**3), rel=1e-14),
        "grad_tol": 0.25,
        "escape_steps": math.ceil(2 * iota),
    }
    old = tb.PGD.constants(10**6, **theory, c=0.25, value_test=True)
    chi = 3 * math.log(10**6 * 2 * 3 / (0.25 * 0.0625 * 0.1))
    assert old == {
        "lr": 0.125,
        "radius": pytest.approx(0.5 / chi**2 * 0.125, rel=1e-14),
        "grad_tol": pytest.approx(0.5 / chi**2 * 0.25, rel=1e-14),
        "escape_steps": math.ceil(16 * chi * 2),
        "value_tol": pytest.approx(0.25 / chi**3 * 0.0625, rel=1e-14),
    }
    least = tb.PGD.constants(1, **{**theory, "gap": 1e-9}, value_test=True)  # chi is at least 12
    assert least["grad_tol"] == pytest.approx(0.25 / 144, rel=1e-14)
    for constants in (new, old):
        rule = tb.PGD([at(0.0)], **constants)
        assert (rule.value_test, rule.radius, rule.escape_steps) == (
            "value_tol" in constants, constants["radius"], constants["escape_steps"] + 1
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be a positive integer, got 0"),
        ({"smoothness": 0.0}, "smoothness must be positive and finite, got 0.0"),
        ({"hessian_lipschitz": math.nan}, "hessian_lipschitz must be positive and finite, got nan"),
        ({"grad_tol": 1.5}, "grad_tol must be at most smoothness^2 / hessian_lipschitz = 1.0, got 1.5"),
        ({"gap": -1.0}, "gap must be positive and finite, got -1.0"),
        ({"failure": 1.0}, "failure must be in (0, 1), got 1.0"),
        ({"c": 2.0, "value_test": True}, "c must be at most 1 with value_test=True, got 2.0"),
        ({"gap": 1e-9}, r"c log(n l Delta / (rho epsilon delta)) must be at least 1, got -"),
    ],
)
def test_bad_constant_is_named_with_its_value(options: dict[str, Any], message: str) -> None:
    good = {"n": 10, "smoothness": 2.0, "hessian_lipschitz": 4.0, "grad_tol": 0.25, "gap": 3.0}
    with pytest.raises(ValueError) as error:
        tb.PGD.constants(**{**good, **options})
    assert str(error.value).startswith(message)


# The recursion, against loops written by hand


def estimate(kind: str, parameter: float, path: list[Tensor], batch: Batch, v: Tensor) -> Tensor:
    """v at the last point of a path, from v at the point before."""
    t = len(path) - 1
    if t == 0 or (kind == "SPIDER" and t % parameter == 0):
        return gradient(path[t], batch)
    a = 0.0 if kind == "SPIDER" else parameter
    return gradient(path[t], batch) + (1 - a) * (v - gradient(path[t - 1], batch))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("kind", "parameter"), [("SPIDER", 5), ("SPIDER", 1), ("STORM", 0.2), ("STORM", 1.0)])
def test_pullback_loop_step_for_step(kind: str, parameter: float, seed: int) -> None:
    lr, lr_escape, r, eps, t_thres, D = 0.02, 0.1, 1e-2, 0.1, 14, 1e-4
    x = at(0.2, 0.0)
    options: dict[str, Any] = {"period": parameter} if kind == "SPIDER" else {"weight": parameter}
    rule = {"SPIDER": tb.PullbackSPIDER, "STORM": tb.PullbackSTORM}[kind](
        [x], lr, lr_escape, radius=r, grad_tol=eps, escape_steps=t_thres, mean_movement=D,
        anchor_size=100, batch_size=10, seed=seed, **options,
    )  # fmt: skip
    z, v, escape, told, sizes, points = x.detach().clone(), torch.zeros(2), False, [], [], []
    for t in range(200):
        sizes.append(100 if t == 0 or (kind == "SPIDER" and t % parameter == 0) else 10)
        assert rule.next_batch_size == sizes[-1]
        rule.step(closure_on(rule, x, batch_of(t, sizes[-1])))
        points.append(z)
        v = estimate(kind, parameter, points, batch_of(t, sizes[-1]), v)
        torch.testing.assert_close(x.grad, v, rtol=0, atol=1e-10)
        if not escape and v.norm() >= eps:
            z = z - lr / v.norm() * v
        elif not escape:
            escape, m, esc, A = True, t, 0, 0.0
            z = z + ball((z,), r, mix_seed(seed, t, 0))[0]
            told.append((t, "perturbation"))
        elif A + lr_escape**2 * v @ v > (t - m) * D:
            z = z - math.sqrt((t - m) * D - A) / v.norm() * v
            escape = False
            told.append((t, "escaped"))
        else:
            z, A, esc = z - lr_escape * v, A + lr_escape**2 * v @ v, esc + 1
            if esc == t_thres:
                escape = False
                told.append((t, "escape test passed"))
        torch.testing.assert_close(x.detach(), z, rtol=0, atol=1e-11)
        assert rule.phase == ("escape" if escape else "descent")
    assert kinds(rule) == told and len(told) >= 4


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["PullbackSPIDER", "PullbackSTORM"])
def test_pull_back_leaves_the_squared_movement_at_the_budget(name: str, seed: int) -> None:
    x = at(0.0, 0.0)
    rule = RULES[name]([x], escape_steps=10**6, seed=seed)
    path = walk(rule, x, 1)
    while rule.phase == "escape":
        path += walk(rule, x, 1)[1:]
    lengths = [float((b - a).norm()) for a, b in zip(path[1:-1], path[2:], strict=True)]  # without the displacement
    assert len(lengths) > 3 and kinds(rule) == [(0, "perturbation"), (len(lengths), "escaped")]
    assert sum(n**2 for n in lengths) == pytest.approx(len(lengths) * PULLBACK["mean_movement"], rel=1e-12)


def ssrgd_loop(
    z: Tensor,
    steps: int,
    seed: int,
    lr: float,
    eps: float,
    T: int,
    m: int,
    D: float | None,
    f: float | None,
    n: int | None,
) -> tuple[list[Tensor], list[tuple[int, str]]]:
    """The paper's nested loops; a value test at the start of an epoch, as the docstring says."""
    path, told, t, t0, value, escaping = [z], [], 0, 0, 0.0, False
    while t < steps:
        B = batch_of(t, n)
        v = gradient(z, B)
        if escaping and f is not None:
            if loss_of(z, B) - value <= -f:
                escaping = False
                told.append((t, "escaped"))
            elif t - t0 >= T:
                escaping = False
                told.append((t, "escape test passed"))
        if not escaping and v.norm() <= eps:
            escaping, z_tilde, value = True, z, loss_of(z, B)
            told.append((t, "perturbation"))
            z = z + ball((z,), 1e-3, mix_seed(seed, t, 0))[0]
            path.append(z)
            t += 1
            t0, v = t, gradient(z, batch_of(t, n))
        length = m if escaping else 1 + mix_seed(seed, t, 1) % m
        for k in range(1, length + 1):
            z_old, z = z, z - lr * v
            path.append(z)
            t += 1
            if escaping and D is not None and (z - z_tilde).norm() > D:
                escaping = False
                told.append((t - 1, "escaped"))
                break
            if escaping and t - t0 >= T:
                if D is not None:
                    escaping = False
                    told.append((t - 1, "escape test passed"))
                break
            if k < length:
                v = v + gradient(z, batch_of(t, 10)) - gradient(z_old, batch_of(t, 10))
    return path[: steps + 1], [event for event in told if event[0] < steps]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("D", "f", "n"), [(0.1, None, 100), (None, 1e-3, None)])
def test_ssrgd_loop_step_for_step(D: float | None, f: float | None, n: int | None, seed: int) -> None:
    x = at(0.2, 0.0)
    rule = tb.SSRGD(
        [x], 0.1, radius=1e-3, grad_tol=0.05, escape_steps=36, period=7, anchor_size=n, batch_size=10,
        max_movement=D, value_tol=f, seed=seed,
    )  # fmt: skip
    path, told = ssrgd_loop(x.detach().clone(), 300, seed, 0.1, 0.05, 36, 7, D, f, n)
    close(walk(rule, x, 300), path)
    assert kinds(rule) == told and {"escaped", "escape test passed"} <= {kind for _, kind in told}


def test_lengths_of_epochs_are_uniform() -> None:
    x = at(0.3, 0.2)
    rule = tb.SSRGD([x], 1e-6, **{**MOVEMENT, "grad_tol": 0.0, "period": 4, "anchor_size": 50, "batch_size": 1})
    anchors = []
    for _ in range(500):
        anchors += [rule.steps] if rule.next_batch_size == 50 else []
        walk(rule, x, 1)
    lengths = Counter(b - a for a, b in zip(anchors[:-1], anchors[1:], strict=True))
    assert set(lengths) == {1, 2, 3, 4} and min(lengths.values()) > 30 and max(lengths.values()) < 70  # 50 +- 6


# Reductions


@pytest.mark.parametrize("name", ["PullbackSPIDER", "PullbackSTORM"])
def test_on_full_batches_it_is_pullback_bitwise(name: str) -> None:
    x, y = at(0.1, 0.0), at(0.1, 0.0)
    rule, plain = RULES[name]([x], seed=2), Pullback([y], 0.02, 0.1, **PULLBACK, seed=2)
    assert equal(walk(rule, x, 300, None), walk(plain, y, 300, None)) and kinds(rule) == kinds(plain)
    assert {"escaped", "escape test passed"} <= {kind for _, kind in kinds(rule)}


@pytest.mark.parametrize(
    ("name", "options"), [("PullbackSPIDER", {"period": 1, "anchor_size": 30}), ("PullbackSTORM", {"weight": 1.0})]
)
def test_without_recursion_it_is_pullback_on_its_batches_bitwise(name: str, options: dict[str, Any]) -> None:
    x, y = at(0.1, 0.0), at(0.1, 0.0)
    rule = RULES[name]([x], **{**options, "batch_size": 30, "anchor_size": 30})
    plain = Pullback([y], 0.02, 0.1, **PULLBACK)
    assert equal(walk(rule, x, 200), walk(plain, y, 200, 30)) and kinds(rule) == kinds(plain) != []


def test_ssrgd_on_full_batches_without_tolerance_is_sgd() -> None:
    x, y = at(0.3, 0.2), at(0.3, 0.2)
    rule, sgd = RULES["SSRGD"]([x], grad_tol=0.0), torch.optim.SGD([y], 0.1)
    for point in walk(rule, x, 60, None)[1:]:
        sgd.zero_grad()
        loss_of(y, EVERYTHING).backward()
        sgd.step()
        torch.testing.assert_close(point, y.detach(), rtol=0, atol=1e-13)


# Escapes


@every_rule
@pytest.mark.parametrize("seed", range(10))
def test_leaves_the_saddle_and_passes_at_a_minimum(build: Build, seed: int) -> None:
    x = at(0.0, 0.0)
    rule = build([x], stop=True, seed=seed)
    path = walk(rule, x, 1500)
    result = rule.result()
    assert rule.done and result.claim == "escape test passed"
    assert [e.kind for e in rule.events][:2] == ["perturbation", "escaped"]
    assert abs(float(x[0].detach())) < 0.05 and abs(abs(float(x[1].detach())) - LEAST) < 0.05
    assert torch.equal(result.x[0], x.detach()) and torch.equal(path[result.step], x.detach())
    with pytest.raises(RuntimeError, match="has stopped with the claim 'escape test passed'"):
        rule.step(closure_on(rule, x, EVERYTHING))
    assert torch.equal(result.x[0], x.detach())


@every_rule
def test_goes_on_after_a_test_passed_by_default(build: Build) -> None:
    x = at(0.0, LEAST)
    rule = build([x])
    path = walk(rule, x, 200)
    assert not rule.done and [e.kind for e in rule.events].count("escape test passed") >= 2
    assert rule.result().claim == "escape test passed"
    assert torch.equal(rule.result().x[0], path[rule.result().step])
    assert rule.result().step in [e.step for e in rule.events if e.kind == "perturbation"]


def test_claims_follow_the_super_epoch() -> None:
    x = at(0.0, 0.0)
    rule = RULES["SSRGD"]([x])
    assert (rule.phase, rule.result().claim) == ("descent", "running")
    walk(rule, x, 2)
    assert (rule.phase, rule.result().claim, rule.result().x[0].tolist()) == ("escape", "stationary", [0.0, 0.0])
    while rule.phase == "escape":
        walk(rule, x, 1)
    assert rule.events[-1].kind == "escaped" and rule.result().claim == "running"
    assert rule.events[-1].value == pytest.approx(float(x.detach().norm()), rel=1e-14)
    assert rule.events[-1].value > 0.1 and rule.next_batch_size is None


# The same sample at both points


def test_sizes_that_the_next_step_wants() -> None:
    for name, expected in [("PullbackSPIDER", [None, 20, 20, 20, 20] * 2), ("PullbackSTORM", [None] + [20] * 9)]:
        x, wanted = at(0.3, 0.2), []
        rule = RULES[name]([x])
        for _ in range(10):
            wanted.append(rule.next_batch_size)
            walk(rule, x, 1)
        assert wanted == expected


def probe_dropout(build: Build) -> tuple[Any, Tensor, Callable[[], Tensor], list[Tensor]]:
    """A rule on a loss whose gradient is a dropout mask, whatever x is."""
    x, masks = torch.ones(50, dtype=torch.float64, requires_grad=True), []
    rule = build([x], grad_tol=0.0)

    def closure() -> Tensor:
        rule.zero_grad()
        masks.append(F.dropout(torch.ones_like(x)).detach())
        loss = (masks[-1] * x).sum()
        loss.backward()
        return loss

    return rule, x, closure, masks


@pytest.mark.parametrize("name", ["SSRGD", "PullbackSPIDER", "PullbackSTORM"])
def test_dropout_is_the_same_at_both_points(name: str) -> None:
    rule, x, closure, masks = probe_dropout(RULES[name])
    torch.manual_seed(3)
    v = torch.zeros(())
    for _ in range(12):
        before, seen, anchor = torch.get_rng_state(), len(masks), rule._anchors()
        rule.step(closure)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        F.dropout(torch.ones_like(x))
        assert torch.equal(torch.get_rng_state(), after) and not torch.equal(before, after)
        assert len(masks) == seen + (1 if anchor else 2) and torch.equal(masks[-1], masks[seen])
        v = masks[-1] if anchor else masks[-1] + (1 - rule.weight) * (v - masks[-1])
        torch.testing.assert_close(x.grad, v, rtol=0, atol=1e-14)


@every_rule
@pytest.mark.parametrize("failing", [1, 2])
def test_error_in_the_closure_leaves_everything_as_it_was(build: Build, failing: int) -> None:
    x = at(0.3, 0.2)
    rule = build([x])
    walk(rule, x, 1)
    while rule.next_batch_size is None:
        walk(rule, x, 1)
    assert rule.steps > 0
    here, memory, calls, states = x.detach().clone(), str(rule.state_dict()), [], [torch.get_rng_state()]
    twin, y = copy.deepcopy((rule, x))

    def closure(bad: str) -> Tensor:
        calls.append(x.detach().clone())
        rule.zero_grad()
        loss = loss_of(x, batch_of(rule.steps, 20))
        loss.backward()
        if len(calls) == failing and bad == "error":
            raise KeyError("broken")
        torch.rand(())
        if len(calls) == 1:
            states.append(torch.get_rng_state())
        if len(calls) == failing:
            if bad == "loss":
                return loss * math.nan
            x.grad.fill_(math.inf)
        return loss

    for bad, error in [("error", KeyError), ("loss", FloatingPointError), ("gradient", FloatingPointError)]:
        calls.clear()
        with pytest.raises(error):
            rule.step(lambda bad=bad: closure(bad))
        assert torch.equal(x.detach(), here) and str(rule.state_dict()) == memory
        assert len(calls) == (2 if bad == "gradient" else failing)
        assert torch.equal(torch.get_rng_state(), states[-1])
        assert len(calls) == 1 or not torch.equal(calls[0], calls[1])
    assert equal(walk(rule, x, 50), walk(twin, y, 50))


@every_rule
def test_gradient_at_the_point_before_alone_moves_nothing(build: Build) -> None:
    x, y = at(0.3, 0.2), at(1.0)
    rule, calls = build([x, y]), []

    def closure() -> Tensor:
        calls.append(x.detach().clone())
        rule.zero_grad()
        loss = loss_of(x, EVERYTHING)
        if len(calls) > 1 and torch.equal(calls[-1], calls[0]):
            loss = loss + (y**2).sum()
        loss.backward()
        return loss

    for _ in range(2):
        rule.left = 2  # SSRGD: not an anchor
        rule.step(closure)
    assert len(calls) == 3 and torch.equal(calls[2], calls[0]) and y.tolist() == [1.0]


def test_weight_one_needs_one_evaluation() -> None:
    x, calls = at(0.3, 0.2), []
    rule = RULES["PullbackSTORM"]([x], weight=1.0)
    for t in range(5):
        closure = closure_on(rule, x, batch_of(t, 20))
        rule.step(lambda closure=closure: calls.append(None) or closure())
    assert len(calls) == rule.steps == 5


@every_rule
def test_closure_is_needed(build: Build) -> None:
    x = at(0.3, 0.2)
    rule = build([x])
    x.grad = torch.ones_like(x)
    with pytest.raises(ValueError, match="compares gradients at two points: pass step.. a closure on one batch"):
        rule.step()
    assert x.tolist() == [0.3, 0.2]


def test_value_test_needs_a_loss() -> None:
    x = at(0.3, 0.2)
    rule = RULES["SSRGD, value test"]([x])
    with pytest.raises(ValueError, match="pass step.. a closure that returns the loss"):
        rule.step(lambda: loss_of(x, EVERYTHING).backward())
    assert x.tolist() == [0.3, 0.2] and rule.next_batch_size is None and rule.last_v == ()


@every_rule
def test_estimate_is_safe_from_gradients_zeroed_in_place(build: Build) -> None:
    x, y = at(0.3, 0.2), at(0.3, 0.2)
    rule, other = build([x]), build([y])
    path = [y.detach().clone()]

    def closure() -> Tensor:
        other.zero_grad(set_to_none=False)
        of_y = gradient(y, batch_of(other.steps, other.next_batch_size))
        y.grad = of_y if y.grad is None else y.grad.add_(of_y)
        return loss_of(y.detach(), EVERYTHING)

    for _ in range(30):
        other.step(closure)
        other.zero_grad(set_to_none=False)
        path.append(y.detach().clone())
    assert equal(walk(rule, x, 30), path)


# What rests


@every_rule
def test_resting_parameters(build: Build) -> None:
    x, still, unused = at(0.3, 0.2), at(1.0, 1.0), at(5.0)
    rule = build([{"params": [x]}, {"params": [still], "lr": 0.0}, {"params": [unused]}])
    y = at(0.3, 0.2)
    plain = build([y])
    for _ in range(40):
        batch = batch_of(rule.steps, rule.next_batch_size)
        assert rule.next_batch_size == plain.next_batch_size

        def closure(batch: Tensor = batch) -> Tensor:
            rule.zero_grad()
            loss = loss_of(x, batch) + (still**2).sum()
            loss.backward()
            return loss

        rule.step(closure)
        plain.step(closure_on(plain, y, batch))
        close([x.detach()], [y.detach()])
    assert still.tolist() == [1.0, 1.0] and unused.tolist() == [5.0]


@every_rule
def test_step_that_may_move_nothing_is_not_counted(build: Build) -> None:
    x = at(0.0, 0.0)
    rule = build([x])
    rule.param_groups[0]["lr"] = 0.0
    walk(rule, x, 3)
    assert x.tolist() == [0.0, 0.0] and rule.steps == 0 and rule.events == []


@every_rule
def test_added_group_makes_the_next_step_an_anchor(build: Build) -> None:
    x, y = at(0.3, 0.2), at(0.5, 0.0)
    rule = build([x])
    walk(rule, x, 1)
    rule.add_param_group({"params": [y]})
    assert rule.next_batch_size is None

    def closure() -> Tensor:
        rule.zero_grad()
        loss = loss_of(x, EVERYTHING) + loss_of(y, EVERYTHING)
        loss.backward()
        return loss

    rule.step(closure)
    assert torch.equal(y.grad, gradient(torch.tensor([0.5, 0.0], dtype=torch.float64), EVERYTHING))
    assert y.tolist() != [0.5, 0.0]


# Copies and checkpoints


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_rule
@pytest.mark.parametrize("steps", [0, 1, 13, 70])
def test_copies_and_resumed_runs_go_on_bitwise(build: Build, steps: int) -> None:
    x = at(0.0, 0.0)
    rule = build([x], seed=5)
    walk(rule, x, steps)
    saved, y = through_file(rule.state_dict()), x.detach().clone().requires_grad_()
    assert rule.phase == "escape" or steps not in (1, 13)
    twin, z = copy.deepcopy((rule, x))
    others = {"period": 3, "max_movement": 9.0, "value_tol": 9.0, "mean_movement": 9.0, "weight": 0.9}
    others = {name: value for name, value in others.items() if getattr(rule, name, None)}
    again = build(
        [y], seed=9, radius=0.05, grad_tol=1.0, escape_steps=3, anchor_size=2, batch_size=1, stop=True, **others
    )
    again.load_state_dict(saved)  # replaces all these settings
    path = walk(rule, x, 80)
    for other, point in ((twin, z), (again, y)):
        assert other.next_batch_size == (20 if steps else None) or other.next_batch_size is None
        assert equal(walk(other, point, 80), path)
        assert (other.events, other.steps, other.phase, other.done) == (rule.events, rule.steps, rule.phase, rule.done)
        assert torch.equal(other.result().x[0], rule.result().x[0])
        assert other.result().claim == rule.result().claim


# Arguments


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SSRGD", {"radius": 0.0}, "radius must be positive and finite, got 0.0"),
        ("SSRGD", {"grad_tol": -1.0}, "grad_tol must be non-negative, got -1.0"),
        ("SSRGD", {"grad_tol": math.nan}, "grad_tol must be non-negative, got nan"),
        ("SSRGD", {"escape_steps": 0}, "escape_steps must be a positive integer, got 0"),
        ("SSRGD", {"period": 0}, "period must be a positive integer, got 0"),
        ("SSRGD", {"anchor_size": 0}, "anchor_size must be a positive integer, got 0"),
        ("SSRGD", {"batch_size": None}, "batch_size must be a positive integer, got None"),
        ("SSRGD", {"max_movement": 1e-3}, "max_movement must be above radius=0.001, got 0.001"),
        ("SSRGD", {"value_tol": 1.0}, "give one of max_movement and value_tol, got 0.1 and 1.0"),
        ("SSRGD", {"max_movement": None}, "give one of max_movement and value_tol, got None and None"),
        ("SSRGD, value test", {"value_tol": 0.0}, "value_tol must be positive and finite, got 0.0"),
        ("SSRGD", {"seed": 1.5}, "seed must be an integer, got 1.5"),
        ("PullbackSPIDER", {"period": 2.5}, "period must be a positive integer, got 2.5"),
        ("PullbackSPIDER", {"anchor_size": -3}, "anchor_size must be a positive integer, got -3"),
        ("PullbackSPIDER", {"batch_size": True}, "batch_size must be a positive integer, got True"),
        ("PullbackSPIDER", {"mean_movement": 0.0}, "mean_movement must be positive, got 0.0"),
        ("PullbackSTORM", {"weight": 0.0}, "weight must be in (0, 1], got 0.0"),
        ("PullbackSTORM", {"weight": 1.5}, "weight must be in (0, 1], got 1.5"),
        ("PullbackSTORM", {"weight": math.nan}, "weight must be in (0, 1], got nan"),
        ("PullbackSTORM", {"batch_size": 0}, "batch_size must be a positive integer, got 0"),
    ],
)
def test_bad_argument_is_named_with_its_value(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        RULES[name]([at(0.0, 0.0)], **options)
    assert str(error.value) == message


def test_bad_rates_and_arguments_of_pgd() -> None:
    with pytest.raises(ValueError, match="lr must be non-negative and finite, got -1.0"):
        tb.SSRGD([at(0.0)], -1.0, **MOVEMENT)
    rule = RULES["SSRGD"]([at(0.0)])
    with pytest.raises(ValueError, match="lr must be non-negative and finite, got nan"):
        rule.add_param_group({"params": [at(0.0)], "lr": math.nan})
    assert len(rule.param_groups) == 1 and isinstance(rule, Recursive)
    with pytest.raises(ValueError, match="stop must be False without value_tol, got True"):
        tb.PGD([at(0.0)], 0.1, radius=0.1, grad_tol=0.1, escape_steps=5, stop=True)
    with pytest.raises(ValueError, match="escape_steps must be a positive integer, got 0"):
        tb.PGD([at(0.0)], 0.1, radius=0.1, grad_tol=0.1, escape_steps=0)
