"""`--rm-type f1`: how many words the response shares with the label, as the harmonic mean of precision and recall.

Words are compared in lower case, without punctuation and articles. Yes, no and noanswer count only as a whole.

Source: SQuAD (arXiv 1606.05250); for yes, no and noanswer HotpotQA (arXiv 1809.09600).
"""

from __future__ import annotations

import re
import string
from collections import Counter

from qwench.samples import Verdict

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WHOLE_ANSWERS = (["yes"], ["no"], ["noanswer"])


def grade(response: str, label: str) -> Verdict:
    """Compare the whole response with the label."""
    stated, wanted = words(response), words(label)
    if stated == wanted and stated:
        return Verdict(score=1.0, reason="exact")
    shared = sum((Counter(stated) & Counter(wanted)).values())
    if not shared or stated in _WHOLE_ANSWERS or wanted in _WHOLE_ANSWERS:
        return Verdict(score=0.0, reason="wrong")
    return Verdict(score=2 * shared / (len(stated) + len(wanted)), reason="shared_words")


def words(text: str) -> list[str]:
    """Return the words that are compared."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
