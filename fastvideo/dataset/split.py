"""Which prompts are held out from training, and evaluated instead: --eval_split."""

import hashlib
from collections.abc import Sequence

from fastvideo.cli import FlagError


def held_out(captions: Sequence[str], amount: float) -> list[bool]:
    """Whether each prompt is held out.

    A hash of the caption alone decides, without regard to case and white space: all copies of a caption lie on one
    side, and neither the order of the file nor a seed matters. With a share no edit of the file moves a caption to the
    other side; with a number, a new caption may take the place of one that was held out.

    amount: below 1, the share of captions that are held out, about; else their number. Raises FlagError about
    `eval_split` if that are none, or all.
    """
    places = [_place(caption) for caption in captions]
    different = sorted(set(places))
    bound = amount if amount < 1 else [*different, 1.0][min(int(amount), len(different))]
    found = [place < bound for place in places]
    if not any(found):
        problem = f"holds out none of {len(different)} prompts; choose a larger share, or a number of prompts"
        raise FlagError("eval_split", f"{amount:g}", problem)
    if all(found):
        problem = f"holds out all of {len(different)} prompts; none is left to train on"
        raise FlagError("eval_split", f"{amount:g}", problem)
    return found


def _place(caption: str) -> float:
    """A number from 0 to 1, evenly spread."""
    digest = hashlib.sha256(" ".join(caption.casefold().split()).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
