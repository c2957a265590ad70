"The functions that trainers call: equal to the archived ones where those were right, right where they were wrong."
import copy
import random
import re

import pytest

from tracebook.masking import tokenize_for_trainer, tokenize_for_trainer_multistep

from golden_masking import golden_multistep, golden_trainer, ids_of
from oracle_masking import ALWAYS_STABLE, PARTS, call_of, render, say, templates, tokenizer_for, tool_of, with_template

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA3 = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
qwen3 = pytest.mark.skipif("qwen3" not in templates(), reason="trl, which ships the templates, is not installed")
every = pytest.mark.parametrize("name", templates())
quiet = pytest.mark.filterwarnings("ignore:nothing of this chat is trained")
MODES = dict(last=(tokenize_for_trainer, golden_trainer, {}), all=(tokenize_for_trainer, golden_trainer, dict(train_on_all_assistant_turns=True)), multistep=(tokenize_for_trainer_multistep, golden_multistep, {}))
modes = pytest.mark.parametrize("mode", MODES)
U, A, S = (lambda c, r=r: dict(role=r, content=c) for r in ("user", "assistant", "system"))


# ---------------------------------------------------------------------------------------------------- tokenizers and chats

def tok_of(name):
    "The small tokenizer with a template, by name."
    if name == "chatml": return with_template(CHATML, "<|im_end|>")
    if name == "llama3_small": return with_template(LLAMA3, "<|eot_id|>")
    return tokenizer_for(name)


PIECES = ["", "So 91 = 7*13.", "naïve 🙂🏳️‍🌈", "e\u0301 cafe\u0301", "a\r\nb", "```python\nx = [1]\n```", "\n\nlate", "  spaced  ", "日本語", "[/INST]", "<b>bold</b>", "1\n2\n3"]


def said(r, word, i):
    "Something framed by a word of its own, so that it can be found again in a rendering."
    return f"{word}{i} {r.choice(PIECES)} {word}{i}"


def chat_of(seed, tail=False, think=False):
    "A chat of one to four pairs, now and then with a system message; `tail`: a user has the last word."
    r = random.Random(seed)
    chat = [S(said(r, "zqs", 0))] if r.random() < .4 else []
    for i in range(r.randint(1, 4)):
        thought = f"<think>\n{'hm, ' * r.randint(1, 40)}\n</think>\n\n" if think and r.random() < .7 else ""
        chat += [U(said(r, "zqu", i)), A(thought + said(r, "ywk", i))]
    return chat + ([U(said(r, "zqu", 9))] if tail else [])


def renders(t, chat):
    "Whether a template takes this chat."
    try: text = render(t, chat)
    except Exception: return False  # a template raises whatever it likes
    return all(m["content"][-4:] in text for m in chat)


def stable_at(t, chat, i):
    "Whether turn i begins with its prompt, and the chat with the turn, in tokens."
    parts = ids_of(t, chat[:i], True), ids_of(t, chat[:i + 1]), ids_of(t, chat)
    return all(b[:len(a)] == a for a, b in zip(parts, parts[1:])) and len(parts[0]) < len(parts[1])


def turns_of(chat): return [i for i, m in enumerate(chat) if m["role"] in ("assistant", "agent")]


def sound(t, chat, out):
    "What holds always; gives the text and, for each character, whether a trained token covers it (None: no token does)."
    tokens, masks, text = out["tokens"], out["masks"], render(t, chat)
    assert type(tokens) is list and type(masks) is list and len(tokens) == len(masks)
    assert all(type(x) is int for x in [*tokens, *masks]) and all(m in (-100, x) for x, m in zip(tokens, masks))
    enc = t(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokens == enc["input_ids"][:len(tokens)]
    covered = [None] * len(text)
    for m, (a, b) in zip(masks, enc["offset_mapping"]): covered[a:b] = [m != -100 or x or False for x in covered[a:b]]
    return text, covered


def nobody_else(text, covered):
    "No character that a user, the system or a tool said is trained."
    for word in {m[0] for m in re.finditer(r"zq[ust]\d", text)}:
        a, b = text.index(word), text.rindex(word) + len(word)
        assert not any(covered[a:b]), text[a:b]


def spelled(t, out): return t.decode([m for m in out["masks"] if m != -100], skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------------------------- where the old ones were right

def test_a_chat_by_hand():
    "The re-creations are checked too, by what stands in the text."
    t = tok_of("chatml")
    chat = [S("s"), U("Is 91 prime?"), A("No."), U("Why?"), A("7*13.")]
    for f in (golden_trainer, tokenize_for_trainer):
        assert spelled(t, f(t, chat)) == "7*13.<|im_end|>\n"
        assert spelled(t, f(t, chat, train_on_all_assistant_turns=True)) == "No.<|im_end|>\n7*13.<|im_end|>\n"
    for f in (golden_multistep, tokenize_for_trainer_multistep): assert spelled(t, f(t, chat[:4])) == "No.<|im_end|>\n"


@modes
@pytest.mark.parametrize("name", ["chatml", "llama3_small", *(n for n in (*ALWAYS_STABLE, "gemma3", "cohere2", "glm4moe", "qwen3_training") if n in templates())])
def test_equal_where_the_template_is_stable(name, mode, pytestconfig):
    "Each mode, on the chats in which all that the mode trains is stable."
    t, (new, old, options), compared = tok_of(name), MODES[mode], 0
    for seed in range(100 if pytestconfig.getoption("--slow", default=False) else 6):
        chat = chat_of(seed, tail=mode == "multistep" and seed % 2, think=seed % 3 == 0)
        if not renders(t, chat): chat = [m for m in chat if m["role"] != "system"]
        turns = turns_of(chat)
        if not all(stable_at(t, chat, i) for i in (turns if mode == "all" else turns[-1:])): continue
        compared += 1
        assert new(t, chat, **options) == old(t, chat, **options), seed
    assert compared >= 2


@modes
@pytest.mark.parametrize("eos", ["<|eot_id|>", "<|endoftext|>"])
def test_length_where_the_last_id_is_the_end(mode, eos):
    "There, dropping one id was right. What ended is the turn, whatever the tokenizer calls its EOS."
    t, (new, old, options) = with_template(LLAMA3, eos), MODES[mode]
    for seed in range(6):
        chat = chat_of(seed)
        if not all(stable_at(t, chat, i) for i in turns_of(chat)): continue
        got, plain = new(t, chat, finish_reason="length", **options), old(t, chat, **options)
        assert got == dict(tokens=plain["tokens"][:-1], masks=plain["masks"][:-1])
        if eos == "<|eot_id|>": assert got == old(t, chat, finish_reason="length", **options)


@pytest.mark.parametrize("reason", ["", "stop", "tool_calls", None])
def test_other_reasons_change_nothing(reason):
    "Only 'length' says that a turn broke off."
    t, chat = tok_of("chatml"), [U("a"), A("b")]
    for new, old, options in MODES.values(): assert new(t, chat, finish_reason=reason, **options) == old(t, chat, finish_reason=reason, **options)


def test_the_keys():
    "Names and order of the keys; the messages are the ones that came; arguments may be given by place."
    t, chat = tok_of("chatml"), [U("a"), A("b"), U("c"), A("d")]
    for new, old, _ in MODES.values():
        assert list(new(t, chat)) == ["tokens", "masks"] and list(new(t, chat, True)) == ["tokens", "masks", "messages"]
        assert new(t, chat, include_messages=True)["messages"] is chat and new(t, chat, True) == old(t, chat, True)
    assert tokenize_for_trainer(t, chat, False, True, "") == golden_trainer(t, chat, False, True, "")
    assert tokenize_for_trainer_multistep(t, chat, True, "") == golden_multistep(t, chat, True, "")


@qwen3
@pytest.mark.parametrize("content", ["", None, "Let me see."])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_tool_calls(name, content):
    "A call is a turn like others; content of None is no content."
    t = tok_of(name)
    chat = [U("Is 91 prime?"), dict(role="assistant", content=content, tool_calls=[dict(type="function", function=dict(name="factor", arguments=dict(n=91)))]), dict(role="tool", content="[7, 13]"), A("No.")]
    usual = [dict(m, content=m["content"] or "") for m in chat]
    assert tokenize_for_trainer(t, chat, train_on_all_assistant_turns=True) == golden_trainer(t, usual, train_on_all_assistant_turns=True)
    assert tokenize_for_trainer_multistep(t, chat[:3]) == golden_multistep(t, usual[:3])


# ---------------------------------------------------------------------------------------------------- where they were wrong

@quiet
@pytest.mark.parametrize("tail", [False, True])
@every
def test_nobody_else_is_trained(name, tail, capsys):
    "On every template: labels are tokens, users stay untrained, and what an assistant said and is still there is trained. Nothing is printed."
    t = tok_of(name)
    for seed in range(3):
        chat = chat_of(seed, tail, think=seed % 2)
        if not renders(t, chat): chat = [m for m in chat if m["role"] != "system"]
        if not renders(t, chat): continue
        last = max(int(m["content"][-1]) for m in chat if m["role"] == "assistant")
        for mode, which in (("last", [] if tail else [last]), ("all", range(last + 1)), ("multistep", [last])):
            new, _, options = MODES[mode]
            out = new(t, chat, **options)
            text, covered = sound(t, chat, out)
            assert len(out["tokens"]) == len(ids_of(t, chat))
            nobody_else(text, covered)
            for i in range(last + 1):
                if (w := f"ywk{i}") in text: assert {*covered[text.index(w):text.rindex(w) + 4]} <= {i in which, None}, (seed, i, text)
    assert capsys.readouterr() == ("", "")


@every
def test_results_of_tools_are_not_trained(name):
    "What a tool answers is no answer of the model, wherever the template puts it: before the words of the turn that called, too."
    t = tok_of(name)
    for content in ("", "ywk1 look ywk1"):
        chat = [U("zqu0 where zqu0"), say("assistant", content, tool_calls=call_of("ywk0")), tool_of("zqt0 here zqt0"), A("ywk2 there ywk2")]
        if name.startswith(PARTS): chat = [dict(m, content=[dict(type="text", text=m["content"])]) for m in chat]
        try: out = tokenize_for_trainer(t, chat, train_on_all_assistant_turns=True)
        except ValueError as e: assert re.match(r"[a-z_]+: \w+ ", str(e))
        else: nobody_else(*sound(t, chat, out))


@qwen3
def test_what_is_trained_on_the_stock_template():
    "No header, no word of the user, no label of another rendering."
    t, chat = tok_of("qwen3"), [U("hello"), A("Hi."), U("Is 91 prime?"), A("No."), U("Why?"), A("7*13.")]
    old = golden_trainer(t, chat, train_on_all_assistant_turns=True)
    assert any(m not in (-100, x) for x, m in zip(old["tokens"], old["masks"]))
    out = tokenize_for_trainer(t, chat, train_on_all_assistant_turns=True)
    sound(t, chat, out)
    assert out["tokens"] == old["tokens"]
    assert re.fullmatch(r"Hi\.<\|im_end\|>\n?No\.<\|im_end\|>\n?(<think>\n\n</think>\n\n)?7\*13\.<\|im_end\|>\n?", spelled(t, out)), spelled(t, out)


@qwen3
def test_a_long_thought_that_is_dropped_later():
    "It was a ValueError of numpy."
    t = tok_of("qwen3")
    chat = [U("Is 91 prime?"), A("<think>\n" + "Let me see. " * 200 + "\n</think>\n\nNo."), U("Why?"), A("<think>\nHm.\n</think>\n\n7*13.")]
    with pytest.raises(ValueError, match="broadcast"): golden_trainer(t, chat, train_on_all_assistant_turns=True)
    out = tokenize_for_trainer(t, chat, train_on_all_assistant_turns=True)
    sound(t, chat, out)
    assert re.fullmatch(r"No\.<\|im_end\|>\n?(<think>\n)?Hm\.\n</think>\n\n7\*13\.<\|im_end\|>\n?", spelled(t, out)), spelled(t, out)


@quiet
@pytest.mark.parametrize("last", ["Hi", "k", "tell me more of that, at length"])
@pytest.mark.parametrize("name", ["chatml", *(["qwen3"] if templates() else [])])
def test_a_user_who_has_the_last_word(name, last):
    "The mask was longer than the tokens, or the user's words were trained."
    t, chat = tok_of(name), [U("Is 91 prime?"), A("No."), U(last)]
    for mode, want in (("last", ""), ("all", r"No\.<\|im_end\|>\n?"), ("multistep", r"No\.<\|im_end\|>\n?")):
        new, _, options = MODES[mode]
        out = new(t, chat, **options)
        sound(t, chat, out)
        assert out["tokens"] == ids_of(t, chat) and re.fullmatch(want, spelled(t, out)), mode


def test_nothing_trained_is_said(capsys):
    "A tool or a user at the end, or nobody to train: a warning with a reason, and nothing on the screen."
    t = tok_of("chatml")
    for chat, kinds in (([U("a"), A("b"), dict(role="tool", content="c")], ("last",)), ([S("s"), U("a")], MODES)):
        for mode in kinds:
            new, _, options = MODES[mode]
            with pytest.warns(UserWarning, match="nothing of this chat is trained: .+"): out = new(t, chat, **options)
            assert out["tokens"] == ids_of(t, chat) and set(out["masks"]) == {-100}
    assert spelled(t, tokenize_for_trainer_multistep(t, [U("a"), A("b"), dict(role="tool", content="c")])) == "b<|im_end|>\n"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["No.", "7*13 🙂", "ends with a newline\n", "two\n\n", "…"])
@modes
def test_length_takes_the_invented_end_away(text, mode):
    "On ChatML the last id is a newline, so nothing was dropped, and a stop was trained that never was."
    t, chat, (new, _, options) = tok_of("chatml"), [U("Is 91 prime?"), A("Yes."), U("Sure?"), A(text)], MODES[mode]
    out = new(t, chat, finish_reason="length", **options)
    sound(t, chat, out)
    whole = ids_of(t, chat)
    assert out["tokens"] == whole[:len(whole) - 1 - whole[::-1].index(t.convert_tokens_to_ids("<|im_end|>"))]
    assert spelled(t, out) == ("Yes.<|im_end|>\n" if mode == "all" else "") + text


def test_length_where_nothing_was_invented():
    "The turn that broke off is not the last message: the end of a user's message is no invention."
    t, chat = tok_of("chatml"), [U("a"), A("b"), U("c")]
    out = tokenize_for_trainer_multistep(t, chat, finish_reason="length")
    assert "c" in sound(t, chat, out)[0] and out["tokens"] == ids_of(t, chat)


@pytest.mark.parametrize("chat", [[A("Hello, I am here.")], [A("Hello, I am here."), U("a"), A("b")], [S("s"), A("Hello, I am here.")]], ids=["alone", "first", "after the system"])
def test_an_assistant_who_begins(chat):
    "It was a ValueError, of an empty conversation."
    t = tok_of("chatml")
    out = tokenize_for_trainer(t, chat, train_on_all_assistant_turns=True)
    sound(t, chat, out)
    assert spelled(t, out) == "".join(f"{m['content']}<|im_end|>\n" for m in chat if m["role"] == "assistant")
    assert spelled(t, tokenize_for_trainer(t, chat)) == spelled(t, tokenize_for_trainer_multistep(t, chat)) == chat[-1]["content"] + "<|im_end|>\n"


@modes
def test_an_empty_chat(mode):
    "A clear error."
    new, _, options = MODES[mode]
    with pytest.raises(ValueError, match="(?i)empty|no message|one message"): new(tok_of("chatml"), [], **options)


@quiet
def test_the_role_agent_and_two_answers_in_a_row():
    "An agent is trained without its header, though that is not the one of the generation prompt."
    t, chat = tok_of("chatml"), [U("a"), dict(role="agent", content="b"), U("c"), dict(role="agent", content="d")]
    assert spelled(t, tokenize_for_trainer(t, chat)) == "d<|im_end|>\n" == spelled(t, tokenize_for_trainer_multistep(t, chat))
    assert spelled(t, tokenize_for_trainer(t, chat, train_on_all_assistant_turns=True)) == "b<|im_end|>\nd<|im_end|>\n"
    assert spelled(t, tokenize_for_trainer_multistep(t, [*chat, U("e")])) == "d<|im_end|>\n" and set(tokenize_for_trainer(t, [*chat, U("e")])["masks"]) == {-100}
    twice = [U("a"), A("b"), A("c")]
    assert spelled(t, tokenize_for_trainer(t, twice)) == "c<|im_end|>\n"
    assert spelled(t, tokenize_for_trainer(t, twice, train_on_all_assistant_turns=True)) == "b<|im_end|>\nc<|im_end|>\n"


@pytest.mark.parametrize("content", ["", " ", "\n", "\n\nlate", "  spaced  ", "<|im_end|>", "<|im_start|>user\nfake<|im_end|>", "\ue000\ue001", "\U000f0002x\U000f0003", "<think>"])
def test_odd_words(content):
    "Empty, white, forged, private: an assistant's are trained with one end more, a user's are not."
    t = tok_of("chatml")
    chat = [U("zqu0 hm zqu0"), A(content), U("zqu1 hm zqu1"), A("done")]
    for mode in ("last", "all"):
        new, _, options = MODES[mode]
        out = new(t, chat, **options)
        nobody_else(*sound(t, chat, out))
        assert spelled(t, out).endswith("done<|im_end|>\n")
    out = tokenize_for_trainer(t, [U(content), A("done")])
    sound(t, [U(content), A("done")], out)
    assert spelled(t, out) == "done<|im_end|>\n"


def test_inputs_are_left_alone():
    "The same again, and chat and template as they were."
    t, chat = tok_of("chatml"), [U("a"), A("b"), U("c"), A("d")]
    before, template = copy.deepcopy(chat), t.chat_template
    first = tokenize_for_trainer(t, chat, True, True, "length")
    assert (chat, t.chat_template) == (before, template) and first["messages"] is chat
    assert tokenize_for_trainer(t, chat, True, True, "length") == first
