"""MobileNetV2 (arXiv:1801.04381, table 2). Names of parameters and buffers are torchvision's."""

from torch import Tensor, nn

CLASSES = 1000
DROPOUT = 0.2
STEM = 32
HEAD = 1280
# Expansion, channels, repeats, stride of the first one.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by 3x3, project by 1x1 without activation (the "linear bottleneck").

    `[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`; adds its input where the shapes agree.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([unit(inputs, hidden, 1)] if expansion != 1 else []),
            unit(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x) if self.residual else self.conv(x)
        return out


class MobileNetV2(nn.Module):
    """`[N, 3, H, W]` to `[N, classes]`; 3,504,872 parameters and 52 batch norm layers at the default sizes.

    The grid of the last features is H / 32 x W / 32. `width` multiplies the channels of all layers but, below 1,
    not those of the last convolution, as in the paper.
    """

    def __init__(self, *, classes: int = CLASSES, width: float = 1.0) -> None:
        if classes < 1 or width <= 0:
            raise ValueError(f"expected classes of at least 1 and width above 0, got {classes} and {width}")
        super().__init__()
        channels = in_eights(STEM * width)
        features: list[nn.Module] = [unit(3, channels, 3, stride=2)]
        for expansion, base, repeats, first_stride in STAGES:
            outputs = in_eights(base * width)
            for stride in (first_stride, *[1] * (repeats - 1)):
                features.append(InvertedResidual(channels, outputs, stride, expansion))
                channels = outputs
        head = in_eights(HEAD * max(1.0, width))
        features.append(unit(channels, head, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(head, classes))
        self._initialize()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU6; stride 1 keeps the grid."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


def in_eights(channels: float) -> int:
    """The nearest multiple of 8, or the next one if that would take away more than a tenth."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8
