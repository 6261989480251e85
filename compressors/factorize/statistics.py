"""What the factors of a product are fed, where the factors are to be compressed in their turn."""

from __future__ import annotations

from torch import Tensor


def factor_hessian(hessian: Tensor, right: Tensor) -> Tensor:
    """The Hessian of left's inputs, [rank, rank], from that of right's, [in, in]; right: [rank, in].

    W x = left (right x), so right is fed x and left is fed right x: the mean of (R x)(R x)ᵀ is R H Rᵀ. right: as it is
    after its own compression, since that is what feeds left.
    """
    product = right.to(hessian.dtype) @ hessian @ right.to(hessian.dtype).T
    return (product + product.T) / 2
