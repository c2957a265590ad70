"Loss masks against prefix differences where those are right, and against the template's own prompts where they are not."
import json

import pytest
from hypothesis import given, settings, strategies as st

from tracebook.masking import Unverified, check_template, tokenize_chat, tokenize_chats, tokenize_for_trainer, tokenize_for_trainer_multistep
from tracebook.sources import sample_traces
from tracebook.tokens import make_tokenizer

CHATML = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and m.reasoning_content SHOWN %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content TRIM }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
STABLE, FORGETFUL = (CHATML.replace("SHOWN", s).replace("TRIM", t) for s, t in (("", ""), ("and loop.last", "| trim")))
LLAMA = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
TEXTS = st.one_of(st.text(max_size=30), st.sampled_from(["", " ", "\n\nx", "é", "e\u0301", "👩‍👩‍👧", "a\r\nb", "```py\n  x = 1\n```", "<think>", "</think>\n\nNo.", "<|im_end|>", " [assistant] "])).filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t))


@pytest.fixture(scope="module")
def tok():
    out = make_tokenizer(sample_traces()["response"])
    out.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<s>", "</s>"], special_tokens=True)
    out.bos_token, out.eos_token = "<s>", "</s>"
    return out


@st.composite
def chats(draw, thoughts=True):
    turns = draw(st.integers(1, 4))
    out = [dict(role="system", content=draw(TEXTS))] * draw(st.booleans())
    for _ in range(turns):
        out.append(dict(role="user", content=draw(TEXTS)))
        answer = dict(role="assistant", content=draw(TEXTS))
        if thoughts and draw(st.booleans()): answer["reasoning_content"] = draw(TEXTS)
        out.append(answer)
    return out + [dict(role="user", content="?")] * draw(st.booleans())


def ids_of(tok, template, chat, prompt=False): return tok.apply_chat_template(chat, chat_template=template, add_generation_prompt=prompt, return_dict=False) if chat else []


def prefix_differences(tok, template, chat, end):
    "Labels by two tokenizations a turn; what follows the end token is not trained."
    ids = ids_of(tok, template, chat)
    labels = [-100] * len(ids)
    for i, m in enumerate(chat):
        if m["role"] != "assistant": continue
        start, stop = len(ids_of(tok, template, chat[:i], True)), len(ids_of(tok, template, chat[:i + 1]))
        while ids[stop - 1] != end: stop -= 1
        labels[start:stop] = ids[start:stop]
    return ids, labels


@settings(max_examples=60, deadline=None)
@given(chat=chats())
def test_equal_to_prefix_differences_where_the_template_is_stable(tok, chat):
    enc = tokenize_chat(tok, chat, chat_template=STABLE)
    ids, labels = prefix_differences(tok, STABLE, chat, tok.convert_tokens_to_ids("<|im_end|>"))
    assert (enc.input_ids, enc.labels) == (ids, labels)


@settings(max_examples=60, deadline=None)
@given(chat=chats(thoughts=False))
def test_a_template_that_trims(tok, chat):
    enc = tokenize_chat(tok, chat, chat_template=LLAMA)
    assert (enc.input_ids, enc.labels) == prefix_differences(tok, LLAMA, chat, tok.eos_token_id)


@settings(max_examples=60, deadline=None)
@given(chat=chats())
def test_each_turn_in_the_context_in_which_it_is_sampled(tok, chat):
    made = tokenize_chat(tok, chat, chat_template=FORGETFUL)
    mine = [i for i, m in enumerate(chat) if m["role"] == "assistant"]
    if not isinstance(made, list): return
    assert len(made) == len(mine)
    for i, enc in zip(mine, made):
        prompt = ids_of(tok, FORGETFUL, chat[:i], True)
        whole = ids_of(tok, FORGETFUL, chat[:i + 1])
        assert enc.input_ids == whole and whole[:len(prompt)] == prompt
        assert [k for k, x in enumerate(enc.labels) if x != -100] == list(range(len(prompt), len(whole) - 1))  # all but the newline after the end token


@settings(max_examples=40, deadline=None)
@given(chat=chats(), train_on=st.sampled_from(["last_message", "last_turn", "all_assistant", "all", "none"]))
def test_what_always_holds(tok, chat, train_on):
    before = json.dumps(chat)
    made = tokenize_chat(tok, chat, chat_template=FORGETFUL, train_on=train_on)
    for enc in made if isinstance(made, list) else [made]:
        n = len(enc.input_ids)
        assert all(len(x) == n for x in (enc.labels, enc.assistant_masks, enc.loss_weights, enc.position_ids, enc.message_ids, enc.offsets))
        assert all(x in (-100, i) for x, i in zip(enc.labels, enc.input_ids)) and enc.position_ids == list(range(n))
        assert [x != -100 for x in enc.labels] == [bool(m) for m in enc.assistant_masks] == [w != 0 for w in enc.loss_weights]
        assert enc.input_ids == tok(enc.text, add_special_tokens=False)["input_ids"]
        if train_on != "all": assert all(chat[m]["role"] == "assistant" for m, x in zip(enc.message_ids, enc.labels) if x != -100)
    assert json.dumps(chat) == before


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(chats(), min_size=1, max_size=5))
def test_a_batch_is_its_chats(tok, rows):
    data = tokenize_chats(tok, rows, chat_template=FORGETFUL, keep_empty=True)
    one = [e for chat in rows for made in [tokenize_chat(tok, chat, chat_template=FORGETFUL)] for e in (made if isinstance(made, list) else [made])]
    assert list(data["input_ids"]) == [e.input_ids for e in one] and list(data["labels"]) == [e.labels for e in one]
    assert data.ledger.rows == len(rows) and data.ledger.trained == sum(x != -100 for e in one for x in e.labels)


def test_weights_of_fields_messages_and_spans(tok):
    chat = [dict(role="user", content="Is 91 prime?"), dict(role="assistant", reasoning_content="7*13", content="It is not prime.", spans=[(6, 9, -.5)])]
    enc = tokenize_chat(tok, chat, chat_template=STABLE, reasoning=.25, eot="masked", boundary="overlap")
    by_weight = {}
    for (a, b), w in zip(enc.offsets, enc.loss_weights): by_weight[w] = by_weight.get(w, "") + enc.text[a:b]
    assert by_weight[.25] == "<think>\n7*13\n</think>\n\n" and "not" in by_weight[-.5] and by_weight[0].endswith("<|im_end|>\n")
    assert tokenize_chat(tok, [chat[0], dict(chat[1], train=False, spans=None)], chat_template=STABLE).report["trained"] == 0
    with pytest.raises(ValueError, match="message 1: the span"): tokenize_chat(tok, [chat[0], dict(chat[1], spans=[(5, 99, 1.)])], chat_template=STABLE)


def test_refusals_have_names(tok):
    chat = [dict(role="user", content="x"), dict(role="assistant", content="y")]
    for template, code in (("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}</s>{% endif %}{% endfor %}", "no_probe"), ("{{ raise_exception('no') }}", "template_raises"),
            (STABLE.replace("{{ m.content  }}", "{{ m.content | length }}{{ m.content }}"), "marks_change_text")):
        with pytest.raises(Unverified) as e: tokenize_chat(tok, chat, chat_template=template)
        assert e.value.code == code
    assert not check_template(tok, "{{ raise_exception('no') }}").probes["plain"]["verified"]


@settings(max_examples=40, deadline=None)
@given(chat=chats())
def test_the_old_functions(tok, chat):
    tok.chat_template = STABLE
    done = tokenize_for_trainer(tok, chat, train_on_all_assistant_turns=True)
    ids, labels = ids_of(tok, STABLE, chat), None
    labels = [-100] * len(ids)
    for i, m in enumerate(chat):
        if m["role"] == "assistant":
            a, b = len(ids_of(tok, STABLE, chat[:i], True)), len(ids_of(tok, STABLE, chat[:i + 1]))
            labels[a:b] = ids[a:b]
    assert done == dict(tokens=ids, masks=labels)
    last = max(i for i, m in enumerate(chat) if m["role"] == "assistant")
    a, b = len(ids_of(tok, STABLE, chat[:last], True)), len(ids_of(tok, STABLE, chat[:last + 1]))
    assert tokenize_for_trainer_multistep(tok, chat)["masks"] == [-100] * a + ids[a:b] + [-100] * (len(ids) - b)
