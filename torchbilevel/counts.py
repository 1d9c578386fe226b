"""Oracle calls, as the papers count them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torchbilevel.samples import Sample


@dataclass
class Counts:
    """Oracle calls so far, and the data points they touched (calls times samples), as the papers count them.

    Attributes:
        upper_gradients: gradients of f (grad_x and grad_y together count once); Gc(f) in samples.
        lower_gradients: gradients of g in y; Gc(g) in samples. A minimax problem has one loss and counts under f.
        hessian_products: products g_yy s; HV(g) in samples.
        jacobian_products: products g_xy s; JV(g) in samples.
        lagrangian_products: products with the second derivatives of f - <z, g_y> in (x, y) (curvature only).
        upper_values: evaluations of f alone, without a gradient.
        calls: all of these.
        samples: all data points.
    """

    upper_gradients: int = 0
    lower_gradients: int = 0
    hessian_products: int = 0
    jacobian_products: int = 0
    lagrangian_products: int = 0
    upper_values: int = 0
    upper_gradient_samples: int = 0
    lower_gradient_samples: int = 0
    hessian_product_samples: int = 0
    jacobian_product_samples: int = 0
    lagrangian_product_samples: int = 0
    upper_value_samples: int = 0

    @property
    def calls(self) -> int:
        """All oracle calls."""
        return sum(count for name, count in vars(self).items() if not name.endswith("_samples"))

    @property
    def samples(self) -> int:
        """All data points that they touched."""
        return sum(count for name, count in vars(self).items() if name.endswith("_samples"))

    def add(self, kind: str, sample: Sample, calls: int = 1) -> None:
        """Count ``calls`` oracle calls of one kind (``"upper_gradient"``, ...) on a sample."""
        tally = vars(self)  # in every evaluation, where getattr and setattr would show
        tally[f"{kind}s"] += calls
        tally[f"{kind}_samples"] += calls * sample.size

    def include(self, other: Counts) -> None:
        """Add the calls that another oracle counted."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def state_dict(self) -> dict[str, int]:
        """All counters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set all counters by name."""
        for f in fields(self):
            setattr(self, f.name, int(state[f.name]))
