"""Learning which weights to keep, of weights that are never trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from perennial.noise import Noise, elements, seed_key
from perennial.tickets.masks import Masks, prunable
from perennial.trainability.lanes import copied, generator, left_alone

KINDS = ("bernoulli", "top_k")


class Supermask(nn.Module):
    r"""A network with frozen weights and a trainable mask.

    ``"bernoulli"``, the supermask of Zhou et al. (NeurIPS 2019, "Deconstructing Lottery Tickets"): each weight has a
    logit s, and a training step keeps it with probability :math:`\sigma(s)`. In evaluation mode weights with
    :math:`\sigma(s) > 1/2` are kept (theirs are drawn there too, and their accuracy is the mean of ten draws; see
    :meth:`drawn`). ``"top_k"``, edge-popup of Ramanujan et al. (CVPR 2020, arXiv 1911.13299): each weight has a score
    s, and the highest share of every layer is kept. (Their released code ranks by :math:`|s|`, their paper by s.)

    .. math:: w = m \odot w_0 \cdot c, \qquad \frac{\partial m}{\partial s} := \sigma'(s) \text{ or } 1

    with the gradient passed straight through the draw, or the choice, of m. The factor c makes up for the weights that
    are missing: :math:`N / \sum m` in each layer for bernoulli, the dynamic weight rescaling of Zhou et al., through
    which the gradient passes too; :math:`\sqrt{N / \sum m}` for top_k, which is what the scaled initialisation of
    Ramanujan et al. amounts to. Example::

        supermask = Supermask(model)
        optimizer = torch.optim.Adam(supermask.parameters(), lr=0.1)
        ...  # train as any network; the logits alone change
        masks = supermask.masks()

    The network inside, ``supermask.model``, is a copy, so that the model given is left alone. Nothing in it is
    reparametrised: the masked weights are handed to its forward pass, and ``supermask.model.state_dict()`` has the keys
    of the model given and loads into it. ``supermask.state_dict()`` has those, behind ``model.``, and the logits,
    behind ``mask_logits.``, with ``/`` for the dots of a parameter's name. It has the number of draws made as well, so
    that a training that is loaded goes on as if it had not been interrupted. Weights not masked, such as biases, are
    frozen too; buffers (batch norms) are not.

    Args:
        model: the untrained network.
        kind: ``"bernoulli"`` or ``"top_k"``.
        share: of the weights kept, in (0, 1): at the start, each with this probability (bernoulli), or always (top_k,
            rounded to a whole number of every layer's weights, at least one).
        rescale: whether to multiply by c.
        signed_constant: replace each weight by its sign times the standard deviation of its layer's weights, about
            their mean.
        names: of the parameters to mask; None: those of :func:`perennial.tickets.prunable`.
        seed: of the draws of masks (bernoulli), or of the first scores (top_k).

    Raises:
        ValueError: an unknown kind or parameter, a share out of range, nothing to mask.
    """

    draws: Tensor

    def __init__(
        self,
        model: nn.Module,
        kind: str = "bernoulli",
        share: float = 0.5,
        rescale: bool = True,
        seed: int = 0,
        *,
        signed_constant: bool = False,
        names: Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; it is one of {', '.join(KINDS)}")
        if not 0 < share < 1:
            raise ValueError(f"share is {share:g}; it must be between 0 and 1, the ends left out")
        self.kind, self.share, self.rescale = kind, share, rescale
        self._key = seed_key(seed, "supermask")
        with left_alone(model):
            self.model = copied(model).requires_grad_(False)
        weights = dict(self.model.named_parameters())
        masked = tuple(prunable(self.model) if names is None else names)
        unknown = [name for name in masked if name not in weights]
        if unknown or not masked:
            raise ValueError(
                f"the model has no parameters named {', '.join(unknown)}; it has {', '.join(weights)}"
                if unknown
                else "there are no weights to mask: the model has none with two dimensions or more; give names="
            )
        self.mask_logits = nn.ParameterDict()
        for name in masked:
            w = weights[name]
            if signed_constant:
                w.copy_(w.sign() * w.std(correction=0))
            self.mask_logits[_key(name)] = nn.Parameter(self._first(name, w, seed))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int32))
        self._masked = masked
        self.train(model.training)

    @property
    def logits(self) -> dict[str, nn.Parameter]:
        """What is trained, by the name of the parameter that it masks, its shape: logits, or scores of top_k."""
        return {name: self.mask_logits[_key(name)] for name in self._masked}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives with its weights masked: by a new draw in training mode if the kind is bernoulli,
        otherwise by :meth:`masks`."""
        drawing = self.training and self.kind == "bernoulli"
        masks = self.drawn(int(self.draws)) if drawing else self.masks()
        if drawing:
            self.draws += 1
        held = dict(self.model.named_parameters())
        return functional_call(
            self.model,
            {name: self._weight(held[name], masks[name], s) for name, s in self.logits.items()},
            args,
            kwargs,
        )

    def masks(self) -> Masks:
        """The masks as they are now, bool by parameter name; True is kept."""
        if self.kind == "bernoulli":
            return {name: s.detach() > 0 for name, s in self.logits.items()}
        found = {}
        for name, s in self.logits.items():
            count = max(1, round(self.share * s.numel()))
            mask = torch.zeros(s.numel(), dtype=torch.bool, device=s.device)
            mask[s.detach().flatten().topk(count).indices] = True
            found[name] = mask.view(s.shape)
        return found

    def drawn(self, number: int) -> Masks:
        """Masks of which each weight is drawn with its probability: a function of seed, number and name; bernoulli."""
        if self.kind != "bernoulli":
            raise ValueError(f"the masks of {self.kind} are not drawn; use masks()")
        found = {}
        for name, s in self.logits.items():
            key = torch.tensor(self._key, dtype=torch.int32, device=s.device)
            noise = Noise(key, torch.full_like(key[0], number), "supermask")
            found[name] = noise.uniform(name, elements(s)) < s.detach().sigmoid()
        return found

    def _weight(self, weight: Tensor, mask: Tensor, s: Tensor) -> Tensor:
        """What stands in for a weight, of which the gradient reaches s."""
        soft = s.sigmoid() if self.kind == "bernoulli" else s
        m = mask.to(weight.dtype) + (soft - soft.detach()).to(weight.dtype)
        if not self.rescale:
            return weight * m
        if self.kind == "top_k":
            return weight * m * math.sqrt(mask.numel() / int(mask.sum()))
        # Where none is kept all is 0, whatever the factor.
        return weight * m * (mask.numel() / m.sum().clamp(min=1))

    def _first(self, name: str, weight: Tensor, seed: int) -> Tensor:
        if self.kind == "bernoulli":
            return torch.full_like(weight, math.log(self.share / (1 - self.share)))
        # As torch draws the weights of a layer, which is how the paper's code draws scores.
        bound = 1 / math.sqrt(weight[0].numel())
        rng = generator(seed, f"supermask {name}")
        drawn = torch.rand(weight.shape, generator=rng, dtype=torch.float64)
        return (2 * drawn - 1).mul(bound).to(weight)


def _key(name: str) -> str:
    """A name of a parameter as that of a module's own, which must not have dots."""
    return name.replace(".", "/")
