"""How the loss bends, and how many directions a network can move its outputs in.

These take functions of the parameters, since they differentiate them: ``loss(params) -> []`` or
``forward(params) -> [samples, outputs]``, params by name, as :func:`torch.func.functional_call` evaluates them. A
network in training mode that draws random numbers or updates statistics should be put into evaluation first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from perennial.metrics.ranks import eigenvalues, rank_of_shares
from perennial.metrics.statistics import wide_dtype

_SMALL = 1024
"""Parameters up to which a Hessian is written out."""

_LARGEST_JACOBIAN = 1 << 32
"""Bytes."""


def sharpness(
    loss: Callable[[dict[str, Tensor]], Tensor],
    params: Mapping[str, Tensor],
    *,
    iterations: int = 200,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    r"""The largest eigenvalue of the Hessian of a loss, :math:`\lambda_{\max}(\nabla^2 L)`.

    By the Lanczos method with full reorthogonalisation, each iteration of which costs a product of the Hessian with a
    vector, about two gradients. It ends when the residual says that an eigenvalue lies within the tolerance.

    Sources: Lanczos (1950); as a measure of plasticity: Lyle et al. (arXiv 2303.01486).

    Args:
        loss: the loss [] as a function of the parameters, any that torch can differentiate twice.
        params: the parameters by name.
        iterations: at most. A warning says if they were not enough.
        tolerance: residual by the eigenvalue's magnitude.
        seed: of the first vector; the global random state is not touched.

    Returns:
        [], in the parameters' dtype.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    product, start = _hessian(loss, params, seed)
    found = _lanczos(product, start, min(iterations, start.numel()), tolerance)
    if found.residual > tolerance and len(found.values) < start.numel():
        warnings.warn(
            f"the largest eigenvalue is known to {found.residual:.1g} of its size only after {iterations} iterations; "
            "give more iterations, or a larger tolerance",
            stacklevel=2,
        )
    return found.values[-1].to(start.dtype)


def hessian_effective_rank(
    loss: Callable[[dict[str, Tensor]], Tensor],
    params: Mapping[str, Tensor],
    *,
    probes: int = 8,
    iterations: int = 64,
    seed: int = 0,
) -> Tensor:
    r"""The effective rank of the Hessian of a loss: :math:`\exp(-\sum_i p_i \ln p_i)` with
    :math:`p_i = |\lambda_i| / \sum_k |\lambda_k|`.

    Written with traces it is :math:`\exp(\ln S - T / S)`, :math:`S = \operatorname{tr} |H|`,
    :math:`T = \operatorname{tr}\, |H| \ln |H|`. Of networks of up to 1,024 parameters the Hessian is written out, and
    the result is exact; of larger ones the traces are estimated by stochastic Lanczos quadrature.

    Sources: Lewandowski et al. (arXiv 2312.00246) and He et al. (arXiv 2509.22335), who find that it falls when
    plasticity is lost; quadrature: Ubaru, Chen and Saad (2017).

    Args:
        loss: the loss [] as a function of the parameters, any that torch can differentiate twice.
        params: the parameters by name.
        probes: random vectors of the estimate.
        iterations: of the Lanczos method for each.
        seed: of the random vectors; the global random state is not touched.

    Returns:
        [], float64, in [0, parameters]; 0 for a loss without curvature.
    """
    if probes < 1 or iterations < 1:
        raise ValueError(f"probes is {probes} and iterations is {iterations}; both must be at least 1")
    product, start = _hessian(loss, params, seed)
    wide = wide_dtype(start)
    size = start.numel()
    if size <= _SMALL:
        columns = vmap(product)(torch.eye(size, dtype=start.dtype, device=start.device)).to(wide)
        return rank_of_shares(eigenvalues((columns + columns.T) / 2).abs())
    total = weighted = torch.zeros((), dtype=wide, device=start.device)
    for number in range(probes):
        probe = start if number == 0 else _direction(start, seed + number)
        found = _lanczos(product, probe, min(iterations, size), 0.0)
        magnitude = found.values.abs()
        total = total + (found.weights * magnitude).sum() * size / probes
        weighted = weighted + (found.weights * torch.xlogy(magnitude, magnitude)).sum() * size / probes
    return torch.where(total > 0, (torch.log(total) - weighted / total).exp(), 0.0 * total)


def ntk_effective_rank(forward: Callable[[dict[str, Tensor]], Tensor], params: Mapping[str, Tensor]) -> Tensor:
    r"""The effective rank of the neural tangent kernel on a batch: :math:`\exp(-\sum_i p_i \ln p_i)` with
    :math:`p_i = \lambda_i / \sum_k \lambda_k`, :math:`\lambda` the eigenvalues of :math:`J J^\top`, J the derivative of
    every output of every sample by all parameters.

    It says in how many independent ways a small step can move the outputs.

    Source: Lyle et al. (arXiv 2402.18762); the effective rank of Roy and Vetterli (2007).

    Args:
        forward: the outputs [samples, outputs] as a function of the parameters, on a batch.
        params: the parameters by name.

    Returns:
        [], float64, in [0, samples x outputs].

    Raises:
        ValueError: the derivatives would take more than 4 GiB.
    """
    held = {name: w.detach() for name, w in params.items()}
    out, pull = vjp(lambda p: forward(p).flatten(), held)  # type: ignore[misc]
    size = sum(w.numel() for w in held.values())
    if (needed := out.numel() * size * out.element_size()) > _LARGEST_JACOBIAN:
        raise ValueError(
            f"the derivatives of {out.numel()} outputs by {size:,} parameters take {needed / 2**30:.0f} GiB; give a "
            "batch of fewer samples, or parameters of fewer layers"
        )
    rows = vmap(lambda v: pull(v)[0], chunk_size=64)(torch.eye(out.numel(), dtype=out.dtype, device=out.device))
    wide = wide_dtype(out)
    kernel = sum((j.flatten(1).to(wide) @ j.flatten(1).to(wide).T for j in rows.values()), torch.zeros_like(out[0]))
    values = eigenvalues(kernel).clamp(min=0)
    return rank_of_shares(torch.where(values <= values[-1] * 1e-12, 0.0, values))


class _Ritz(NamedTuple):
    values: Tensor
    """[k], ascending: eigenvalues of the Hessian, approximately; the outermost first to be right."""
    weights: Tensor
    """[k]: the squared first component of each eigenvector of the small matrix."""
    residual: float
    """Of the largest, by its magnitude."""


def _hessian(
    loss: Callable[[dict[str, Tensor]], Tensor], params: Mapping[str, Tensor], seed: int
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The product with a flat vector, and a first vector."""
    held = {name: w.detach() for name, w in params.items()}
    if not held:
        raise ValueError("there are no parameters; give those whose loss is to be looked at")
    sizes = [w.numel() for w in held.values()]
    _, pull = vjp(grad(loss), held)  # type: ignore[misc]

    def product(vector: Tensor) -> Tensor:
        parts = vector.split(sizes)
        shaped = {n: part.reshape(w.shape) for part, (n, w) in zip(parts, held.items(), strict=True)}
        (found,) = pull(shaped)
        return torch.cat([found[name].flatten() for name in held])

    like = next(iter(held.values()))
    return product, _direction(like.new_empty(sum(sizes)), seed)


def _direction(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.numel(), generator=generator, dtype=torch.float64).to(like)


def _lanczos(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float) -> _Ritz:
    """Of the symmetric operator, from a vector; ends early where the largest eigenvalue is known."""
    wide = wide_dtype(start)
    basis = [(start / start.norm()).to(wide)]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        image = product(basis[-1].to(start.dtype)).to(wide)
        diagonal.append(basis[-1] @ image)
        span = torch.stack(basis)
        for _ in range(2):  # twice is enough (Parlett)
            image = image - span.T @ (span @ image)
        rest = image.norm()
        if not bool(torch.isfinite(rest)):
            return _Ritz(torch.full_like(rest[None], torch.nan), torch.ones_like(rest[None]), 0.0)
        small = torch.diag(torch.stack(diagonal))
        if beside:
            off = torch.stack(beside)
            small = small + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(small)
        scale = float(values.abs().amax())
        residual = float(rest * vectors[-1, -1].abs()) / max(abs(float(values[-1])), 1e-30)
        # The space is used up: what is left of the image is rounding of the products.
        exhausted = float(rest) <= 10 * torch.finfo(start.dtype).eps * max(scale, 1e-30)
        if exhausted or len(diagonal) == iterations or residual < tolerance:
            return _Ritz(values, vectors[0].square(), 0.0 if exhausted else residual)
        beside.append(rest)
        basis.append(image / rest)
