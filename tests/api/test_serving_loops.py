"""Loops that serve several sequences of a model of two layers with rotary embeddings over paged
caches, written from docs/guide/decode.md: greedy, beams with an end token, drafts, trees of drafts.
Each must write what the model without a cache writes.
"""

import pytest
import torch

import attn_ext

VOCABULARY, HEADS, KV_HEADS, DIM, LAYERS, END = 53, 4, 2, 16, 2, 7
PROMPTS = [[5, 17, 3, 40], [44], [9, 9, 2, 1, 7, 8, 30]]


def rotary(x, positions):
    """x [B, H, S, D] turned by positions [B, S]."""
    angle = positions[:, None, :, None] * 10000 ** (-torch.arange(0, DIM, 2) / DIM)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Decoder:
    """Random weights, and a cache a layer for each of some sequences."""

    def __init__(self, batch):
        random = torch.Generator().manual_seed(1)
        width, narrow = HEADS * DIM, KV_HEADS * DIM
        self.embedding = torch.randn(VOCABULARY, width, generator=random)
        sizes = {"q": (width, width), "k": (width, narrow), "v": (width, narrow),
                 "o": (width, width)}  # fmt: skip
        self.layers = [
            {n: torch.randn(size, generator=random) / 8 for n, size in sizes.items()}
            for _ in range(LAYERS)
        ]
        self.caches = [
            attn_ext.KVCache(batch, KV_HEADS, DIM, max_length=64, page_size=4)
            for _ in range(LAYERS)
        ]

    def heads(self, x, layer, positions):
        """q, k, v of a layer."""
        q, k, v = ((x @ layer[n]).unflatten(-1, (-1, DIM)).transpose(1, 2) for n in "qkv")
        return rotary(q, positions), rotary(k, positions), v

    def logits(self, tokens, positions=None, counts=None, rows=None, **options):
        """Of tokens [B, S] behind what the caches hold."""
        x, seqlen = self.embedding[tokens], tokens.shape[1]
        if positions is None:
            lengths = self.caches[0].lengths
            lengths = lengths if rows is None else lengths[rows]
            positions = lengths[:, None] + torch.arange(seqlen)
            if counts is not None:
                positions = (positions - (seqlen - torch.tensor(counts))[:, None]).clamp(min=0)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            q, k, v = self.heads(x, layer, positions)
            out = cache.append(k, v, counts=counts, rows=rows).attend(q, rows=rows, **options)
            x = x + out.transpose(1, 2).flatten(2) @ layer["o"]
        return x @ self.embedding.T

    def prefill(self, prompts, rows=None):
        """Logits [B, vocabulary] after each prompt."""
        counts = [len(prompt) for prompt in prompts]
        padded = [[0] * (max(counts) - len(prompt)) + prompt for prompt in prompts]
        return self.logits(torch.tensor(padded), counts=counts, rows=rows)[:, -1]

    def whole(self, tokens):
        """Logits [S, vocabulary] of one text, without a cache and without attn_ext."""
        x, n = self.embedding[torch.tensor([tokens])], len(tokens)
        for layer in self.layers:
            q, k, v = self.heads(x, layer, torch.arange(n)[None])
            k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
            s = (q @ k.mT) / DIM**0.5
            p = s.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)
            x = x + (p @ v).transpose(1, 2).flatten(2) @ layer["o"]
        return (x @ self.embedding.T)[0]

    def greedy(self, prompt, count):
        """What it writes behind a prompt."""
        text = list(prompt)
        for _ in range(count):
            text.append(self.whole(text)[-1].argmax().item())
        return text[len(prompt) :]

    def each(self, change):
        """change(cache) of all layers."""
        for cache in self.caches:
            change(cache)


def test_greedy():
    """Positions of padded prompts; steps after the first."""
    model = Decoder(3)
    written = model.prefill(PROMPTS).argmax(-1)[:, None]
    for _ in range(7):
        tokens = model.logits(written[:, -1:])[:, -1:].argmax(-1)
        written = torch.cat([written, tokens], dim=1)
    assert written.tolist() == [model.greedy(prompt, 8) for prompt in PROMPTS]


def best(candidates, beams):
    """(ended, live) of (score, text, parent), which are in order of their scores."""
    ended, live = [], []
    for one in candidates:
        (ended if one[1][-1] == END else live).append(one)
        if len(live) == beams:
            break
    return ended, live


def beams_by_hand(model, prompt, beams, steps):
    """The best texts, without a cache."""
    live, done = [(0.0, [], 0)], []
    for _ in range(steps):
        found = []
        for score, text, _ in live:
            scores = model.whole(prompt + text)[-1].log_softmax(-1) + score
            found += [(s, [*text, token], 0) for token, s in enumerate(scores.tolist())]
        ended, live = best(sorted(found, key=lambda one: -one[0]), beams)
        done += ended
    return sorted(done + live, key=lambda one: -one[0])[:beams]


def test_beams_of_several_prompts():
    """Rows of one prompt's beams taken for another's; pages of beams that are dropped."""
    prompts, beams, steps = PROMPTS[:2], 3, 5
    model = Decoder(len(prompts) * beams)
    firsts = [n * beams for n in range(len(prompts))]
    logits = model.prefill(prompts, rows=firsts)[:, None].expand(-1, beams, -1)
    for first in firsts:
        targets = range(first + 1, first + beams)
        model.each(lambda cache, first=first, targets=targets: cache.fork(first, targets))
    live = [[(0.0 if beam == 0 else -torch.inf, [], 0) for beam in range(beams)] for _ in prompts]
    done = [[] for _ in prompts]
    for step in range(steps):
        for n, first in enumerate(firsts):
            scores = logits[n].log_softmax(-1) + torch.tensor([one[0] for one in live[n]])[:, None]
            top = scores.flatten().topk(2 * beams)
            pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            found = [
                (s, [*live[n][i // VOCABULARY][1], i % VOCABULARY], first + i // VOCABULARY)
                for s, i in pairs
            ]
            ended, live[n] = best(found, beams)
            done[n] += ended
        together = [one for some in live for one in some]
        parents = [parent for *_, parent in together]
        model.each(lambda cache, parents=parents: cache.reorder(parents))
        if step < steps - 1:
            tokens = torch.tensor([[text[-1]] for _, text, _ in together])
            logits = model.logits(tokens)[:, -1].unflatten(0, (len(prompts), beams))
    for n, prompt in enumerate(prompts):
        got = sorted(done[n] + live[n], key=lambda one: -one[0])[:beams]
        want = beams_by_hand(model, prompt, beams, steps)
        assert [text for _, text, _ in got] == [text for _, text, _ in want]
    model.each(lambda cache: cache.truncate([0] * len(cache.lengths)))
    assert all(cache.free_pages == len(cache.k_pages) for cache in model.caches)


@pytest.mark.parametrize("unequal", [False, True])
def test_drafts_of_several_sequences(unequal):
    """Drafts of one sequence judged by another's, or kept where they are wrong; unequal numbers of
    drafts, which padding on the left makes equal."""
    model, random = Decoder(3), torch.Generator().manual_seed(0)
    truth = [model.greedy(prompt, 30) for prompt in PROMPTS]
    written = [[token] for token in model.prefill(PROMPTS).argmax(-1).tolist()]
    while min(map(len, written)) < 16:
        drafts = []
        for b, text in enumerate(written):
            right = truth[b][len(text) : len(text) + (2 + b if unequal else 4)]
            wrong = torch.rand(len(right), generator=random) < 0.3
            drafts.append(
                [(t + w) % VOCABULARY for t, w in zip(right, wrong.tolist(), strict=True)]
            )
        rows = [[text[-1], *some] for text, some in zip(written, drafts, strict=True)]
        counts, lengths = [len(row) for row in rows], model.caches[0].lengths.tolist()
        padded = [[0] * (max(counts) - len(row)) + row for row in rows]
        says = model.logits(torch.tensor(padded), counts=counts).argmax(-1).tolist()
        kept = []
        for b, some in enumerate(drafts):
            mine, right = says[b][-counts[b] :], 0
            while right < len(some) and some[right] == mine[right]:
                right += 1
            kept.append(lengths[b] + 1 + right)
            written[b] += mine[: right + 1]
        model.each(lambda cache, kept=kept: cache.truncate(kept))
    assert all(text == truth[b][: len(text)] for b, text in enumerate(written))


def test_trees_of_several_sequences():
    """A guess at another's position; a path that keeps another sequence's guesses."""
    model, parents = Decoder(3), [None, 0, 0, 1, 2, 1]
    depth, tree_mask = torch.tensor([0, 1, 1, 2, 2, 2]), torch.eye(6).bool()
    for i, parent in enumerate(parents):
        tree_mask[i] |= tree_mask[parent] if parent is not None else False
    truth = [model.greedy(prompt, 20) for prompt in PROMPTS]
    written = [[token] for token in model.prefill(PROMPTS).argmax(-1).tolist()]
    for turn in range(5):
        guesses = []
        for b, text in enumerate(written):
            first, second = truth[b][len(text) : len(text) + 2]
            right = (turn + b) % 3  # which of the first guesses is right, if any
            ways = [first if right == 1 else first + 1, first if right == 2 else first + 2]
            wrong = second + 3
            tree = [*ways, second if right == 1 else wrong, second, wrong]
            guesses.append([text[-1], *[guess % VOCABULARY for guess in tree]])
        positions = model.caches[0].lengths[:, None] + depth
        says = model.logits(torch.tensor(guesses), positions, tree_mask=tree_mask).argmax(-1)
        paths = []
        for b, said in enumerate(says.tolist()):
            path = [0]
            while following := [
                i for i in range(1, 6) if parents[i] == path[-1] and guesses[b][i] == said[path[-1]]
            ]:
                path.append(following[0])
            paths.append(path)
            written[b] += [said[i] for i in path]
        model.each(lambda cache, paths=paths: cache.keep(6, paths))
    assert all(text == truth[b][: len(text)] for b, text in enumerate(written))
    assert max(map(len, written)) > 10, "some guesses were right"
