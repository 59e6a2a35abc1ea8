"""The page of inspect.look in a headless browser: what is shown equals the N x N way, by pointer,
keyboard and link, with nothing on the console.
"""

import json
import re

import pytest
import torch
from closeness import PAGE_COLOUR, assert_close
from look_pages import dom_of, driven, in_a_browser, number, recorded

import attn_ext
from attn_ext import inspect

pytestmark = in_a_browser


def check_list(shown: dict, p, there):
    """A list of the answer panel against a row's weights p [Sk] and the keys that it sees."""
    best = p.topk(min(16, int(there.sum())))
    assert [at for _, at, _ in shown["keys"]] == [f"({j})" for j in best.indices.tolist()]
    for (_, _, said), weight in zip(shown["keys"], best.values.tolist(), strict=True):
        value, off = number(said)
        assert abs(value - weight) <= off + 2e-6
    words, more = " ".join(shown["rest"]), int(there.sum()) - len(best.values)
    found = re.search(r"and (\d+) keys? more, ((?:under |over )?[\d.]+(?: %)?)", words)
    assert (int(found[1]) if found else 0) == more
    if more:
        value, off = number(found[2])
        assert abs(value - float(p.sum() - best.values.sum())) <= off + 2e-6
    none = re.search(r"to no key ([\d.]+ %)", words)
    if none:
        value, off = number(none[1])
        assert abs(value - (1 - float(p.sum()))) <= off + 2e-6


def row(truths, there, layer, example, head, query):
    """(p [Sk], keys that are seen) of a row; head -1 is the mean over heads."""
    p, keys = truths[layer][example, :, query], there[layer][example, :, query]
    return (p.mean(0), keys.any(0)) if head < 0 else (p[head], keys[head])


def test_what_is_shown_is_the_data(tmp_path):
    """The first thing that is shown: 41 keys, of which the page lists 16, in the mean's order; and
    other layers, heads, examples, a comparison, and links to what is not there.
    """
    seen, truths, there = recorded()
    _, path = inspect.look(seen, tmp_path)
    places = [
        (0, -1, 0, 40), (0, 1, 1, 40), (0, 1, 0, 3), (0, -1, 1, 3), (0, 2, 1, 5), (1, 3, 1, 20),
        (2, -1, 1, 7), (2, 2, 0, 0), (3, -1, 0, 11), (4, 1, 0, 2),
    ]  # fmt: skip
    steps = "steps.push(read());"
    for layer, head, example, token in places:
        place = f"layer={layer}&head={head}&example={example}&token={token}"
        steps += f"await go('{place}'); steps.push(read());"
    steps += """await go("layer=0&head=1&token=30&layer2=2&head2=-1"); steps.push(read());
    await go("layer=9&head=7&example=-4&token=99&layer2=77"); steps.push(read());
    await go("layer=x&head=&token=NaN"); steps.push(read());"""
    first, *shown, pair, far, odd = driven(path, steps)
    assert first["title"] == "40 (40) attends to"
    for (layer, head, example, token), found in zip(
        [(0, -1, 0, 40), *places], [first, *shown], strict=True
    ):
        (one,) = found["lists"]
        p, keys = row(truths, there, layer, example, head, token)
        if not keys.any():
            assert one["rest"] == ["sees no key"] and not one["keys"]
            continue
        check_list(one, p, keys)
        best = p.topk(min(16, int(keys.sum())))
        want = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        assert {int(j): w for j, w in found["weights"].items()} == pytest.approx(want, abs=1e-6)
        assert one["rest"] == [] or found["spoken"].endswith(", ".join(one["rest"]))
    assert "Sigmoid weights need not sum to 1" in shown[6]["legend"]
    assert [x["which"] for x in pair["lists"]] == [
        "call 0 · head 1",
        "call 2 (sigmoid) · mean of 4 heads",
    ]
    check_list(pair["lists"][0], *row(truths, there, 0, 0, 1, 30))
    check_list(pair["lists"][1], *row(truths, there, 2, 0, -1, 30))
    for found in (far, odd):
        assert found["title"] == "40 (40) attends to" and len(found["lists"]) == 1


@pytest.fixture
def short(tmp_path):
    """The page of two calls of 7 tokens, some of which no eye would see."""
    q = torch.randn(2, 3, 7, 8)
    with inspect.record() as seen:
        attn_ext.attention(q, q, q, causal=True)
        attn_ext.attention(q, q.flip(2), q)
    tokens = ["", " ", "\n", "\t", "a b", "</script>", "if x:\n  "]
    return inspect.look(seen, tmp_path, tokens=tokens, title="a <test>")[1], seen


def test_keyboard(short):
    """Something that only a pointer can reach."""
    path, _ = short
    steps = """
    const link = async () => { await wait(500); return location.hash; };
    $("keys").focus(); press("Home"); steps.push(await link());
    press("ArrowRight"); press("ArrowRight"); steps.push(await link());
    steps.push($("keys").getAttribute("aria-activedescendant") +
      $("keys").querySelectorAll("[aria-selected=true]").length);
    press("]"); press("]"); press("}"); steps.push(await link());
    press("c"); press("["); steps.push(await link());
    press("c"); press("End"); steps.push(await link());
    press("/"); steps.push(document.activeElement.id);
    $("find").value = "A B"; $("find").dispatchEvent(new Event("input"));
    press("Enter"); steps.push(await link()); press("Escape");
    steps.push(document.activeElement.id);
    document.querySelector("#heads [aria-checked=true]").focus();
    press("ArrowUp"); press("ArrowLeft"); steps.push(await link());
    steps.push(document.activeElement.getAttribute("aria-label"));
    steps.push(document.querySelectorAll("#heads [tabindex='0']").length);
    """
    got = driven(path, steps)
    state = [
        dict(x.split("=") for x in s[1:].split("&")) if s[0] == "#" else s for s in map(str, got)
    ]
    assert [state[0]["token"], state[1]["token"]] == ["0", "2"] and state[2] == "keys-21"
    assert (state[3]["layer"], state[3]["head"]) == ("1", "1")
    assert [state[4][n] for n in ("head", "layer2", "head2")] == ["0", "1", "1"]
    assert state[5]["token"] == "6" and "layer2" not in state[5]
    assert state[6] == "find" and state[7]["token"] == "4" and state[7]["find"] == "A%20B"
    assert state[8] == "keys" and (state[9]["layer"], state[9]["head"]) == ("0", "-1")
    assert state[10] == "call 0, mean of 3 heads" and state[11] == "1"


def test_pointer_maps_and_colours(short):
    """A click that holds nothing, a cell of the map that names other positions or another weight,
    colours of another row; tokens of white space that nobody sees, and code that loses its lines.
    """
    path, seen = short
    steps = """
    await go("layer=0&head=1&example=1&token=6");
    steps.push([...document.querySelectorAll("#keys span")].map(s => s.textContent));
    const span = document.querySelectorAll("#keys span"), over = at => span[at].dispatchEvent(
      new PointerEvent("pointerover", {bubbles: true, pointerType: "mouse"}));
    press("Escape", document.body); over(2); steps.push(read().title);
    span[4].click(); over(1); steps.push(read().title);
    const canvas = document.querySelector("#maps canvas"), box = canvas.getBoundingClientRect();
    const at = (type, row, col) => canvas.dispatchEvent(new PointerEvent(type, {bubbles: true,
      clientX: box.left + (col + .5) / 7 * box.width,
      clientY: box.top + (row + .5) / 7 * box.height}));
    at("pointermove", 5, 2); steps.push($("cell").textContent);
    const pixels = () => [...document.querySelector("#maps canvas").getContext("2d")
      .getImageData(0, 0, 7, 7).data];
    steps.push(pixels());
    at("click", 3, 0); steps.push(read().title);
    for (const colour of ["row", "log", "linear"]) {
      $("colour").value = colour; $("colour").dispatchEvent(new Event("change"));
      steps.push([...document.querySelectorAll("#keys span")].map(s => s.style.backgroundColor));
    }
    document.querySelectorAll("#heads button")[5].dispatchEvent(
      new MouseEvent("click", {bubbles: true, shiftKey: true}));
    steps.push(read().lists.map(x => x.which));
    steps.push([...document.querySelectorAll("#maps .axis")].map(x => x.clientHeight));
    """
    spans, hover, held, cell, pixels, clicked, *colours, pair, axes = driven(path, steps)
    assert spans == ["∅", "␣", "⏎\n", "⇥", "a b", "</script>", "if x:⏎\n  "]
    assert hover == "⏎ (2) attends to" and held == "a b (4) attends to"
    p = seen.calls[0].pooled_map[1, 1]
    words, said = cell.split(": weight ")
    value, off = number(said)
    assert words == "queries 5, keys 2" and abs(value - float(p[5, 2])) <= off + 2e-6
    assert clicked == "⇥ (3) attends to"
    reds = torch.tensor(pixels).view(7, 7, 4)
    by_row = p / p.amax(-1, keepdim=True)
    stops = torch.tensor([[255, 255, 255], [253, 190, 133], [230, 85, 13], [92, 31, 4.0]])
    place = (by_row * 255).round() / 255 * 3
    low = place.floor().clamp_max(2).long()
    want = stops[low] + (stops[low + 1] - stops[low]) * (place - low).unsqueeze(-1)
    assert int((reds[..., :3] - want).abs().max()) <= 4  # one of 256 steps of the ramp
    row = p[3, :4].double()
    strengths = {
        "row": row / row.max(),
        "log": (1 + (row / row.max()).log10() / 4).clamp_min(0),
        "linear": row,
    }
    for want, found in zip(strengths.values(), colours, strict=True):
        alphas = [re.search(r", ([\d.]+)\)", c) for c in found[:4]]
        got = torch.tensor([float(a[1]) if a else 1.0 for a in alphas])
        assert_close(got / 0.8, want.float(), PAGE_COLOUR)
        assert found[4:] == ["", "", ""]
    assert pair == ["call 0 · head 1", "call 1 · head 0"]
    assert len(axes) == 2 and max(axes) < 24  # one line under each of two maps


# Whether the token of a link is in sight
SIGHT = """await go("token=700");
    const on = document.querySelector("#keys .on"), at = on.getBoundingClientRect();
    steps.push(document.elementFromPoint(at.left + 3, at.top + 3) === on);
    """


def test_a_long_text(tmp_path):
    """A page that shows 1,500 tokens at once, a search that ends at the window, keys outside of it
    that cannot be reached."""
    q = torch.randn(1, 1, 1500, 8)
    with inspect.record() as seen:
        attn_ext.attention(q, q, q, causal=True)
    path = inspect.look(seen, tmp_path, tokens=[f"w{i} " for i in range(1500)])[1]
    steps = (
        """
    const shown = () => [$("range").textContent, document.querySelectorAll("#keys span").length];
    steps.push(shown(), $("overview").hidden);
    $("find").value = "w77 w78"; $("find").dispatchEvent(new Event("input"));
    steps.push($("found").textContent); press("Enter", $("find"));
    steps.push(shown(), read().title);
    $("later").click(); steps.push(shown(), read().title);
    press("End", document.body); const key = read().lists[0].keys.at(-1)[1];
    document.querySelector("#answer li:last-child button").click();
    steps.push(document.querySelector(`#keys span[data-i="${key.slice(1, -1)}"]`) !== null);
    await go("token=1499&from=100"); steps.push(shown(), read().title);
    """
        + SIGHT
    )
    got = driven(path, steps)
    assert got[0] == ["tokens 988 to 1499 of 1500", 512] and got[1] is False
    assert got[2] == "1 place" and got[3] == ["tokens 0 to 511 of 1500", 512]
    assert got[4] == "w77  (77) attends to" and got[5][0] == "tokens 256 to 767 of 1500"
    assert got[6] == got[4] and got[7] is True
    assert got[8] == ["tokens 100 to 611 of 1500", 512] and got[9] == "w1499  (1499) attends to"
    assert got[10] is True
    assert driven(path, SIGHT, "", "--window-size=500,800") == [True]  # the answer lies below


def test_queries_that_are_another_text(tmp_path):
    """Queries coloured as keys, or none to choose from."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    with inspect.record() as seen:
        attn_ext.attention(q, k, k)
    options = {"tokens": list("abcde"), "query_tokens": ["x", "y", "z"]}
    path = inspect.look(seen, tmp_path, **options)[1]
    steps = """steps.push(read().title, [...document.querySelectorAll("#queries span")].length);
    document.querySelectorAll("#queries span")[1].click(); steps.push(read());"""
    title, count, shown = driven(path, steps)
    assert title == "z (2) attends to" and count == 3 and shown["title"] == "y (1) attends to"
    p = seen.calls[0].pooled_map[0].mean(0)[1]
    check_list(shown["lists"][0], p, torch.ones(5, dtype=torch.bool))


def test_in_a_notebook_and_without_network(short, tmp_path):
    """A page that fails inside of a frame without an address, where links cannot be kept."""
    _, seen = short
    frame = tmp_path / "cell.html"
    frame.write_text(f"<!doctype html><meta charset=utf-8>{seen._repr_html_()}", "utf-8")
    assert "srcdoc" in dom_of(frame)  # and nothing on the console
    assert json.dumps("https:") not in frame.read_text("utf-8")
