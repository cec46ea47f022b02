"""A text encoder that knows what words mean and needs no download: the package wordllama ships its table of vectors.

The package itself is never imported: its import sets up the logging of the whole process, and its loader asks the
network for a tokenizer that is already there. The table and the tokenizer are read as files.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from atoll.condition import Condition, Tokens
from atoll.encoders.embedded import EXTRA, EmbeddedConfig, package_file
from atoll.encoders.text.encoder import TextEncoder
from atoll.encoders.text.hashed import WORD, sinusoids
from atoll.encoders.trust import USER, Trust
from atoll.encoders.weights import require_sha256, sha256_files
from atoll.errors import AtollError
from atoll.runtime.libraries import import_library
from atoll.storage import bounds
from atoll.storage.content import advice

PACKAGE = "wordllama"
SHIPPED = 256  # the width of the table in the package; its first columns are the narrower tables
_TABLE = "l2_supercat_{}.safetensors"
_TOKENIZER = "l2_supercat_tokenizer_config.json"
_PADDING, _START = 0, 1  # <unk> and <s> of Llama 2's vocabulary; no word has them as pieces
_WORDS_CACHED = 1 << 16


class WordLlamaConfig(EmbeddedConfig):
    """dim: the first columns of the table, which was trained to be cut there.

    length: the start token, and pieces of words; most words are one to three pieces.
    weights: a directory or a repository of the hub with a wider table; "": the package's.
    """

    name: Literal["wordllama"] = "wordllama"
    dim: Literal[64, 128, 256, 512, 1024] = 256
    length: int = Field(32, ge=2, le=bounds.MAX_TOKENS)


class WordLlamaEncoder(TextEncoder):
    """Words as vectors of WordLlama (Miller 2024), in which words of near meaning are near, plus their position.

    A word is a run of letters or digits; case does not matter, and punctuation only separates. Llama 2's vocabulary
    splits it into pieces, in the one of its three cases (rose, Rose, ROSE) that has the fewest; its vector is the mean
    of the pieces' vectors. Those of words such as "a" and "of" are short. The first state is the caption's: the sum of
    its words at unit mean square, zero for the empty caption. states = vectors + sinusoidal position, zero at padding;
    pooled = the caption's vector, independent of the order of the words.

    Args:
        config: with the width and the length.
        trust: what `weights` may reach.

    Raises:
        AtollError: the package is not installed, or the weights are not found, damaged, or not those of the config's
            sha256.
    """

    name = "wordllama"
    zero_padding = True

    def __init__(self, config: WordLlamaConfig, trust: Trust = USER):
        # Find the table and the tokenizer, and check their hash.
        table, tokenizer, root = _files(config, trust)
        sha256 = sha256_files({table.name: table, tokenizer.name: tokenizer})
        require_sha256(f"condition encoder {self.name!r}", root, sha256, config.sha256)
        self._config = config.pinned(sha256, root)
        self.dim = self.pooled_dim = config.dim
        self.length = config.length

        # Load both; they must fit each other.
        self._tokenizer = _load_tokenizer(tokenizer)
        vectors = _load_table(table, config.dim)  # [V,D] float16
        if len(vectors) != self._tokenizer.get_vocab_size():
            raise AtollError(
                f"{table}: has {len(vectors)} vectors, the tokenizer {self._tokenizer.get_vocab_size()} pieces; get "
                "both from one place"
            )
        self._pieces = lru_cache(_WORDS_CACHED)(self._split)
        self._placed = (vectors, sinusoids(config.length, config.dim), _begins_word(self._tokenizer))

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        # Whole words, as many as fit; a first word that does not fit is cut.
        rows = list[list[int]]()
        for caption in captions:
            words, fit = self._fitting(caption)
            pieces = [_START, *(piece for word in words[: fit or 1] for piece in self._pieces(word))][: self.length]
            rows.append(pieces + [_PADDING] * (self.length - len(pieces)))
        ids = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.length)
        return Tokens(ids, ids != _PADDING)

    def encode(self, tokens: Tokens) -> Condition:
        table, position, begins = self._on(tokens.ids.device)
        # The number of each piece's word, from 1; the start token and padding belong to no word.
        text = tokens.mask & (tokens.ids != _START)  # [B,L]
        word = (begins[tokens.ids] & text).cumsum(1)  # [B,L]
        # The mean of each word's pieces. In float64 a sum of float16 numbers is exact in any order, also on a GPU.
        rows, read = torch.arange(len(word), device=word.device).unsqueeze(1) * self.length, text.flatten()
        slots = (rows + word).flatten()[read]  # [n], of the n pieces
        vectors = table[tokens.ids.flatten()[read]].double()  # [n,D]
        states = vectors.new_zeros(word.numel(), self.dim).index_add_(0, slots, vectors)  # [B*L,D]
        states = (states / slots.bincount(minlength=len(states)).clamp(min=1).unsqueeze(1)).unflatten(0, word.shape)
        # The caption's vector takes the start token's place.
        pooled = F.normalize(states.sum(1)) * math.sqrt(self.dim)  # [B,D], zero for the empty caption
        states[:, 0] = pooled
        # Positions, also of the start token, which is therefore never zero.
        mask = torch.arange(self.length, device=word.device) <= word.amax(1, keepdim=True)  # [B,L]
        states = torch.addcmul(states.float(), position, mask.unsqueeze(-1).float())  # [B,L,D]
        return Condition(states, mask, pooled.float())

    def truncated_text(self, caption: str) -> str:
        words, fit = self._fitting(caption)
        return " ".join(words[fit:])

    def config(self) -> dict[str, Any]:
        return {"name": self.name, **self._config.entry()}

    def _fitting(self, caption: str) -> tuple[list[str], int]:
        """Return the words of a caption, and how many of them fit as a whole."""
        words, used = WORD.findall(caption.lower()), 1  # the start token
        for number, word in enumerate(words):
            used += len(self._pieces(word))
            if used > self.length:
                return words, number
        return words, len(words)

    def _split(self, word: str) -> tuple[int, ...]:
        """Return the pieces of a word in lower case, in the case that has the fewest; lower case wins a tie."""
        # The vocabulary has "Paris" and "NASA", but neither in lower case.
        cases = [word, word.capitalize(), word.upper()]
        encoded = self._tokenizer.encode_batch(cases, add_special_tokens=False)
        return min((tuple(one.ids) for one in encoded), key=len)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the table [V, D], the positions [L, D] and the pieces that begin a word [V] on a device."""
        if self._placed[0].device != device:
            table, position, begins = self._placed
            self._placed = (table.to(device), position.to(device), begins.to(device))
        return self._placed


def _files(config: WordLlamaConfig, trust: Trust) -> tuple[Path, Path, Path]:
    """Return the table's and the tokenizer's file, and the directory that they were found in."""
    # The package ships one table, and the tokenizer of all.
    if not config.weights:
        if config.dim > SHIPPED:
            raise AtollError(
                f"condition encoder 'wordllama': dim {config.dim}, but the package ships {SHIPPED}; lower "
                f"condition.dim, or set condition.weights to a directory that holds {_TABLE.format(config.dim)}"
            )
        table = package_file(PACKAGE, "weights", _TABLE.format(SHIPPED))
        return table, package_file(PACKAGE, "tokenizers", _TOKENIZER), table.parent
    # A directory of the user: the table of this width, and the tokenizer.
    root = config.find(trust)
    for file in (root / _TABLE.format(config.dim), root / _TOKENIZER):
        if not file.is_file():
            raise AtollError(f"{file}: not found; name a whole copy of dleemiller/word-llama-l2-supercat")
    return root / _TABLE.format(config.dim), root / _TOKENIZER, root


def _load_table(path: Path, dim: int) -> Tensor:
    """Return the first `dim` columns of the table [V, dim] float16. Raises AtollError for another file."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            table: Tensor = file.get_tensor("embedding.weight")[:, :dim].contiguous()
    except Exception as error:  # safetensors' own errors, of the system, and of shapes
        raise AtollError(f"{path}: {advice(path, error)}") from None
    if table.dtype != torch.float16 or table.shape[1] != dim or not table.isfinite().all():
        raise AtollError(
            f"{path}: {table.dtype} {list(table.shape)}; expected finite float16 vectors {dim} wide; get the file again"
        )
    return table


def _load_tokenizer(path: Path) -> Any:
    """Load a tokenizer from its file. Raises AtollError if it is damaged, or its package is missing."""
    library = import_library("tokenizers", EXTRA)
    try:
        return library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise AtollError(f"{path}: {advice(path, error)}") from None


def _begins_word(tokenizer: Any) -> Tensor:
    """Return which pieces of the vocabulary begin a word [V] bool: Llama 2 writes the space before one as U+2581."""
    begins = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.bool)
    begins[[number for piece, number in tokenizer.get_vocab().items() if piece.startswith("\u2581")]] = True
    return begins
