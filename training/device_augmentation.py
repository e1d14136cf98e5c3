"""The augmentation recipe on the train worker's device: a batch of uint8 pictures at once, each with its own draw.

The same probabilities, magnitudes and coordinates as in the read task (data_pipelines.lesion_transforms), drawn from
another generator, and in floating point throughout.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from data_pipelines.augmentation import AugmentationConfig, Recipe, recipe_of


class DeviceAugmentation:
    """Callable uint8 (N, S, S, 3) -> uint8 (N, S, S, 3) on the batch's device.

    The draws depend on (seed, epoch, rank) and the number of calls alone, so that a resumed epoch repeats them.
    """

    def __init__(self, config: AugmentationConfig, input_size: int, device: torch.device, seed: int, rank: int):
        self._full = config.recipe == "full"
        self._recipe: Recipe = recipe_of(config, input_size)
        self._device, self._seed, self._rank = device, seed, rank
        self._generator = torch.Generator(device=device)
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Begins the draws of an epoch."""
        # Any injective mix will do; a generator takes one 64-bit number.
        self._generator.manual_seed((self._seed * 1_000_003 + epoch) * 65_537 + self._rank)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        pixels = self._brightness_contrast(pixels)
        grid = self._grid(len(pixels), pixels.shape[-1])
        if self._full:
            pixels = self._blur_or_noise(pixels)
        pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
        if self._full:
            pixels = self._drop(self._colour(pixels))
        return pixels.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self._generator, device=self._device)

    def _chosen(self, count: int, probability: float) -> torch.Tensor:
        """bool (count,)."""
        return torch.rand(count, generator=self._generator, device=self._device) < probability

    def _brightness_contrast(self, pixels: torch.Tensor) -> torch.Tensor:
        recipe, count = self._recipe, len(pixels)
        on = self._chosen(count, recipe.brightness_p)
        gain = torch.where(on, 1 + self._uniform(-recipe.contrast, recipe.contrast, count), 1.0)
        lift = torch.where(on, 255 * self._uniform(-recipe.brightness, recipe.brightness, count), 0.0)
        return (pixels * gain[:, None, None, None] + lift[:, None, None, None]).clamp_(0, 255)

    def _grid(self, count: int, side: int) -> torch.Tensor:
        """float32 (count, side, side, 2): where each output pixel comes from, in grid_sample's -1 to 1."""
        axis = torch.linspace(-1, 1, side, device=self._device)
        y, x = (part.expand(count, side, side) for part in torch.meshgrid(axis, axis, indexing="ij"))
        if self._full:
            x, y = self._distort(x, y)
            x, y = self._affine(x, y)
        # The eight symmetries of the square.
        turned = self._chosen(count, 0.5)[:, None, None]
        x, y = torch.where(turned, y, x), torch.where(turned, x, y)
        signs = torch.where(self._chosen(2 * count, 0.5), 1.0, -1.0).view(2, count, 1, 1)
        return torch.stack([x * signs[0], y * signs[1]], dim=-1)

    def _affine(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        recipe, count = self._recipe, len(x)
        on = self._chosen(count, recipe.affine_p)

        def draw(low: float, high: float, otherwise: float) -> torch.Tensor:
            return torch.where(on, self._uniform(low, high, count), otherwise)[:, None, None]

        angle = draw(-math.radians(recipe.rotate), math.radians(recipe.rotate), 0.0)
        scale = draw(1 - recipe.scale, 1 + recipe.scale, 1.0)
        # A share of the side is twice that in coordinates from -1 to 1.
        x = x - draw(-2 * recipe.shift, 2 * recipe.shift, 0.0)
        y = y - draw(-2 * recipe.shift, 2 * recipe.shift, 0.0)
        cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
        return cosine * x + sine * y, cosine * y - sine * x

    def _distort(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        recipe, count = self._recipe, len(x)
        on = self._chosen(count, recipe.distortion_p)
        optical = on & self._chosen(count, 0.5)
        strength = torch.where(optical, self._uniform(-recipe.distortion, recipe.distortion, count), 0.0)
        square = (x**2 + y**2) / 4
        radial = 1 + strength[:, None, None] * (square + square**2)
        by_grid = (on & ~optical)[:, None, None]
        x_grid, y_grid = self._stretch(x), self._stretch(y)
        return torch.where(by_grid, x_grid, x * radial), torch.where(by_grid, y_grid, y * radial)

    def _stretch(self, position: torch.Tensor) -> torch.Tensor:
        """Cells of a grid get wider and narrower; the ends stay."""
        recipe, count = self._recipe, len(position)
        widths = 1 + self._uniform(-recipe.distortion, recipe.distortion, count, recipe.grid_steps)
        edges = F.pad(torch.cumsum(widths, dim=1) / widths.sum(dim=1, keepdim=True), (1, 0))
        cell = (position + 1) / 2 * recipe.grid_steps
        low = cell.floor().clamp(max=recipe.grid_steps - 1)
        index = low.long().flatten(1)
        start, end = (torch.gather(edges, 1, index + step).view_as(cell) for step in (0, 1))
        return (start + (cell - low) * (end - start)) * 2 - 1

    def _blur_or_noise(self, pixels: torch.Tensor) -> torch.Tensor:
        recipe, count = self._recipe, len(pixels)
        on = self._chosen(count, recipe.blur_or_noise_p)
        blurred = on & self._chosen(count, 0.5)
        std = torch.where(on & ~blurred, 255 * self._uniform(*recipe.noise_std, count), 0.0)
        noise = torch.randn(pixels.shape, generator=self._generator, device=self._device)
        return (self._blur(pixels, blurred) + noise * std[:, None, None, None]).clamp_(0, 255)

    def _blur(self, pixels: torch.Tensor, blurred: torch.Tensor) -> torch.Tensor:
        """Separable Gaussian, one kernel per picture; a kernel of one point leaves a picture as it is."""
        recipe, count = self._recipe, len(pixels)
        reach = recipe.blur_sizes[1] // 2
        sigma = self._uniform(*recipe.blur_sigma, count)
        half = torch.where(self._chosen(count, 0.5), recipe.blur_sizes[0] // 2, reach)
        steps = torch.arange(-reach, reach + 1, device=self._device)
        kernel = torch.exp(-0.5 * (steps / sigma[:, None]) ** 2) * (steps.abs() <= half[:, None])
        kernel = torch.where(blurred[:, None], kernel, (steps == 0).float())
        kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
        planes = pixels.reshape(1, count * 3, *pixels.shape[2:])
        for shape in ((-1, 1, 1, 2 * reach + 1), (-1, 1, 2 * reach + 1, 1)):
            pad = (reach, reach, 0, 0) if shape[-1] > 1 else (0, 0, reach, reach)
            planes = F.conv2d(F.pad(planes, pad, mode="reflect"), kernel.view(shape), groups=count * 3)
        return planes.view_as(pixels)

    def _colour(self, pixels: torch.Tensor) -> torch.Tensor:
        recipe, count = self._recipe, len(pixels)
        on = self._chosen(count, recipe.colour_p)[:, None, None]
        hue, saturation, value = _to_hsv(pixels / 255)

        def draw(limit: float, unit: float) -> torch.Tensor:
            return self._uniform(-limit / unit, limit / unit, count)[:, None, None]

        hue = (hue + draw(recipe.hue, 180)) % 1.0
        saturation = (saturation + draw(recipe.saturation, 255)).clamp(0, 1)
        value = (value + draw(recipe.value, 255)).clamp(0, 1)
        return torch.where(on[:, None], _to_rgb(hue, saturation, value) * 255, pixels)

    def _drop(self, pixels: torch.Tensor) -> torch.Tensor:
        recipe, count, side = self._recipe, len(pixels), pixels.shape[-1]
        on = self._chosen(count, recipe.hole_p)
        corner = self._uniform(0, side - recipe.hole + 1, 2, count).floor()
        step = torch.arange(side, device=self._device)
        inside = [(step >= at[:, None]) & (step < at[:, None] + recipe.hole) for at in corner]
        hole = inside[0][:, :, None] & inside[1][:, None, :] & on[:, None, None]
        return pixels.masked_fill(hole[:, None], 0.0)


def _to_hsv(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hue, saturation and value, each float (N, H, W) in 0-1, of RGB float (N, 3, H, W) in 0-1."""
    red, green, blue = rgb.unbind(1)
    value, which = rgb.max(dim=1)
    spread = value - rgb.amin(dim=1)
    safe = spread.clamp(min=1e-8)
    sectors = torch.stack([(green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4])
    hue = torch.gather(sectors, 0, which[None])[0] / 6 % 1.0
    return hue, spread / value.clamp(min=1e-8), value


def _to_rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Inverse of `_to_hsv`: value - value * saturation * max(0, min(k, 4 - k, 1)) with k = (n + 6 hue) mod 6."""
    planes = []
    for shift in (5, 3, 1):
        sector = (shift + 6 * hue) % 6
        planes.append(value - value * saturation * torch.minimum(sector, 4 - sector).clamp(0, 1))
    return torch.stack(planes, dim=1)
