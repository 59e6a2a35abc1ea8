"""MeanFlow: digits from noise in one step, trained by a directional derivative of the network.

    python examples/meanflow.py

Data: scikit-learn's load_digits, 1797 images of 8 x 8; every fifth is held out.  u(z, r, t), the
mean velocity between the times r and t, is trained to be v - (t - r) du/dt, and du/dt is a forward
derivative (Geng et al., arXiv 2505.13447).  Held out: the mean distance of a generated image to
the nearest held-out digit.  Baseline: that of noise.
"""

from __future__ import annotations

import torch
from common import learned, options, plt, save, steps
from sklearn.datasets import load_digits
from torch import nn
from twice import Block, run_both

WIDTH, HEADS, PATCHES, BATCH = 48, 3, 16, 128


class Velocity(nn.Module):
    """z [B, 16, 4] and times r, t [B] -> velocities [B, 16, 4]"""

    def __init__(self, attend):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.place = nn.Parameter(0.1 * torch.randn(PATCHES, WIDTH))
        self.time = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, attend) for _ in range(2))
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, z, r, t):
        h = self.embed(z) + self.place + self.time(torch.stack([r, t - r], -1))[:, None]
        for block in self.blocks:
            h = block(h)
        return self.out(h)


def loss_of(model, x):
    """The squared error of the mean velocity, weighted so that its size does not matter."""
    noise, ends = torch.randn_like(x), torch.rand(2, len(x))
    t, r = ends.amax(0), ends.amin(0)
    r = torch.where(torch.rand(len(x)) < 0.5, t, r)
    at = lambda time: time[:, None, None]  # noqa: E731
    z, v = (1 - at(t)) * x + at(t) * noise, noise - x
    u, du = torch.func.jvp(model, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    error = (u - (v - at(t - r) * du).detach()).square().sum((1, 2))
    return (error / (error.detach() + 1e-2)).mean(), error.mean().item()


def main() -> None:
    chosen = options(__doc__, "meanflow")
    images = torch.tensor(load_digits().data, dtype=torch.float32).view(-1, PATCHES, 4) / 8 - 1
    is_held = torch.arange(len(images)) % 5 == 0
    held, x = images[is_held].flatten(1), images[~is_held]
    total, samples = 30 if chosen.short else 1500, {}

    def distance(found):
        return torch.cdist(found.flatten(1), held).amin(1).mean().item()

    def train(attend):
        model, losses = Velocity(attend), []
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _, say in steps(total):
            loss, error = loss_of(model, x[torch.randint(len(x), (BATCH,))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(error)
            say(f"squared error {error:.2f}")
        with torch.no_grad():
            noise = torch.randn(500, PATCHES, 4)
            samples[attend] = noise - model(noise, torch.zeros(500), torch.ones(500))
        return distance(samples[attend]), losses

    both = run_both(train)
    figure, axes = plt.subplots(2, 8, figsize=(8, 2.2))
    for axis, image in zip(axes.flat, next(iter(samples.values())), strict=False):
        axis.imshow(image.view(8, 8), cmap="gray_r", vmin=-1, vmax=1)
        axis.set_axis_off()
    save(figure, chosen.out / "meanflow.png")
    base = distance(torch.randn(500, PATCHES, 4))
    goal = (0.95 if chosen.short else 0.6) * base
    learned("distance to a digit", both["attn_ext"][0], base, goal, higher=False)


if __name__ == "__main__":
    main()
