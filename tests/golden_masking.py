"""What the archived `tokenize_for_trainer` and `tokenize_for_trainer_multistep` did, faults included.

Written anew from a description of what they do, for comparison in tests only. One thing is adapted: `return_dict=False`,
without which transformers 5 answers with a dictionary of two entries. Where a template is prefix-stable for a chat, what comes out is right."""
import numpy as np

UNMASKED_ROLES = ["assistant", "agent"]


def ids_of(tokenizer, chat, prompt=False):
    "The template ids of a chat."
    return list(tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=prompt, return_dict=False))


def _result(tokenizer, tokens, masks, chat, include_messages, finish_reason):
    "A generation that ran out of room did not end: a last id that is the EOS goes."
    if finish_reason == "length" and tokens and tokens[-1] == tokenizer.eos_token_id: tokens, masks = tokens[:-1], masks[:-1]
    return dict(tokens=tokens, masks=masks) | (dict(messages=chat) if include_messages else {})


def golden_trainer(tokenizer, chat, include_messages=False, train_on_all_assistant_turns=False, finish_reason=""):
    "Everything after the prompt of the last message is trained, or every turn between the lengths of two renderings."
    tokens = ids_of(tokenizer, chat)
    if train_on_all_assistant_turns:
        labels = np.full(len(tokens), -100)
        for i, message in enumerate(chat):
            if message["role"] not in UNMASKED_ROLES: continue
            start, through = len(ids_of(tokenizer, chat[:i], True)), ids_of(tokenizer, chat[:i + 1])
            labels[start:len(through)] = through[start:]  # of the shorter rendering, not of `tokens`
        masks = labels.tolist()
    else:
        prompt = ids_of(tokenizer, chat[:-1], True)
        masks = [-100] * len(prompt) + tokens[len(prompt):]
    return _result(tokenizer, tokens, masks, chat, include_messages, finish_reason)


def golden_multistep(tokenizer, chat, include_messages=False, finish_reason=""):
    "Only the last message of an assistant is trained; what follows it stays, with -100."
    tokens = ids_of(tokenizer, chat)
    masks = [-100] * len(tokens)
    last = next((i for i in range(len(chat) - 1, -1, -1) if chat[i]["role"] in UNMASKED_ROLES), None)
    if last is not None:
        start, end = len(ids_of(tokenizer, chat[:last], True)), len(ids_of(tokenizer, chat[:last + 1]))
        if 0 <= start < end <= len(tokens): masks[start:end] = tokens[start:end]
    return _result(tokenizer, tokens, masks, chat, include_messages, finish_reason)
