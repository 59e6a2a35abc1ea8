"""A gradient penalty: a classifier whose answer a small change of the image does not turn.

    python examples/gradient_penalty.py

Data: scikit-learn's load_digits, 1797 images of 8 x 8; every fifth is held out.  The penalty is the
squared norm of the loss's gradient in the pixels, so that training differentiates it again.  Held
out: the accuracy on images that were changed by 0.15 of their range in each pixel against the
answer.  Baseline: the same training without the penalty.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import learned, options, plt, save, steps
from sklearn.datasets import load_digits
from torch import nn
from twice import Block, ours, run_both

WIDTH, HEADS, PATCHES, BATCH, CHANGE = 48, 3, 16, 64, 0.3


class Classifier(nn.Module):
    """Images [B, 16, 4] in -1 .. 1 -> logits [B, 10]"""

    def __init__(self, attend):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.place = nn.Parameter(0.1 * torch.randn(PATCHES, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, attend) for _ in range(2))
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x):
        h = self.embed(x) + self.place
        for block in self.blocks:
            h = block(h)
        return self.out(h.mean(1))


def loss_and_gradient(model, x, labels, create_graph: bool):
    """(mean cross entropy, its gradient in the pixels of each image)"""
    x = x.detach().requires_grad_()
    losses = F.cross_entropy(model(x), labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=create_graph)
    return losses.mean(), gradient


def main() -> None:
    chosen = options(__doc__, "gradient_penalty")
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32).view(-1, PATCHES, 4) / 8 - 1
    labels, is_held = torch.tensor(digits.target), torch.arange(len(images)) % 5 == 0
    held, held_labels, x, y = images[is_held], labels[is_held], images[~is_held], labels[~is_held]
    total = 40 if chosen.short else 600

    def accuracy(model):
        _, gradient = loss_and_gradient(model, held, held_labels, create_graph=False)
        with torch.no_grad():
            changed = (held + CHANGE * gradient.sign()).clamp(-1, 1)
            return (model(changed).argmax(-1) == held_labels).float().mean().item()

    def train(attend, weight=3.0):
        model, losses = Classifier(attend), []
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _, say in steps(total):
            at = torch.randint(len(x), (BATCH,))
            loss, gradient = loss_and_gradient(model, x[at], y[at], create_graph=weight > 0)
            whole = loss + weight * gradient.square().sum((1, 2)).mean()
            optimizer.zero_grad()
            whole.backward() if weight else F.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()
            losses.append(loss.item())
            say(f"cross entropy {loss.item():.3f}")
        return accuracy(model), losses

    torch.manual_seed(1)
    base, plain = train(ours, 0.0)
    found, losses = run_both(train)["attn_ext"]
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.plot(plain, label=f"without the penalty: {base:.0%} of changed images")
    axes.plot(losses, label=f"with it: {found:.0%}")
    axes.set(xlabel="step", ylabel="cross entropy")
    axes.legend()
    save(figure, chosen.out / "gradient_penalty.png")
    learned("accuracy on changed images", found, base, base + (0.02 if chosen.short else 0.1))


if __name__ == "__main__":
    main()
