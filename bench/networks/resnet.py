"""Residual networks (arXiv:1512.03385, table 1): ResNet-18, and ResNet-50 v1.5 with its stride in the 3x3 convolution.

Names of parameters and buffers are torchvision's, so its checkpoints load. The forward is written as such models
usually are, as that is what swapping and compiling meet: one in-place ReLU per block, used several times.
"""

from typing import ClassVar

from torch import Tensor, nn

WIDTH = 64
CLASSES = 1000


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: `[N, inputs, H, W]` to `[N, width, H / stride, W / stride]`."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        activated: Tensor = self.relu(out)
        return activated


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut: `[N, inputs, H, W]` to `[N, 4 * width, H / stride, W / stride]`."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        activated: Tensor = self.relu(out)
        return activated


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """`[N, 3, H, W]` to `[N, classes]`; the grid of layer 1 is H / 4 x W / 4, each later layer halves it.

    `width` is the number of channels of the stem; layer `i` has `width * 2**(i - 1)` within its blocks.
    """

    def __init__(self, block: Block, depths: tuple[int, int, int, int], classes: int, width: int, zero: bool) -> None:
        if classes < 1 or width < 1:
            raise ValueError(f"expected classes and width of at least 1, got {classes} and {width}")
        super().__init__()
        self.conv1 = conv(3, width, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        outputs = width * block.expansion
        self.layer1 = layer(block, depths[0], width, width, stride=1)
        self.layer2 = layer(block, depths[1], outputs, width * 2, stride=2)
        self.layer3 = layer(block, depths[2], outputs * 2, width * 4, stride=2)
        self.layer4 = layer(block, depths[3], outputs * 4, width * 8, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(outputs * 8, classes)
        self._initialize(zero)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits

    def _initialize(self, zero_init_residual: bool) -> None:
        """Kaiming normal by fan-out. Zero: the last scale of each block is 0, so that it starts as its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)


def resnet18(*, classes: int = CLASSES, width: int = WIDTH, zero_init_residual: bool = False) -> ResNet:
    """11,689,512 parameters and 20 batch norm layers at the default sizes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, width, zero_init_residual)


def resnet50(*, classes: int = CLASSES, width: int = WIDTH, zero_init_residual: bool = False) -> ResNet:
    """25,557,032 parameters and 53 batch norm layers at the default sizes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, width, zero_init_residual)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Pads such that stride 1 keeps the grid. Batch norm follows, so there is no bias."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


def layer(block: Block, depth: int, inputs: int, width: int, stride: int) -> nn.Sequential:
    """Blocks of one grid; the first takes the stride, and its shortcut a 1x1 convolution where the shape changes."""
    outputs = width * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    first = block(inputs, width, stride, downsample)
    return nn.Sequential(first, *(block(outputs, width, 1, None) for _ in range(1, depth)))
