"""Spoken digits: a small encoder with attention over frames, tested on voices it never heard.

    python examples/spoken_digits.py
    python examples/spoken_digits.py --make     # speak the data again (needs espeak-ng)

Data: the words zero to nine by espeak-ng in 24 voices and two tempi, as 20 mel bands a frame of
12 ms (examples/data/spoken_digits.npz); six voices are held out.  Baseline: the nearest mean
spectrum.  The picture shows which frames the model listened to.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import wave
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import learned, options, plt, save, steps
from torch import nn

from attn_ext import inspect
from attn_ext.nn import AttentionPooling, MultiheadAttention

DATA = Path(__file__).parent / "data" / "spoken_digits.npz"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VARIANTS = ["m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f5"]
VOICES = [f"{accent}+{v}" for v in VARIANTS for accent in ("en-us", "en-gb")]
HELD_OUT = {v for v in VOICES if v.split("+")[1] in ("m3", "m7", "f2")}  # in neither accent heard
BANDS, WIDTH, HEADS = 20, 64, 4


def mel(rate: int, bins: int) -> torch.Tensor:
    """[BANDS, bins]: triangles, evenly spaced in mel from 100 Hz to 7 kHz"""
    edges = 700 * (10 ** (torch.linspace(150, 2700, BANDS + 2) / 2595) - 1)
    f = torch.linspace(0, rate / 2, bins)
    up = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(up, down).clamp_min(0)


def speak(word: str, voice: str, speed: int) -> np.ndarray:
    """uint8 [frames, BANDS]: log mel energies of the word, 0.5 dB a step, silence cut off"""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", word]
    with wave.open(
        io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)
    ) as w:
        rate, samples = w.getframerate(), np.frombuffer(w.readframes(10**7), np.int16)
    x = torch.from_numpy(samples.astype(np.float32) / 32768)
    size, hop = int(rate * 0.025), int(rate * 0.012)
    power = torch.stft(x, size, hop, window=torch.hann_window(size), return_complex=True)
    decibel = 10 * (mel(rate, size // 2 + 1) @ power.abs().square() + 1e-6).log10().T
    loud = (decibel.mean(1) > decibel.mean(1).max() - 35).nonzero()
    decibel = decibel[loud[0, 0] : loud[-1, 0] + 1]
    return ((decibel - decibel.max() + 80).clamp(0, 80) * 2).round().byte().numpy()


def make() -> None:
    spoken = [(v, n, speak(WORDS[n], v, s)) for v in VOICES for n in range(10) for s in (140, 190)]
    frames = np.concatenate([x for *_, x in spoken])
    lengths = np.array([len(x) for *_, x in spoken], np.int32)
    labels = np.array([n for _, n, _ in spoken], np.uint8)
    voices = np.array([VOICES.index(v) for v, *_ in spoken], np.uint8)
    np.savez_compressed(DATA, frames=frames, lengths=lengths, labels=labels, voices=voices)


def load():
    """x [N, longest, BANDS], which frames there are [N, longest], labels [N], held out [N]"""
    data = np.load(DATA)
    lengths = torch.from_numpy(data["lengths"]).long()
    frames = torch.from_numpy(data["frames"]).float() / 40 - 2
    x = nn.utils.rnn.pad_sequence(frames.split(lengths.tolist()), batch_first=True)
    there = torch.arange(x.shape[1]) < lengths[:, None]
    held = torch.tensor([VOICES[v] in HELD_OUT for v in data["voices"]])
    return x, there, torch.from_numpy(data["labels"]).long(), held


class Listener(nn.Module):
    """Frames -> convolution -> self-attention -> additive pooling -> 10 logits"""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv1d(BANDS, WIDTH, 5, padding=2)
        self.position = nn.Parameter(torch.randn(256, WIDTH) * 0.1)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.drop, self.pool = nn.Dropout(0.2), AttentionPooling(WIDTH, 1, score="additive")
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x, there):
        x = F.gelu(self.front(x.transpose(1, 2))).transpose(1, 2) + self.position[: x.shape[1]]
        y = self.norm(x)
        x = x + self.attention(y, y, y, key_padding_mask=~there, need_weights=False)[0]
        return self.out(self.drop(self.pool(x, mask=there)))


def means(x, there):
    return (x * there[..., None]).sum(1) / there.sum(1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--make", action="store_true", help="speak the data again with espeak-ng")
    chosen = options(__doc__, "spoken_digits", parser)
    if chosen.make:
        make()
    x, there, labels, held = load()
    train = (~held).nonzero().flatten()
    model, total = Listener(), 100 if chosen.short else 400
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    for _, say in steps(total):
        rows = train[torch.randint(len(train), (32,))]
        batch = x[rows] + 0.2 * torch.randn(32, 1, BANDS) + 0.2 * torch.randn_like(x[rows])
        loss = F.cross_entropy(model(batch, there[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        say(f"loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(x[held], there[held]).argmax(1) == labels[held]).float().mean().item()
    average = means(x, there)
    centers = torch.stack([average[train][labels[train] == n].mean(0) for n in range(10)])
    base = (torch.cdist(average[held], centers).argmin(1) == labels[held]).float().mean().item()

    figure, axes = plt.subplots(2, 3, figsize=(9, 4))
    for axis, n in zip(axes.flat, (0, 3, 4, 6, 7, 9), strict=True):
        i = int((held & (labels == n)).nonzero()[0])
        length = int(there[i].sum())
        with inspect.record(model, ("column_mass",)) as seen, torch.no_grad():
            model(x[i : i + 1, :length], there[i : i + 1, :length])
        heard = seen.calls[-1].column_mass[0].mean(0)
        axis.imshow(x[i, :length].T, origin="lower", aspect="auto", cmap="gray_r")
        axis.plot(heard / heard.max() * (BANDS - 2), color="tab:orange")
        axis.set_title(f'"{WORDS[n]}" and what was attended to', fontsize=8)
        axis.axis("off")
    save(figure, chosen.out / "spoken_digits.png")
    learned("accuracy on unheard voices", accuracy, base, 0.6 if chosen.short else 0.9)


if __name__ == "__main__":
    main()
