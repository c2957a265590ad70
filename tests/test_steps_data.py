"The annotated part of the bundled corpus: its steps against the texts, its conventions, and a file that was tampered with."
import copy
import hashlib
import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from tracebook import sources
from tracebook.sources import STEP_COLUMNS, STEP_LABELS, load_traces, read_rows, sample_traces

EIGHT = ["Read", "Analyze", "Plan", "Implement", "Explore", "Verify", "Monitor", "Answer"]
ROWS = list(sample_traces("steps"))
LINES = [json.loads(line) for line in files("tracebook").joinpath("data", "steps.jsonl").read_text(encoding="utf-8").splitlines()]
SAMPLE = list(sample_traces())
N = range(len(ROWS))
MARKER = re.compile(r"</?think>|<\|(?:block|summary)_(?:start|end)\|>")


def said(row): return [(s["category"], row["response"][s["start"]:s["end"]], s["start"]) for s in row["steps"]]

def regions(text):
    "(start, end) of the contents of the blocks and of the answer, found without the parser."
    return [m.span(1) for m in re.finditer(r"<\|block_start\|>(.*?)<\|block_end\|>", text, re.S)] + [(text.index("</think>") + len("</think>"), len(text))]


# ---- what is promised of the corpus
def test_sizes():
    assert len(ROWS) == 15 and sum(len(r["steps"]) for r in ROWS) == 545
    assert len(ROWS) >= 12 and sum(len(r["steps"]) for r in ROWS) >= 200 and min(len(r["steps"]) for r in ROWS) >= 8
    assert Counter(r["domain"] for r in ROWS) == dict(math=5, code=5, science=5)

def test_all_eight_labels_occur():
    assert list(STEP_LABELS) == EIGHT
    count = Counter(c for r in ROWS for c, *_ in said(r))
    assert set(count) == set(EIGHT) and min(count.values()) >= 9 and max(count.values()) < .4 * count.total()

def test_columns():
    steps = sample_traces("steps")
    assert steps.column_names == ["problem", "response", "domain", "source", "difficulty", "steps"] == STEP_COLUMNS.names
    assert steps.data.schema.field("steps").type == pa.list_(pa.struct([("start", pa.int64()), ("end", pa.int64()), ("category", pa.string()), ("macro", pa.string())]))
    assert list(ROWS[0]["steps"][0]) == ["start", "end", "category", "macro"]

def test_the_texts_are_those_of_the_sample():
    for line, row in zip(LINES, ROWS, strict=True):
        assert {k: v for k, v in row.items() if k != "steps"} == SAMPLE[line["row"]]
        assert hashlib.sha256(row["response"].encode()).hexdigest() == line["sha256"]
    assert not any(isinstance(x, str) and len(x) > 64 for line in LINES for x in line.values()) # no text twice
    assert len({line["row"] for line in LINES}) == len(LINES)


# ---- each trace
@pytest.mark.parametrize("i", N)
def test_offsets(i):
    text, steps = ROWS[i]["response"], ROWS[i]["steps"]
    for a, b in zip(steps, steps[1:]): assert a["end"] <= b["start"]
    for s in steps:
        assert 0 <= s["start"] < s["end"] <= len(text) and s["category"] in EIGHT and s["macro"] == s["category"]
        assert text[s["start"]:s["end"]] == text[s["start"]:s["end"]].strip() != ""
        assert not MARKER.search(text, s["start"], s["end"])

@pytest.mark.parametrize("i", N)
def test_no_word_is_cut(i):
    text = ROWS[i]["response"]
    for s in ROWS[i]["steps"]:
        assert text[s["start"] - 1].isspace() or text[:s["start"]].endswith("<|block_start|>")
        assert s["end"] == len(text) or text[s["end"]].isspace() or text.startswith("<|block_end|>", s["end"])

@pytest.mark.parametrize("i", N)
def test_blocks_and_answer_are_covered_and_nothing_else(i):
    text, at = ROWS[i]["response"], 0
    steps = [(s["start"], s["end"]) for s in ROWS[i]["steps"]]
    for start, end in regions(text):
        mine = [(a, b) for a, b in steps if start <= a and b <= end]
        inside = "".join(text[a:b] for a, b in mine)
        assert "".join(inside.split()) == "".join(text[start:end].split())
        at += len(mine)
    assert at == len(steps) # so none lies in a memento

@pytest.mark.parametrize("i", N)
def test_conventions(i):
    text, steps = ROWS[i]["response"], said(ROWS[i])
    solution = text.index("</think>")
    for label, step, start in steps:
        if "```" in step:
            assert step.count("```") == 2 and label == ("Answer" if start > solution else "Implement")
        if re.search(r"\\boxed|\*\*Answer:\*\*|^(So|so) the answer is|^Conclusion:", step): assert label == "Answer"
        if re.match(r"(My|It is tempting|One tempting|The usual trick)\b.*", step) and not step.startswith("My sign"): assert label == "Explore"
        if re.match(r"(but )?(that|this|it) (is|was|would be) wrong|but that sign is wrong|That fails|That shortcut is wrong", step): assert label == "Verify"
        if re.match(r"Let me (trace|run|follow|also verify|test)|As a check|A quick|Check:|One more|One last|To be safe, let me trace|For an? (independent )?check", step): assert label == "Verify"
        if label == "Monitor": assert len(step) < 60 and not re.search(r"\d = ", step)
    assert any(label == "Answer" and start > solution for label, _, start in steps)
    assert any(label == "Answer" and start < solution for label, _, start in steps) or ROWS[i]["domain"] == "code"

def test_an_idea_that_is_given_up_is_judged_at_once():
    after = Counter(b for r in ROWS for (a, _, _), (b, _, _) in zip(said(r), said(r)[1:]) if a == "Explore")
    assert after["Verify"] > .6 * after.total()


# ---- as rows like any others
def test_read_rows_hands_the_steps_on():
    assert [r["steps"] for _, r in read_rows(sample_traces("steps"))] == [r["steps"] for r in ROWS]

def test_through_files(tmp_path):
    steps = sample_traces("steps")
    steps.to_json(tmp_path/"a.jsonl")
    steps.to_parquet(tmp_path/"a.parquet")
    for name in ("a.jsonl", "a.parquet"): assert [r for _, r in read_rows(tmp_path/name)] == ROWS

def test_the_other_configs_do_not_need_the_file(monkeypatch):
    real = sources._bundled
    def only(name):
        assert name != "steps.jsonl"
        return real(name)
    monkeypatch.setattr(sources, "_bundled", only)
    assert len(sample_traces()) == 24 and len(sample_traces("full")) == 24 and len(sample_traces("thoughts")) == 16

def test_wrong_config():
    with pytest.raises(ValueError, match="choose default or full or thoughts or steps$"): sample_traces("step")
    with pytest.raises(ValueError, match="choose default or full$"): load_traces([dict(response="x")], config="steps")

def test_the_file_ships():
    root = Path(__file__).parent.parent
    assert "recursive-include tracebook/data *" in (root/"MANIFEST.in").read_text() and '"data/*"' in (root/"setup.py").read_text()

def test_a_later_room_is_not_needed(): assert "tracebook.steps" not in Path(sources.__file__).read_text(encoding="utf-8")


# ---- a file that was tampered with
def load(monkeypatch, lines=None, sample=None):
    "`sample_traces('steps')` with other contents of the files."
    real = sources._bundled
    monkeypatch.setattr(sources, "_bundled", lambda name: copy.deepcopy(lines) if name == "steps.jsonl" and lines is not None
        else copy.deepcopy(sample) if name == "sample.jsonl" and sample is not None else real(name))
    return sample_traces("steps")

def changed(line, **kw): return [*LINES[:line], LINES[line] | kw, *LINES[line + 1:]]
def step(k, new): return changed(3, steps=[*LINES[3]["steps"][:k], new, *LINES[3]["steps"][k + 1:]])
S, E, L = LINES[3]["steps"][5]

@pytest.mark.parametrize("lines, says", [
    (changed(0, sha256="0" * 64), r"steps.jsonl:1: the response of row 0 is not the one that was annotated"),
    (changed(0, sha256=LINES[0]["sha256"].upper()), "sha256 is another"),
    (changed(0, sha256=None), "sha256 is another"),
    (changed(4, row=20), r"steps.jsonl:5: the response of row 20"),
    (changed(4, row=24), r"steps.jsonl:5: row 24 is not one of 4 to 23"),
    (changed(4, row=-1), "row -1 is not one of"), (changed(0, row=True), "row True is not one of"), (changed(0, row="0"), "row '0' is not one of"),
    ([LINES[0], LINES[0]], r"steps.jsonl:2: row 0 is not one of 1 to 23"), # twice
    (LINES[::-1], r"steps.jsonl:2: row 13 is not one of 15 to 23"),
    ([{}], "must have row, sha256 and a list of steps"), ([[]], "must have row"), ([None], "must have row"), ([LINES[0] | dict(text="x")], "must have row"), (changed(0, steps={}), "a list of steps"),
    (step(5, [S, E, "Guess"]), r"steps.jsonl:4: step 5 of row 3 has the unknown label 'Guess'"), (step(5, [S, E, "analyze"]), "unknown label 'analyze'"),
    (step(5, [S, S, L]), "empty"), (step(5, [E, S, L]), "empty"), (step(5, [S - 2, E, L]), "empty or not within"), (step(0, [-3, E, L]), "empty or not within"),
    (step(5, [S, E + 1, L]), "white space"), (step(5, [S - 1, E, L]), "white space"), (step(len(LINES[3]["steps"]) - 1, [3800, 10**9, L]), "empty or not within"),
    (step(5, [S, E]), r"is not \[start, end, label\]"), (step(5, [S, E, L, L]), r"is not \["), (step(5, [float(S), E, L]), r"is not \["), (step(5, [True, E, L]), r"is not \["),
    (step(5, [S, E, None]), r"is not \["), (step(5, dict(start=S, end=E, category=L)), r"is not \["), (step(5, None), r"is not \["),
    (changed(3, steps=[*LINES[3]["steps"][:6], LINES[3]["steps"][5], *LINES[3]["steps"][6:]]), "step 6 of row 3 is"), # the same step twice
], ids=range(32))
def test_a_tampered_file_is_refused(monkeypatch, lines, says):
    with pytest.raises(ValueError, match=says): load(monkeypatch, lines)

@pytest.mark.parametrize("i", N)
@pytest.mark.parametrize("how", [lambda t: t + " ", lambda t: t[:-1], lambda t: t.replace("a", "e", 1), lambda t: t.replace("\n", "\r\n"), lambda t: ""], ids=["longer", "shorter", "other", "crlf", "empty"])
def test_a_changed_response_is_refused(monkeypatch, i, how):
    sample = sources._bundled("sample.jsonl")
    sample[LINES[i]["row"]]["response"] = how(sample[LINES[i]["row"]]["response"])
    with pytest.raises(ValueError, match=rf"steps.jsonl:{i + 1}: the response of row {LINES[i]['row']} is not"): load(monkeypatch, sample=sample)

def test_fewer_lines_are_fewer_rows(monkeypatch):
    assert [r["problem"] for r in load(monkeypatch, LINES[3:5])] == [ROWS[3]["problem"], ROWS[4]["problem"]]
    assert load(monkeypatch, [LINES[0] | dict(steps=[])])[0]["steps"] == [] and len(load(monkeypatch, [])) == 0

TEXT = "ab  cd\n ef"
@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 12), st.integers(-2, 12), st.sampled_from([*EIGHT, "x"])).map(list), max_size=4))
def test_steps_are_accepted_exactly_if_they_are_sound(steps):
    note = dict(row=0, sha256=hashlib.sha256(TEXT.encode()).hexdigest(), steps=steps)
    taken = [i for s, e, _ in steps for i in range(s, e)]
    sound = all(0 <= s < e <= len(TEXT) and c != "x" and TEXT[s:e] == TEXT[s:e].strip() for s, e, c in steps) and taken == sorted(set(taken))
    assert (sources._note_fault(note, [dict(response=TEXT)], 0) == "") == sound

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(["row", "sha256", "steps", "x"]), x, max_size=4), max_leaves=12)
@settings(max_examples=300, deadline=None)
@given(JSON)
def test_anything_is_refused_with_words(note):
    fault = sources._note_fault(note, [dict(response=TEXT)], 0)
    assert isinstance(fault, str) and fault
