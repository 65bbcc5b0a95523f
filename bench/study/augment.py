"""Images of a data set on the device, made into batches there: no copy from the host, so a CUDA graph can hold it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.images import MEAN, STD, Memory

GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue in what the eye takes for brightness


@dataclass(frozen=True)
class Pixels:
    """A split on the device."""

    images: Tensor  # [N, side, side, 3] uint8: a batch gathered of it is channels_last
    labels: Tensor  # [N] int64
    constants: Tensor  # [3, 3] float32: mean and standard deviation of a byte, weights of grey; by channel

    @staticmethod
    def of(memory: Memory, device: torch.device) -> "Pixels":
        images = memory.images.to(device).permute(0, 2, 3, 1).contiguous()
        constants = torch.tensor([[255 * value for value in MEAN], [255 * value for value in STD], GREY])
        return Pixels(images, memory.labels.to(device), constants.to(device))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def side(self) -> int:
        return self.images.shape[1]

    def plain(self, chosen: slice) -> Tensor:
        """[B, 3, side, side] float32 in channels_last, normalized as `bench.images.normalized` does it."""
        return self.normalized(self.images[chosen].float())

    def augmented(self, places: Tensor, factors: Tensor) -> Tensor:
        """The same of one step's `batches.Draws`: mirrored, moved over black, distorted."""
        index, mirrored, down, right = places.unsqueeze(-1)
        along = torch.arange(self.side, device=places.device)
        rows = along + down  # [B, side]
        columns = torch.where(mirrored.bool(), self.side - 1 - along, along) + right
        last = self.side - 1
        gathered = self.images[index[:, None], rows.clamp(0, last)[:, :, None], columns.clamp(0, last)[:, None]]
        inside = ((rows >= 0) & (rows <= last))[:, :, None] & ((columns >= 0) & (columns <= last))[:, None]
        return self.normalized(self.distorted(gathered * inside[..., None], factors))

    def distorted(self, images: Tensor, factors: Tensor) -> Tensor:
        """[B, side, side, 3] bytes, distorted as floats: brightness, then contrast, then saturation."""
        brightness, contrast, saturation = factors[:, :, None, None, None]
        x: Tensor = images * brightness
        average = (x * self.constants[2]).sum(3, keepdim=True).mean((1, 2), keepdim=True)
        x = average + contrast * (x - average)
        grey = (x * self.constants[2]).sum(3, keepdim=True)
        x = grey + saturation * (x - grey)
        return x.clamp(0, 255)

    def normalized(self, x: Tensor) -> Tensor:
        return ((x - self.constants[0]) / self.constants[1]).permute(0, 3, 1, 2)
