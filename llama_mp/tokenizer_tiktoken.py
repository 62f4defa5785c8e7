"""Llama 3's tokenizer.model: tiktoken's format, a line for each token with its bytes in base64 and its rank.

tiktoken merges whichever neighbours make the token of the lowest rank, and takes a word that is a token as it is. The
same comes of byte-pair encoding with every way to cut a token in two as a merge, in the order of the ranks: all merges
within a token are done before the one that makes it, so it is always made of the same two halves, and the order of
its other cuts plays no part. So the library that serves all other byte-level files serves here, without tiktoken.
"""

import base64
import binascii

from llama_mp.errors import RequestError
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_byte_level import LLAMA3_WORDS, ByteLevelTokenizer
from llama_mp.tokenizer_settings import Settings
from llama_mp.vocabulary import BYTE_OF_LETTER, CONTROL, MAX_TOKEN_CHARS, NORMAL, REMEDY, Vocabulary

# The ids after the last rank, which the file does not hold. These are the names of Llama 3.1 and later, as their
# tokenizer.json has them. The same file serves Llama 3, where the tokens for padding, the end of a message and Python
# are reserved ones: it was not trained on any of them.
NAMED_FIRST = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
SPECIAL_TOKENS = NAMED_FIRST + tuple(f"<|reserved_special_token_{n}|>" for n in range(3, 248))


def tokenizer_from_tiktoken(content: bytes, settings: Settings) -> Tokenizer:
    """The tokenizer of Llama 3 and later in a file's `content`. Raises RequestError for damaged content."""
    letter_of_byte = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}
    texts = ["".join(map(letter_of_byte.__getitem__, token)) for token in read_ranks(content)]
    known = set(texts)
    cuts = ((text[:at], text[at:]) for text in texts for at in range(1, len(text)))
    merges = [(left, right) for left, right in cuts if left in known and right in known]
    special_ids = {text: len(texts) + n for n, text in enumerate(SPECIAL_TOKENS)}
    bos_id, eos_id = settings.token_ids(special_ids, bos=SPECIAL_TOKENS[0], eos=SPECIAL_TOKENS[1])
    vocabulary = Vocabulary(
        tokens=[*texts, *SPECIAL_TOKENS],
        types=[NORMAL] * len(texts) + [CONTROL] * len(SPECIAL_TOKENS),
        bos_id=bos_id,
        eos_id=eos_id,
        other_end_ids=settings.end_ids,
        adds_bos=settings.adds_bos is not False,
    )
    return ByteLevelTokenizer(vocabulary, merges, [LLAMA3_WORDS], ignore_merges=True)


def read_ranks(content: bytes) -> list[bytes]:
    """The tokens in the order of their ranks, which are 0, 1, 2, ...; every single byte is among them."""
    found: dict[int, bytes] = {}
    lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            found[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error) as error:
            raise RequestError(f"line {number} is not a token in base64 and its rank{REMEDY}") from error
    tokens = [found[rank] for rank in sorted(found)]
    if sorted(found) != list(range(len(lines))) or len(set(tokens)) != len(lines):
        raise RequestError(f"{len(lines)} lines hold {len(set(tokens))} tokens and {len(found)} ranks{REMEDY}")
    if (longest := max(map(len, tokens), default=0)) > MAX_TOKEN_CHARS:
        raise RequestError(f"a token of {longest} bytes{REMEDY}")
    if missing := 256 - sum(len(token) == 1 for token in tokens):
        raise RequestError(f"{missing} of the 256 single bytes are missing{REMEDY}")
    return tokens
