"""Energy and forces of a cluster of 13 atoms: the loss holds a gradient, training differentiates it
again.

    python examples/forces.py

Data: Lennard-Jones clusters around a piece of a cubic lattice.  Attention between atoms has a bias
that a small network makes of their distance; the forces are -dE/dx.  Held out: the mean error of a
force component in clusters that were not trained on.  Baseline: forces of 0.
"""

from __future__ import annotations

import torch
from common import learned, options, plt, save, steps
from torch import nn
from twice import Block, run_both

ATOMS, WIDTH, HEADS, BATCH = 13, 32, 2, 64
LATTICE = torch.cartesian_prod(*[torch.arange(3.0)] * 3)[:ATOMS] * 1.15


def clusters(n: int):
    """(positions [n, 13, 3], energies [n], forces [n, 13, 3])"""
    x = (LATTICE + 0.04 * torch.randn(n, ATOMS, 3)).requires_grad_()
    apart = (x[:, :, None] - x[:, None]).square().sum(-1) + torch.eye(ATOMS) * 1e6
    attraction = apart**-3
    energy = 2 * (attraction.square() - attraction).sum((1, 2))
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    return x.detach(), energy.detach(), -gradient


class Energy(nn.Module):
    """Positions [B, 13, 3] -> energies [B]"""

    def __init__(self, attend):
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.of_distance = nn.Sequential(nn.Linear(12, 32), nn.SiLU(), nn.Linear(32, HEADS))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, attend) for _ in range(2))
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x):
        x = x - x.mean(1, keepdim=True)
        apart = (x[:, :, None] - x[:, None]).square().sum(-1) + torch.eye(ATOMS)
        waves = torch.exp(-((apart.sqrt()[..., None] - torch.linspace(0.8, 3, 12)) * 4).square())
        bias = 2 * self.of_distance(waves).movedim(-1, 1)
        h = 0.3 * self.embed(x)
        for block in self.blocks:
            h = block(h, bias)
        return self.out(h).sum((1, 2))


def forces_of(model, x, create_graph: bool):
    """(energies, forces)"""
    x = x.detach().requires_grad_()
    energy = model(x)
    (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=create_graph)
    return energy, -gradient


def main() -> None:
    chosen = options(__doc__, "forces")
    x, energies, forces = clusters(512)
    held_x, _, held_forces = clusters(256)
    total = 30 if chosen.short else 1000

    def train(attend):
        model, losses = Energy(attend), []
        optimizer = torch.optim.Adam(model.parameters(), 4e-3)
        for _, say in steps(total):
            at = torch.randint(len(x), (BATCH,))
            energy, force = forces_of(model, x[at], create_graph=True)
            off = energy - (energies[at] - energies.mean())
            loss = (force - forces[at]).square().mean() + 0.01 * off.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            say(f"squared error {loss.item():.3f}")
        found = forces_of(model, held_x, create_graph=False)[1]
        return (found - held_forces).abs().mean().item(), losses

    both = run_both(train)
    error, _ = both["attn_ext"]
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for name, (_, values) in both.items():
        axes.plot(values, label=name)
    axes.set(xlabel="step", ylabel="squared error of forces", yscale="log")
    axes.legend()
    save(figure, chosen.out / "forces.png")
    base = held_forces.abs().mean().item()
    learned("error of forces", error, base, (0.95 if chosen.short else 0.5) * base, higher=False)


if __name__ == "__main__":
    main()
