"Tokens with their labels as text; examples whose context is cut and whose continuation is not; a loss whose gradient leaves the context out."
import copy
import json
import os
import re
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, GPT2Config, MistralConfig, PreTrainedTokenizerFast, Qwen3Config

from tracebook.masking import ExampleTokenizer, TrainingExample, context_frozen_loss, decode_token_ids, load_examples, save_examples
from tracebook.sources import sample_traces

CORPUS = list(sample_traces()["response"])[:6]
SHARED = os.environ.get("TRACEBOOK_SHARED")
real = pytest.mark.skipif(not SHARED, reason="TRACEBOOK_SHARED is not set: no real tokenizer at hand")
check = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA3 = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
LLAMA2 = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


# ---------------------------------------------------------------------------------------------------- tokenizers

def byte_level(bos=None, extra=(), template=None, **names):
    "Byte-level BPE, with a BOS that it puts before every text if asked for."
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in (*([bos] if bos else []), *extra)])
    if bos: t.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
    out = PreTrainedTokenizerFast(tokenizer_object=t, clean_up_tokenization_spaces=False, bos_token=bos, **names)
    out.chat_template = template
    return out


@cache
def chatml(): return byte_level(extra=("<|im_start|>", "<|im_end|>", "<|endoftext|>"), template=CHATML, eos_token="<|endoftext|>")


@cache
def llama3(): return byte_level("<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"), LLAMA3, eos_token="<|end_of_text|>")


@cache
def llama2():
    "SentencePiece as of old: a space before every text, bytes where there is no letter."
    pieces = {"<unk>": 0, "<s>": 0, "</s>": 0, "▁": -4} | {f"<0x{b:02X}>": -20 for b in range(256)}
    pieces |= {c: -8 for c in sorted(set("".join(CORPUS)) - {" "}) if c.isascii()} | dict.fromkeys(("▁the", "▁is", "ing", "▁a", "▁91", "INST"), -6)
    t = Tokenizer(models.Unigram(list(pieces.items()), 0, byte_fallback=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ("<s>", "</s>")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    out = PreTrainedTokenizerFast(tokenizer_object=t, clean_up_tokenization_spaces=False, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    out.chat_template = LLAMA2
    return out


@cache
def bert():
    "A tokenizer that frames every text."
    t = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "c": 5}, "[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@cache
def qwen(): return AutoTokenizer.from_pretrained(f"{SHARED}/tokenizers/qwen3")


def plain(tokenizer, text): return tokenizer(text, add_special_tokens=False)["input_ids"]
def spelled(tokenizer, ids): return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


KINDS = [chatml, llama3]
texts = st.text(st.one_of(st.sampled_from("ab 91*=\n\t.,é🙂日[]/\\:<|>"), st.characters(exclude_categories=["Cs"])), max_size=40)
some = texts.filter(bool)


# ---------------------------------------------------------------------------------------------------- decode_token_ids

@pytest.mark.parametrize("kind", [chatml, llama3, llama2])
@check
@given(text=texts)
@example(text="[/INST] [bold]x[/bold] \\[x] \\\\[/b] :smile: [a:smile:] \\")
@example(text="\u2028\u00a0\u200b\x1b[31m\r\n\x00")
def test_markup_shows_what_the_plain_text_shows(kind, text):
    "With colours or without, with emoji codes or without: the same characters, on one line."
    t = kind()
    ids = plain(t, text) or plain(t, "a")
    labels = [i if n % 2 else -100 for n, i in enumerate(ids)]
    bare, rich = (decode_token_ids(ids, labels, t, use_rich=r) for r in (False, True))
    assert Text.from_markup(rich).plain == Text.from_markup(rich, emoji=False).plain == bare
    assert len(bare.splitlines()) == 1 and not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", bare)
    assert bare.count(")") >= len(ids)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(word=st.text(st.sampled_from("[]/\\:ab#@ =(,)smile\n-"), min_size=1, max_size=14))
@example(word=":smile:")
@example(word="[/]")
@example(word="\\[")
@example(word=":\\:\\:\\")
@example(word="\\\\[a]\\\\:b:\\\\")
@example(word="[@click=print('x')]")
def test_a_hostile_added_token_shows_as_itself(word):
    t = bert.__wrapped__()
    t.add_tokens([AddedToken(word, special=True, normalized=False)])
    i = t.convert_tokens_to_ids(word)
    bare, rich = (decode_token_ids([i, i], [i, -100], t, use_rich=r) for r in (False, True))
    assert Text.from_markup(rich).plain == bare
    if word.strip(): assert bare.startswith(word.replace(" ", "·").replace("\n", "↵") + f"({i}, {i}) ")


def test_the_form_of_the_original():
    t = chatml()
    ids = plain(t, "<|im_start|>user\nprime")
    words = [spelled(t, [i]) for i in ids]
    assert decode_token_ids(ids, [-100] * len(ids), t) == " ".join(f"{w.replace(chr(10), '↵')}({i}, -100)" for w, i in zip(words, ids))
    rich = decode_token_ids(ids[:2], [-100, ids[1]], t, use_rich=True)
    assert rich == f"[pink3 bold]<|im_start|>[/pink3 bold][steel_blue]({ids[0]}, -100)[/steel_blue] [pale_green3 bold]{words[1]}[/pale_green3 bold][steel_blue]({ids[1]}, {ids[1]})[/steel_blue]"


def test_white_space_can_be_seen():
    t = chatml()
    out = decode_token_ids(plain(t, " a\n\t\r\u00a0"), [-100] * len(plain(t, " a\n\t\r\u00a0")), t)
    assert "·" in out and "↵" in out and "→" in out and "␍" in out


@pytest.mark.parametrize("kind", [chatml, llama2])
def test_pieces_of_characters_are_shown_as_bytes(kind):
    t = kind()
    ids = [i for i in plain(t, "🙂") if spelled(t, [i]).strip()]
    out = decode_token_ids(ids, ids, t)
    assert "\ufffd" not in out and "".join(re.findall("<0x(..)>", out)) == "🙂".encode().hex().upper()


def test_a_real_replacement_character_stays():
    t = chatml()
    ids = plain(t, "\ufffd")
    shown = decode_token_ids(ids, ids, t)
    assert "".join(re.findall("<0x(..)>", shown)) == "EFBFBD" or "\ufffd" in shown


def test_a_space_that_the_decoder_drops_is_shown():
    t = llama2()
    i = t.convert_tokens_to_ids("▁the")
    assert spelled(t, [i]) == "the" and decode_token_ids([i], [i], t) == f"·the({i}, {i})"
    i = t.convert_tokens_to_ids("▁")
    assert decode_token_ids([i], [i], t) == f"·({i}, {i})"


def test_tokens_without_text():
    class Empty(PreTrainedTokenizerFast):
        def decode(self, *args, **kwargs): return ""
    t = Empty(tokenizer_object=chatml().backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|im_end|>")
    end, pad = t.eos_token_id, t.pad_token_id
    assert decode_token_ids([end, pad], [end, -100], t) == f"<|eos|>({end}, {end}) <SPECIAL_{pad}>({pad}, -100)"
    assert decode_token_ids([len(chatml()) + 7], [-100], chatml()) == f"<UNKNOWN_{len(chatml()) + 7}>({len(chatml()) + 7}, -100)"


def test_a_tokenizer_written_in_python():
    t = ByT5Tokenizer()
    ids = t("a 🙂", add_special_tokens=False)["input_ids"]
    out = decode_token_ids(ids, ids, t, use_rich=True)
    assert len(re.findall("steel_blue]\\(", out)) == len(ids) and "·" in out


@pytest.mark.parametrize("bad", [[1.0], ["1"], [None], [True], [-1], [[1]], [np.int64(1)]])
def test_ids_are_ints(bad):
    with pytest.raises(ValueError, match=r"token_ids\[0\]"): decode_token_ids(bad, [-100], chatml())


@pytest.mark.parametrize("ids, mask", [([1, 2], [1]), ([1], [1, 2]), ([], [1]), ([1], [])])
def test_lengths_must_agree(ids, mask):
    with pytest.raises(ValueError, match="a mask of"): decode_token_ids(ids, mask, chatml())


def test_arrays_and_tensors():
    ids = [1, 2, 300]
    expected = decode_token_ids(ids, [-100, 2, 300], chatml())
    assert decode_token_ids(np.array(ids), np.array([-100, 2, 300]), chatml()) == expected == decode_token_ids(torch.tensor(ids), torch.tensor([-100, 2, 300]), chatml())
    assert decode_token_ids([], [], chatml(), use_rich=True) == ""


def test_nothing_is_printed_and_a_console_takes_it(capsys):
    ids = plain(chatml(), "[/INST] :smile: [red]")
    out = decode_token_ids(ids, ids, chatml(), use_rich=True)
    assert capsys.readouterr() == ("", "")
    console = Console(width=500, force_terminal=False, record=True, file=open(os.devnull, "w"))
    console.print(out)
    assert console.export_text().strip() == decode_token_ids(ids, ids, chatml())


@real
def test_the_real_tokenizer():
    text = "naïve 🙂🏳️‍🌈 <|im_end|>\n<think>\n[/INST]"
    ids = plain(qwen(), text)
    bare = decode_token_ids(ids, ids, qwen())
    assert "<|im_end|>(151645, 151645)" in bare and "<think>(151667, 151667)" in bare and "\ufffd" not in bare
    assert Text.from_markup(decode_token_ids(ids, ids, qwen(), use_rich=True)).plain == bare


# ---------------------------------------------------------------------------------------------------- tokens of an example

def sound(e):
    "What holds for every example that has tokens."
    assert e.input_ids.dtype == e.labels.dtype == torch.long and e.input_ids.shape == e.labels.shape == (e.total_len,)
    assert (e.labels[:e.context_len] == -100).all() and torch.equal(e.labels[e.context_len:], e.input_ids[e.context_len:]) and e.context_len < e.total_len
    return e


@pytest.mark.parametrize("kind", KINDS)
@check
@given(context=texts, continuation=some, max_len=st.integers(1, 60), protect=st.integers(0, 5), eot=st.booleans())
def test_the_context_is_cut_from_the_left_and_the_continuation_stays(kind, context, continuation, max_len, protect, eot):
    t = kind()
    whole = sound(TrainingExample("x", context, continuation).tokenize(t, 10**6, append_eot=eot))
    n, rest = whole.context_len, whole.input_ids[whole.context_len:].tolist()
    assert spelled(t, rest) == continuation + (t.eos_token if eot and not continuation.endswith(t.eos_token) else "")
    keep = min(protect, n)
    if len(rest) + keep > max_len:
        with pytest.raises(ValueError, match="do not fit"): TrainingExample("x", context, continuation).tokenize(t, max_len, append_eot=eot, protect=protect)
        return
    e = sound(TrainingExample("x", context, continuation).tokenize(t, max_len, append_eot=eot, protect=protect))
    assert e.input_ids[e.context_len:].tolist() == rest and e.cut_continuation == 0
    assert e.total_len == min(max_len, whole.total_len) and e.cut == whole.total_len - e.total_len
    before = whole.input_ids[:n].tolist()
    assert e.input_ids[:e.context_len].tolist() == before[:keep] + before[keep + e.cut:]


@pytest.mark.parametrize("kind", KINDS)
@check
@given(context=texts, continuation=some, max_len=st.integers(1, 30))
def test_a_cut_continuation_gets_no_stop(kind, context, continuation, max_len):
    t = kind()
    assume(t.eos_token not in continuation)
    whole = TrainingExample("x", context, continuation).tokenize(t, 10**6, append_eot=True)
    e = sound(TrainingExample("x", context, continuation).tokenize(t, max_len, append_eot=True, overflow="right"))
    n = whole.total_len - whole.context_len
    assert e.total_len <= max_len and e.cut_continuation == max(0, n - max_len)
    assert e.labels[e.context_len:].tolist() == whole.labels[whole.context_len:].tolist()[:max_len]
    assert (t.eos_token_id in e.labels.tolist()) == (n <= max_len)


def test_a_continuation_that_fills_the_limit():
    e = TrainingExample("x", "some context", "abc")
    n = len(plain(chatml(), "abc"))
    sound(e.tokenize(chatml(), n))
    assert (e.context_len, e.total_len, e.cut) == (0, n, len(plain(chatml(), "some context")))
    with pytest.raises(ValueError, match="max_len"): e.tokenize(chatml(), n - 1)


@pytest.mark.parametrize("kind, times", [(chatml, 0), (llama3, 1), (llama2, 1)])
@pytest.mark.parametrize("templated", [True, False])
def test_never_a_second_bos(kind, times, templated):
    "By whatever way an example comes, and after it was saved and read."
    t, chat = kind(), [dict(role="user", content="Is 91 prime?")]
    context = t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) if templated else "Is 91 prime? "
    ways = [TrainingExample("x", context, "No.").tokenize(t), ExampleTokenizer(t).prepare_example(TrainingExample("x", context, "No."))]
    if templated: ways.append(ExampleTokenizer(t).prepare_from_messages("x", chat, 1, "No."))
    ways.append(TrainingExample.from_dict(json.loads(json.dumps(ways[-1].to_dict()))).tokenize(t))
    for e in ways:
        assert e.input_ids.tolist() == ways[0].input_ids.tolist() and e.labels.tolist() == ways[0].labels.tolist()
        assert e.input_ids.tolist().count(t.bos_token_id) == times if t.bos_token_id is not None else True
        assert not times or e.input_ids[0] == t.bos_token_id
    if templated: assert ways[0].input_ids.tolist() == plain(t, context + "No.")


def test_a_frame_is_opened_and_not_closed_between_the_parts():
    e = TrainingExample("x", "a b", " c").tokenize(bert())
    assert (e.input_ids.tolist(), e.context_len) == ([1, 3, 4, 5], 3)


def test_an_empty_context():
    e = sound(TrainingExample("x", "", "No.").tokenize(chatml()))
    assert (e.context_len, e.total_len) == (0, len(plain(chatml(), "No.")))
    e = sound(TrainingExample("x", "", "No.").tokenize(llama3()))
    assert (e.context_len, e.input_ids[0]) == (1, llama3().bos_token_id)


@check
@given(context=some, continuation=some)
def test_parts_that_do_not_join(context, continuation):
    "The tokens spell the text, and apart means: as they are at inference."
    t = chatml()
    e = TrainingExample("x", context, continuation).tokenize(t)
    assert spelled(t, e.input_ids) == context + continuation
    apart, both = plain(t, context) + plain(t, continuation), plain(t, context + continuation)
    assert e.seam == ("same" if apart == both else "apart") and e.input_ids.tolist() == apart
    if apart != both:
        with pytest.raises(ValueError, match="together than apart"): TrainingExample("x", context, continuation).tokenize(t, seam="error")


def test_a_tokenizer_that_begins_every_text_with_a_space():
    "There the continuation alone would be another text."
    t = llama2()
    context, rest = "<s>[INST] Is 91 prime? [/INST]", "No."
    e = sound(TrainingExample("x", context, rest).tokenize(t))
    assert e.seam == "together" and e.input_ids.tolist() == plain(t, context + rest)
    assert spelled(t, e.labels[e.context_len:]).strip() == rest and spelled(t, e.input_ids).endswith("[/INST]No.")
    short = sound(TrainingExample("x", context, rest).tokenize(t, e.total_len - 3, protect="<s>"))
    assert short.input_ids.tolist() == [1, *e.input_ids.tolist()[4:]] and short.cut == 3


def test_a_protected_prefix_as_text():
    t, system = llama3(), "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    chat = [dict(role="system", content="Be brief.")] + [dict(role=r, content=f"{r} {i}") for i in range(4) for r in ("user", "assistant")] + [dict(role="user", content="Now?")]
    made = ExampleTokenizer(t).prepare_from_messages("x", chat, len(chat), "Yes.")
    short = sound(ExampleTokenizer(t).prepare_from_messages("x", chat, len(chat), "Yes.", max_len=made.total_len - 9, protect=system))
    k = len(plain(t, system))
    assert short.input_ids.tolist() == made.input_ids[:k].tolist() + made.input_ids[k + 9:].tolist()
    at_turn = sound(ExampleTokenizer(t).prepare_from_messages("x", chat, len(chat), "Yes.", max_len=made.total_len - 9, protect=system, cut_at="<|start_header_id|>"))
    text = spelled(t, at_turn.input_ids)
    assert text.startswith(system + "<|start_header_id|>") and text.endswith("Yes.") and at_turn.total_len <= made.total_len - 9 and at_turn.cut == made.total_len - at_turn.total_len
    with pytest.raises(ValueError, match="does not begin with the protected prefix"): made.tokenize(t, protect="something else")
    with pytest.raises(ValueError, match="no turn starts"): made.tokenize(t, made.total_len - made.context_len + 2, cut_at="<|start_header_id|>")
    raw = TrainingExample("x", "Be brief. " + "and so on " * 20, "Yes.").tokenize(t, 30, protect="Be brief.")
    assert raw.input_ids[0] == t.bos_token_id and spelled(t, raw.input_ids).startswith("<|begin_of_text|>Be brief.") and raw.total_len == 30


@pytest.mark.parametrize("kind, end", [(chatml, "<|im_end|>"), (llama3, "<|eot_id|>"), (llama2, "</s>")])
def test_the_end_token_is_that_of_the_template(kind, end):
    t, chat = kind(), [dict(role="user", content="Is 91 prime?")]
    e = sound(ExampleTokenizer(t).prepare_from_messages("x", chat, 1, "No.", append_eot=True))
    assert e.labels[-1] == t.convert_tokens_to_ids(end)
    again = sound(ExampleTokenizer(t).prepare_from_messages("x", chat, 1, "No." + end, append_eot=True))
    assert again.input_ids.tolist() == e.input_ids.tolist()
    assert ExampleTokenizer(t).prepare_from_messages("x", chat, 1, "No.").labels.tolist() == e.labels[:-1].tolist()
    assert TrainingExample("x", "a", "b").tokenize(t, append_eot=True).labels[-1] == t.eos_token_id


def test_no_end_token():
    t = byte_level(template=BARE)
    with pytest.raises(ValueError, match="no end token.*give it as append_eot"): ExampleTokenizer(t).prepare_from_messages("x", [dict(role="user", content="a")], 1, "b", append_eot=True)
    with pytest.raises(ValueError, match="has no EOS"): TrainingExample("x", "a", "b").tokenize(t, append_eot=True)
    with pytest.raises(ValueError, match="not one"): TrainingExample("x", "a", "b").tokenize(t, append_eot="two words")


@pytest.mark.parametrize("wrong, error", [(dict(max_len=0), "max_len"), (dict(max_len=True), "max_len"), (dict(max_len=2.5), "max_len"), (dict(overflow="left"), "overflow"),
    (dict(seam="x"), "seam"), (dict(protect=-1), "protect"), (dict(protect=None), "protect"), (dict(cut_at=""), "cut_at")])
def test_wrong_wishes(wrong, error):
    with pytest.raises(ValueError, match=error): TrainingExample("x", "a b c", "d").tokenize(chatml(), **wrong)


def test_what_cannot_be_learned():
    with pytest.raises(ValueError, match="is empty"): TrainingExample("x", "a", "").tokenize(chatml())
    with pytest.raises(ValueError, match="is empty"): ExampleTokenizer(chatml()).prepare_from_messages("x", [dict(role="user", content="a")], 1, "")
    with pytest.raises(TypeError, match="not str"): TrainingExample("x", "a", None).tokenize(chatml())
    with pytest.raises(ValueError, match="lone surrogate"): TrainingExample("x", "a\ud83d", "b").tokenize(chatml())
    cleaning = copy.deepcopy(chatml())
    cleaning.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(ValueError, match="no token of its own"): TrainingExample("x", "a", "\u200b").tokenize(cleaning)


def test_white_space_may_be_learned():
    e = sound(TrainingExample("x", "a", "\n").tokenize(chatml()))
    assert spelled(chatml(), e.labels[e.context_len:]) == "\n"


def test_a_preset_truncation_and_padding_change_nothing():
    t = copy.deepcopy(chatml())
    t.backend_tokenizer.enable_truncation(3)
    t.backend_tokenizer.enable_padding(length=64)
    t.model_max_length = 4
    a, b = (TrainingExample("x", "a long context " * 5, "and an answer").tokenize(k) for k in (t, chatml()))
    assert a.input_ids.tolist() == b.input_ids.tolist()


def test_tokenizing_again_changes_nothing():
    e = TrainingExample("x", "some context", "and more", memories=["k"])
    first = e.tokenize(chatml(), 8, append_eot=True)
    ids = first.input_ids.tolist()
    assert first is e and e.tokenize(chatml(), 8, append_eot=True).input_ids.tolist() == ids and (e.context, e.continuation) == ("some context", "and more")
    assert TrainingExample("a", "", "x").memories is not TrainingExample("b", "", "x").memories


def test_on_the_cpu_unless_told():
    assert TrainingExample("x", "a", "b").tokenize(chatml()).input_ids.device.type == "cpu"
    assert TrainingExample("x", "a", "b").tokenize(chatml(), 8192, "meta").labels.device.type == "meta"


# ---------------------------------------------------------------------------------------------------- from messages

CHAT = [dict(role="system", content="Be brief."), dict(role="user", content="Is 91 prime?"), dict(role="assistant", content="Yes."), dict(role="user", content="Why?"), dict(role="agent", content="Hm.")]


@pytest.mark.parametrize("kind", [chatml, llama3])
@pytest.mark.parametrize("at", [2, 4, 5])
def test_the_context_is_the_prompt(kind, at):
    t, before = kind(), copy.deepcopy(CHAT)
    e = sound(ExampleTokenizer(t).prepare_from_messages("id", CHAT, at, "No: 7*13.", "wrong", ("m",)))
    prompt = t.apply_chat_template(CHAT[:at], tokenize=False, add_generation_prompt=True)
    assert (e.id, e.context, e.continuation, e.reason, e.memories, CHAT) == ("id", prompt, "No: 7*13.", "wrong", ["m"], before)
    assert e.input_ids[:e.context_len].tolist() == t.apply_chat_template(CHAT[:at], add_generation_prompt=True, return_dict=False)
    assert spelled(t, e.labels[e.context_len:]) == "No: 7*13."


@pytest.mark.parametrize("at", [0, -1, -3, 6, True, 2.0, None, "2"])
def test_a_wrong_index(at):
    with pytest.raises(ValueError, match="decision_idx"): ExampleTokenizer(chatml()).prepare_from_messages("x", CHAT, at, "No.")


@pytest.mark.parametrize("at", [1, 3])
def test_a_decision_that_is_not_the_assistants(at):
    with pytest.raises(ValueError, match="'user'"): ExampleTokenizer(chatml()).prepare_from_messages("x", CHAT, at, "No.")


def test_arguments_for_the_template():
    t = copy.deepcopy(chatml())
    t.chat_template = CHATML + "{% if think is defined %}<think>\n{% endif %}"
    e = ExampleTokenizer(t).prepare_from_messages("x", CHAT, 2, "No.", template_kwargs=dict(think=True))
    assert e.context.endswith("<|im_start|>assistant\n<think>\n")


def test_a_tokenizer_by_its_name(tmp_path):
    chatml().save_pretrained(tmp_path)
    made = ExampleTokenizer(str(tmp_path))
    assert made.prepare_from_messages("x", CHAT, 2, "No.").input_ids.tolist() == ExampleTokenizer(chatml()).prepare_from_messages("x", CHAT, 2, "No.").input_ids.tolist()
    with pytest.raises(ValueError, match="cannot load the tokenizer"): ExampleTokenizer(tmp_path / "none")


@real
@check
@given(turns=st.lists(some, min_size=1, max_size=4), better=some, cut=st.integers(0, 30))
def test_the_real_tokenizer_with_its_template(turns, better, cut):
    chat = [dict(role=("user", "assistant")[i % 2], content=c) for i, c in enumerate(turns)]
    at = len(chat) - 1 + len(chat) % 2
    assume(at > 0)
    e = sound(ExampleTokenizer(qwen()).prepare_from_messages("x", chat, at, better, append_eot=True))
    assert e.input_ids[:e.context_len].tolist() == qwen().apply_chat_template(chat[:at], add_generation_prompt=True, return_dict=False)
    assert e.labels[e.context_len:].tolist() == plain(qwen(), better) + ([151645] if plain(qwen(), better)[-1] != 151645 else [])
    short = sound(ExampleTokenizer(qwen()).prepare_from_messages("x", chat, at, better, append_eot=True, max_len=max(e.total_len - cut, e.total_len - e.context_len)))
    assert short.labels[short.context_len:].tolist() == e.labels[e.context_len:].tolist()


# ---------------------------------------------------------------------------------------------------- files

plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@check
@given(rows=st.lists(st.builds(TrainingExample, plain_text, plain_text, plain_text, plain_text, st.lists(plain_text, max_size=3)), max_size=4))
@example(rows=[TrainingExample("a", "\u2028\x85\r\n\x0b\x1c🙂", "\ufeff", "é\x00")])
def test_what_is_saved_is_read(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("x") / "examples.jsonl"
    for e in rows: e.context_len, e.total_len = 3, 7
    save_examples(iter(rows), path)
    assert [e.to_dict() for e in load_examples(path)] == [e.to_dict() for e in rows]
    assert all(e.input_ids is None and e.labels is None for e in load_examples(path))
    raw = path.read_bytes()
    assert raw.count(b"\n") == len(rows) and all(c in raw.decode() for e in rows for c in e.context if c not in '"\\' and ord(c) > 31)


def test_the_keys():
    e = TrainingExample("a", "b", "c").tokenize(chatml())
    assert list(e.to_dict()) == ["id", "context", "continuation", "reason", "memories", "context_len", "total_len"]
    assert (e.to_dict()["context_len"], e.to_dict()["total_len"]) == (1, 2)
    assert TrainingExample.from_dict(dict(id="a", context="b", continuation="c", more=1)).to_dict() == dict(id="a", context="b", continuation="c", reason="", memories=[], context_len=0, total_len=0)


def test_blank_lines_and_a_mark_at_the_beginning(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n  \r\n" + json.dumps(dict(id="1", context="a", continuation="b")).encode() + b"\r\n\n")
    assert [e.id for e in load_examples(path)] == ["1"]


@pytest.mark.parametrize("line", ["{", "[]", "1", "null", '{"id": "1", "context": "a"}', '{"id": "1", "context": "a", "continuation": null}', '{"id": "1", "context": "a", "continuation": "b", "memories": 3}'])
def test_a_line_that_is_no_example_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "0", "context": "", "continuation": "b"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="line 3"): load_examples(path)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    save_examples([TrainingExample("1", "a", "b")], path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'2' holds a lone surrogate"): save_examples([TrainingExample("1", "x", "y"), TrainingExample("2", "x", "\udc00")], path)

    def broken():
        yield TrainingExample("1", "x", "y")
        raise RuntimeError("the source fell over")
    with pytest.raises(RuntimeError): save_examples(broken(), path)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError): save_examples([TrainingExample("3", "x", "y")], path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_empty_file(tmp_path):
    save_examples([], tmp_path / "a.jsonl")
    assert load_examples(tmp_path / "a.jsonl") == []


# ---------------------------------------------------------------------------------------------------- the loss

def qwen3_model(layers=2, **kwargs): return Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, tie_word_embeddings=True, **kwargs)
def gpt2_model(layers=2): return GPT2Config(vocab_size=64, n_embd=32, n_layer=layers, n_head=4, n_positions=2048, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
def sliding_model(): return MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=5)


def model_of(config, attention="sdpa", dtype=torch.float64):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).train()


def cross_entropy(logits, labels): return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")
def gradients(loss, model): return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
def same(a, b, tol=1e-10): return all((x is None or not x.any()) if y is None else torch.allclose(x, y, rtol=tol, atol=tol) for x, y in zip(a, b))


def by_cache(model, ids, n):
    "The continuation over a cache of its context, computed without gradients and detached by hand."
    with torch.no_grad(): kept = model(input_ids=ids[None, :n - 1], use_cache=True).past_key_values if n > 1 else None
    for layer in getattr(kept, "layers", ()): layer.keys, layer.values = layer.keys.detach().clone(), layer.values.detach().clone()
    return cross_entropy(model(input_ids=ids[None, n - 1:], past_key_values=kept, use_cache=True).logits[0, :-1], ids[n:]) / (len(ids) - n)


def by_hooks(model, ids, n):
    "One pass over all, without any cache: where keys and values of the context are made, their gradients are cut."
    def cut(out, at):
        frozen = torch.arange(out.shape[at], device=out.device).view([-1 if d == at else 1 for d in range(out.ndim)]) < n - 1
        return torch.where(frozen, out.detach(), out)
    hooks = []
    for layer in getattr(model, "transformer", model).h if hasattr(model, "transformer") else model.model.layers:
        if hasattr(layer, "attn"):
            d = model.config.n_embd
            hooks.append(layer.attn.c_attn.register_forward_hook(lambda m, i, out: torch.cat([out[..., :d], cut(out[..., d:], 1)], -1)))
        else:
            last = layer.self_attn.k_norm if hasattr(layer.self_attn, "k_norm") else layer.self_attn.k_proj
            hooks += [part.register_forward_hook(lambda m, i, out: cut(out, 1)) for part in (last, layer.self_attn.v_proj)]
    try: return cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, n - 1:-1], ids[n:]) / (len(ids) - n)
    finally:
        for h in hooks: h.remove()


def row(ids, n): return dict(input_ids=ids[None], labels=torch.where(torch.arange(len(ids)) < n, -100, ids)[None])


@pytest.mark.parametrize("config", [qwen3_model, gpt2_model, sliding_model])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("n, total", [(1, 6), (2, 9), (12, 17), (30, 31), (7, 40)])
def test_the_gradient_is_that_of_the_reference(config, attention, n, total):
    "Two references that know nothing of each other; the value is that of the ordinary loss."
    model = model_of(config(), attention)
    ids = torch.randint(0, 64, (total,), generator=torch.Generator().manual_seed(total))
    loss = context_frozen_loss(model, row(ids, n))
    ordinary = model(**row(ids, n)).loss
    assert torch.allclose(loss, ordinary.to(loss), atol=1e-5)
    ours, tol = gradients(loss, model), 1e-10 if attention == "sdpa" else 1e-6 # eager attention takes its softmax in float32
    for reference in (by_cache, by_hooks):
        expected = reference(model, ids, n)
        assert torch.allclose(loss, expected, rtol=tol, atol=tol)
        assert same(ours, gradients(expected, model), tol), reference.__name__
    assert same(ours, gradients(ordinary, model), 1e-5) == (n == 1)


@pytest.mark.parametrize("config", [qwen3_model, gpt2_model])
def test_a_batch_is_the_mean_over_its_tokens(config):
    "Rows of different lengths, padded on either side, and labels with holes."
    model, pad = model_of(config()), 0
    rows = [(torch.randint(1, 64, (t,), generator=torch.Generator().manual_seed(t)), n) for t, n in ((9, 4), (20, 13), (5, 1))]
    count = sum(len(i) - n for i, n in rows)
    expected = sum(by_hooks(model, i, n) * (len(i) - n) for i, n in rows) / count
    wanted = gradients(expected, model)
    for left in (False, True):
        ids, labels, mask = torch.full((3, 22), pad), torch.full((3, 22), -100), torch.zeros(3, 22, dtype=torch.long)
        for b, (i, n) in enumerate(rows):
            at = slice(22 - len(i), 22) if left else slice(0, len(i))
            ids[b, at], labels[b, at], mask[b, at] = i, row(i, n)["labels"][0], 1
        loss = context_frozen_loss(model, dict(input_ids=ids, labels=labels, attention_mask=mask, context_len=torch.tensor([4, 13, 1])))
        assert torch.allclose(loss, expected, rtol=1e-12) and same(gradients(loss, model), wanted)
    made = [TrainingExample(str(n), "", "", input_ids=i, labels=row(i, n)["labels"][0]) for i, n in rows]
    assert torch.allclose(context_frozen_loss(model, made), expected, rtol=1e-12)
    assert torch.allclose(context_frozen_loss(model, made[0]), by_cache(model, *rows[0]), rtol=1e-12)
    empty = row(rows[0][0], 99)
    both = {k: torch.cat([empty[k], row(rows[0][0], 4)[k]]) for k in empty}
    assert torch.allclose(context_frozen_loss(model, both), by_cache(model, *rows[0]), rtol=1e-12)


def test_labels_with_holes():
    model, ids = model_of(qwen3_model()), torch.arange(1, 15)
    labels = torch.where((torch.arange(14) >= 6) & (torch.arange(14) != 9) & (torch.arange(14) < 12), ids, -100)
    loss = context_frozen_loss(model, dict(input_ids=ids[None], labels=labels[None]))
    assert torch.allclose(loss, model(input_ids=ids[None], labels=labels[None]).loss.double(), atol=1e-5)


def test_the_first_label_of_a_row_predicts_nothing():
    model, ids = model_of(gpt2_model()), torch.arange(1, 9)
    assert torch.allclose(context_frozen_loss(model, row(ids, 0)), context_frozen_loss(model, row(ids, 1)))
    assert same(gradients(context_frozen_loss(model, row(ids, 0)), model), gradients(model(**row(ids, 0)).loss, model), 1e-5)


def test_the_first_token_of_a_decision_is_learned():
    "A continuation of one token has a gradient."
    model, ids = model_of(qwen3_model()), torch.arange(1, 9)
    assert all(g is not None and g.any() for g in gradients(context_frozen_loss(model, row(ids, 7)), model))


def test_inputs_are_left_alone():
    model, batch = model_of(gpt2_model()), row(torch.arange(1, 9), 4)
    before = {k: v.clone() for k, v in batch.items()}
    context_frozen_loss(model, batch).backward()
    assert all(torch.equal(batch[k], before[k]) for k in before) and model.training


@pytest.mark.parametrize("batch, error", [(row(torch.arange(5), 9), "no token"), (row(torch.arange(1), 0), "no token"), ([], "no token"),
    (dict(input_ids=torch.zeros(1, 3, dtype=torch.long), labels=torch.zeros(1, 2, dtype=torch.long)), "differ in shape"),
    (dict(row(torch.arange(6), 2), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])), "packed")])
def test_batches_that_are_refused(batch, error):
    with pytest.raises(ValueError, match=error): context_frozen_loss(model_of(gpt2_model()), batch)


def test_checkpointing_is_refused_and_not_silently_wrong():
    model = model_of(qwen3_model())
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"): context_frozen_loss(model, row(torch.arange(1, 9), 4))
    model.eval()
    assert torch.allclose(context_frozen_loss(model, row(torch.arange(1, 9), 4)), by_cache(model, torch.arange(1, 9), 4))


@pytest.mark.parametrize("config", [qwen3_model, gpt2_model])
def test_mixed_precision_learns(config):
    "Weights that autocast casts while there are no gradients must not be used again where there are some."
    model = model_of(config(), dtype=torch.float32)
    ids = torch.arange(1, 20)
    with torch.autocast("cpu", torch.bfloat16): loss = context_frozen_loss(model, row(ids, 9))
    got, wanted = gradients(loss, model), gradients(by_hooks(model, ids, 9), model)
    assert all(g is not None for g in got)
    assert all(torch.nn.functional.cosine_similarity(g.flatten(), w.flatten(), 0) > .98 for g, w in zip(got, wanted) if w.norm() > 1e-6)


def test_a_few_steps_of_training():
    model = model_of(qwen3_model(), dtype=torch.float32)
    batch, steps = row(torch.arange(1, 20), 12), []
    best = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(12):
        loss = context_frozen_loss(model, batch)
        best.zero_grad(); loss.backward(); best.step()
        steps.append(loss.item())
    assert steps[-1] < steps[0] / 2


def saved_bytes(make):
    "Bytes that a loss keeps for its backward pass, each storage once, parameters not counted."
    seen = {}

    def keep(t):
        if not isinstance(t, torch.nn.Parameter): seen[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): loss = make()
    return sum(t.untyped_storage().nbytes() for t in seen.values()), loss


@pytest.mark.slow
@pytest.mark.parametrize("config", [qwen3_model, gpt2_model])
def test_the_memory_that_is_saved(config, capsys):
    model = model_of(config(4), "sdpa", torch.float32)
    with capsys.disabled():
        print(f"\n{type(model).__name__}, 4 layers of width 32: MB kept for the backward pass")
        for context, rest in ((480, 32), (992, 32), (2000, 32)):
            ids = torch.randint(0, 64, (context + rest,))
            frozen, a = saved_bytes(lambda: context_frozen_loss(model, row(ids, context)))
            whole, b = saved_bytes(lambda: model(**row(ids, context)).loss)
            print(f"  context {context:5}, continuation {rest}: ordinary {whole / 1e6:7.1f}, frozen {frozen / 1e6:6.1f}, {whole / frozen:5.1f} times less")
            assert torch.allclose(a, b, atol=1e-4) and frozen * 3 < whole
