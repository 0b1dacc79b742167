"""The ResNet-18 of the papers' class-incremental CIFAR-100."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., CVPR 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels_in, height, width] -> [batch, channels, height / stride, width / stride]."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for images of about 32 x 32: a 3x3 stem of stride 1 and no pooling behind it, as Dohare et al. (Nature,
    2024) use it. Weights are Kaiming-normal, those of the last layer without the factor for ReLU; its biases are zero.
    The paper's convolutions have biases, which the batch normalisation behind each subtracts again; here are none.

    Args:
        classes: outputs.
        width: channels of the first stage; 64 in the paper.
    """

    def __init__(self, classes: int = 100, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.draw_head()

    def draw_head(self) -> None:
        """Draw the last layer anew."""
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="linear")
        nn.init.zeros_(self.fc.bias)

    def features(self, x: Tensor) -> Tensor:
        """Images [batch, 3, height, width] -> what the last layer reads, [batch, 8 width]."""
        h: Tensor = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return h.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images [batch, 3, height, width] -> logits [batch, classes]."""
        out: Tensor = self.fc(self.features(x))
        return out
