"""A second, deliberately slow reading of the Memento format, to check the parser against.

Nothing here is clever on purpose: every look-ahead scans the text again, every search goes through the whole
list. `reference_parse` follows the recovery rules of the format one by one (flat nesting, markers in code fences
are markers, exact tags); `reference_serving` follows the state machine of the serving engine.
"""

THINK, END_THINK = "<think>", "</think>"
BLOCK, END_BLOCK = "<|block_start|>", "<|block_end|>"
MEMENTO, END_MEMENTO = "<|summary_start|>", "<|summary_end|>"
MARKERS = (THINK, END_THINK, BLOCK, END_BLOCK, MEMENTO, END_MEMENTO)


def marker_at(text, i):
    "The marker that starts at offset `i`, or None."
    for marker in MARKERS:
        if text[i : i + len(marker)] == marker:
            return marker
    return None


def next_marker(text, i, skip=()):
    "(offset, marker) of the first marker at or after `i` that is not in `skip`; (len(text), None) if there is none."
    while i < len(text):
        marker = marker_at(text, i)
        if marker is not None and marker not in skip:
            return i, marker
        i += 1
    return len(text), None


def is_partial(text):
    "Does the text end in at least two characters of an unfinished marker?"
    return any(text.endswith(m[:n]) for m in MARKERS for n in range(2, len(m)))


def reference_parse(text, pairing="adjacent", assume_thinking=False):
    """Read `text` by the rules; returns (spans, codes, pairs, answer).

    spans: list of (kind, start, end, complete); codes: sorted list, one entry for each issue;
    pairs: list of ((start, end, complete), (start, end, complete) or None), one for each block; answer: str or None.
    """
    spans, codes = [], []
    links = []  # one list [block, memento or None] for each block, in order
    memento_target = None  # the entry of `links` that the open memento belongs to
    state = "before"  # before any section | thinking | block | memento | after a section
    begin = 0  # where the text that is being collected starts

    def add(kind, start, end, complete=True):
        if start == end and kind in ("gap", "prefix"):
            return
        spans.append((kind, start, end, complete))

    def end_block(at, complete):
        content = text[begin:at]
        add("block", begin, at, complete)
        links.append([(begin, at, complete), None])
        if complete and content.strip() == "":
            codes.append("empty_block")
        if complete and content.count("```") % 2 == 1:
            codes.append("marker_in_fence")

    def choose_block():
        "The entry of `links` that a memento opened now belongs to, or None."
        if pairing == "adjacent":
            if links and links[-1][1] is None:
                return links[-1]
            return None
        for entry in reversed(links):  # vllm: the nearest closed block without a memento, however far back
            if entry[0][2] and entry[1] is None:
                return entry
        return None

    def open_memento():
        "The entry is filled in when the memento ends, which is always before the next one opens."
        entry = choose_block()
        if entry is None:
            codes.append("orphan_summary")
        return entry

    def end_memento(at, complete):
        add("memento", begin, at, complete)
        if memento_target is not None:
            memento_target[1] = (begin, at, complete)
        if complete and text[begin:at].strip() == "":
            codes.append("empty_summary")

    at, marker = next_marker(text, 0)
    any_marker = marker is not None
    while marker is not None:
        after = at + len(marker)
        structural = True

        if state == "before" and marker in (END_THINK, BLOCK, MEMENTO):  # rule 1
            codes.append("implicit_think_open")
            state = "thinking"

        if state == "before":
            if marker == THINK:
                add("prefix", begin, at)
                state = "thinking"
            else:  # rule 5
                codes.append("stray_block_end" if marker == END_BLOCK else "stray_summary_end")
                structural = False

        elif state == "thinking":
            if marker == THINK:  # rule 7
                codes.append("think_reopened")
                structural = False
            elif marker == END_THINK:
                add("gap", begin, at)
                state = "after"
            elif marker == BLOCK:
                add("gap", begin, at)
                state = "block"
            elif marker == MEMENTO:
                add("gap", begin, at)
                memento_target = open_memento()
                state = "memento"
            else:  # rule 5
                codes.append("stray_block_end" if marker == END_BLOCK else "stray_summary_end")
                structural = False

        elif state == "block":
            if marker == THINK:  # rule 7
                codes.append("think_reopened")
                structural = False
            elif marker == END_THINK:  # rule 6
                if next_marker(text, after, skip=(END_THINK,))[1] == END_BLOCK:
                    codes.append("think_close_in_block")
                    structural = False
                else:
                    codes.append("truncated_block")
                    end_block(at, False)
                    state = "after"
            elif marker == BLOCK:  # rule 3
                codes.append("block_reopened")
                end_block(at, False)
            elif marker == END_BLOCK:
                end_block(at, True)
                state = "thinking"
            elif marker == MEMENTO:  # rule 4
                codes.append("unclosed_block")
                end_block(at, False)
                memento_target = open_memento()
                state = "memento"
            else:  # rule 5
                codes.append("stray_summary_end")
                structural = False

        elif state == "memento":
            if marker == THINK:  # rule 7
                codes.append("think_reopened")
                structural = False
            elif marker == END_THINK:  # rule 6
                if next_marker(text, after, skip=(END_THINK,))[1] == END_MEMENTO:
                    codes.append("think_close_in_summary")
                    structural = False
                else:
                    codes.append("truncated_summary")
                    end_memento(at, False)
                    state = "after"
            elif marker == BLOCK:  # rule 4
                codes.append("unclosed_summary")
                end_memento(at, False)
                state = "block"
            elif marker == MEMENTO:  # rule 4
                codes.append("summary_reopened")
                end_memento(at, False)
                memento_target = open_memento()
            elif marker == END_MEMENTO:
                end_memento(at, True)
                state = "thinking"
            else:  # rule 5
                codes.append("stray_block_end")
                structural = False

        elif state == "after":
            if marker == THINK:  # rule 7
                if any(marker_at(text, i) == END_THINK for i in range(after, len(text))):
                    add("gap", begin, at)
                    state = "thinking"
                else:
                    codes.append("stray_think_open")
                    structural = False
            elif marker == END_THINK:  # rule 8
                codes.append("stray_think_close")
                structural = False
            else:  # rule 8
                codes.append("marker_in_answer")
                structural = False

        if structural:
            add("marker", at, after)
            begin = after
        at, marker = next_marker(text, after)

    answer = None
    end = len(text)
    if state == "before" and assume_thinking and text and not any_marker:  # rule 9; "" is the empty trace
        state = "thinking"
    if state == "thinking":
        add("gap", begin, end, False)
        codes.append("unclosed_think")
    elif state == "block":
        codes += ["truncated_block", "unclosed_think"]
        end_block(end, False)
    elif state == "memento":
        codes += ["truncated_summary", "unclosed_think"]
        end_memento(end, False)
    else:
        answer = text[begin:end]
        if state == "after" or text:
            add("answer", begin, end)

    for block, memento in links:
        if block[2] and memento is None:
            codes.append("missing_summary")
        if memento is not None and any(kind == "marker" and text[x:y] == "<think>" and block[1] <= x < memento[0] for kind, x, y, _ in spans):
            codes.append("split_pair")
    if is_partial(text):
        codes.append("partial_marker")
    return spans, sorted(codes), [tuple(entry) for entry in links], answer


def reference_serving(ids, prompt_length=0):
    """The state machine of the serving engine over symbols `"B" "b" "S" "s"` (anything else is a plain token).

    Returns one (block_start, block_end, summary_start, summary_end) for each block, in opening order.
    """
    blocks = []  # [block_start, block_end, summary_start, summary_end]
    current = None  # the block whose summary is being written
    for position, symbol in enumerate(ids):
        if position < prompt_length:
            continue
        if symbol == "B":
            blocks.append([position, None, None, None])
        elif symbol == "b":
            still_open = [block for block in blocks if block[1] is None]
            if still_open:
                max(still_open, key=lambda block: block[0])[1] = position
        elif symbol == "S":
            waiting = [block for block in blocks if block[1] is not None and block[2] is None]
            if waiting:
                current = max(waiting, key=lambda block: block[0])
                current[2] = position
        elif symbol == "s":
            if current is not None:
                current[3] = position
                current = None
    return [tuple(block) for block in blocks]
