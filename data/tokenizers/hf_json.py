"""Reader of tokenizer.json, the format of Hugging Face's `tokenizers`.

It reads byte-level byte-pair encodings, and SentencePiece's with byte fallback. A byte-level one may lack tokens for
some bytes; a text that contains such a byte is refused when it is encoded. Names of special and added tokens are
encoded as ordinary text. tiktoken's core encodes if it gives the same ids, because it is faster; otherwise `tokenizers`
does.

Proof that both cores give the same ids. Both split text into pieces by the pattern and merge within a piece, one pair
of adjacent tokens at a time, the leftmost pair if there are several of one rank. `tokenizers` merges the pair that
comes first in its list of merges. tiktoken merges the pair whose concatenation has the lowest id. Let n be the number
of tokens that the list of merges makes of the bytes of token z alone.

1. As long as `tokenizers` merges nothing across the ends of a span of text, it does the same inside the span as for the
   span alone, because the order of merges depends only on positions and pairs. So if adjacent x, y with x + y = z are
   reached in any text, z alone reaches x, y too. Merging z alone is deterministic, so x, y is the only pair that z can
   be merged from.
2. If n = 1, the pair is in the list. If n >= 3, z alone is never two tokens, so no pair for z is ever reached. If
   n = 2, the pair is reached but not in the list: tiktoken merges it, `tokenizers` does not.
3. So if no token has n = 2, both cores choose among the same pairs at every step, one pair per token. If the list also
   makes its tokens in the order of their ids, they choose the same pair.
4. tiktoken looks up a whole piece before it merges. The result is equal if n = 1 for all tokens. With
   `ignore_merges`, `tokenizers` looks up whole pieces too.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from data.tokenizers.tokenizer import CL100K_PATTERN, END_OF_TEXT, GPT2_PATTERN, O200K_PATTERN, Tokenizer
from util.errors import UserError, user_errors

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"  # the place of the template in newer folders
GENERATION_CONFIG = "generation_config.json"
ROLES = ("bos_token", "pad_token", "unk_token")
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
# cl100k's pattern as GPT-4's and Llama 3's tokenizer.json have it. tiktoken's differs in trailing white space.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken's cl100k pattern for Oniguruma, where $ matches at each line end and {1,3}+ means {1,}. No branch needs to
# backtrack, so greedy quantifiers match the same text as possessive ones.
CL100K_ONIGURUMA = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)
# Pattern in a tokenizer.json -> pattern for tiktoken. The two cores use different regular expression engines. A test
# has shown that they split all 1,112,064 characters alike beside letters, digits, punctuation, spaces and line ends.
SAME_CUTS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2_PATTERN,
    CL100K_ONIGURUMA: CL100K_PATTERN,
    GPT4_PATTERN: GPT4_PATTERN,
    O200K_PATTERN: O200K_PATTERN,
}
SAMPLE = [
    "The quick brown fox's 1234567 jumps; DON'T they'll I'VE 'ſ x'S\n\n  \tif x == 'y':\r\n    return {}  # ...   ",
    "naïve façade Ǆ ǅ ŉ ß ﬁ K Å e\u0301 東京タワー Привет שלום مرحبا हिन्दी 한국어 ไทย ½ Ⅷ ٣٤٥ १२३",
    "👩‍👩‍👧 🇩🇪 \u200b\u2028\u2029\u00a0\u0085\x00\x1c\x7f\ufeff\ufffd\U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa ababababab aabaabaab ------------- ==== <|endoftext|></s>",
    " \n \n\n\t \r\n   x  \u3000 y\n ",
]


@cache
def _byte_letters() -> dict[str, int]:
    """Maps GPT-2's letters to bytes. Printable bytes are written as themselves, the others as U+0100 and following."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class LibraryEncoding:
    """An encoder by `tokenizers` with the methods of tiktoken's Encoding. Text never becomes a special token."""

    def __init__(self, definition: dict[str, Any], token_bytes: dict[int, bytes], special: dict[str, int]):
        import tokenizers

        self._library = tokenizers.Tokenizer.from_str(json.dumps(definition))
        self.token_bytes = token_bytes
        self._special = {i: name.encode() for name, i in special.items()}
        self.prepends_space = self.decode_bytes(self.encode_ordinary("x")) == b" x"

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts: list[str], *, num_threads: int = 8) -> list[list[int]]:
        """Encodes many texts. `num_threads` is ignored: the library reads RAYON_NUM_THREADS."""
        try:
            encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeError, TypeError):  # half a surrogate pair: U+FFFD, as in tiktoken
            texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
            encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Returns the first character of each token of a text, and the one after its last."""
        spans: list[tuple[int, int]] = self._library.encode(text, add_special_tokens=False).offsets
        return spans

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(self._special[i] if i in self._special else self.token_bytes[i] for i in ids)


def load_tokenizer_json(path: Path) -> Tokenizer:
    """Loads a tokenizer.json, given its path or its folder."""
    file = path / TOKENIZER if path.is_dir() else path
    with user_errors(f"--tokenizer: {file}"):
        content = file.read_bytes()
    config, generation = (_read_config(file.with_name(name)) for name in (TOKENIZER_CONFIG, GENERATION_CONFIG))
    if (template := file.with_name(CHAT_TEMPLATE)).is_file():
        config = config | {"chat_template": template.read_text(encoding="utf-8", errors="replace")}
    return read_tokenizer_json(str(path), file, content, config, generation)


def read_tokenizer_json(
    name: str, file: Path, content: bytes, config: dict[str, Any], generation: dict[str, Any] | None = None
) -> Tokenizer:
    """Creates a tokenizer from the content of a tokenizer.json and of its config. Errors name `file`.

    `generation` is the content of the generation_config.json beside it. Its bos_token_id counts if the config does not
    mention a bos_token, unless transformers derived the file from config.json: then it may be the default of a class.
    """
    data = _parse(file, content)
    try:
        model, added = data["model"], {token["content"]: int(token["id"]) for token in data.get("added_tokens") or []}
        if (kind := model.get("type", "BPE")) != "BPE" or "merges" not in model:
            raise UserError(f"{file}: a {kind} tokenizer; only byte-pair encodings (BPE) are supported")
        vocab = {str(token): int(i) for token, i in model["vocab"].items()}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        made = [vocab[left + right] for left, right in merges]
        if min([*vocab.values(), *added.values()]) < 0 or len(set(vocab.values())) != len(vocab):
            raise ValueError("ids must be distinct and not negative")
        ordinary = set(made)  # tokens made by merges are ordinary, even if they are listed as added
        special = {name: i for name, i in added.items() if i not in ordinary}
        token_bytes = _token_bytes(file, data, {t: i for t, i in vocab.items() if t not in special})
        library = library_encoding(data, token_bytes, special)
        same_ids = _same_cuts(data) and _same_merges(model, made, special)
        prefix = _prefix(data.get("post_processor") or {})
        if unknown := {*prefix} - {*vocab.values(), *added.values()}:
            raise ValueError(f"its post_processor puts the unknown id {min(unknown)} before a text")
    except UserError:
        raise
    except Exception as e:  # `tokenizers` raises Exception itself for what it cannot use
        what = f"{e} is missing" if isinstance(e, KeyError) else str(e) or type(e).__name__
        raise UserError(f"{file}: not a usable tokenizer.json ({what})") from e
    end = _end_of_text(file, special, config)
    ids = vocab | added
    if "bos_token" not in config and generation and not generation.get("_from_model_config"):
        config = config | {"bos_token": next((n for n, i in ids.items() if i == generation.get("bos_token_id")), None)}
    bos = ids.get(_token_name(config, "bos_token") or "")
    files = {TOKENIZER: content, TOKENIZER_CONFIG: _kept_config(config, end, set(ids))}
    slow = Tokenizer(name, None, None, special, special[end], library, files, prefix, bos)
    if not same_ids:
        return slow
    ranks = {token: i for i, token in token_bytes.items()}
    fast = Tokenizer(name, ranks, SAME_CUTS[_pattern(data)], special, special[end], None, files, prefix, bos)
    sample = ["".join(c for c in text if fast.find_missing_byte(c) is None) for text in [*SAMPLE, *special]]
    if any(fast.encode(text) != slow.encode(text) for text in sample):
        print(f"{file}: tiktoken's core gives other ids; encoding with the tokenizers library, which is slower")
        return slow
    return fast


def _parse(file: Path, content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: {'empty file' if not content.strip() else f'not JSON ({e})'}") from e
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise UserError(f"{file}: not a tokenizer.json: it has no model")
    return data


def _prefix(processor: dict[str, Any]) -> list[int]:
    """Returns the ids that a post-processor puts before a single text."""
    if processor.get("type") == "Sequence":  # each wraps the result of the one before it
        return [i for step in reversed(processor["processors"]) for i in _prefix(step)]
    ids: list[int] = []
    if processor.get("type") == "TemplateProcessing":
        for piece in processor["single"]:
            if "Sequence" in piece:
                break
            ids += map(int, processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return ids


def _token_bytes(file: Path, data: dict[str, Any], vocab: dict[str, int]) -> dict[int, bytes]:
    """Maps ids of ordinary tokens to bytes. A tokenizer that is not byte-level must have byte fallback."""
    letters = _byte_letters()
    if byte_level_steps(data):
        # Tokens with other letters cannot occur in text.
        return {i: bytes(letters[c] for c in t) for t, i in vocab.items() if all(c in letters for c in t)}
    fallback = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
    if not data["model"].get("byte_fallback") or not fallback.keys() <= vocab.keys():
        raise UserError(f"{file}: not byte-level and without byte fallback, so some text would be lost; not supported")
    return {i: fallback.get(t, t.replace("▁", " ").encode()) for t, i in vocab.items()}


def library_encoding(data: dict[str, Any], token_bytes: dict[int, bytes], special: dict[str, int]) -> LibraryEncoding:
    """Returns the encoder of a tokenizer.json's content."""
    return LibraryEncoding(_without_special(data, special), token_bytes, special)


def pre_tokenizers(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the steps that split a text, and that may put a space before it."""
    pre = data.get("pre_tokenizer") or {}
    return list(pre["pretokenizers"]) if pre.get("type") == "Sequence" else [pre]


def byte_level_steps(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the pre-tokenizers that write bytes as letters."""
    return [step for step in pre_tokenizers(data) if step.get("type") == "ByteLevel"]


def _pattern(data: dict[str, Any]) -> str:
    """Returns the regular expression of a pre-tokenizer that only splits text, "" for other pre-tokenizers."""
    *before, last = pre_tokenizers(data)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return ""
    if not before:  # built into ByteLevel
        return next(iter(SAME_CUTS)) if last.get("use_regex", True) else ""
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    if len(before) > 1 or last.get("use_regex", True) or any(before[0].get(k) != v for k, v in split.items()):
        return ""
    return str(before[0]["pattern"].get("Regex", ""))


def _same_cuts(data: dict[str, Any]) -> bool:
    """Returns whether both cores split text into the same pieces."""
    return not data.get("normalizer") and _pattern(data) in SAME_CUTS


def _same_merges(model: dict[str, Any], made: list[int], special: dict[str, int]) -> bool:
    """Returns whether both cores merge every piece into the same tokens, by the proof at the top of this file."""
    switches = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if any(model.get(switch) for switch in switches) or made != sorted(made):
        return False
    import tokenizers

    alone = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": model | {"ignore_merges": False}}))
    tokens = [token for token in model["vocab"] if token not in special]
    if any(letter not in _byte_letters() for token in tokens for letter in token):
        return False
    counts = {len(encoding.ids) for encoding in alone.encode_batch_fast(tokens, add_special_tokens=False)}
    return 2 not in counts if model.get("ignore_merges") else counts == {1}


def _without_special(data: dict[str, Any], special: dict[str, int]) -> dict[str, Any]:
    """Returns the definition without special tokens. Their names in the vocabulary are changed, so no text matches."""
    vocab = {f"\ue000{t}" if t in special else t: i for t, i in data["model"]["vocab"].items()}
    plain: dict[str, Any] = {
        "added_tokens": [],
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "decoder": None,
    }
    unk = data["model"].get("unk_token")
    model = data["model"] | {"vocab": vocab, "unk_token": f"\ue000{unk}" if unk in special else unk}
    return data | plain | {"model": model}


def _read_config(file: Path) -> dict[str, Any]:
    """Reads a JSON file beside a tokenizer.json. Returns {} if the file does not exist."""
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{file}: damaged; make it again or remove it") from e
    return config


def _token_name(config: dict[str, Any], role: str) -> str | None:
    """Returns the name of a special token in a tokenizer_config.json, which may be a string or an object."""
    value = config.get(role)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _end_of_text(file: Path, special: dict[str, int], config: dict[str, Any]) -> str:
    """Returns the name of the end-of-text token: eos_token in the config, or one of the usual names."""
    eos = _token_name(config, "eos_token")
    name = eos or next((end for end in ENDS_OF_TEXT if end in special), None)
    if name not in special:
        what = f"end-of-text token {eos!r} is not one of its special tokens" if eos else "no end-of-text token"
        names = ", ".join(sorted(special)[:8]) or "none"
        raise UserError(f"{file}: {what} (it has {names}); set eos_token in {TOKENIZER_CONFIG}")
    return name


def _kept_config(config: dict[str, Any], end: str, names: set[str]) -> bytes:
    """Returns the tokenizer_config.json for a copy: names of tokens and the chat template, nothing that changes ids.

    Tokens that are missing from the tokenizer.json are dropped, because `transformers` would give them new ids.
    """
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    kept |= {role: name for role in ROLES if (name := _token_name(config, role)) in names and name}
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates, each with a name
        template = {each.get("name"): each.get("template") for each in template}.get("default")
    if isinstance(template, str):
        kept["chat_template"] = template
    return json.dumps(kept).encode()
