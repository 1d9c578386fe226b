"""Attacks, a GAN, optimal transport and a critic: the examples run, and what they compute is what they say."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchbilevel as tb
from examples import actor_critic, adversarial_digits, gan_mixture, optimal_transport

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

DOCS = Path(__file__).parents[1] / "docs" / "results"


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def smoke(example: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """The rows by method (and start) of a short run; its other outputs are looked at here."""
    example.main(["--smoke", "--output", str(folder / "new")])
    name = example.__name__.rpartition(".")[2]
    assert (folder / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert max(len(line) for line in capsys.readouterr().out.splitlines()[:-1]) <= 120
    table = rows(folder / "new" / f"{name}.csv")
    return {", ".join(filter(None, (row["method"], row.get("start")))): row for row in table}


# --- adversarial training -----------------------------------------------------------------------------------------


def test_adversarial_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adversarial_digits, "RESTARTS", 1)
    table = smoke(adversarial_digits, tmp_path, capsys)
    assert list(table) == list(adversarial_digits.COLORS)
    for row in table.values():  # at equal cost, and a larger radius never leaves more
        assert row["gradients"] == "120"
        shares = [float(row[f"radius {radius}"]) for radius in adversarial_digits.RADII]
        assert shares == sorted(shares, reverse=True)
    still = {table["GDmax from 0"][f"radius {radius}"] for radius in adversarial_digits.RADII}
    assert len(still) == 1  # weights that stayed zero do not look at the image
    assert int(table["PerturbedGDmax from 0"]["displacements"]) > 0


def test_a_step_of_gdmax_is_pgd_training_written_by_hand() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    x, t = (part[:20] for part in adversarial_digits.load(0, "cpu")[0])
    x, steps = x.double(), adversarial_digits.ATTACK
    low, high = adversarial_digits.bounds(x, 0.1)
    start = torch.empty_like(x).uniform_(-0.1, 0.1)
    problem = tb.MinimaxProblem(
        net,
        adversarial_digits.Changes(x),
        adversarial_digits.robust_loss,
        projection=tb.projections.box(low, high),
        lower_init=lambda _: start,
    )
    method = tb.GDmax(problem, 0.5, lower_solver=tb.SignGD(lr=0.025, steps=steps), warm_start=False)

    attacked = (x + start).clamp(0, 1)  # in pixels, where the package moves changes
    for _ in range(steps):
        attacked.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(attacked), t), attacked)
        attacked = (attacked.detach() + 0.025 * g.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    gradients = torch.autograd.grad(F.cross_entropy(net(attacked), t), list(net.parameters()))
    wanted = [p.detach() - 0.5 * g for p, g in zip(net.parameters(), gradients, strict=True)]

    method.zero_grad()
    method.backward((x, t))
    method.step()
    torch.testing.assert_close(x + problem.lower.pixels.detach(), attacked, atol=1e-12, rtol=0)
    for p, q in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.detach(), q, atol=1e-12, rtol=0)


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.15])
def test_strong_attack_finds_all_there_is_to_find_in_a_linear_net_of_two_classes(radius: float) -> None:
    x, t = adversarial_digits.load(0, "cpu")[0]
    x, t = x[t < 2].double(), t[t < 2]
    torch.manual_seed(1)
    net = nn.Linear(64, 2).double()
    with torch.no_grad():  # between the two classes, and not along their difference
        w = 0.5 * torch.randn(64).double() + x[t == 1].mean(0) - x[t == 0].mean(0)
        net.weight.copy_(torch.stack([-w, w]) / 2)
        middle = (x[t == 1].mean(0) + x[t == 0].mean(0)) / 2 @ w
        net.bias.copy_(torch.stack([middle, -middle]) / 2)
    low, high = adversarial_digits.bounds(x, radius)
    toward = (2 * t - 1)[:, None] * w  # the margin is linear, and smallest in a corner of the box
    margin = (2 * t - 1) * (x @ w - middle) + torch.where(toward > 0, low, high).mul(toward).sum(1)
    left = 100 * (margin > 0).double().mean().item()
    assert adversarial_digits.withstood(net, (x, t), radius) == pytest.approx(left)
    assert 5 < left < 95 or radius == 0


# --- a GAN --------------------------------------------------------------------------------------------------------


def test_gan_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = smoke(gan_mixture, tmp_path, capsys)
    assert list(table) == list(gan_mixture.COLORS)
    assert {row["gradients"] for row in table.values()} == {"300"}
    assert all(0 <= int(row["modes"]) <= 8 and float(row["good samples"]) < 100 for row in table.values())


def test_modes_are_counted_and_samples_judged_by_distance() -> None:
    means = gan_mixture.circle(8, 2.0)
    torch.testing.assert_close(means.norm(dim=1), torch.full((8,), 2.0))
    assert torch.cdist(means, means).fill_diagonal_(9.0).min().item() == pytest.approx(4 * math.sin(math.pi / 8))
    # Of 800 samples, 100 would be a fair share and 25 cover a mode; beside a centre by more than 0.3 they do not count.
    parts = [(0, 200, 0.0), (1, 25, 0.29), (2, 24, 0.0), (3, 300, 0.31), (5, 251, 0.1)]
    samples = torch.cat([means[k] * (1 + d / 2) * torch.ones(n, 1) for k, n, d in parts])
    assert gan_mixture.judge(samples, means) == (3, pytest.approx(100 * (200 + 25 + 24 + 251) / 800))


def test_value_of_the_game_against_a_discriminator_that_does_not_look() -> None:
    generator, discriminator = gan_mixture.network(gan_mixture.NOISE, 2), gan_mixture.network(2, 1)
    with torch.no_grad():
        for p in discriminator.parameters():
            p.zero_()
    f = gan_mixture.value(generator, discriminator, torch.randn(16, 2))
    assert f.item() == pytest.approx(-2 * math.log(2))
    with torch.no_grad():
        discriminator[-1].bias.fill_(1.5)
    f = gan_mixture.value(generator, discriminator, torch.randn(16, 2))
    closed = -math.log1p(math.exp(-1.5)) - math.log1p(math.exp(1.5)) - gan_mixture.L2 / 2 * 1.5**2
    assert f.item() == pytest.approx(closed, rel=1e-5)


# --- optimal transport --------------------------------------------------------------------------------------------


def test_optimal_transport(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = smoke(optimal_transport, tmp_path, capsys)
    assert list(table) == optimal_transport.NAMES
    assert {row["gradients"] for row in table.values()} == {str(60 * (optimal_transport.INNER + 1))}
    verdicts = [
        table[name]["certificate"] for name in ("GDmax, one point", "GDmax, spread", "PerturbedGDmax, one point")
    ]
    assert verdicts == ["strict saddle", "epsilon-local minimum", "epsilon-local minimum"]
    assert all(float(row["gradient error"]) < 1e-3 for row in table.values())


def test_sinkhorn_and_the_minimax_problem_agree_with_the_plan_by_matrix_scaling() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(7, 2).double(), torch.randn(9, 2).double()
    eps = optimal_transport.EPS
    # The primal problem: a plan P with equal marginals, of least <P, C> + eps KL(P | product of the marginals).
    cost = torch.cdist(x, target) ** 2 / 2
    kernel, u = (-cost / eps).exp(), torch.ones(7).double()
    for _ in range(4000):
        v = 1 / 9 / (kernel.T @ u)
        u = 1 / 7 / (kernel @ v)
    plan = u[:, None] * kernel * v
    torch.testing.assert_close(plan.sum(0), torch.full((9,), 1 / 9).double(), atol=1e-9, rtol=0)
    primal = (plan * cost).sum() + eps * (plan * (plan * 63).clamp(min=1e-300).log()).sum()

    value, gradient = optimal_transport.sinkhorn(x, target, 4000)
    assert value.item() == pytest.approx(primal.item(), abs=1e-9)
    torch.testing.assert_close(gradient, (plan[:, :, None] * (x[:, None] - target)).sum(1), atol=1e-9, rtol=0)

    positions, potentials = optimal_transport.Vector(x), optimal_transport.Vector(torch.zeros(7).double())
    problem = tb.MinimaxProblem(positions, potentials, optimal_transport.dual)
    method = tb.GDmax(problem, 0.1, lower_solver=tb.GD(lr=7 * eps, steps=1500, momentum=0.9))
    assert method.backward(target).item() == pytest.approx(primal.item(), abs=1e-7)
    torch.testing.assert_close(positions.values.grad, gradient, atol=1e-6, rtol=0)


def test_curvature_of_a_cloud_in_one_point_is_the_closed_form() -> None:
    torch.manual_seed(1)
    target = torch.randn(6, 2).double()
    start = target.mean(0).expand(5, 2).clone()
    problem = tb.MinimaxProblem(
        optimal_transport.Vector(start), optimal_transport.Vector(torch.zeros(5).double()), optimal_transport.dual
    )
    found = tb.certify(problem, target, grad_tol=1e-6, curvature_tol=1e-3)
    variance = torch.linalg.eigvalsh((target - target.mean(0)).T @ (target - target.mean(0)) / 6)[-1].item()
    assert found.verdict == "strict saddle"
    assert 5 * found.lambda_min == pytest.approx(1 - variance / optimal_transport.EPS, rel=1e-6)


# --- actor and critic ---------------------------------------------------------------------------------------------


def test_actor_critic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = smoke(actor_critic, tmp_path, capsys)
    assert list(table) == list(actor_critic.COLORS)
    assert all(600 <= int(row["calls"]) < 640 and 0 < float(row["gap"]) < 60 for row in table.values())
    assert float(table["AIDBiO"]["cosine"]) > float(table["alternating"]["cosine"])


def test_hypergradient_is_the_policy_gradient() -> None:
    grid = actor_critic.world(0, "cpu")
    torch.testing.assert_close(grid.moves.sum(2), torch.ones(4, 25).double())
    torch.manual_seed(0)
    logits = torch.randn(25, 4).double()
    policy, critic = actor_critic.Table(logits.clone()), actor_critic.Table(torch.zeros(25).double())
    problem = tb.BilevelProblem(policy, critic, upper_loss=actor_critic.loss_of_value, lower_loss=actor_critic.bellman)
    descent, cg = tb.GD(lr=25 / 1.9**2, steps=1000, momentum=0.9), tb.CG(max_iter=100, tol=1e-12)
    loss = tb.AIDBiO(problem, 1.0, lower_solver=descent, linear_solver=cg).backward(lower=grid, upper=grid)

    # The policy gradient theorem: visits of s, times the share of a, times its advantage; values by iteration.
    shares, gamma = logits.softmax(1), actor_critic.GAMMA
    chain = sum(shares[:, a, None] * grid.moves[a] for a in range(4))
    value, visits = torch.zeros(25).double(), torch.zeros(25).double()
    for _ in range(600):
        value, visits = grid.reward + gamma * chain @ value, 1 / 25 + gamma * chain.T @ visits
    advantage = grid.reward[:, None] + gamma * (grid.moves @ value).T - value[:, None]
    assert loss.item() == pytest.approx(-value.mean().item(), abs=1e-8)
    assert actor_critic.exact(logits, grid).item() == pytest.approx(value.mean().item(), abs=1e-12)
    torch.testing.assert_close(policy.values.grad, -visits[:, None] * shares * advantage, atol=1e-8, rtol=0)


def test_optimum_is_reached_by_the_greedy_policy_and_by_no_other() -> None:
    grid = actor_critic.world(3, "cpu")
    best, logits = actor_critic.optimum(grid), torch.zeros(25, 4).double()
    for _ in range(10):  # policy iteration
        chain = torch.einsum("sa,ast->st", logits.softmax(1), grid.moves)
        value = torch.linalg.solve(torch.eye(25).double() - actor_critic.GAMMA * chain, grid.reward)
        logits = 1e4 * F.one_hot((grid.moves @ value).argmax(0), 4).double()
    assert actor_critic.exact(logits, grid).item() == pytest.approx(best, abs=1e-10)
    generator = torch.Generator().manual_seed(0)
    others = [10 * torch.randn(25, 4, generator=generator).double() for _ in range(50)]
    assert max(actor_critic.exact(other, grid).item() for other in others) < best


# --- the claims made with the committed results -------------------------------------------------------------------


def column(example: str, name: str, **where: str) -> list[float]:
    own = [row for row in rows(DOCS / f"{example}.csv") if all(row[key] == value for key, value in where.items())]
    assert [row["seed"] for row in own] == [str(seed) for seed in range(5)]
    return [float(row[name]) for row in own]


def test_committed_results_keep_what_they_are_quoted_for() -> None:
    def robust(method: str) -> float:
        return sum(column("adversarial_digits", "radius 0.1", method=method)) / 5

    assert robust("GDmax") > robust("plain training") + 20
    assert robust("PerturbedGDmax") == pytest.approx(robust("GDmax"), abs=1)
    assert robust("GDmax from 0") < 12 and robust("PerturbedGDmax from 0") == pytest.approx(robust("GDmax"), abs=1)

    assert min(column("gan_mixture", "modes", method="SGDA")) == 8
    plain, escaping = (
        column("gan_mixture", "good samples", method=f"Adam, {how}") for how in ("torch loop", "escaping")
    )
    assert all(ours <= theirs for ours, theirs in zip(escaping, plain, strict=True))

    spread, stuck, free = (
        column("optimal_transport", "cost", method=method, start=start)
        for method, start in (("GDmax", "spread"), ("GDmax", "one point"), ("PerturbedGDmax", "one point"))
    )
    assert min(stuck) > 3 * max(spread) and free == pytest.approx(spread, abs=1e-3)

    gaps = [column("actor_critic", "gap", method=method) for method in actor_critic.COLORS]
    assert all(first < second <= third for first, second, third in zip(*gaps, strict=True))
