"""
The tokenizers as Hugging Face's libraries read them: tokenizer.json and tokenizer_config.json, with
the same ids for every text.
"""

from bpe import PATTERNS, BPETokenizer, as_visible, from_visible
from configurator import UserError
from system.files import read_json
from tokenizer import SPACE, ByteLevel

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def tokenizer_json(tokenizer):
    """tokenizer.json of a Tokenizer, as a dict. Raises UserError for models that do more."""
    if isinstance(tokenizer, ByteLevel):
        return byte_level_json(tokenizer.bpe, with_bos=True)
    return sentencepiece_json(tokenizer)


def with_bos_before(bos, i):
    """The post_processor that puts the token `bos`, of id i, before each text."""
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": k}} for k, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
    }


def added(tokens):
    """added_tokens of {id: text} of special tokens."""
    words = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": text, **words, "special": True} for i, text in sorted(tokens.items())
    ]


def sentencepiece_json(tokenizer):
    """
    tokenizer.json of a SentencePiece, as a dict, with the same ids for every text.
    SentencePiece joins the two neighbours that make the piece of the best score; here every pair
    that makes a piece is written down, in the order of the scores. Raises UserError for models that
    do more.
    """
    spec = tokenizer.check_plain("hf")

    def replaced(kind, pattern, content):
        return {"type": "Replace", "pattern": {kind: pattern}, "content": content}

    normalizers, strip = [replaced("String", " ", SPACE)], []
    if spec.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    if spec.remove_extra_whitespaces:
        first = [replaced("Regex", r"\A +", ""), replaced("Regex", " {2,}", " ")]
        normalizers = [*first, *normalizers, replaced("Regex", rf"{SPACE}+\z", "")]
    sp = tokenizer.sp
    pieces = [sp.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    special = [i for i in range(len(pieces)) if sp.is_unknown(i) or sp.is_control(i)]
    made = {}  # pieces that merging can make, and their scores
    for i, piece in enumerate(pieces):
        if not (i in special or sp.is_byte(i) or sp.is_unused(i)):
            made[piece] = sp.get_score(i)
    merges = []
    for piece in sorted(made, key=lambda piece: -made[piece]):
        for i in range(1, len(piece)):
            if piece[:i] in made and piece[i:] in made:
                merges.append([piece[:i], piece[i:]])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added({i: pieces[i] for i in special}),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": with_bos_before(pieces[tokenizer.bos_id], tokenizer.bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[tokenizer.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": tokenizer.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def byte_level_json(bpe, with_bos=False):
    """
    tokenizer.json of a BPETokenizer, as a dict; with_bos: texts begin with its first special token.
    """
    special = {i: text for text, i in bpe.special.items()}
    vocab = {special.get(i) or as_visible(token): i for i, token in bpe.vocab.items()}
    check_names(vocab, bpe)
    cut = {**BYTE_LEVEL, "use_regex": bpe.pattern_name == "gpt2"}
    if bpe.pattern_name != "gpt2":
        split = {"type": "Split", "pattern": {"Regex": PATTERNS[bpe.pattern_name]}}
        split |= {"behavior": "Isolated", "invert": False}
        cut = {"type": "Sequence", "pretokenizers": [split, cut]}
    bos = next(iter(bpe.special), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added(special),
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": with_bos_before(bos, bpe.special[bos]) if with_bos else None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[as_visible(a), as_visible(b)] for a, b in bpe.merges],
        },
    }


def byte_level_from_json(path):
    """
    The BPETokenizer of a tokenizer.json. Raises UserError for one that does anything that bpe.py
    does not: text changed before encoding, another pattern, another model.
    """
    data = read_json(path)
    try:
        model, cut = data["model"], data["pre_tokenizer"]
        wrong = [name for name in ("byte_fallback", "dropout") if model.get(name)]
        wrong += ["normalizer"] if data.get("normalizer") else []
        wrong += [] if model["type"] == "BPE" else [f"model {model['type']}"]
        marks = ("end_of_word_suffix", "continuing_subword_prefix")
        wrong += [mark for mark in marks if model.get(mark)]
        added = sorted(data["added_tokens"], key=lambda token: token["id"])
        for token in added:
            wrong += [f"{w} of a token" for w in ("lstrip", "rstrip", "single_word") if token[w]]
        pattern_name = pattern_of(cut)
        if pattern_name is None:
            wrong.append(f"the pre_tokenizer {str(cut)[:100]}")
        if wrong:
            raise ValueError(f"it has {wrong[0]}")
        special = {token["content"]: token["id"] for token in added}
        vocab = {i: from_visible(t) for t, i in model["vocab"].items() if t not in special}
        vocab |= {i: text.encode() for text, i in special.items()}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        merges = [(from_visible(a), from_visible(b)) for a, b in pairs]
        bpe = BPETokenizer(vocab, merges, list(special), pattern_name)
        if model.get("ignore_merges") and not bpe.makes_its_tokens():
            raise ValueError("it has tokens that its merges do not make")
        return bpe
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as e:
        why = f"no {e}" if isinstance(e, KeyError) else e
        raise UserError(f"{path} is no byte-level BPE as bpe.py knows it: {why}") from None


def pattern_of(cut):
    """The name in PATTERNS of what a pre_tokenizer does; None for anything else."""
    steps = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    last = steps[-1] if steps else {"type": "nothing"}
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(steps) > 2:
        return None
    if len(steps) == 1:
        return "gpt2" if last.get("use_regex", True) else None
    split = steps[0]
    if split["type"] != "Split" or last.get("use_regex", True):
        return None
    if split["behavior"] != "Isolated" or split["invert"]:
        return None
    regex = split["pattern"].get("Regex")
    return next((name for name, text in PATTERNS.items() if text == regex), None)


def check_names(names, bpe):
    """Raise UserError where a special token of a BPETokenizer is also the name of another token."""
    if len(set(names)) < len(bpe.vocab):
        raise UserError(
            "a special token is spelled like another token in the letters that Hugging Face and "
            "llama.cpp write bytes with: train with other --special_tokens"
        )


def tokenizer_config(tokenizer, max_seq_len):
    """
    tokenizer_config.json. With SentencePiece text that looks like a special token stays text; with
    byte-level BPE it stands for the token; both as in ours.
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
