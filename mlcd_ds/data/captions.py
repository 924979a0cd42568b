"""The captions of tars: KEY.txt, or the field "caption" of KEY.json where that is not there (img2dataset's layout).

A caption is one text, whatever lines it has; in CLIP_benchmark's retrieval sets each line is a caption of its own.
"""

import json
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from mlcd_ds.data.tars import local_shard, read_samples

TEXT, RECORD = "txt", "json"
EXTENSIONS = (TEXT, RECORD)
"""Where a caption may lie; the first of them that a sample has is asked."""

FIELD = "caption"


class CaptionError(Exception):
    """A sample without a caption that can be used; reason: as the ledger counts it."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


CAPTION_PROBLEMS = ("no_caption", "bad_caption")
"""Reasons: nothing there, or an empty text; bytes that are no UTF-8, JSON that is none."""


def read_caption(extension: str, data: bytes) -> str:
    """The caption in a member's bytes, white space at its ends taken off. Raises CaptionError."""
    try:
        text = data.decode("utf-8")
        if extension == RECORD:
            record = json.loads(text)
            text = record.get(FIELD) if isinstance(record, dict) else None
    except (ValueError, RecursionError) as error:  # the latter: brackets in brackets, thousands deep
        raise CaptionError("bad_caption", f"its .{extension} cannot be read ({error})") from None
    if text is None or text == "":
        raise CaptionError("no_caption", f"its .{extension} holds none")
    if not isinstance(text, str):
        raise CaptionError("bad_caption", f"its caption is {str(text)[:40]!r}, expected a text")
    if not text.strip():
        raise CaptionError("no_caption", f"its .{extension} holds none")
    return text.strip()


def caption_extension(members) -> str | None:
    """The extension that holds a sample's caption, None without one."""
    return next((extension for extension in EXTENSIONS if extension in members), None)


def captions_of(
    shards: Sequence[str], shard_cache: str | None, limit: int | None = None, allow_pipe: bool = False
) -> Iterator[str]:
    """The captions of tars, with a progress bar; samples without one are passed over. limit: captions at most."""
    count = 0
    for shard in tqdm(shards, desc="captions", unit="tar", disable=None):
        for _, parts in read_samples(local_shard(shard, shard_cache, allow_pipe), EXTENSIONS):
            extension = caption_extension(parts)
            if extension is None:
                continue
            try:
                caption = read_caption(extension, parts[extension])
            except CaptionError:
                continue  # the run that trains on them counts them
            if limit is not None and count >= limit:
                return
            count += 1
            yield caption
