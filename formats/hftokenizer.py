"""
Tokenizers as Hugging Face's tokenizer.json and tokenizer_config.json, with the same ids for every
text; and the files that bpe.py's command line writes.
"""

import base64
import json
import os

from bpe import PATTERNS, BPETokenizer
from configurator import UserError
from system.files import atomic_write, read_json
from text.corpus import text_files
from tokenizer import BYTE_LEVEL, SPACE, ByteLevel, bpe_json, byte_level_json, cutting_steps


def tokenizer_json(tokenizer):
    """Return a Tokenizer's tokenizer.json as a dict; raise UserError if it cannot represent it."""
    if isinstance(tokenizer, ByteLevel):
        bos, value = next(iter(tokenizer.bpe.special)), byte_level_json(tokenizer.bpe)
    else:
        bos, value = tokenizer.sp.id_to_piece(tokenizer.bos_id), sentencepiece_json(tokenizer)
    return {**value, "post_processor": bos_post_processor(bos, tokenizer.bos_id)}


def bos_post_processor(bos, i):
    """Return the post_processor that puts the token `bos` with id i before each text."""
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": k}} for k, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
    }


def sentencepiece_json(tokenizer):
    """
    Return a SentencePiece model's tokenizer.json as a dict, without a post_processor. Raises
    UserError for models that it cannot represent.
    """
    spec, sp = tokenizer.check_plain("hf"), tokenizer.sp
    pieces = [sp.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    special = {i: p for i, p in enumerate(pieces) if sp.is_unknown(i) or sp.is_control(i)}
    normalizers, strip = [replace_step(" ", SPACE)], []
    if spec.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    if spec.remove_extra_whitespaces:
        first = [replace_step(r"\A +", "", "Regex"), replace_step(" {2,}", " ", "Regex")]
        normalizers = [*first, *normalizers, replace_step(rf"{SPACE}+\z", "", "Regex")]
    decoders = [replace_step(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return bpe_json(
        special,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=sentencepiece_merges(sp, pieces, special),
        unk_token=pieces[tokenizer.unk_id],
        fuse_unk=True,
        byte_fallback=tokenizer.byte_fallback,
    )


def replace_step(pattern, content, kind="String"):
    """Return the normalizer or decoder that replaces a pattern."""
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sentencepiece_merges(sp, pieces, special):
    """
    Return [[left, right]]. SentencePiece joins the adjacent pair that makes the piece with the best
    score, so every pair that makes a piece is a merge, ordered by score.
    """
    scores = {
        piece: sp.get_score(i)
        for i, piece in enumerate(pieces)
        if not (i in special or sp.is_byte(i) or sp.is_unused(i))
    }
    return [
        [piece[:i], piece[i:]]
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]


def byte_level_from_json(path):
    """
    Return the BPETokenizer of a tokenizer.json. Raises UserError for one that does what bpe.py does
    not: change text before encoding, split it by another pattern, or use another model.
    """
    data = read_json(path)
    try:
        model, pre_tokenizer = data["model"], data["pre_tokenizer"]
        added = sorted(data.get("added_tokens") or [], key=lambda token: token["id"])
        pattern_name = pattern_of(pre_tokenizer)
        options = ("byte_fallback", "dropout", "end_of_word_suffix", "continuing_subword_prefix")
        extras = [name for name in options if model.get(name)]
        extras += ["a normalizer"] if data.get("normalizer") else []
        kind = model.get("type", "BPE")  # missing in GPT-2's own file
        extras += [] if kind == "BPE" else [f"a {kind} model"]
        flags = ("lstrip", "rstrip", "single_word")
        extras += [f"a token with {flag}" for token in added for flag in flags if token.get(flag)]
        extras += [] if pattern_name else [f"the pre_tokenizer {str(pre_tokenizer)[:100]}"]
        if extras:
            raise ValueError(f"it has {extras[0]}")
        special = {token["content"]: token["id"] for token in added}
        names = {i: name for name, i in model["vocab"].items() if name not in special}
        names |= {i: text for text, i in special.items()}
        bpe = BPETokenizer.from_names(names, model["merges"], list(special), pattern_name)
        if model.get("ignore_merges") and not bpe.makes_its_tokens():
            raise ValueError("its merges do not make all its tokens")
        return bpe
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as e:
        cause = f"{e} is missing" if isinstance(e, KeyError) else e
        raise UserError(f"{path} is not a byte-level BPE that bpe.py supports: {cause}") from None


def pattern_of(pre_tokenizer):
    """Return the name in PATTERNS of the same pre_tokenizer, or None."""
    is_sequence = pre_tokenizer["type"] == "Sequence"
    steps = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    if steps and steps[-1]["type"] == "ByteLevel":
        steps = [*steps[:-1], {"use_regex": True, **steps[-1], "trim_offsets": True}]
    if steps == [{**BYTE_LEVEL, "use_regex": True}]:
        return "gpt2"
    return next((name for name in PATTERNS if steps == cutting_steps(name)), None)


def tokenizer_config(tokenizer, max_seq_len):
    """
    Return tokenizer_config.json as a dict. As in our tokenizers, text that looks like a special
    token is encoded as text by SentencePiece, and as the token by byte-level BPE.
    """
    if isinstance(tokenizer, ByteLevel):
        bos = tokenizer.bpe.vocab[tokenizer.bos_id].decode()
        names = {"bos_token": bos, "eos_token": bos, "pad_token": bos}
    else:
        piece = tokenizer.sp.id_to_piece
        ids = {"unk": tokenizer.unk_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        names = {f"{name}_token": piece(i) for name, i in ids.items()}
        names |= {"pad_token": names["eos_token"], "split_special_tokens": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }


# ---- files of bpe.py's command line


class VocabularyFiles:
    """The files of one BPETokenizer: model, readable vocabulary, and optionally others."""

    def __init__(self, model, also_tiktoken=False, also_hf=False):
        base = os.path.splitext(model)[0]
        self.paths = {"model": model, "vocab": f"{base}.vocab"}
        self.paths |= {"tiktoken": f"{base}.tiktoken"} if also_tiktoken else {}
        self.paths |= {"hf": f"{base}.json"} if also_hf else {}

    def check(self, source):
        """Raise UserError if a file cannot be written, or would replace anything but a model."""
        model, paths = self.paths["model"], self.paths
        folder = os.path.dirname(model) or "."
        if not os.path.basename(model) or os.path.isdir(model):
            raise UserError(f"cannot write {model!r}: it is a folder; choose a file")
        if len({*paths.values()}) < len(paths):
            raise UserError(f"model = {model!r}: expected a path ending in .model")
        if os.path.exists(folder) and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise UserError(f"cannot write {model}: {folder} is not a writable folder")
        texts = {os.path.realpath(path) for path in text_files(source)} if source else set()
        if any(os.path.realpath(path) in texts for path in paths.values()):
            raise UserError(
                f"{model} or a file beside it already exists and is part of the text; choose "
                f"another --model"
            )
        if os.path.exists(model):
            BPETokenizer.load(model)
        if "hf" in paths and source and os.path.realpath(source) == os.path.realpath(folder):
            raise UserError(
                f"{paths['hf']} would be read as text in the next run; choose another folder for "
                f"--model"
            )

    def write(self, bpe):
        """Write all files and print their paths."""
        paths = self.paths
        bpe.save(paths["model"])
        n = f"{len(bpe.vocab):,} tokens"
        print(f"{n}: wrote {paths['model']} and the readable list {paths['vocab']}")
        if "tiktoken" in paths:
            with atomic_write(paths["tiktoken"]) as f:
                f.write(tiktoken_file(bpe))
            print(f"wrote {paths['tiktoken']}")
        if "hf" in paths:
            with atomic_write(paths["hf"], "w") as f:
                f.write(json.dumps(byte_level_json(bpe), ensure_ascii=False))
            print(f"wrote {paths['hf']}, a Hugging Face tokenizer.json")


def tiktoken_file(bpe):
    """
    Return the ranks of a BPETokenizer as tiktoken's file format, as bytes: one line per token, with
    its base64 and its id. The file does not include the pattern or the special tokens.
    """
    special = set(bpe.special.values())
    lines = (
        base64.b64encode(token) + b" %d\n" % i
        for i, token in sorted(bpe.vocab.items())
        if i not in special
    )
    return b"".join(lines)
