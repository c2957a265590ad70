"The book of bad and hostile rows: whole, safe and the same every time."
import html, json, os, re, signal, subprocess, sys, textwrap
from contextlib import contextmanager
from html.parser import HTMLParser

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings, strategies as st
from transformers import LogitsProcessor, Qwen3ForCausalLM

from tracebook.book import _token_texts, _trace_item, live_trace, make_book, render_trace, visible
from tracebook.memento import MEMENTO_TOKENS, build_memento, parse
from tracebook.sources import load_traces, make_traces, sample_traces, sample_zoo
from tracebook.stats import measure, summarize
from tracebook.thoughts import parse_thoughts
from tracebook.tokens import add_memento_tokens, make_tokenizer
from tracebook.toy import toy_config
from tracebook.trace import PHI4, QWEN3, VANILLA, ContextPolicy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CLEAN = build_memento([("one two three", "one"), ("four five six", "four")], "\n\nThe answer.")
FIELDS = ("problem", "response", "domain", "source")


class Page(HTMLParser):
    "Elements with their attributes, and the text of a page outside scripts and styles."
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.raw = [], [], None
        self.feed(text); self.close()
    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"): self.raw = tag
    def handle_endtag(self, tag): self.raw = None if tag == self.raw else self.raw
    def handle_data(self, data):
        if self.raw is None: self.text.append(data)

@contextmanager
def within(seconds):
    "A generous limit, so that a hang is a failure."
    def stop(*_): raise TimeoutError(f"not done in {seconds} s")
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, old)

def book(tmp_path, rows, **k):
    made = make_book(load_traces(rows), tmp_path / "o.html", **k)
    return made, made.path.read_text(encoding="utf-8")

def shape(text):
    "Names of elements with the names of their attributes."
    return {(tag, frozenset(attrs)) for tag, attrs in Page(text).elements}

@pytest.fixture(scope="module")
def allowed(tmp_path_factory):
    "What the template and the plots emit by themselves, for clean rows and for the zoo of defects."
    where = tmp_path_factory.mktemp("clean")
    _, a = book(where, list(sample_traces()) + [dict(response=r["response"], domain="zoo") for r in sample_zoo()])
    _, b = book(where, [dict(response=CLEAN, problem="p", domain=3, source="s", difficulty=3), dict(response=3), dict(response="x")], title="t", max_traces=1)
    return shape(a) | shape(b)

ATTACKS = ["<script>alert(1)</script>", "</script><script>x()</script>", "\"><img src=x onerror=alert(1)>", "' onmouseover='x", "</style><style>*{}", "<!--", "-->", "<![CDATA[", "]]>", "</title><iframe src=//e.x>",
    "</div></details></main>", "{{ 7*7 }}{% raw %}", "&lt;script&gt;&#60;script&#62;", "<svg onload=x>", "<a href=javascript:x>y</a>", "$\\frac{1}{0}$", "`", "<think>", "\" autofocus onfocus=\"x"]

@pytest.mark.parametrize("attack", ["".join(ATTACKS), ATTACKS[2]], ids=["all", "img"])
def test_no_element_and_no_attribute_is_injected(tmp_path, allowed, attack):
    row = {k: attack for k in FIELDS} | dict(response=build_memento([(attack, attack), ("a", "b")], attack), difficulty=1)
    path = tmp_path / (attack[:60].replace("/", "_") + ".jsonl")
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, dict(response=attack, domain=3), {"response": {attack: 1}}, {attack: 1})) + attack + "\n")
    made = make_book(load_traces(str(path)), tmp_path / "o.html", title=attack)
    text = made.path.read_text()
    assert made.traces == 2 and made.unreadable == 3
    assert not shape(text) - allowed
    assert "49" not in re.findall(r"<h1[^>]*>(.*?)</h1>", text)[0] and len(re.findall("<script>", text)) == 2
    assert visible(attack) in "".join(Page(text).text)

def test_nothing_is_fetched(tmp_path):
    _, text = book(tmp_path, [dict(response=CLEAN, problem="see https://example.org/x.png", source="//example.org")])
    for tag, attrs in Page(text).elements:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "audio", "video", "image") and "src" not in attrs
        assert attrs.get("href", attrs.get("xlink:href", "#")).startswith("#") and attrs.get("http-equiv", "") != "refresh"
        for value in attrs.values(): assert "url(" not in (value or "").replace("url(#", "")
    for style in re.findall(r"<style.*?</style>", text, re.S): assert "@import" not in style and "url(" not in style
    for script in re.findall(r"<script>.*?</script>", text, re.S): assert not re.search(r"fetch\(|XMLHttp|import\(|https?:", script)

CONTROL = "".join(map(chr, [*range(9), 11, 12, *range(14, 32), 127, *range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]))

def test_no_control_character_reaches_the_page_or_the_terminal(tmp_path, capsys):
    row = {k: "a" + CONTROL + "\x1b]0;owned\x07b" for k in FIELDS}
    _, text = book(tmp_path, [row, row | dict(response=build_memento([(CONTROL, CONTROL)], CONTROL))], title=CONTROL)
    assert not set(CONTROL) & set(text) and "\r" not in text
    assert not re.search(r"&#x?0*(?:[0-8]|1[124-9]|2\d|3[01]|127)\b", text)
    for r in (row["response"], build_memento([(CONTROL, CONTROL)], CONTROL), "<think>" + CONTROL, "<|summary_start|>" + CONTROL): render_trace(r)
    assert not set(CONTROL) & set(capsys.readouterr().out)

@given(st.text(max_size=60) | st.lists(st.sampled_from([*MEMENTO_TOKENS, " ", "a", "é", "\n", "```", "<b>", "\0", "\r"]), max_size=14).map("".join))
@settings(derandomize=True, deadline=None, max_examples=400)
def test_the_accounts_sum_to_the_length_and_no_text_is_lost(text):
    trace, item = parse(text), _trace_item(dict(response=text), 0)
    assert sum(a["characters"] for a in item["accounts"]) == item["characters"] == len(text)
    shown = "".join(p.get("text", "") + p.get("block", "") + (p.get("memento") or "") for p in item["parts"])
    left = [visible(trace.text_of(s)) for s in trace.spans if s.kind != "marker" and trace.text_of(s).strip()]
    assert sorted(shown.replace("\n", "").replace(" ", "")) == sorted("".join(left).replace("\n", "").replace(" ", "")) or all(x in shown for x in left)

def test_every_trace_and_every_character_is_there(tmp_path):
    rows = sample_traces()
    made, text = book(tmp_path, rows)
    said = Page(text)
    ids = [a["id"] for t, a in said.elements if a.get("class") == "trace"]
    assert made.traces == made.shown == len(ids) == len(set(ids)) == len(rows)
    whole = "".join(said.text)
    for row in rows:
        trace = parse(row["response"])
        assert visible(row["problem"]) in whole
        for s in trace.spans:
            if s.kind != "marker" and trace.text_of(s).strip(): assert visible(trace.text_of(s)) in whole

PLAIN = ["plain text", "a < b & c > d \" '", "&amp; &lt;", "\n\nleading", "tail \n ", "tab\tand  two", "é😀العربية", "a\u2028b", "\ufeffx", "x" * 19_999]

def test_plain_text_stands_on_the_page_as_it_is(tmp_path):
    whole = "".join(Page(book(tmp_path, [dict(response=text) for text in PLAIN])[1]).text)
    assert [text for text in PLAIN if text not in whole] == []

@pytest.mark.parametrize("response", ["", " ", "<think>", "<think></think>", *MEMENTO_TOKENS, "<|block_start|><|block_end|><|summary_start|><|summary_end|>", "<|summary_start|>x<|summary_end|>",
    "<think><|block_start|><|block_end|><|summary_start|>abc<|summary_end|></think>x", "\0", "\r\n", "\ufeff" + CLEAN])
def test_a_book_of_one_odd_trace(tmp_path, response):
    made, text = book(tmp_path, [dict(response=response)])
    assert made.traces == 1 and 'id="t-0"' in text

@pytest.mark.parametrize("domain", ["all", "(none)", "", "_x", "$x$", "\\$a$", "#010203", "\0", "a\nb", "x" * 100_000, None], ids=range(11))
def test_a_book_of_one_odd_domain(tmp_path, domain):
    made, text = book(tmp_path, [dict(response=CLEAN, domain=domain), dict(response=CLEAN, domain=domain)])
    assert made.traces == 2
    figure = text[text.index("<figure"):]
    if domain and len(domain) < 20 and domain.isprintable(): assert html.escape(domain) in figure[:figure.index("</figure>")], "the legend has no such domain"

def test_a_domain_called_all_is_a_domain(tmp_path):
    rows = load_traces([dict(response=CLEAN, domain="all"), dict(response=CLEAN, domain="math"), dict(response=CLEAN, domain="math")])
    table, blocks = measure(rows)
    counts = sorted(r["n"] for r in summarize(table, blocks=blocks).per_domain().to_pylist())
    assert counts == [1, 2, 3]

def test_no_domain_and_a_domain_called_none_are_counted_apart_or_together_but_the_same_everywhere(tmp_path):
    made, text = book(tmp_path, [dict(response=CLEAN, domain="(none)"), dict(response=CLEAN), dict(response="<think>", domain="")])
    rows = dict(re.findall(r'<th scope="row"><bdi class="cell">([^<]*)</bdi></th><td class="num"><bdi>[\d,]+</bdi></td><td class="num"><bdi>([\d,]+)</bdi>', text))
    assert rows.get("", "1") == "1" and rows["(none)"] == "0" and rows["all"] == "1"

def test_many_domains(tmp_path):
    with within(20): made, text = book(tmp_path, [dict(response=CLEAN, domain=f"domain {i}") for i in range(500)], max_traces=3)
    assert made.domains == 500 and len(text) < 2_000_000 and "smallest domains are left out" in text

def test_a_hundred_thousand_blocks(tmp_path):
    text = build_memento([("x" * 50, "sum")] * 100_000, "end")
    with within(40): made, page = book(tmp_path, [dict(response=text)])
    assert len(text) > 10_000_000 and made.size < 3_000_000 and "100,000 blocks" in page and "are not shown here" in page

@pytest.mark.parametrize("row", [dict(response="x" * 5_000_000), dict(response=CLEAN, problem="p" * 5_000_000), dict(response=CLEAN, source="s" * 5_000_000), dict(response=CLEAN, domain="d" * 5_000_000)], ids=["response", "problem", "source", "domain"])
def test_one_enormous_field_makes_no_enormous_page(tmp_path, row):
    with within(25): made, text = book(tmp_path, [row])
    assert made.size < 2_000_000

def test_more_unreadable_rows_than_can_be_listed(tmp_path):
    made, text = book(tmp_path, [dict(response=CLEAN)] + [dict(response=None)] * 1000)
    assert made.unreadable == 1000 and "1,000 rows could not be read" in text and "The first 200 of 1,000" in text

def test_what_is_not_shown_is_said(tmp_path):
    made, text = book(tmp_path, [dict(response=CLEAN)] * 5, max_traces=2)
    assert (made.traces, made.shown) == (5, 2) and "first 2 of 5 traces" in text
    with pytest.raises(ValueError): book(tmp_path, [dict(response=CLEAN)], max_traces=-1)

def test_no_rows_at_all(tmp_path):
    for rows in ([], Dataset.from_list([dict(response=CLEAN)]).select([]), load_traces(Dataset.from_list([dict(response=CLEAN)]).to_iterable_dataset(), limit=0)):
        made = make_book(rows, tmp_path / "o.html")
        assert made.traces == 0 and "There are no traces to read" in made.path.read_text()

def test_a_stream_makes_the_book_of_a_list(tmp_path):
    rows = [dict(response=CLEAN, problem=3, difficulty="easy"), dict(response=None), dict(response=CLEAN, problem="x", difficulty=2), dict(response="\ud800")]
    made = [make_book(source, tmp_path / "o.html") for source in (rows, IterableDataset.from_generator(lambda: iter(rows)))]
    assert made[0]._replace(path="", size=0) == made[1]._replace(path="", size=0) and made[0].unreadable == 2

def test_a_stream_that_was_looked_at_counts_once(tmp_path):
    rows = load_traces(IterableDataset.from_generator(lambda: iter([dict(response=None), dict(response=CLEAN)])))
    next(iter(rows))
    assert make_book(rows, tmp_path / "o.html").unreadable == 1

def test_an_error_while_rendering_leaves_the_old_page(tmp_path, monkeypatch):
    import tracebook.book as b
    (tmp_path / "o.html").write_text("old")
    def stop(*_, **__): raise KeyboardInterrupt
    for name in ("_figures", "_trace_item", "_environment", "measure"):
        with monkeypatch.context() as m:
            m.setattr(b, name, stop)
            with pytest.raises(KeyboardInterrupt): make_book([dict(response=CLEAN)], tmp_path / "o.html")
        assert (tmp_path / "o.html").read_text() == "old" and os.listdir(tmp_path) == ["o.html"]

def test_figures_are_closed_when_one_fails(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt, tracebook.book as b
    before = plt.get_fignums()
    def stop(*_): raise RuntimeError
    monkeypatch.setattr(b, "_svg", stop)
    with pytest.raises(RuntimeError): make_book([dict(response=CLEAN)], tmp_path / "o.html")
    assert plt.get_fignums() == before

def test_a_page_that_cannot_be_written(tmp_path):
    for path in (tmp_path / "none" / "o.html", tmp_path):
        with pytest.raises(OSError) as e: make_book([dict(response=CLEAN)], path)
        assert not re.search(r"\.\w+\.\w{8}'", str(e.value)), "the message names a file that nobody asked for"
    assert os.listdir(tmp_path) == []

def test_the_page_is_the_same_every_time(tmp_path):
    code = textwrap.dedent("""
        import socket, sys
        def refuse(*_, **__): raise OSError("network")
        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
        from tracebook.book import make_book
        from tracebook.sources import make_traces
        make_book(make_traces(5), sys.argv[1])""")
    pages = []
    for seed, zone, name in (("1", "UTC", "o.html"), ("2", "Asia/Tokyo", "o.html")):
        env = os.environ | dict(PYTHONHASHSEED=seed, TZ=zone)
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, env=env, timeout=60)
        pages.append((tmp_path / name).read_bytes())
    same = pages[0] == pages[1] # a plain bool: a diff of two pages would take minutes
    assert same
    rows = make_traces(5)
    here = {make_book(rows, tmp_path / name).path.read_bytes() for name in ("a.html", "b.html")} | {pages[0]}
    assert len(here) == 1


# the context chapter

def contexts(page): return [json.loads(x) for x in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)]

def test_context_says_what_the_library_says(tmp_path):
    from tracebook.attention import kv_occupancy, visible_until
    from tracebook.book import _POLICIES
    from tracebook.compress import compress_report
    from tracebook.tokens import _with_markers, make_tokenizer, tokenize_trace
    rows = [*sample_traces(), *(dict(problem=None, response=z["response"]) for z in sample_zoo())]
    tokenizer = make_tokenizer(r["response"] for r in rows)
    make_book(rows, tmp_path/"b.html", tokenizer=tokenizer)
    found = contexts((tmp_path/"b.html").read_text(encoding="utf-8"))
    traces = [t for t in map(parse, (r["response"] for r in rows)) if any(p.is_complete for p in t.pairs)]
    assert len(found) == len(traces) > 24
    for c, trace in zip(found, traces):
        tokens = tokenize_trace(_with_markers(tokenizer), trace)
        assert c["sizes"] == dict(characters=len(trace.text), tokens=len(tokens))
        assert [(p["start"], p["end"]) for p in c["pieces"]] == [(s.start, s.end) for s in trace.spans]
        for under, (label, policy) in zip(c["policies"], _POLICIES.values(), strict=True):
            report = compress_report(trace, policy=policy)
            curve, drawn = kv_occupancy(visible_until(trace.to_token_blocks(tokens), len(tokens), policy)), under["curves"]["tokens"]
            assert under["label"] == label and under["characters_left"] == report.chars_after and under["percent"] == pytest.approx(report.percent)
            assert (drawn["peak"], drawn["area"], drawn["mean"], drawn["final"]) == (curve.peak, curve.auc, curve.mean, int(curve.occupancy[-1]))
            assert [tuple(p) for p in drawn["points"]] == curve.sawtooth().points

def test_context_of_hostile_texts(tmp_path):
    evil = "</script><script>alert(1)</script><!--"
    text = f"<think>{evil}" + build_memento([("a </script> b", "m"), ("c", "n")], "</script>x").removeprefix("<think>")
    make_book([dict(response=text, problem=evil)], tmp_path/"b.html", tokenizer=None)
    page = (tmp_path/"b.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page and len(contexts(page)) == 1 and contexts(page)[0]["pieces"][1]["text"].startswith(evil)

def test_no_context_without_mementos(tmp_path):
    make_book([dict(response="<think>Hm</think>x"), dict(response="plain")], tmp_path/"b.html", tokenizer=None)
    page = (tmp_path/"b.html").read_text(encoding="utf-8")
    assert not contexts(page) and 'id="context"' not in page

def test_units_are_named(tmp_path, monkeypatch):
    from tracebook.tokens import make_tokenizer
    monkeypatch.setattr("tracebook.book.cached_tokenizer", lambda: None)
    make_book(sample_traces(), tmp_path/"c.html")
    make_book(sample_traces(), tmp_path/"t.html", tokenizer=make_tokenizer(["x"], name="tiny & small"))
    without, with_tokens = ((tmp_path/n).read_text(encoding="utf-8") for n in ("c.html", "t.html"))
    assert "Sizes are in characters and words: no tokenizer was named and none of Qwen/Qwen3-8B" in without and "Ratio in tokens" not in without
    assert "Tokens are those of tiny &amp; small" in with_tokens and "Ratio in tokens" in with_tokens
    with pytest.raises(ValueError, match="give a name on the hub"): make_book(sample_traces(), tmp_path/"x.html", tokenizer="no/such")
    assert not (tmp_path/"x.html").exists()

# the live chapter

class Said(LogitsProcessor):
    "Makes a model write what it is told."
    def __init__(self, ids, start): self.ids, self.start = ids, start
    def __call__(self, ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self.ids[ids.shape[1] - self.start]] = 0
        return scores

@pytest.fixture(scope="module")
def said():
    "A function that lets a random model write a text."
    tokenizer = make_tokenizer(["a b c"])
    add_memento_tokens(tokenizer)
    model = Qwen3ForCausalLM(toy_config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, eos_token_id=None, pad_token_id=None, bos_token_id=None)).eval()
    def write(text, policy="qwen3", prompt="<b>p</b>&amp;"):
        ids, start = tokenizer(text)["input_ids"], len(tokenizer(prompt)["input_ids"])
        return live_trace(model, tokenizer, prompt, policy=policy, max_new_tokens=len(ids), logits_processor=[Said(ids, start)])
    return write

def live_page(tmp_path, live):
    "The page, and (text, kind, step before which it left or None) of its tokens, and its sizes."
    made = make_book([dict(response="x")], tmp_path/"l.html", tokenizer=None, live=live)
    text = made.path.read_text(encoding="utf-8")
    part = text[text.index('id="live-text"'):text.index('id="live-sizes"')]
    found = re.findall(r'<span class="p-([a-z]+)( gone)?"(?: data-leaves="([0-9]+)")?>(.*?)</span>', part, re.S)
    assert all(bool(gone) == bool(leaves) for _, gone, leaves, _ in found)
    sizes = json.loads(re.search(r'id="live-sizes">(.*?)</script>', text).group(1))
    return text, [(html.unescape(t), kind, int(l) if l else None) for kind, _, l, t in found], sizes

LIVE = build_memento([("one two", "1"), ("three", "3"), ("four five six", "4")], "\n\nThe answer, d’été 🙂.")

@pytest.mark.parametrize("policy", [QWEN3, PHI4, VANILLA, ContextPolicy(1), ContextPolicy(0, keep_last_block_for_answer=True), ContextPolicy(restart=True)], ids=lambda p: p.label)
def test_the_page_fades_what_the_cache_had_lost(tmp_path, said, policy):
    live = said(LIVE, policy)
    _, tokens, sizes = live_page(tmp_path, live)
    n, given = len(tokens), live.output.prompt_length
    assert sizes == live.output.curve.occupancy.tolist() and n == len(live.output.ids)
    leaves = [l or n + 1 for *_, l in tokens]
    in_cache = [sum(l >= k for l in leaves[:k]) for k in range(given, n + 1)]
    assert in_cache == sizes
    assert "".join(t for t, kind, _ in tokens if kind != "prompt") == LIVE
    assert "".join(t for t, kind, _ in tokens if kind == "answer") == parse(LIVE).answer

def test_live_text_of_a_stranger(tmp_path, said, allowed):
    attack = "".join(ATTACKS) + "\x1b[31m"
    clean, _, _ = live_page(tmp_path, said(LIVE))
    text, tokens, _ = live_page(tmp_path, said(build_memento([(attack, attack), ("a", "b")], attack), prompt=attack)._replace(model=attack))
    assert not shape(text) - allowed - shape(clean)
    assert len(re.findall("<script>", text)) == 2 and "\x1b" not in text
    assert visible(attack) in "".join(Page(text).text)
    assert "".join(t for t, kind, _ in tokens if kind == "prompt") == visible(attack)

def test_live_without_a_block_says_nothing_of_right_and_wrong(tmp_path, said):
    text, tokens, sizes = live_page(tmp_path, said("nothing to forget"))
    assert sizes[-1] == len(tokens) and not any(l for *_, l in tokens)
    assert "partial sum" not in text and "stopped before it had finished" in text

@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_token_texts_are_the_text(text):
    tokenizer = make_tokenizer(["a"])
    ids = tokenizer(text)["input_ids"]
    assert "".join(_token_texts(tokenizer, ids)) == tokenizer.decode(ids) and len(_token_texts(tokenizer, ids)) == len(ids)

def test_the_toy_writes_the_same_page_every_time(tmp_path):
    first, again = (live_page(tmp_path, live_trace())[0] for _ in range(2))
    assert first == again and "the answer are right" in first and "tracebook toy" in first


EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m</details></section>'
TREE_NODE = "<start_of_father_id>{}<end_of_father_id><start_of_local_id>{}<end_of_local_id><start_of_thought>{}<end_of_thought><start_of_rating>{}<end_of_rating>"

def test_hostile_trees(tmp_path):
    "What a tree says is shown and never run; what is wrong with it is named."
    good = TREE_NODE.format(-1, 0, "<problem>2+3?", "<unknown_rating>") + TREE_NODE.format(0, 1, "<expansion>5", "<positive_rating>")
    rows = [dict(text=good, domain=EVIL), dict(text=TREE_NODE.format(-1, 0, EVIL, "<unknow_rating>")), dict(text=None), dict(text="no header"), dict(text=EVIL + good[:-9])]
    with pytest.warns(UserWarning, match="row 2"): book = make_book(None, tmp_path/"b.html", trees=rows)
    page = Page(book.path.read_text(encoding="utf-8"))
    shown, tags = "".join(page.text), [t for t, _ in page.elements]
    assert (book.trees, book.traces, tags.count("img")) == (4, 0, 0)
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]
    assert EVIL.replace("\x1b", "␛") in shown and "\x1b" not in shown
    assert "rating_misspelled" in shown and "row 2" in shown
    assert sum("tree" in (a.get("class") or "").split() for t, a in page.elements if t == "details") == 4

def test_book_of_a_thousand_trees_is_bounded(tmp_path):
    "All trees are counted, thirty are to be read, and a long one is cut with a note."
    long = TREE_NODE.format(-1, 0, "p", "") + "".join(TREE_NODE.format(0, i, f"<expansion>{i}", "<positive_rating>") for i in range(1, 500))
    short = TREE_NODE.format(-1, 0, "p", "")
    rows = [dict(text=short if i else long, domain=f"d{i % 50}") for i in range(60)]
    with within(60): book = make_book(None, tmp_path/"b.html", trees=rows)
    page = Page(book.path.read_text(encoding="utf-8"))
    shown = "".join(page.text)
    assert book.trees == 60 and "The first 30 of 60" in shown and "300 nodes of this tree not shown" in shown
    assert sum("tree" in (a.get("class") or "").split() for t, a in page.elements if t == "details") == 30
    assert make_book(sample_traces(), tmp_path/"t.html", trees=[long]).trees == 1

def test_trees_of_every_kind(tmp_path):
    "Streams, trees, datasets and saved trees give the same chapter."
    rows = sample_traces("thoughts").select(range(3)).flatten_indices()
    kinds = [rows, rows.data.table, rows.to_iterable_dataset(), (dict(r) for r in rows), rows.rename_column("text", "response")]
    pages = [make_book(None, tmp_path/f"{i}.html", trees=k).path.read_bytes() for i, k in enumerate(kinds)]
    assert len(set(pages)) == 1
    assert make_book(None, tmp_path/"x.html", trees=[parse_thoughts(t) for t in rows["text"]]).trees == 3
