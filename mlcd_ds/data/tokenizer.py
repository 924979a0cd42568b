"""Captions to token ids: a tokenizer from a file or folder, or a small one trained on captions at hand.

Everything comes from the disk: nothing is fetched. A tokenizer is kept as one JSON file of the `tokenizers` library, which
every checkpoint of a run on captions holds.

T: the context, tokens of one text with those for its start and end.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.files import write_text

START, END = "<|startoftext|>", "<|endoftext|>"
"""CLIP's special tokens; those of tokenizers trained here."""

END_NAMES = (END, "</s>", "[SEP]", "<eos>", "<|im_end|>")
"""Tokens that may end a text, where the tokenizer does not say by itself."""

FILE = "tokenizer.json"

_CURE = (
    "Give --tokenizer a tokenizer.json or a transformers tokenizer folder (CLIP's lies in every CLIP folder), or train one "
    "on your captions: python tools/train_tokenizer.py --shards TARS --output tokenizer.json"
)


@dataclass(frozen=True)
class CaptionTokenizer:
    """A tokenizer. text: JSON of the `tokenizers` library. Cheap to send to another process: built there on first use."""

    text: str

    @staticmethod
    def load(path: str | Path) -> "CaptionTokenizer":
        """Reads a JSON file of the `tokenizers` library, or a transformers tokenizer folder.

        Raises DataError for what is not there or cannot be read, ConfigError where a library is missing.
        """
        path = Path(path)
        if not path.exists():
            raise DataError(f"--tokenizer {path} does not exist, and nothing is downloaded. {_CURE}")
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            return CaptionTokenizer._of_folder(path)
        try:
            tokenizer = CaptionTokenizer(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the tokenizer {file} cannot be read ({error}). {_CURE}") from None
        tokenizer.check(str(file))
        return tokenizer

    @staticmethod
    def _of_folder(path: Path) -> "CaptionTokenizer":
        """Of vocab.json and merges.txt alone, as OpenAI's CLIP has them: transformers knows how to join them."""
        if not (path / "vocab.json").is_file():
            raise DataError(f"the folder {path} holds no {FILE} and no vocab.json: it is no tokenizer's. {_CURE}")
        try:
            from transformers import CLIPTokenizerFast
        except ImportError:
            raise ConfigError(
                f"{path} has vocab.json and merges.txt, which transformers reads: pip install transformers, or give a {FILE}"
            ) from None
        try:
            backend = CLIPTokenizerFast.from_pretrained(path, local_files_only=True).backend_tokenizer
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"the tokenizer in {path} cannot be read ({str(error).splitlines()[0]}). {_CURE}") from None
        tokenizer = CaptionTokenizer(backend.to_str())
        tokenizer.check(str(path))
        return tokenizer

    def check(self, where: str) -> None:
        """Raises DataError where this is no tokenizer, or one whose texts do not end with a token of their own."""
        try:
            self.backend, self.end_token  # noqa: B018
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    @cached_property
    def backend(self):
        """The `tokenizers.Tokenizer`, without its own padding and truncation."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ConfigError("captions need the tokenizers library: pip install tokenizers") from None
        try:
            tokenizer = Tokenizer.from_str(self.text)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"it is no tokenizer of the tokenizers library ({error}). {_CURE}") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @cached_property
    def end_token(self) -> int:
        """Id of the token that ends every text: the last of an empty one, or one of END_NAMES.

        Raises DataError where there is none, or the id also stands at a text's beginning.
        """
        alone = self.backend.encode("").ids
        named = [self.backend.token_to_id(name) for name in END_NAMES]
        known = [number for number in named if number is not None]
        end = alone[-1] if alone else next(iter(known), None)
        if end is None:
            raise DataError(
                f"texts of this tokenizer do not end with a token of their own, and none of {', '.join(END_NAMES)} is in "
                f"its vocabulary, but the text tower reads the embedding there. {_CURE}"
            )
        if len(alone) > 1 and alone[0] == end:
            raise DataError(f"this tokenizer begins and ends texts with the same token ({end}). {_CURE}")
        return end

    @property
    def vocabulary(self) -> int:
        """One more than the highest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def hash(self) -> str:
        """Changes with the tokenizer: for a checkpoint to compare."""
        return hashlib.sha256(json.dumps(json.loads(self.text), sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, text: str, context: int) -> np.ndarray:
        """int64 [T]: the text's ids, cut so that the end token has room, filled up with the end token."""
        ids = self.backend.encode(" ".join(text.split())).ids
        if not ids or ids[-1] != self.end_token:
            ids = [*ids, self.end_token]
        row = np.full(context, self.end_token, np.int64)
        row[: min(len(ids), context)] = ids[:context]
        row[-1] = self.end_token
        return row

    def encode_all(self, texts: Sequence[str], context: int) -> np.ndarray:
        """int64 [n, T]."""
        return np.stack([self.encode(text, context) for text in texts]) if texts else np.zeros((0, context), np.int64)

    def transformers_files(self, context: int) -> dict[str, str]:
        """{name: content} of a folder that transformers' AutoTokenizer reads, giving the ids that `encode` gives."""
        from tokenizers import Tokenizer, processors

        tokenizer, end = Tokenizer.from_str(self.text), self.backend.id_to_token(self.end_token)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if tokenizer.encode("").ids[-1:] != [self.end_token]:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"$A {end}", special_tokens=[(end, self.end_token)]
            )
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "eos_token": end,
            "pad_token": end,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
        }
        return {
            FILE: tokenizer.to_str(pretty=True) + "\n",
            "tokenizer_config.json": json.dumps(described, indent=2) + "\n",
        }

    def __getstate__(self) -> dict:
        return {"text": self.text}

    def __setstate__(self, state: dict) -> None:
        object.__setattr__(self, "text", state["text"])


def train_tokenizer(captions: Iterable[str], vocabulary: int, output: Path) -> CaptionTokenizer:
    """Trains a byte-pair encoding on captions, cut into words as CLIP cuts them, and writes it as one JSON file.

    vocabulary: tokens, special ones included; fewer where the captions do not have so many pairs. Lower case, and any byte
    can be spelt: nothing is unknown. Raises DataError where there is no caption, ConfigError for a vocabulary too small.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    except ImportError:
        raise ConfigError("a tokenizer is trained by the tokenizers library: pip install tokenizers") from None
    letters = 2 * 256  # each byte, within a word and at its end
    if vocabulary < letters + 2:
        raise ConfigError(
            f"--vocab_size {vocabulary} has no room for {letters} bytes and 2 special tokens: at least {letters + 2}"
        )
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    replaced = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), replaced, normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    count = 0

    def counted() -> Iterable[str]:
        nonlocal count
        for caption in captions:
            count += bool(caption.strip())
            yield caption

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        # The trainer numbers bytes at a word's end as a hash table comes by them, and parts equal counts by these numbers:
        # the same captions would give another vocabulary each time. Known beforehand, they have one order.
        special_tokens=[f"{letter}</w>" for letter in alphabet],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if not count:
        raise DataError("no caption to train a tokenizer on: expected KEY.txt, or KEY.json with a caption, in the tars")
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = []  # they are pieces of words, not tokens of their own
    tokenizer = Tokenizer.from_str(json.dumps(described))
    # Behind all others, as in CLIP's vocabulary: the end token is the highest.
    tokenizer.add_special_tokens([START, END])
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
    )
    write_text(output, tokenizer.to_str(pretty=True))
    return CaptionTokenizer.load(output)
