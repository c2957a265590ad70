"The probe of memento states: what it is given, what it must not be given, and the table of the package."
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import DynamicCache

from tracebook import probe
from tracebook.probe import (LAYERS, PLACES, PROBE_CELLS, PROBE_PLAN, RUNS, TARGET, attention_on_target, load_probe_table, main, memento_states, probe_chains,
    probe_features, probe_share, probe_table, run_probe, split_by_label, text_floor)
from tracebook.toy import Share, check_toy, load_toy, toy_batch

BEGIN, END, MEMENTO, END_MEMENTO = "<|block_start|>", "<|block_end|>", "<|summary_start|>", "<|summary_end|>"


@pytest.fixture(scope="module")
def model(): return load_toy()[0]

@pytest.fixture(scope="module")
def tokens(): return load_toy()[1]


def places_of(ids, tokens):
    "Where the markers of each block stand, found in the text itself."
    ids = ids.tolist()
    return list(zip(*([i for i, x in enumerate(ids) if x == tokens.convert_tokens_to_ids(m)] for m in (BEGIN, END, MEMENTO, END_MEMENTO))))


@torch.inference_mode()
def test_states_are_those_of_a_model_that_has_forgotten(model, tokens):
    ids, _ = probe_chains(3)
    cache, at, start, states = DynamicCache(), torch.zeros(0, dtype=torch.long), 0, []
    for begin, end, _, last in places_of(ids[0], tokens): # everything up to the end of a memento, and then the block is taken out
        new = torch.arange(start, last + 1)
        model(input_ids=ids[:, new], position_ids=new.expand(3, -1), past_key_values=cache, use_cache=True)
        at, start = torch.cat([at, new]), last + 1
        figures = [int((at == p).nonzero()) for p in range(last - 3, last)]
        states.append(torch.stack([torch.cat([torch.cat([x[:, :, f].flatten(1) for x in (l.keys, l.values)], 1) for f in figures], 1) for l in cache.layers], 1))
        keep = (at <= begin) | (at >= end)
        at = at[keep]
        for layer in cache.layers: layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
    assert torch.stack(states, 1).shape == (3, 10, 4, 768)
    assert (torch.stack(states, 1) - memento_states(model, ids)).abs().max() < 1e-4
    assert (memento_states(model, ids, mementos=3) - memento_states(model, ids)[:, :3]).abs().max() < 1e-4


def swapped(ids, tokens):
    "The same chains with other digits in the target, and the same text everywhere else."
    (begin, end, *_), out = places_of(ids[0], tokens)[TARGET - 1], ids.clone()
    digits = [i + 1 for i in range(begin, end) if ids[0, i] == tokens.convert_tokens_to_ids("+")]
    out[:, digits] = tokens.convert_tokens_to_ids("0") + (out[:, digits] - tokens.convert_tokens_to_ids("0") + 3) % 10
    return out


def test_only_what_may_know_the_block_changes_with_it(model, tokens):
    ids, digits = probe_chains(4)
    other = swapped(ids, tokens)
    assert torch.equal(ids[:, probe._places().digits], digits + tokens.convert_tokens_to_ids("0"))
    changed = {run: (memento_states(model, ids, policy) - memento_states(model, other, policy)).abs().amax((0, 2, 3)) for run, policy in RUNS.items()}
    assert changed["memento"][:TARGET - 1].max() == 0 and changed["restart"].max() == 0 # the control, and the closed channel: exactly
    assert changed["memento"][TARGET - 1] > .1 and changed["memento"][TARGET:].max() > 1e-3 # the block's own memento, and what it hands on
    assert (memento_states(model, ids)[:, :, 0] - memento_states(model, other)[:, :, 0]).abs().max() == 0 # layer 1 knows tokens and positions only


def test_attention_is_looked_at(model):
    ids, before = probe_chains(2)[0], model.config._attn_implementation
    assert attention_on_target(model, ids) == 0 and model.config._attn_implementation == before


def test_chains_are_right_and_do_not_depend_on_their_number(tokens):
    ids, digits = probe_chains(30)
    assert torch.equal(probe_chains(7)[0], ids[:7]) and not torch.equal(toy_batch(30)["input_ids"], ids)
    for row, five in zip(ids, digits):
        text = tokens.decode(row[7:-1])
        assert check_toy(text) is None
        block = text.split(BEGIN)[TARGET].split(END)[0]
        assert [int(part[0]) for part in block.split("+")[1:]] == five.tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_no_combination_is_in_two_parts(seed, n):
    digits = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (n, 5))) # three digits: many chains share a combination
    split = split_by_label(digits)
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(n))
    where = {}
    for name, rows in split.items():
        for row in rows: assert where.setdefault(tuple(digits[row].tolist()), name) == name


def test_a_combination_is_always_in_the_same_part():
    digits = torch.tensor(list(itertools.product(range(10), repeat=5)))
    split = split_by_label(digits)
    assert {k: len(v) for k, v in split.items()} == dict(train=70_000, validation=10_000, test=20_000)
    home = {int(row): name for name, rows in split.items() for row in rows}
    few = torch.from_numpy(np.random.default_rng(0).integers(0, 10, (500, 5)))
    for name, rows in split_by_label(few).items():
        assert {home[int(x)] for x in (few[torch.from_numpy(rows)].numpy() * 10 ** np.arange(5)[::-1]).sum(1)} == {name}
    for digit in range(5): assert max(Counter(digits[torch.from_numpy(split["test"])][:, digit].tolist()).values()) < 2_200 # every digit is about as frequent


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_text_floor_by_counting(digits):
    found = {}
    for x in itertools.product(range(10), repeat=digits): found.setdefault(sum(x), Counter())[x[0]] += 1
    assert text_floor(digits) == pytest.approx(sum(max(c.values()) for c in found.values()) / 10 ** digits, abs=1e-12)


def test_the_probe_is_the_same_every_time_and_leaves_random_numbers_alone():
    x, digits = np.random.default_rng(0).normal(size=(300, 20)).astype(np.float32), torch.from_numpy(np.random.default_rng(1).integers(0, 10, (300, 5)))
    split, copy = split_by_label(digits), x.copy()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    a, b = (run_probe(x, digits, split) for _ in range(2))
    assert torch.rand(1) == expected and (x == copy).all()
    assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert a["n"] == 5 * len(split["test"]) and sum(a["by_digit"]) == a["right"] and a["epochs"] - a["best_epoch"] == PROBE_PLAN["patience"]


def test_the_test_part_decides_nothing():
    digits = torch.from_numpy(np.random.default_rng(1).integers(0, 10, (400, 5)))
    x, split = np.random.default_rng(0).normal(size=(400, 20)).astype(np.float32), split_by_label(digits)
    y = x.copy()
    y[split["test"]] = 7e3
    a, b = (run_probe(z, digits, split) for z in (x, y))
    assert (a["best_epoch"], a["epochs"]) == (b["best_epoch"], b["epochs"])


def without_seconds(table): return {k: ({c: {m: v for m, v in cell.items() if m != "seconds"} for c, cell in x.items()} if k == "cells" else x) for k, x in table.items() if k != "seconds"}

def test_a_table_that_was_interrupted_is_the_same(tmp_path, model, monkeypatch):
    monkeypatch.setattr(probe, "PROBE_CELLS", [("control", "1"), ("direct", "4"), ("+1", "4")])
    whole = probe_table(tmp_path / "whole.json", 40, model, progress=False)
    calls, real, states = itertools.count(), probe.run_probe, probe.memento_states
    def breaks(*args): return 1 / 0 if next(calls) == 4 else real(*args)
    monkeypatch.setattr(probe, "run_probe", breaks)
    with pytest.raises(ZeroDivisionError): probe_table(tmp_path / "t.json", 40, model)
    assert len(json.loads((tmp_path / "t.json").read_text())["cells"]) == 4
    monkeypatch.setattr(probe, "run_probe", real)
    monkeypatch.setattr(probe, "memento_states", lambda *args: 1 / 0) # states that are there are not computed again
    again = probe_table(tmp_path / "t.json", 40, model)
    assert without_seconds(again) == without_seconds(whole) == without_seconds(load_probe_table(tmp_path / "t.json"))
    shutil.rmtree(tmp_path / "t.states")
    assert probe_table(tmp_path / "t.json", 40, model) == again # and those of a finished table not at all
    with pytest.raises(ValueError, match="other chains"): probe_table(tmp_path / "t.json", 41, model)
    monkeypatch.setattr(probe, "PROBE_PLAN", PROBE_PLAN | dict(seed=1))
    with pytest.raises(ValueError, match="other plan"): probe_table(tmp_path / "t.json", 40, model)


def test_states_go_on_where_they_were(tmp_path, model, monkeypatch):
    ids, calls, real = probe_chains(9)[0], itertools.count(), probe.memento_states
    monkeypatch.setattr(probe, "memento_states", lambda *args: 1 / 0 if next(calls) == 2 else real(*args))
    with pytest.raises(ZeroDivisionError): probe._stored_states(model, ids, "memento", tmp_path / "s.npy", chunk=3)
    assert (tmp_path / "s.done").read_text() == "6"
    counted = []
    monkeypatch.setattr(probe, "memento_states", lambda model, x, policy: counted.append(len(x)) or real(model, x, policy))
    out = probe._stored_states(model, ids, "memento", tmp_path / "s.npy", chunk=3)
    assert counted == [3] and np.abs(out - real(model, ids).numpy()).max() < 1e-4


def test_the_command_says_what_it_needs(capsys):
    with pytest.raises(SystemExit): main([])
    assert "--out" in capsys.readouterr().err


def test_the_table_of_the_package(model):
    table = load_probe_table()
    assert table["weights"] == probe._weights(model) and table["chains"] == 50_000
    assert table["plan"] == json.loads(json.dumps(PROBE_PLAN)) and table["parts"] == {k: len(v) for k, v in split_by_label(probe_chains(50_000)[1]).items()}
    assert set(table["cells"]) == {f"{run} {place} {layers}" for run in RUNS for place, layers in PROBE_CELLS}
    for cell in table["cells"].values():
        assert cell["n"] == 5 * table["parts"]["test"] and sum(cell["by_digit"]) == cell["right"] <= cell["n"]
        assert cell["epochs"] == 60 or cell["epochs"] - cell["best_epoch"] == 5


def test_what_the_table_has_to_show():
    table = load_probe_table()
    share = lambda place, layers, run="memento", **k: probe_share(table, run, place, layers, **k)
    assert share("direct", "all").value >= .9
    for layers in LAYERS:
        control = share("control", layers, confidence=.99)
        assert control.lo <= .1 <= control.hi
    assert share("direct", "4").lo > share("+1", "4").hi and share(["+1", "+2"], "4").lo > share(["+6", "+7"], "4").hi
    for place in PLACES: assert share(place, "4", "restart").lo <= text_floor(5)


def test_shares_are_put_together():
    table = dict(cells={"memento +1 4": dict(right=3, n=10), "memento +2 4": dict(right=5, n=10)})
    assert probe_share(table, "memento", ["+1", "+2"], "4") == Share.of(8, 20)
    assert probe_share(table, "memento", "+1", "4", .99) == Share.of(3, 10, .99)


@pytest.mark.slow
def test_the_ordering_at_a_reduced_size(model):
    ids, digits = probe_chains(3_000)
    split = split_by_label(digits)
    states = torch.cat([memento_states(model, x, mementos=TARGET + 1) for x in ids.split(50)]).numpy()
    cells = {place: run_probe(probe_features(states, place, "4"), digits, split) for place in ("control", "direct", "+1")}
    shares = {place: Share.of(c["right"], c["n"], .99) for place, c in cells.items()}
    assert shares["direct"].lo > 2 * shares["+1"].hi and shares["control"].lo <= .1 <= shares["control"].hi
