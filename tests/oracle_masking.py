"""Loss masks the slow way, to check `tracebook.masking` against: from plain renderings of prefixes of a chat.

A turn is what the template adds to the prompt of message i, `render(chat[:i], prompt)`, when the message is there,
`render(chat[:i + 1])`, through the token that ends every turn. Nothing is marked, and no code of the package is used.
"""
import copy
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tracebook.sources import sample_traces
from tracebook.tokens import make_tokenizer

SHARED = os.environ.get("TRACEBOOK_SHARED")
REAL = Path(SHARED)/"tokenizers/qwen3" if SHARED else None
SPECIAL = re.compile(r"<\|\"\|>|<\|(?!\")[^|<>\s'\"{}]{1,40}\|>|<｜[^｜<>\s'\"]{1,40}｜>|<(?:start|end)_of_turn>|<end_of_utterance>|<(?:turn|channel|tool|tool_call|tool_response)\|>|<\|(?:turn|channel|tool|tool_call|tool_response)>|\[gMASK\]|<sop>|<BOS_TOKEN>")
BOS_EOS = dict(cohere=("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"), deepseek=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), gemma=("<bos>", "<eos>"), diffusion_gemma=("<bos>", "<eos>"),
    glm=(None, "<|endoftext|>"), gptoss=("<|startoftext|>", "<|return|>"), idefics=("<|begin_of_text|>", "<end_of_utterance>"), lfm2=("<|startoftext|>", "<|im_end|>"), llama=("<|begin_of_text|>", "<|eot_id|>"),
    llava=("<s>", "</s>"), muse=("<|begin_of_text|>", "<|eot|>"), nemotron=(None, "<|im_end|>"), phi3=("<s>", "<|endoftext|>"), qwen=(None, "<|im_end|>"), smolvlm=("<|im_start|>", "<end_of_utterance>"))
PARTS = ("idefics3", "llava_next", "smolvlm")  # templates that read content only as a list of parts
ASSISTANT = ("assistant", "agent")
ALWAYS_STABLE = ("gemma4_v2", "lfm2", "lfm2_v2", "llama3", "llama3_1", "llama3_2", "muse_glimmer", "qwen2_5", "qwen2_5_vl", "qwen3_8", "qwen3_instruct_2507", "qwen3_vl")
REWRITING = ("deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning", "gptoss", "qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6")


# ---------------------------------------------------------------------------------------------------- templates and tokenizers

@lru_cache
def templates():
    "Every chat template in the trl wheel, by name; none if it is not installed."
    spec = importlib.util.find_spec("trl")
    return {p.stem: p.read_text(encoding="utf-8") for p in sorted((Path(spec.origin).parent/"chat_templates").glob("*.jinja"))} if spec else {}


@lru_cache
def _base(real, bos, eos):
    from transformers import AddedToken, AutoTokenizer
    tok = AutoTokenizer.from_pretrained(str(REAL)) if real else make_tokenizer(sample_traces()["response"], 800)
    found = {m for text in templates().values() for m in SPECIAL.findall(text)} | {x for pair in BOS_EOS.values() for x in pair if x} | {"<|im_start|>", "<|im_end|>", "<think>", "</think>"}
    tok.add_tokens([AddedToken(t, special=t not in ("<think>", "</think>"), normalized=False) for t in sorted(found - set(tok.get_vocab()))])
    tok.bos_token, tok.eos_token = bos, eos
    return tok


@lru_cache
def tokenizer_for(name, real=False):
    "A small tokenizer, or Qwen3's, with the special tokens of every template, and the template `name`."
    tok = copy.copy(_base(real, *next(v for k, v in BOS_EOS.items() if name.startswith(k))))
    tok.chat_template = templates()[name]
    return tok


@lru_cache
def with_template(template, eos):
    "The small tokenizer with any template."
    tok = copy.copy(_base(False, "<|endoftext|>", eos))
    tok.chat_template = template
    return tok


def render(tok, chat, prompt=False, **kw): return tok.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False, **kw)
def ids_of(tok, text): return list(tok(text, add_special_tokens=False).input_ids)


@lru_cache
def _specials(backend): return sorted((t.content for t in backend.get_added_tokens_decoder().values() if t.special), key=len, reverse=True)


def specials(tok):
    "The special tokens, longest first."
    return _specials(tok.backend_tokenizer)


# ---------------------------------------------------------------------------------------------------- what a template always writes

def say(role, text, parts=False, **more): return dict(role=role, content=[dict(type="text", text=text)] if parts else text, **more)
def in_parts(chat): return any(isinstance(m.get("content"), list) for m in chat)


def _common(tok, a, b):
    "The common beginning of two texts, in tokens."
    a, b, n = ids_of(tok, a), ids_of(tok, b), 0
    while n < min(len(a), len(b)) and a[n] == b[n]: n += 1
    return tok.decode(a[:n])


@lru_cache
def _habits(tok, template, parts):
    "What ends a turn, what opens one, and what stands before a user's words after a turn."
    chat = [say("user", "uuu", parts), say("assistant", "zqzq", parts), say("user", "vvv", parts)]
    end, mid = (render(tok, c).rpartition("zqzq")[2] for c in (chat[:2], chat))
    close = _common(tok, end, mid).rstrip() or next((s for s in specials(tok) if end.lstrip().startswith(s)), "")
    asked = render(tok, chat[:1], True)
    opening = asked[len(_common(tok, asked, render(tok, chat[:1]))):]
    return close, opening, mid.partition("vvv")[0].removeprefix(close).strip()


def close_of(tok, chat=()):
    "The tokens that follow an assistant's words at the end of a chat and before a user alike; GPT-OSS: what ends the chat; GLM: nothing."
    return _habits(tok, tok.chat_template, in_parts(chat))[0]


def opening_of(tok, chat=()): return _habits(tok, tok.chat_template, in_parts(chat))[1]
def user_header(tok, chat=()): return _habits(tok, tok.chat_template, in_parts(chat))[2]


# ---------------------------------------------------------------------------------------------------- turns

@dataclass
class Turn:
    "Message i: what the model sees, what it then emits, what the template puts after it. `emits` is None if the prompt is no prefix of the turn."
    i: int
    prompt: str
    emits: str
    tail: str
    sure: bool = True  # the end is the one that every turn has, and the prompt opened the turn

    @property
    def full(self): return self.prompt + self.emits + self.tail


def turn_of(tok, chat, i, **kw):
    "Turn i from two renderings; None if the template does not render one of them."
    try: p, q = render(tok, chat[:i], True, **kw), render(tok, chat[:i + 1], **kw)
    except Exception: return None  # a template raises whatever it likes
    if not q.startswith(p): return Turn(i, p, None, None)
    close, opening = close_of(tok, chat), opening_of(tok, chat)
    opened = not (opening and q.startswith(opening, len(p)))
    if not opened: p += opening  # some templates open no turn after a tool's result, and write the header with the message
    said = q[len(p):]
    cut = len(said) if not close else said.rfind(close) + len(close) if close in said else len(said.rstrip())
    return Turn(i, p, said[:cut], said[cut:], opened and (not close or close in said))


def turns_of(tok, chat, **kw): return [turn_of(tok, chat, i, **kw) for i, m in enumerate(chat) if m["role"] in ASSISTANT]
def proven(turns): return all(t and t.emits is not None and t.sure for t in turns)


def stable(text, turns):
    "Does every prompt begin its turn, and does the chat begin with every turn, its end included? (What stands after the end, as an EOS that only the last turn has, is not trained.)"
    return all(t and t.emits is not None and text.startswith(t.prompt + t.emits) for t in turns)


# ---------------------------------------------------------------------------------------------------- labels

def by_offsets(tok, text, ranges):
    "Labels of a text: a token is trained if it starts in one of the ranges."
    e = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    return [t if any(a <= s < b for a, b in ranges) else -100 for t, (s, _) in zip(e.input_ids, e.offset_mapping)]


def prefix_labels(tok, text, turns, trailing=False):
    """Labels of a stable chat by differences of tokenized prefixes; where a token lies across the end of one, it belongs where it starts.
    The second value says whether no token did."""
    ids = ids_of(tok, text)
    labels, clean = [-100] * len(ids), True
    for t in turns:
        a, b = (ids_of(tok, x) for x in (t.prompt, t.full if trailing else t.prompt + t.emits))
        clean = clean and ids[:len(a)] == a and ids[:len(b)] == b
        labels[len(a):len(b)] = ids[len(a):len(b)]
    slow = by_offsets(tok, text, [(len(t.prompt), len(t.full) if trailing else len(t.prompt + t.emits)) for t in turns])
    assert not clean or labels == slow, "two ways of differencing disagree"
    return slow, clean


def trained_text(enc):
    "The characters that trained tokens cover."
    at = {c for (a, b), l in zip(enc.offsets, enc.labels) if l != -100 for c in range(a, b)}
    return "".join(enc.text[c] for c in sorted(at))


def differs(tok, chat, enc, want, lax=False):
    "Where labels are not those wanted; the next speaker's marker after a turn without an end of its own (GLM) may be either, and so may special tokens if `lax`."
    if len(want) != len(enc.labels): return [(len(enc.labels), len(want))]
    free = lambda k, t: tok.decode([t]) in specials(tok) and (lax or not close_of(tok, chat) and want[k] == -100 != want[k - 1])
    return [(k, tok.decode([t]), l, w) for k, (t, l, w) in enumerate(zip(enc.input_ids, enc.labels, want)) if l != w and not (l in (t, -100) and free(k, t))]


def squeeze(text): return re.sub(r"</?think>|\s", "", text)


def texts_of(m):
    "Reasoning and content of a message."
    c = m.get("content") or ""
    return m.get("reasoning_content") or m.get("thinking") or m.get("reasoning") or "", c if isinstance(c, str) else "".join(p.get("text", "") for p in c)


def begins_at(enc, t):
    "Is the first token after the prompt of this turn trained?"
    at = next((k for k, (a, b) in enumerate(enc.offsets) if a >= len(t.prompt) and b > a), None)
    return enc.text.startswith(t.prompt) and at is not None and enc.labels[at] != -100


def unroll_problems(tok, chat, encs, turns, text):
    "What is wrong with examples of a rewritten chat: a prompt that is not the template's, a trained character that no turn emits, a turn not trained or trained twice."
    out, seen, close = [], [], close_of(tok, chat)
    for n, enc in enumerate(encs):
        mine = [t for t in turns if begins_at(enc, t)]
        seen += [t.i for t in mine]
        if not mine:
            if any(l != -100 for l in enc.labels): out.append(f"example {n} trains {trained_text(enc)!r} after no prompt of the chat")
            continue
        whole = [t for t in mine if t.emits is not None]
        out += [f"turn {t.i} emits {t.emits!r}, example {n} goes on with {enc.text[len(t.prompt):]!r}" for t in whole if not enc.text.startswith(t.prompt + t.emits)]
        if len(whole) == len(mine):
            want = by_offsets(tok, enc.text, [(len(t.prompt), len(t.prompt + t.emits)) for t in mine])
            if d := differs(tok, chat, enc, want, not all(t.sure for t in mine)): out.append(f"example {n}: labels are not those of turns {[t.i for t in mine]}: {d}")
            ends = {text, *(x for t in mine for x in (t.full, t.prompt + t.emits))} | ({t.prompt + t.emits + m for t in mine for m in specials(tok)} if not close else set())
            if enc.text not in ends: out.append(f"example {n} has text after its turn: {enc.text[-60:]!r}")
        else:  # the prompt is no prefix of what is rendered later: the words and the end token are left to compare
            message, said = chat[mine[-1].i], squeeze(trained_text(enc))
            thought, content = map(squeeze, texts_of(message))
            if close and not said.endswith(squeeze(close)): out.append(f"turn {mine[-1].i} ends in {said[-20:]!r}, not in {close!r}")
            if not message.get("tool_calls") and said.removesuffix(squeeze(close)) not in (thought + content, content, squeeze(texts_of(message)[1].rpartition("</think>")[2])): out.append(f"turn {mine[-1].i} trains {said!r}")
    if sorted(seen) != [t.i for t in turns if t.emits != ""]: out.append(f"turns {[t.i for t in turns]}, trained {sorted(seen)}")
    return out


def problems(tok, chat, encs, **kw):
    "What is wrong with the examples of a chat."
    text, turns = render(tok, chat, **kw), turns_of(tok, chat, **kw)
    if None in turns: turns = [t for t in turns if t]
    elif stable(text, turns) and not (len(encs) > 1 and any(m.get("tool_calls") for m in chat)):  # an example for each turn of a loop of tools is right too
        if len(encs) != 1 or encs[0].text != text: return [f"{len(encs)} examples for a chat that is not rewritten, or another text"]
        d = differs(tok, chat, encs[0], prefix_labels(tok, text, turns)[0], not proven(turns))
        return [f"labels are not those of prefix differences: {d}"] if d else []
    return unroll_problems(tok, chat, encs, turns, text)


def unsound(tok, enc):
    "Lists of other lengths, a label that is not its token, ids that are not those of the text, weights that are not the mask's."
    n, e = len(enc.input_ids), tok(enc.text, add_special_tokens=False, return_offsets_mapping=True)
    return [what for what, wrong in dict(
        lengths=any(len(x) != n for x in (enc.labels, enc.assistant_masks, enc.loss_weights, enc.position_ids, enc.message_ids, enc.offsets)),
        labels=any(l not in (-100, t) for l, t in zip(enc.labels, enc.input_ids)),
        masks=[l != -100 for l in enc.labels] != [m == 1 for m in enc.assistant_masks] or [l != -100 for l in enc.labels] != [w != 0 for w in enc.loss_weights],
        positions=enc.position_ids != list(range(n)), ids=enc.input_ids != e.input_ids, offsets=[*map(tuple, enc.offsets)] != [*map(tuple, e.offset_mapping)]).items() if wrong]


# ---------------------------------------------------------------------------------------------------- random chats

BITS = ["hello", " world", "a", " ", "  ", "\n", "\n\n", "\r\n", "\t", "é", "e\u0301", "\u0301", "ö\u0323", "👩‍👩‍👧", "🇩🇪", "👍🏽", "日本", "שלום", "ﷺ", "```py\nx = {1: '<b>'}\n```", "{{ x }}", "{% if %}", "\\n", "\u200d", "\xa0",
    "\u2028", "1234", "<", "|>", "\"", "'", "&amp;", "user", "assistant", "Ünïcödé", ".", "[1]", "- x\n- y\n"]
TOOLS = [dict(type="function", function=dict(name="asst0call", description="schema0x0z", parameters=dict(type="object", properties=dict(place=dict(type="string", description="schema0x1z")), required=["place"])))]


def text_of(r): return "".join(r.choices(BITS, k=r.randint(0, 6)))


def call_of(text, n=1, as_json=False):
    "Tool calls with a text each as argument."
    arguments = [dict(place=f"{text}{k}" if n > 1 else text) for k in range(n)]
    return [dict(id=f"call0000{k + 1}", type="function", function=dict(name="asst0call", arguments=json.dumps(a, ensure_ascii=False) if as_json else a)) for k, a in enumerate(arguments)]


def tool_of(text, k=0): return dict(role="tool", name="asst0call", tool_call_id=f"call0000{k + 1}", content=text)


def chat_of(r, most=3):
    "A random chat: perhaps a system message, calls of tools, reasoning in a key of its own or in the content, a question at the end."
    chat = [say("system", text_of(r))] if r.random() < .3 else []
    for _ in range(r.randint(1, most)):
        chat += [say("user", text_of(r)) for _ in range(1 + (r.random() < .05))]
        if r.random() < .2:
            n = r.choice([1, 1, 2])
            chat += [say("assistant", r.choice(["", text_of(r)]), tool_calls=call_of(text_of(r), n, r.random() < .3)), *(tool_of(text_of(r), k) for k in range(n))]
        answer = say("assistant", text_of(r))
        if (kind := r.random()) < .3: answer["reasoning_content"] = text_of(r)
        elif kind < .45: answer["content"] = f"<think>\n{text_of(r)}\n</think>\n\n{text_of(r)}"
        chat.append(answer)
    return chat + ([say("user", text_of(r))] if r.random() < .2 else [])


def fitted(tok, name, chat):
    "The chat as the template can take it: content in parts, no tools, no system message, alternating roles; None if nothing helps."
    if name.startswith(PARTS): chat = [dict(m, content=[dict(type="text", text=m["content"])]) for m in chat]
    no_tools = [m for m in chat if m["role"] != "tool" and not m.get("tool_calls")]
    alternating = [m for k, m in enumerate(no_tools) if m["role"] != "system" and m["role"] != (no_tools[k + 1:k + 2] or [{}])[0].get("role")]
    for c in (chat, no_tools, [m for m in no_tools if m["role"] != "system"], alternating):
        try: render(tok, c)
        except Exception: continue  # a template raises whatever it likes
        return c
    return None


# ---------------------------------------------------------------------------------------------------- refusals

def excused(tok, chat, code, **kw):
    "Does the template give a reason for a refusal with this code?"
    turns, mine = turns_of(tok, chat, **kw), [i for i, m in enumerate(chat) if m["role"] in ASSISTANT]
    other = say("assistant", "other", in_parts(chat))["content"]
    def unseen(i, **changed): return render(tok, [*chat[:i], {**chat[i], **changed}], **kw).split() == render(tok, chat[:i + 1], **kw).split()
    if code == "template_raises": return None in turns
    if code == "prefill_conflict": return any(t is None or t.emits is None for t in turns)
    if code == "tool_calls_unplaced": return any(chat[i].get("tool_calls") and unseen(i, tool_calls=call_of("other")) for i in mine)
    if code == "dropped_by_template":  # nothing is left of the answer, and the thought may be another
        thought = say("assistant", "<think>\nother\n</think>\n\n", in_parts(chat))["content"]
        blank = lambda i: not texts_of(chat[i])[1].rpartition("</think>")[2].strip() or unseen(i, content=other)
        return any(any(texts_of(chat[i])) and blank(i) and (not texts_of(chat[i])[0].strip() or unseen(i, reasoning_content="other")) and ("<think>" not in texts_of(chat[i])[1] or unseen(i, content=thought)) for i in mine)
    return False
