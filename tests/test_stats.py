"The fast way of measuring against plain Python, on random texts; the bootstrap against drawing."
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tracebook.memento import MEMENTO_TOKENS, build_memento, parse
from tracebook.sources import load_traces, make_traces, sample_traces, sample_zoo
from tracebook.stats import _measure, _measure_parsed, _spaces, _strip, _words, block_table, bootstrap_median, measure, summarize, trace_table

SPACES = "".join(chr(c) for c in range(0x3001) if chr(c).isspace())
settings.register_profile("stats", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("stats")

texts = st.text(st.one_of(st.sampled_from(SPACES + "<|`>ab\x00\x1b"), st.characters(exclude_categories=["Cs"])), max_size=12)
loose = st.lists(st.one_of(texts, st.sampled_from([*MEMENTO_TOKENS, "```", "<|block_st", "</thi"])), max_size=16).map("".join)


@st.composite
def regular(draw):
    "Mostly what the fast way takes: well-formed traces with any text inside."
    T, t, B, b, S, s = MEMENTO_TOKENS
    pairs = draw(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4))
    body = "".join(f"{B}{x}{b}{g}{S}{y}{s}" for x, y, g in pairs)
    return draw(texts) + T + body + t + draw(texts) + draw(st.sampled_from(["", "<", "<|", "<|block_start|", "</think"]))


def plain(text):
    "Every column of `trace_table` that is a size, by the book."
    trace = parse(text)
    size = {k: sum(s.size for s in trace.spans if s.kind == k) for k in ("block", "memento", "gap", "marker")}
    blocks, mementos = ([trace.text_of(s) for s in which] for which in (trace.blocks, trace.mementos))
    words, stripped = lambda xs: sum(len(x.split()) for x in xs), lambda xs: sum(len(x.strip()) for x in xs)
    ratios = [p.memento.size / p.block.size for p in trace.pairs if p.memento and p.block.size]
    per = lambda a, b: a / b if b else None
    some = lambda a, b: per(a, b) if mementos else None
    return dict(dialect=trace.dialect, n_blocks=len(blocks), n_mementos=len(mementos), block_chars=stripped(blocks), summ_chars=stripped(mementos),
        block_words=words(blocks), summ_words=words(mementos), compress_char=some(stripped(mementos), stripped(blocks)), compress_word=some(words(mementos), words(blocks)),
        chars=len(text), block_chars_raw=size["block"], summ_chars_raw=size["memento"], gap_chars=size["gap"], marker_chars=size["marker"],
        answer_chars=None if trace.answer is None else len(trace.answer), gap_share=per(size["gap"], len(text)), marker_share=per(size["marker"], len(text)),
        trace_ratio_of_sums=some(size["memento"], size["block"]), trace_mean_of_ratios=sum(ratios) / len(ratios) if ratios else None,
        compression_factor=per(size["block"], size["memento"]), complete=trace.is_complete, issues=[i.code for i in trace.issues])


def same(a, b): return a == b or isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-12)


@given(st.lists(st.one_of(regular(), loose), max_size=6))
@example(["<think", "><|block_start|>a<|block_end|><|summary_start|>b<|summary_end|></think>"])
@example(["<think><|block_start|>\u3000a\u00a0b\u2028<|block_end|><|summary_start|>\x1c<|summary_end|></think><|block_star"])
@example(["", "<", "<think><|block_start|>```<|block_end|><|summary_start|>``````<|summary_end|></think>"])
def test_trace_table_is_plain_counting(rows):
    table = trace_table([dict(response=r) for r in rows])
    assert len(table) == len(rows)
    for got, text in zip(table.to_pylist(), rows):
        want = plain(text)
        assert {k: (got[k], v) for k, v in want.items() if not same(got[k], v)} == {}


@given(st.lists(st.one_of(regular(), loose), max_size=5))
def test_block_table_is_plain_counting(rows):
    got = block_table([dict(response=r) for r in rows]).to_pylist()
    want = []
    for row, trace in enumerate(map(parse, rows)):
        for p in trace.pairs:
            block, memento = trace.text_of(p.block), trace.text_of(p.memento)
            want.append(dict(row=row, block=p.index, position=(p.index + .5) / len(trace.pairs), start=p.block.start, end=p.block.end, block_chars=len(block.strip()),
                block_words=len(block.split()), summ_chars=None if memento is None else len(memento.strip()), summ_words=None if memento is None else len(memento.split()),
                block_ratio=len(memento) / len(block) if memento is not None and block else None, complete=p.block.complete and memento is not None))
    assert len(got) == len(want)
    for g, w in zip(got, want): assert all(same(g[k], v) for k, v in w.items() if k != "complete"), (g, w)


@given(st.lists(st.one_of(regular(), loose), max_size=6))
def test_both_ways_agree(rows):
    fast, slow = _measure(pa.array(rows, pa.string()), True)
    oracle = _measure_parsed({i: r for i, r in enumerate(rows) if i in set(fast.rows.tolist())}, True)
    assert sorted([*fast.rows.tolist(), *slow.rows.tolist()]) == list(range(len(rows)))
    for name in ("rows", "sizes", "complete", "blocks", "mementos", "pairs"): assert np.array_equal(getattr(fast, name), getattr(oracle, name)), name
    assert (fast.issues, fast.dialects) == (oracle.issues, oracle.dialects)


@given(texts, st.data())
def test_words_and_strip(text, data):
    raw = text.encode()
    space, cuts = _spaces(np.frombuffer(raw, np.uint8)), [len(text[:i].encode()) for i in range(len(text) + 1)]
    i, j = sorted((data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))))
    a, b = np.array([cuts[i]]), np.array([cuts[j]])
    assert _words(space, a, b)[0] == len(text[i:j].split())
    (x,), (y,) = _strip(space, a, b)
    assert raw[x:y].decode() == text[i:j].strip()


def test_undefined_is_null():
    table = trace_table([dict(response=r) for r in ("", "<think></think>", "<think><|block_start|><|block_end|>", "x")])
    for name in ("compress_char", "compress_word", "trace_ratio_of_sums", "trace_mean_of_ratios", "compression_factor"): assert table[name].to_pylist() == [None] * 4
    for column in table.columns:
        if pa.types.is_floating(column.type): assert not any(x is not None and math.isnan(x) for x in column.to_pylist())


def test_same_from_every_source(tmp_path):
    rows = [*sample_traces(), *(dict(problem=None, response=z["response"], domain=z["code"], source=None, difficulty=None) for z in sample_zoo()), *make_traces(30)]
    path = tmp_path/"rows.parquet"
    data = load_traces(rows)
    pq.write_table(data.data.table, path, row_group_size=17)
    want = measure(rows)
    for source in (data, path, tmp_path, iter(rows), data.data.table, data.select(range(len(data)))): assert measure(source) == want
    assert measure(path, workers=2) == want


def test_tokens_are_counted_per_text():
    seen = []

    def count(texts):
        seen.extend(texts)
        return [len(t) + 1 for t in texts]

    rows = [dict(response=build_memento([("one two", "x"), (" three ", None)], "A")), dict(response="plain")]
    table, blocks = measure(rows, count_tokens=count)
    assert table["block_tokens"].to_pylist() == [8 + 8, 0] and table["summ_tokens"].to_pylist() == [2, 0]
    assert table["trace_token_ratio_of_sums"].to_pylist() == [2 / 16, None] and blocks["block_token_ratio"].to_pylist() == [2 / 8, None]
    assert blocks["summ_tokens"].to_pylist() == [2, None]
    assert sorted(seen) == [" three ", "one two", "x"]  # once, for both tables
    with pytest.raises(ValueError, match="one number for each text"): trace_table(rows, count_tokens=lambda t: [1])


@pytest.mark.parametrize("n", [1, 2, 5, 6, 31, 200])
def test_bootstrap_median_has_the_distribution_of_drawing(n):
    values = np.random.default_rng(n).normal(size=n)
    drawn = np.median(np.random.default_rng(7).choice(values, (40_000, n)), axis=1)
    for level in (.5, .8, .95):
        low, high = bootstrap_median(values, level, n_boot=40_000)
        tail = (1 - level) / 2
        # a quantile of a discrete distribution may fall on either side of a jump: compare probabilities
        assert (drawn < low - 1e-12).mean() <= tail + .01 and (drawn <= low + 1e-12).mean() >= tail - .01
        assert (drawn < high - 1e-12).mean() <= 1 - tail + .01 and (drawn <= high + 1e-12).mean() >= 1 - tail - .01


def test_summary_says_its_denominators():
    table, blocks = measure([dict(response=z["response"], domain=d) for z, d in zip(sample_zoo(), ["a", "b"] * 20)])
    summary = summarize(table, blocks=blocks)
    for row in summary.issues.to_pylist():
        part = [codes for codes, d in zip(table["issues"].to_pylist(), table["domain"].to_pylist()) if row["group"] in (d, "all")]
        assert row["n"] == len(part) and row["rows"] == sum(row["code"] in codes for codes in part)
    for row in summary.metrics.to_pylist():
        if row["level"] == "corpus": continue
        source = table if row["level"] == "trace" else blocks
        values = [v for v, d in zip(source[row["metric"]].to_pylist(), source["domain"].to_pylist()) if v is not None and row["group"] in (d, "all")]
        assert row["n"] == len(values)
        if values: assert same(row["median"], float(np.median(values))) and row["ci_low"] <= row["median"] <= row["ci_high"]
