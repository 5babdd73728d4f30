"""What a sample says: captions of a picture, or content in parts; and how many tokens that is.

A *pair* has `captions` by language and one picture. *Content* is a list of parts, in the order in which the model reads them:

    {"text": "...", "learn": bool, "end": bool}     learn: its tokens are learned; end: an <eos> follows, learned if they are
    {"image": k, "learn": bool}                     the sample's picture k; learn: to be painted, which the last part alone may be

`learn` and `end` are false where they are left out. Each part's text is encoded by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmar_megatron.data.index import CONTENT, NO_LANGUAGE, PAIR

QUESTION, ANSWER = "USER: {}\nASSISTANT: ", "{}"
"""A conversation as the model reads it: each question, then its answer, which alone is learned, and <eos>."""
PLACEHOLDER = "<image>"
"""Where in a question a picture belongs."""
_CHARACTERS = 8
"""For each token that a piece may have, so many are looked at; in English about 4 are one."""
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True, kw_only=True)
class TextCounts:
    """What the index holds of a sample's text."""

    kind: int
    tokens: list[int]
    """Of each text."""
    languages: list[int]
    """Of each text."""
    learned: int = 0
    paints: bool = False


def count_texts(metadata: Mapping[str, Any], *, count: Callable[[str], int], languages: Sequence[str]) -> TextCounts:
    """Counts the tokens of a sample.

    Args:
        metadata: the content of its json.
        count: text -> tokens.
        languages: of the data set.
    """
    if "content" in metadata:
        return _count_content(metadata["content"], count)
    captions: Mapping[str, Sequence[str]] = metadata["captions"]
    texts = [(code, text) for code, language in enumerate(languages) for text in captions.get(language, ())]
    return TextCounts(kind=PAIR, tokens=[count(text) for _, text in texts], languages=[code for code, _ in texts])


def _count_content(parts: Sequence[Mapping[str, Any]], count: Callable[[str], int]) -> TextCounts:
    total = learned = 0
    for part in parts:
        if "text" in part:
            tokens = count(part["text"]) + bool(part.get("end"))
            total += tokens
            learned += tokens if part.get("learn") else 0
    last = parts[-1]
    paints = "image" in last and bool(last.get("learn"))
    return TextCounts(kind=CONTENT, tokens=[total], languages=[NO_LANGUAGE], learned=learned, paints=paints)


def conversation_parts(turns: Any, *, pictures: int) -> list[dict[str, Any]] | None:
    """A conversation -> content; None where it is none.

    Args:
        turns: {"from": "human" or "gpt", "value": text} or {"role": "user" or "assistant", "content": text}, by turns. Before the
            first question, what a "system" says is read too.
        pictures: each has its place in a question as `<image>`; where no question has any, all come before the first.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    said = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
    if not all(isinstance(text, str) for _, text in said):
        return None
    parts: list[dict[str, Any]] = []
    if said and said[0][0] == "system":
        parts = [{"text": f"{said.pop(0)[1]}\n"}]
    roles = [_ASKS, _ANSWERS] * (len(said) // 2)
    if not said or len(said) % 2:
        return None
    if not all(role in expected for (role, _), expected in zip(said, roles, strict=True)):
        return None
    questions, answers = [text for _, text in said[::2]], [text for _, text in said[1::2]]
    if pictures and not any(PLACEHOLDER in question for question in questions):
        questions[0] = PLACEHOLDER * pictures + questions[0]
    images = 0
    for question, answer in zip(questions, answers, strict=True):
        for number, text in enumerate(QUESTION.format(question).split(PLACEHOLDER)):
            if number:
                parts.append({"image": images})
                images += 1
            if text:
                parts.append({"text": text})
        parts.append({"text": ANSWER.format(answer), "learn": True, "end": True})
    return parts


def texts_in(metadata: Mapping[str, Any]) -> list[str]:
    """All captions, or the texts of all parts."""
    if "content" in metadata:
        return [part["text"] for part in metadata["content"] if "text" in part]
    return [text for texts in metadata["captions"].values() for text in texts]


def cut_text(text: str, *, count: Callable[[str], int], longest: int) -> list[str]:
    """Pieces of at most `longest` tokens each that make up the text, cut behind white space where there is any.

    Args:
        text: of any length.
        count: text -> tokens.
        longest: at least 1; a single character may have more.
    """
    begin = 0
    pieces = []
    while begin < len(text):
        # Not all that is left: to count that for each piece would take the square of the time.
        head = text[begin : begin + _CHARACTERS * longest]
        while (total := count(head)) <= longest and begin + len(head) < len(text):
            head = text[begin : begin + 2 * len(head)]
        end = len(head)
        if total > longest:
            end = _after_space(head, max(1, end * longest // total))
        while end > 1 and count(head[:end]) > longest:
            end = _after_space(head, end * 9 // 10)
        pieces.append(head[:end])
        begin += end
    return pieces


def _after_space(text: str, end: int) -> int:
    """The last place behind white space up to `end`, if it is not far from there."""
    for place in range(end, max(0, end - 200), -1):
        if text[place - 1].isspace():
            return place
    return max(1, end)


def fault_of(metadata: Any, *, pictures: int) -> str | None:
    """What keeps a sample's json from being one of a sample with so many pictures; None: nothing."""
    if not isinstance(metadata, dict):
        return "its json is no object"
    if "content" in metadata:
        return _fault_of_content(metadata["content"], pictures)
    captions = metadata.get("captions")
    if not isinstance(captions, dict) or not all(_is_list_of_texts(texts) for texts in captions.values()):
        return 'its json has neither "content" nor "captions" with a list of texts for each language'
    if not any(captions.values()):
        return "it has no caption"
    return None if pictures == 1 else f"it has captions and {pictures} pictures instead of one"


def _is_list_of_texts(texts: Any) -> bool:
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def _fault_of_content(parts: Any, pictures: int) -> str | None:
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        return "its content is no list of parts"
    images = [part for part in parts if "image" in part]
    if not all(isinstance(part.get("text"), str) for part in parts if "image" not in part) or any("text" in p for p in images):
        return "a part of its content is neither a text nor an image"
    if [part["image"] for part in images] != list(range(pictures)):
        return f"the images of its content are not its {pictures} pictures, each once and in their order"
    if any(part.get("learn") for part in parts[:-1] if "image" in part):
        return "an image to be painted is not the last part of its content"
    return None
