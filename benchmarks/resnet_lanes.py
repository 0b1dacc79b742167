"""Lanes of a ResNet-18: one after another, or stacked by ``torch.func``, in turn in one run.

    python benchmarks/resnet_lanes.py --lanes 2 --rounds 3

A step is the gradient of a batch of 90 images of 32 x 32 and the update of SGD with momentum, batch normalisation in
training, of every lane on images of its own. It prints the median seconds of a lane's step and the ratio; above 1,
stacking costs more than it saves, and lanes of this size run one after another (``perennial.incremental``).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from perennial.resnet import ResNet18

BATCH, LR, MOMENTUM = 90, 0.1, 0.9


def one_after_another(nets: list[nn.Module], x: Tensor, y: Tensor) -> Callable[[], None]:
    """A step of every lane in a plain loop."""
    optimizers = [torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM) for net in nets]

    def step() -> None:
        for net, optimizer, images, classes in zip(nets, optimizers, x, y, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), classes).backward()
            optimizer.step()

    return step


def stacked(nets: list[nn.Module], x: Tensor, y: Tensor) -> Callable[[], None]:
    """The same step of all lanes at once."""
    params, buffers = stack_module_state(nets)
    params = {name: value.detach() for name, value in params.items()}
    moments = {name: torch.zeros_like(value) for name, value in params.items()}
    skeleton = copy.deepcopy(nets[0]).to("meta")

    def loss(own: dict[str, Tensor], kept: dict[str, Tensor], images: Tensor, classes: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(skeleton, (own, kept), (images,)), classes)

    gradients = vmap(grad_and_value(loss))

    def step() -> None:
        found, _ = gradients(params, buffers, x, y)
        for name, gradient in found.items():
            moments[name].mul_(MOMENTUM).add_(gradient)
            params[name].sub_(moments[name], alpha=LR)

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Of one call."""
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    x = torch.rand(arguments.lanes, BATCH, 3, 32, 32, device=device)
    y = torch.randint(100, (arguments.lanes, BATCH), device=device)
    nets: list[nn.Module] = [ResNet18(100).to(device).train() for _ in range(arguments.lanes)]
    again, together = one_after_another(copy.deepcopy(nets), x, y), stacked(nets, x, y)
    seconds(again, device), seconds(together, device)
    rounds = [(seconds(again, device), seconds(together, device)) for _ in range(arguments.rounds)]
    first, second = (statistics.median(times) / arguments.lanes for times in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    print(f"{arguments.lanes} lanes on {device}, {torch.get_num_threads()} threads, seconds of a lane's step")
    print(f"one after another {first:.3f}   stacked {second:.3f}   stacked / one after another {ratio:.2f}")


if __name__ == "__main__":
    main()
