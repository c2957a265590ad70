"""A second, deliberately slow reading of annotated steps, to check `tracebook.steps` against.

`best_total` tries every monotone assignment of pieces to their places in a small text and returns the greatest number
of matched characters, white space aside. `read_inline` walks a marked text character by character. `plain_segments`
reads the thinking tags with `str.find`. Nothing here uses the package.

The rule for short pieces is the one of the chapter: fewer than four characters (white space aside) count only where
they cut no word of ASCII letters and digits, unless all pieces together are the text.
"""


def squeeze(text):
    return "".join(text.split())


def squeezed_offsets(text):
    "For each character other than white space its offset."
    return [i for i, c in enumerate(text) if not c.isspace()]


def cuts_word(text, start, end):
    "Whether a stretch begins or ends inside a word."
    word = lambda c: c.isascii() and c.isalnum()
    before = start > 0 and word(text[start - 1]) and word(text[start])
    after = end < len(text) and word(text[end - 1]) and word(text[end])
    return before or after


def places(text, piece):
    "All places (start, end) of a piece among the characters that are no white space."
    core, flat, at = squeeze(piece), squeeze(text), squeezed_offsets(text)
    found = [(i, i + len(core)) for i in range(len(flat) - len(core) + 1) if core and flat.startswith(core, i)]
    if len(core) > 3: return found
    return [(a, b) for a, b in found if not cuts_word(text, at[a], at[b - 1] + 1)]


def best_total(text, pieces):
    "The most characters that a monotone assignment without overlap can match: every choice is tried."
    flat = squeeze(text)
    if squeeze("".join(pieces)) == flat: return len(flat)
    options = [places(text, p) for p in pieces]
    seen = {}

    def best(i, low):
        if i == len(pieces): return 0
        if (i, low) not in seen:
            seen[i, low] = max([best(i + 1, low), *(b - a + best(i + 1, b) for a, b in options[i] if a >= low)])
        return seen[i, low]

    return best(0, 0)


def read_inline(marked, end="end-section"):
    "(label, text, closed) of each section, and how many ends and openings had no partner."
    sections, label, start, odd, i = [], None, 0, 0, 0
    while i < len(marked):
        stop = marked.find('"]', i + 2) if marked.startswith('["', i) else -1
        name = marked[i + 2:stop] if stop > 0 else ""
        if not name or len(name) > 80 or set(name) & set('"[]\n'):
            i += 1
            continue
        if label is not None:
            sections.append((label, marked[start:i], name == end))
            odd += name != end
        elif name == end: odd += 1
        label, start, i = None if name == end else name, stop + 2, stop + 2
    if label is not None:
        sections.append((label, marked[start:], False))
        odd += 1
    return sections, odd


def plain_segments(text):
    "Thought and solution of a text with at most one `<think>` and one `</think>`, in this order."
    opened, closed = text.find("<think>"), text.find("</think>")
    if opened < 0 and closed < 0: return dict(thought=None, solution=(0, len(text)))
    start = opened + 7 if opened >= 0 else 0
    if closed < 0: return dict(thought=(start, len(text)), solution=None)
    return dict(thought=(start, closed), solution=(closed + 8, len(text)))
