"""What the factors of a product see, held against inputs that were run through them."""

from __future__ import annotations

import torch

from modelzip.compressors.factorize.statistics import factor_hessian


def test_left_sees_the_second_moment_of_what_right_makes_of_the_inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator) * torch.randn(12, generator=generator).exp()
    right = torch.randn(5, 12, generator=generator)
    hidden = (x @ right.T).double()
    truth = hidden.T @ hidden / len(x)
    made = factor_hessian(x.T @ x / len(x), right)
    assert made.dtype == torch.float32
    assert torch.equal(made, made.T)
    assert float((made.double() - truth).norm() / truth.norm()) < 1e-5  # measured: 9e-8
