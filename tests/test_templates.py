"Loss masks over every chat template in the trl wheel: by words that only one message has, by prefix differences, by the prompts of the template."
import copy
import json
import random
import re

import pytest

from tracebook.masking import Unverified, check_template, tokenize_chat, tokenize_chats
from tracebook.chat import _template

from oracle_masking import (ALWAYS_STABLE, PARTS, REAL, REWRITING, TOOLS, call_of, chat_of, close_of, excused, fitted, ids_of, opening_of, prefix_labels, problems, proven, render, say, specials, stable,
    templates, tokenizer_for, tool_of, trained_text, turns_of, unsound, user_header)

pytestmark = pytest.mark.skipif(not templates(), reason="trl, which ships the templates, is not installed")
every = pytest.mark.parametrize("name", templates())
some = pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "gemma3", "qwen3", "gptoss", "phi3", "deepseek_r1_distill", "gemma4"])
steady = pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "gemma3", "cohere2", "qwen3_8"])


def words(who, i, n=3): return " ".join(f"{who}{i}x{k}z" for k in range(n))
def user(i): return say("user", words("user", i))
def asst(i, **more): return say("assistant", words("asst", i), **more)
def inline(i): return say("assistant", f"<think>\n{words('asst', f'{i}r')}\n</think>\n\n{words('asst', i)}")
def calls(i, n=1, **kw): return call_of(words("asst", f"{i}c", 1), n, **kw)


WORD = re.compile(r"(?:user|syst|tool|asst|schema)\d+[rc]?x\dz\d?")
PROBES = dict(
    plain=[user(0), asst(1), user(2), asst(3)],
    system=[say("system", words("syst", 0)), user(1), asst(2), user(3), asst(4)],
    open_end=[user(0), asst(1), user(2)],
    reasoning=[user(0), asst(1, reasoning_content=words("asst", "1r")), user(2), asst(3, reasoning_content=words("asst", "3r"))],
    thinking=[user(0), asst(1, thinking=words("asst", "1r")), user(2), asst(3, thinking=words("asst", "3r"))],
    inline=[user(0), inline(1), user(2), inline(3)],
    tools=[user(0), say("assistant", "", tool_calls=calls(1)), tool_of(words("tool", 2)), asst(3), user(4), asst(5)],
    json_tools=[user(0), say("assistant", "", tool_calls=calls(1, as_json=True)), tool_of(words("tool", 2)), asst(3)],
    two_calls=[user(0), asst(1, tool_calls=calls(1, 2)), tool_of(words("tool", 2)), tool_of(words("tool", 3), 1), asst(4)],
    mixed=[say("system", words("syst", 0)), user(1), asst(2, reasoning_content=words("asst", "2r"), tool_calls=calls(2)), tool_of(words("tool", 3)), asst(4, reasoning_content=words("asst", "4r")), user(5), inline(6)])


def tools_of(chat): return dict(tools=TOOLS) if any(m.get("tool_calls") for m in chat) else {}


def in_its_form(name, chat):
    "Content in parts for the templates that want it so."
    return [dict(m, content=[dict(type="text", text=m["content"])]) for m in chat] if name.startswith(PARTS) else chat


def encode(tok, chat, **kw):
    "Always a list."
    got = tokenize_chat(tok, chat, **kw)
    return got if isinstance(got, list) else [got]


def attempt(tok, chat, **kw):
    "The examples, or None for a refusal that has a name, and that the template gives a reason for."
    try: return encode(tok, chat, **kw)
    except Unverified as e:
        rendering = {k: v for k, v in kw.items() if k == "tools"}
        try: render(tok, chat, **rendering)
        except Exception: assert e.code == "template_raises"  # a template raises whatever it likes
        else: assert excused(tok, chat, e.code, **rendering), f"refused without need: {e}"
        assert re.fullmatch(r"[a-z_]+", e.code) and len(str(e).split()) > 3
        return None


def trained(enc): return [k for k, l in enumerate(enc.labels) if l != -100]


def said_in(encs):
    "The words that are trained, and those that are in the text; a word in half is a fault."
    said, there = [], []
    for e in encs:
        for m in WORD.finditer(e.text):
            state = {l != -100 for (a, b), l in zip(e.offsets, e.labels) if a < m.end() and b > m.start()}
            assert len(state) == 1, f"{m[0]} is trained in part"
            there.append(m[0])
            if state.pop(): said.append(m[0])
    return said, there


def row(e): return e.input_ids, e.labels, e.loss_weights


# ---------------------------------------------------------------------------------------------------- the sweep

@pytest.mark.parametrize("probe", PROBES)
@every
def test_only_what_an_assistant_emits_is_trained(name, probe):
    "Each template and probe: refused by name, or every word of an assistant that is still there is trained once, no other word is, and no header."
    tok, chat = tokenizer_for(name), in_its_form(name, PROBES[probe])
    encs = attempt(tok, chat, **tools_of(chat))
    if encs is None: return
    said, there = said_in(encs)
    assert all(w.startswith("asst") for w in said) and len(said) == len(set(said))
    assert set(said) == {w for w in there if w.startswith("asst")}
    for i, m in enumerate(chat):
        lost = {w for w in WORD.findall(str(m["content"])) if not re.match(r"asst\dr", w)} - set(said)
        if m["role"] == "assistant" and lost: assert lost.isdisjoint(there) and any(f"message {i}: the template drops its content" in n for e in encs for n in e.report["notes"])
    text, own = "".join(trained_text(e) for e in encs), "".join(t.emits or "" for t in turns_of(tok, chat, **tools_of(chat)) if t)
    headers = [opening_of(tok, chat).replace("<think>", "").strip(), *([user_header(tok, chat)] if close_of(tok, chat) else [])]
    assert not [h for h in headers if len(h) > 2 and text.count(h) > own.count(h)]
    for e in encs: assert unsound(tok, e) == []
    assert problems(tok, chat, encs, **tools_of(chat)) == []


@every
def test_what_is_trained_beside_words_is_tags_and_ends(name):
    "In chats without tools nothing is left of the trained text but tags, special tokens, white space and the names of channels."
    tok = tokenizer_for(name)
    for probe in ("plain", "reasoning", "inline"):
        for e in attempt(tok, in_its_form(name, PROBES[probe])) or []:
            rest = WORD.sub("", trained_text(e))
            for s in [*specials(tok), "<think>", "</think>"]: rest = rest.replace(s, "")
            assert set(rest.split()) <= {"analysis", "final", "assistantfinal", "thought", "to=self", "to=user", "assistant"}, rest


@every
def test_plain_chats_are_never_refused(name):
    "Two pairs of plain turns are proven on every template, each with one end token."
    tok, chat = tokenizer_for(name), in_its_form(name, PROBES["plain"])
    encs = encode(tok, chat)
    assert sum(r.field == "eot" for e in encs for r in e.spans) == 2 or not close_of(tok, chat)
    assert sum(trained_text(e).count(close_of(tok, chat)) for e in encs) == 2 or not close_of(tok, chat)


@every
def test_a_report_names_every_probe(name):
    "Each probe of a report is proven, or refused with a code and a reason; what it says of stability is what two renderings say."
    tok = tokenizer_for(name)
    report = check_template(tok)
    assert json.loads(report.to_json())["probes"] == report.probes and report.probes.keys() >= {"plain", "reasoning", "inline", "tools", "mixed"}
    for p in report.probes.values(): assert p["verified"] or (re.fullmatch(r"[a-z_]+", p["code"]) and len(p["message"].split()) > 3)
    if name in ALWAYS_STABLE: assert all(p["stable"] for k, p in report.probes.items() if p["verified"]) and report.probes["plain"]["verified"]
    if name in REWRITING: assert report.probes["plain"]["stable"] is False
    chat = in_its_form(name, PROBES["plain"])
    if report.probes["plain"]["verified"]: assert report.probes["plain"]["stable"] == stable(render(tok, chat), turns_of(tok, chat))
    assert report.end_of_turn == close_of(tok, chat) or not close_of(tok, chat)


def test_the_oracle_finds_the_stable_templates():
    "Of the originals these eleven, and no others, rewrite a plain chat; twelve rewrite none."
    originals = [n for n in templates() if not n.endswith("_training")]
    is_stable = lambda n, p: stable(render(tokenizer_for(n), in_its_form(n, PROBES[p])), turns_of(tokenizer_for(n), in_its_form(n, PROBES[p])))
    assert {n for n in originals if not is_stable(n, "plain")} == set(REWRITING)
    assert all(is_stable(n, p) for n in ALWAYS_STABLE for p in ("plain", "reasoning", "inline"))


def test_the_oracle_reads_a_chat_as_a_person_does():
    "Prompt, emission and rest of a turn, written out by hand."
    tok = tokenizer_for("qwen2_5")
    t = turns_of(tok, [say("system", "s"), say("user", "u"), say("assistant", "a")])[0]
    assert (t.prompt, t.emits, t.tail) == ("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>", "\n")
    assert close_of(tokenizer_for("phi3")) == "<|end|>" and close_of(tokenizer_for("gptoss")) == "<|return|>" and close_of(tokenizer_for("glm4moe")) == ""


# ---------------------------------------------------------------------------------------------------- random chats

def check(tok, name, chat):
    "One random chat against the oracle; whether it was proven."
    chat = fitted(tok, name, chat)
    if chat is None: return None
    encs = attempt(tok, chat)
    if encs is None: return False
    for e in encs: assert unsound(tok, e) == [], chat
    assert problems(tok, chat, encs) == [], chat
    return True


def fuzz(tok, name, n, most):
    r = random.Random(name)
    done = [check(tok, name, chat_of(r, most)) for _ in range(n)]
    assert done.count(None) == 0 and done.count(True) >= n / 5  # what thinks is refused where the prompt has closed the thinking


@every
def test_random_chats(name):
    "Labels of stable chats are those of prefix differences; of others each example has the template's prompt, and trains the turn. 50 chats a template."
    fuzz(tokenizer_for(name), name, 50, 3)


@pytest.mark.slow
@every
def test_a_thousand_random_chats(name):
    "The same for 1,000 chats a template."
    fuzz(tokenizer_for(name), name, 1000, 5)


@pytest.mark.skipif(not REAL or not REAL.exists(), reason="TRACEBOOK_SHARED is not set: no real tokenizer at hand")
@pytest.mark.parametrize("name", ["qwen3", "qwen3_8", "qwen2_5", "llama3_1", "gptoss"])
def test_random_chats_with_a_real_tokenizer(name):
    "The tokenizer of Qwen3 composes accents, so that some characters have no token of their own."
    fuzz(tokenizer_for(name, real=True), name, 25, 3)


ANSWERS = ["<b>bold</b>", "< 3", "</p>", "[x]", "|", ":", "\\", "'", "<|", "\n<", " <x", "assistant", "0", "é", "\u0301", "\u200d", "�", "#", "</think", "think>"]


@every
def test_a_refusal_does_not_hang_on_the_words(name):
    "An answer of other words is proven where a plain one is: what begins with a bracket or a new line is no special case."
    tok = tokenizer_for(name)
    for text in ANSWERS:
        chat = in_its_form(name, [say("user", text), say("assistant", text), say("user", "y"), say("assistant", text)])
        encs = encode(tok, chat)
        assert problems(tok, chat, encs) == [], text


@every
def test_thoughts_of_any_form(name):
    "Tags left open, closed only, twice, or typed by the user: proven, or refused for a reason."
    tok = tokenizer_for(name)
    for text in ("<think>{0}x0z", "{0}x0z</think>{0}x1z", "<think>{0}x0z</think>{0}x1z<think>{0}x2z</think>{0}x3z", "<think></think>{0}x0z", "<think>\n\n</think>\n\n{0}x0z", "{0}x0z <think>{0}x1z</think> {0}x2z"):
        for chat in ([user(0), say("assistant", text.format("asst1"))], [user(0), say("assistant", text.format("asst1")), user(2), asst(3)], [say("user", text.format("user0")), asst(1), user(2), asst(3)]):
            chat = in_its_form(name, chat)
            encs = attempt(tok, chat)
            if encs is None: continue
            said, _ = said_in(encs)
            assert all(w.startswith("asst") for w in said) and len(said) == len(set(said)), text
            assert problems(tok, chat, encs) == [], text


@every
def test_orders_of_roles(name):
    "Nobody, an assistant first, two in a row, two users, an empty answer: words of assistants, all that are there, and no others."
    tok = tokenizer_for(name)
    for chat in ([user(0)], [asst(0)], [asst(0), user(1), asst(2)], [say("system", words("syst", 0)), asst(1)], [user(0), asst(1), asst(2)], [user(0), user(1), asst(2)], [user(0), say("assistant", ""), user(2), asst(3)],
            [user(0), say("assistant", " \n "), say("user", ""), asst(3)]):
        chat = in_its_form(name, chat)
        try: render(tok, chat)
        except Exception: continue  # a template raises whatever it likes
        encs = attempt(tok, chat)
        if encs is None: continue
        said, there = said_in(encs)
        assert set(said) == {w for w in there if w.startswith("asst")} and len(said) == len(set(said))
        if None not in turns_of(tok, chat): assert problems(tok, chat, encs) == []


@every
def test_a_call_is_trained_to_its_end(name):
    "A call whose last argument is a number, empty, a list or missing ends where the template ends it, not at the first special token after its words."
    tok = tokenizer_for(name)
    for arguments in (dict(n=2), {}, dict(place=""), dict(place="x", n=2), dict(place=["x", 1]), dict(place="x", deep=dict(n=None))):
        chat = in_its_form(name, [user(0), say("assistant", "", tool_calls=[dict(id="call00001", type="function", function=dict(name="asst0call", arguments=arguments))])])
        try: encs = encode(tok, chat, tools=TOOLS)
        except Unverified as e: assert e.code in ("template_raises", "prefill_conflict", "tool_calls_unplaced")  # some write a list as Python does, and cannot be marked
        else: assert problems(tok, chat, encs, tools=TOOLS) == [], arguments


@pytest.mark.parametrize("probe", ["plain", "tools", "two_calls", "mixed"])
@every
def test_as_rendered_nobody_else_is_trained(name, probe):
    "In the one rendering, each stretch that is trained is a part of what a turn emits: a tool's header may repeat the name of the call, and is not trained for that."
    tok, chat = tokenizer_for(name), in_its_form(name, PROBES[probe])
    try: enc = tokenize_chat(tok, chat, history="as_rendered", **tools_of(chat))
    except Unverified: return
    bare = lambda text: re.sub(r"\s", "", re.sub("|".join(map(re.escape, specials(tok))), " ", text))
    turns = turns_of(tok, chat, **tools_of(chat))
    if any(t is None or t.emits is None for t in turns): return
    emitted = "".join(bare(t.emits) + "\n" for t in turns)
    at = [m.span() for m in re.finditer("1+", "".join("01"[l != -100] for l in enc.labels))]
    assert at
    for a, b in at: assert bare(enc.text[enc.offsets[a][0]:enc.offsets[b - 1][1]]) in emitted


# ---------------------------------------------------------------------------------------------------- what always holds

def randoms(name, n, seed="", **kw):
    "Random chats that the template takes and the module proves, with their tokenizer and examples."
    tok, r = tokenizer_for(name), random.Random(name + seed)
    for _ in range(n):
        chat = fitted(tok, name, chat_of(r))
        encs = attempt(tok, chat, **kw)
        if encs is not None: yield tok, chat, encs


@some
def test_last_message_in_last_turn_in_all(name):
    "The last message is a part of the last turn, that of all turns of the assistant, and those of all."
    for tok, chat, _ in randoms(name, 12):
        try: kinds = [set(trained(tokenize_chat(tok, chat, train_on=t, history="as_rendered"))) for t in ("none", "last_message", "last_turn", "all_assistant", "all")]
        except Unverified as e:
            assert e.code in ("dropped_by_template", "turn_split")  # what a turn said is gone from the history, or stands on both sides of a tool's words
            continue
        assert kinds[0] == set() and kinds[1] <= kinds[2] <= kinds[3] <= kinds[4]


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "qwen3_6", "deepseekv3", "nemotron_3_nano"])
def test_unrolled_examples_are_what_a_model_sees_and_says(name):
    "Each example begins with the template's prompt of its turn, untrained; and the examples say all turns, one after the other."
    n = 0
    for tok, chat, encs in randoms(name, 15):
        mine = [i for i, m in enumerate(chat) if m["role"] == "assistant"]
        if len(encs) != len(mine) or len(encs) == 1: continue
        n += 1
        for i, e in zip(mine, encs):
            prompt = render(tok, chat[:i], True)
            assert e.text.startswith(prompt) and all(a + 1 >= len(prompt) for k in trained(e) for a in e.offsets[k][:1])
            assert {e.message_ids[k] for k in trained(e)} <= {i} and (chat[i].get("tool_calls") or trained_text(e).endswith(close_of(tok, chat)))
    assert n >= 3


@steady
def test_a_stable_chat_needs_no_unrolling(name):
    "One example, whichever way history is treated; and turn by turn it trains the same tokens."
    for tok, chat, encs in randoms(name, 12):
        if not stable(render(tok, chat), turns := turns_of(tok, chat)) or not proven(turns): continue
        for history in ("unroll", "as_rendered", "error"): assert row(tokenize_chat(tok, chat, history=history)) == row(encs[0])
        single = [tokenize_chat(tok, chat, train_on=[j == t.i for j in range(len(chat))]).labels for t in turns]
        assert [max(ls) for ls in zip(*single)] == encs[0].labels


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "qwen3_6"])
def test_rewritten_history_as_it_is(name):
    "'error' refuses it by name; 'as_rendered' has the template's text, and trains the assistant's words in it."
    tok = tokenizer_for(name)
    with pytest.raises(Unverified) as e: tokenize_chat(tok, PROBES["plain"], history="error")
    assert e.value.code == "history_rewritten"
    enc = tokenize_chat(tok, PROBES["plain"], history="as_rendered")
    assert enc.text == render(tok, PROBES["plain"]) and said_in([enc])[0] == (words("asst", 1) + " " + words("asst", 3)).split()


@some
def test_marks_leave_no_trace(name):
    "A rendering with marks is, without them, the plain one; and each mark stands where its text is."
    for tok, chat, _ in randoms(name, 12):
        found = _template(tok).marked(chat)
        assert found.text == render(tok, chat)
        for s, places in zip(found.segments, found.places):
            content = chat[s.message].get("content")
            if s.field == "content" and chat[s.message]["role"] in ("user", "assistant"): assert all(found.text[a:b] == content[s.start:s.end] for a, b in places)


@some
def test_weights(name):
    "Weight 0 is masked and weight 1 is trained, any other weight is trained and said, for each message by itself."
    for tok, chat, _ in randoms(name, 10):
        r = random.Random(len(str(chat)))
        flags = [m["role"] == "assistant" and r.random() < .7 for m in chat]
        if not any(flags): continue
        w = r.choice([.5, 2., -1., -.25])
        on, one, scaled = (encode(tok, chat, train_on=t) for t in (flags, [float(f) for f in flags], [w * f for f in flags]))
        assert [*map(row, on)] == [*map(row, one)] and [e.labels for e in on] == [e.labels for e in scaled]
        for a, b in zip(on, scaled): assert a.loss_weights == [float(l != -100) for l in a.labels] and b.loss_weights == [w * (l != -100) for l in a.labels]


@some
def test_a_turn_that_broke_off_has_no_end(name):
    "With finish_reason 'length' the last turn loses its end token and all after it, and nothing else; with 'stop', nothing."
    for probe in ("plain", "reasoning", "inline"):
        tok, chat = tokenizer_for(name), PROBES[probe]
        whole, cut, stop = (encode(tok, chat, finish_reason=f) for f in (None, "length", "stop"))
        assert [*map(row, stop)] == [*map(row, whole)] and [*map(row, cut[:-1])] == [*map(row, whole[:-1])]
        n, close = len(cut[-1]), close_of(tok, chat)
        assert (cut[-1].input_ids, cut[-1].labels) == (whole[-1].input_ids[:n], whole[-1].labels[:n])
        assert trained_text(whole[-1]) == trained_text(cut[-1]) + close and cut[-1].labels[-1] != -100


@steady
def test_the_end_and_what_surrounds_a_turn(name):
    "The end token can be left out; the header and what follows the end are trained only if asked for, and then all of them."
    tok, chat = tokenizer_for(name), PROBES["plain"]
    text, turns, base = render(tok, chat), turns_of(tok, chat), tokenize_chat(tok, chat)
    assert trained_text(tokenize_chat(tok, chat, eot="masked")) == trained_text(base).replace(close_of(tok), "")
    assert tokenize_chat(tok, chat, trailing=True).labels == prefix_labels(tok, text, turns, trailing=True)[0]
    assert trained_text(tokenize_chat(tok, chat, generation_prompt=True)) == "".join(t.prompt[len(render(tok, chat[:t.i])):] + t.emits for t in turns)


LONG = [say("system", words("syst", 0)), *(m for i in range(1, 13, 2) for m in (user(i), asst(i + 1)))]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "gemma4_v2"])
def test_truncation(name):
    "Never longer than asked; what is kept is unchanged, labels move with ids; whole rounds go from the oldest on; nothing is cut unasked."
    tok, whole = tokenizer_for(name), tokenize_chat(tokenizer_for(name), LONG)
    n, least = len(whole), len(ids_of(tok, render(tok, LONG[:1] + LONG[-2:])))
    with pytest.raises(ValueError, match="max_length"): tokenize_chat(tok, LONG, max_length=n - 1)
    assert row(tokenize_chat(tok, LONG, max_length=n)) == row(whole)
    for most in (n - 1, n // 2, least + 10, least):
        left, right, turns = (tokenize_chat(tok, LONG, max_length=most, truncation=t) for t in ("left", "right", "turns"))
        assert [*map(list, row(right))] == [x[:most] for x in row(whole)] and [*map(list, row(left))] == [x[-most:] for x in row(whole)]
        kept = next(c for i in range(1, len(LONG), 2) for c in [LONG[:1] + LONG[i:]] if len(ids_of(tok, render(tok, c))) <= most)
        assert row(turns) == row(tokenize_chat(tok, kept)) and len(turns) <= most
        for e in (left, right, turns): assert e.position_ids == list(range(len(e))) and len(e.message_ids) == len(e.offsets) == len(e.assistant_masks) == len(e)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_a_limit_shorter_than_the_last_turn(name):
    "Refused, or within the limit and no end invented."
    tok = tokenizer_for(name)
    for how in ("left", "right", "turns", "error"):
        try: encs = encode(tok, LONG, max_length=8, truncation=how)
        except ValueError as e: assert "max_length" in str(e)
        else:
            assert how != "error" and all(len(e) <= 8 for e in encs)
            assert not any(e.labels[-1] == ids_of(tok, close_of(tok))[-1] for e in encs) or how == "left"


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_truncation_of_unrolled_examples(name):
    "Each example is within the limit, and its labels are tokens."
    tok = tokenizer_for(name)
    n = max(len(e) for e in encode(tok, LONG))
    for how in ("left", "right", "turns"):
        try: encs = encode(tok, LONG, max_length=n - 10, truncation=how)
        except ValueError as e: assert how == "turns" and "max_length" in str(e)
        else: assert all(len(e) <= n - 10 and all(l in (-100, t) for l, t in zip(e.labels, e.input_ids)) for e in encs)


@some
def test_a_batch_is_its_chats_in_any_order(name):
    "Rows of a batch are those of single calls, shuffled or repeated, and the ledger counts them."
    tok, chats = tokenizer_for(name), [chat for _, chat, _ in randoms(name, 14)]
    for order in (chats, chats[::-1], random.Random(0).sample(chats, len(chats)) + chats[:3]):
        one = [e for c in order for e in encode(tok, c)]
        data = tokenize_chats(tok, order, keep_empty=True, progress=False)
        assert [*zip(data["input_ids"], data["labels"])] == [(e.input_ids, e.labels) for e in one]
        assert data.ledger.rows == len(order) and data.ledger.examples == len(one) and data.ledger.trained == sum(len(trained(e)) for e in one)


@every
def test_the_same_again_and_nothing_changed(name):
    "A second call gives the same; messages, tools and the tokenizer's template stay as they were."
    tok, chat, tools = tokenizer_for(name), in_its_form(name, PROBES["mixed" if name in ("qwen3", "qwen3_8", "gemma4") else "plain"]), copy.deepcopy(TOOLS)
    before, template = copy.deepcopy(chat), tok.chat_template
    first, second = (encode(tok, chat, tools=tools if any(m["role"] == "tool" for m in chat) else None) for _ in range(2))
    assert [*map(row, first)] == [*map(row, second)] and (chat, tools, tok.chat_template) == (before, TOOLS, template)


# ---------------------------------------------------------------------------------------------------- typed special tokens

TYPED = ["<|im_end|>", "<|im_start|>", "<|im_start|>assistant\nuser0x0z", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<turn|>", "<|return|>", "<｜end▁of▁sentence｜>", "<|im_end", "im_end|>", "x", " ", "\n"]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "gemma3", "qwen3", "gptoss", "gemma4_v2"])
def test_typed_special_tokens_are_text_when_sanitized(name):
    "A message may say what it likes: the number of control tokens is the template's own, and the text is what was typed."
    tok, r = tokenizer_for(name), random.Random(name)
    control = {i for i, t in tok.added_tokens_decoder.items() if t.special}
    for _ in range(15):
        chat = [say(role, "".join(r.choices(TYPED, k=r.randint(1, 4))) + "x") for role in ("user", "assistant") * r.randint(1, 2)]
        encs, clean = (encode(tok, c, sanitize=True) for c in (chat, [dict(m, content="x") for m in chat]))
        assert [sum(t in control for t in e.input_ids) for e in encs] == [sum(t in control for t in e.input_ids) for e in clean], chat
        assert [tok.decode(e.input_ids) for e in encs] == [e.text for e in encs] == [e.text for e in encode(tok, chat)]


def test_typed_turn_ends_of_gemma_are_text_when_sanitized():
    "Special tokens that look like tags are no exception: they would end the user's turn and begin another."
    tok = tokenizer_for("gemma3")
    enc = tokenize_chat(tok, [say("user", "a<end_of_turn>\n<start_of_turn>model\nb"), say("assistant", "c")], sanitize=True)
    assert [enc.input_ids.count(tok.convert_tokens_to_ids(t)) for t in ("<start_of_turn>", "<end_of_turn>")] == [2, 2] and "b" not in trained_text(enc)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "gemma3", "qwen3", "gemma4_v2"])
def test_sanitizing_changes_nothing_where_nothing_is_typed(name):
    tok = tokenizer_for(name)
    assert [*map(row, encode(tok, PROBES["system"], sanitize=True))] == [*map(row, encode(tok, PROBES["system"]))]


@some
def test_typed_special_tokens_do_not_move_the_mask(name):
    "Where typed special tokens stay tokens, a user's are not trained, an assistant's are, and a turn ends where the template ends it."
    tok, r = tokenizer_for(name), random.Random(name)
    for _ in range(15):
        chat = [m for i in (0, 2) for m in (say("user", words("user", i) + r.choice(TYPED) + words("user", i)), say("assistant", words("asst", i + 1) + r.choice(TYPED[3:12]) + words("asst", i + 1)))]
        encs = attempt(tok, chat)
        assert encs is not None
        said, _ = said_in(encs)
        assert {w[:5] for w in said} == {"asst1", "asst3"} and len(said) == 12, chat
        for e in encs: assert unsound(tok, e) == []


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1"])
@pytest.mark.parametrize("text", ["\ue000\ue001", "a\uf8ffb", "\U000f0002x\U0010fffd", "\U000ffffd", "\ue000" * 40])
def test_private_characters_in_a_chat(name, text):
    "Other characters are taken for marks, and the text keeps its own."
    tok, chat = tokenizer_for(name), [say("user", text), say("assistant", text + "b"), say("user", "c" + text), say("assistant", text)]
    encs = encode(tok, chat)
    assert problems(tok, chat, encs) == [] and all(unsound(tok, e) == [] for e in encs)
