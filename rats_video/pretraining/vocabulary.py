"""The words of captions that are worth scoring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rats_video.rewards.word import words_in

_EVERYWHERE = 0.9  # of the captions: what is nearly always said tells nothing
_FUNCTION_WORDS = """
a about above across after against all along also among an and another any are around as at away be because been
before behind being below beneath beside between both but by can could did do does during each either every few for
from further had has have having he her here hers him his how i if in inside into is it its itself just like many
may me more most much my near no nor not now of off on onto or other our out outside over own per she should so some
such than that the their them then there these they this those through to together too toward towards under until
upon us very was we were what when where which while who whom whose why will with within without would you your
"""


def content_words(captions: Sequence[str], most: int, at_least: int) -> list[str]:
    """The most frequent words of captions, each counted once a caption.

    Skips function words, single letters, numbers, words of too few captions, and those of nearly all.

    Args:
        captions: one a clip.
        most: how many words.
        at_least: captions that must have a word.
    """
    dull = set(_FUNCTION_WORDS.split())
    counts = Counter(word for caption in captions for word in set(words_in(caption)))
    known = [
        word
        for word, count in counts.items()
        if at_least <= count <= _EVERYWHERE * len(captions)
        and len(word) > 1 and not word.isdigit() and word not in dull
    ]  # fmt: skip
    return sorted(known, key=lambda word: (-counts[word], word))[:most]
