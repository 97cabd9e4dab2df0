"""
The tokenizers, SentencePiece BPE and byte-level BPE, behind one interface; and the tokenizer file
that run.c reads.

    python tokenizer.py --tokenizer-model=data/tok128.model    # writes data/tok128.bin

All numbers in that file are little-endian. For SentencePiece it has llama2.c's layout:

    uint32 bytes of the longest piece
    for each id: float32 score, uint32 length, the bytes of the piece, with plain spaces

Byte pieces appear as <0x0A>, BOS and EOS as "\\n<s>\\n" and "\\n</s>\\n". For byte-level BPE all
numbers are uint32:

    "bpe1"
    the place of the pattern in PATTERNS of bpe.py, the id that begins a text, one that ends it too
    the numbers of tokens, merges, special tokens and ranges
    for each range of characters: first and last code point; 1 letters, 2 numbers, 3 white space
    the ids of the special tokens
    for each merge, in order: the ids left, right and merged
    for each id: length and bytes of the token; length 0 where an id is not used

To add a kind: a class with the methods of Tokenizer, in open_tokenizer(). To add a library that
encodes faster: a method in ENCODERS of a class.
"""

import argparse
import codecs
import functools
import hashlib
import io
import itertools
import json
import os
import struct
import tempfile
import zlib
from collections import Counter

import numpy as np
import sentencepiece

from bpe import PATTERNS, BPETokenizer, as_visible, pattern, train_bpe
from configurator import UserError, one_sentence_errors
from system.files import atomic_write, check_not_pointer, named
from text.documents import SEPARATOR
from text.letters import ranges

SPACE = "\u2581"  # SentencePiece's visible space
UNK_TEXT = " \u2047 "  # what SentencePiece, and run.c, show for an unknown piece
N_SPECIAL = 3  # <unk>, <s>, </s>
N_BYTES = 256
BPE_MAGIC = b"bpe1"  # begins a tokenizer file of byte-level BPE
RESERVED = "\0\x1f\u2585"  # SentencePiece gives them no piece, and drops lines with the last
# texts that a library must encode as we do before it is used
PROBE = [
    "Once upon a time, there was a little girl named Lily. She didn't like 1,234 dogs!",
    " two  spaces,   three\n\n\nlines\t\ttabs\r\n end  ",
    "naïve Straße 日本語 中文 😀👩\u200d🚀 e\u0301 ½ Ⅷ \u00a0 \u2003 \x1c \x85 \u2581 \ufffd",
    "<s>a</s> <unk> <0x41> <|endoftext|><|endoftext|> I'VE it's",
    "",
]


class Tokenizer:
    """
    Text to ids and back, with the model file at model_path or its content, `proto`. Besides the
    methods both kinds have: vocab_size; bos_id, which begins a text; eos_id and unk_id (-1: none);
    `stop`, the ids at which a text ends; n_prefix, the bytes that encoding puts before a text; and
    the `hash` of the file, "" where there is only `proto`. Raises UserError where the file is
    missing or of another kind.
    """

    n_prefix, unk_id = 0, -1
    ENCODERS = ()  # names of methods that make a function of texts to ids, the fastest first

    def __init__(self, model_path, proto=None):
        self.model_path, self.hash = os.fspath(model_path), ""
        self.encoders, self.not_used = {}, {}  # {name: (name, function)}, {name: why}
        if proto is None:
            proto = read_model(self.model_path)
            self.hash = hashlib.sha256(proto).hexdigest()
        self.proto = proto

    def __reduce__(self):
        """How it gets to another process: by its path, opened once there."""
        return cached_tokenizer, (self.model_path,)

    def encoder(self, name="auto"):
        """
        (name, function of a list of texts -> (ids one after another, uint32; how many of each)):
        the fastest of ENCODERS that is installed and gives the ids of encode() for PROBE, or the
        named one. Raises UserError where the named one cannot be used.
        """
        if name in self.encoders:
            return self.encoders[name]
        if name not in ("auto", *self.ENCODERS):
            raise UserError(f"encoder = {name!r}: expected auto, {', '.join(self.ENCODERS)}")
        expected, lengths = flattened([self.encode(text, bos=False) for text in PROBE])
        for one in self.ENCODERS if name == "auto" else [name]:
            try:
                encode = getattr(self, f"by_{one}")()
                ids, counts = encode(PROBE)
            except ImportError:
                why = f"is not installed: pip install {one}"
            except (ValueError, TypeError, KeyError, RuntimeError) as e:
                why = f"cannot read {self.model_path}: {e}"
            else:
                if np.array_equal(ids, expected) and np.array_equal(counts, lengths):
                    self.encoders[name] = self.encoders[one] = one, encode
                    return one, encode
                why = f"gives other ids than ours for {self.model_path}"
            self.not_used[one] = why
            if name != "auto":
                raise UserError(f"encoder {name} {why}")
        raise AssertionError("the last of ENCODERS is our own")

    def encode_flat(self, texts, encode):
        """All ids of texts one after another, uint32, BOS before each; encode: of encoder()."""
        ids, counts = encode(texts)
        return np.insert(ids, np.cumsum(counts) - counts, self.bos_id)

    def bytes_in(self, tokens):
        """
        Bytes of text that an array of ids stands for, BOS before each text. What encoding puts
        before a text is not counted; an unk, which hides at least one byte, counts as one.
        """
        lengths = np.array([len(piece) for piece in self.piece_bytes()])
        if self.unk_id >= 0:
            lengths[self.unk_id] = 1
        counts = np.bincount(tokens, minlength=self.vocab_size)
        return int((counts * lengths).sum() - self.n_prefix * counts[self.bos_id])

    def caveat(self):
        """A sentence if ./run gives some texts other ids; else ""."""
        return ""

    @functools.cached_property
    def fingerprint(self):
        """What a model file says of this tokenizer, see fingerprint_of()."""
        return fingerprint_of(self.c_file())

    def export(self, path):
        """Write the tokenizer file of run.c."""
        with atomic_write(path) as f:
            f.write(self.c_file())


def fingerprint_of(c_file):
    """
    What stands for a tokenizer in the header of a model file: the CRC-32 of run.c's tokenizer file,
    without the classes of characters of byte-level BPE, which follow Unicode. Never 0, which means
    unknown.
    """
    start = 0
    if c_file.startswith(BPE_MAGIC):
        *_, n_ranges = struct.unpack_from("<7I", c_file, len(BPE_MAGIC))
        start = struct.calcsize("<8I") + n_ranges * struct.calcsize("<3I")
    return zlib.crc32(c_file[start:]) or 1


def read_model(path):
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"tokenizer model {path} {what}")
    check_not_pointer(path)
    with open(path, "rb") as f:
        return f.read()


def flattened(lists):
    """Lists or arrays of ids as (ids one after another, uint32; ids of each)."""
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    arrays = (np.asarray(ids, np.uint32) for ids in lists)
    return np.concatenate([np.empty(0, np.uint32), *arrays]), counts


class SentencePiece(Tokenizer):
    """A SentencePiece model. Ids 0, 1, 2 are unk, BOS, EOS."""

    n_prefix = 1  # a space
    ENCODERS = ("gigatoken", "sentencepiece")

    def __init__(self, model_path, proto=None):
        super().__init__(model_path, proto)
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(self.proto)
            self.sp.id_to_piece(list(range(self.sp.vocab_size())))  # all of them are UTF-8
        except (RuntimeError, UnicodeDecodeError):
            raise UserError(
                f"{self.model_path} is not a SentencePiece model or one of bpe.py"
            ) from None
        self.vocab_size = self.sp.vocab_size()
        self.unk_id, self.bos_id, self.eos_id = self.sp.unk_id(), self.sp.bos_id(), self.sp.eos_id()
        if (self.unk_id, self.bos_id, self.eos_id) != (0, 1, 2):
            raise UserError(
                f"{self.model_path} numbers unk, BOS and EOS {self.unk_id}, {self.bos_id}, "
                f"{self.eos_id}; expected 0, 1, 2 as in Llama 2"
            )
        self.stop = (self.bos_id, self.eos_id)  # a text ends there
        self.byte_fallback = any(self.sp.is_byte(i) for i in range(self.vocab_size))

    def encode(self, text, bos=True, eos=False):
        """Ids of `text`, a str or bytes (broken UTF-8 becomes U+FFFD), with BOS before it."""
        return [self.bos_id] * bos + self.sp.encode(text) + [self.eos_id] * eos

    def by_sentencepiece(self):
        return lambda texts: flattened(self.sp.encode(texts, num_threads=1))

    def by_gigatoken(self):
        """gigatoken takes "<s>" in a text for BOS: such texts go to SentencePiece."""
        import gigatoken

        encode = gigatoken.Tokenizer.from_sentencepiece(self.proto).encode
        control = [self.sp.id_to_piece(i) for i in range(self.vocab_size) if self.sp.is_control(i)]

        def ids_of(text):
            if any(piece in text for piece in control):
                return np.array(self.sp.encode(text), np.uint32)
            return encode(text)

        return lambda texts: flattened(list(map(ids_of, texts)))

    def piece_bytes(self):
        """For each id the bytes it stands for inside a text; BOS and EOS stand for none."""
        pieces = []
        for i in range(self.vocab_size):
            piece = self.sp.id_to_piece(i)
            if self.sp.is_byte(i):
                pieces.append(bytes([int(piece[3:5], 16)]))
            elif self.sp.is_control(i):
                pieces.append(b"")
            elif self.sp.is_unknown(i):
                pieces.append(UNK_TEXT.encode())
            else:
                pieces.append(piece.replace(SPACE, " ").encode())
        return pieces

    @functools.cached_property
    def pieces(self):
        return self.piece_bytes()

    def decode(self, ids):
        """The text of `ids` as run.c prints it, without the space that encoding puts first."""
        ids = [i for i in ids if not self.sp.is_control(i)]
        text = b"".join(self.pieces[i] for i in ids)
        if ids and not (self.sp.is_unknown(ids[0]) or self.sp.is_byte(ids[0])):
            text = text.removeprefix(b" ")
        return text.decode("utf-8", errors="replace")

    def check_plain(self, name):
        """
        The normalizer_spec of the model (sentencepiece_model.proto). Raises UserError for a model
        that format `name` cannot carry: one that is not BPE, replaces text before encoding, or has
        user-defined pieces of several characters.
        """
        spec = proto_module().ModelProto.FromString(self.proto)
        wrong = ""
        if spec.trainer_spec.model_type != spec.trainer_spec.BPE:
            wrong = "is not BPE"
        elif spec.normalizer_spec.precompiled_charsmap:
            wrong = "replaces characters"
        elif any(
            piece.type == piece.USER_DEFINED and len(piece.piece) > 1 for piece in spec.pieces
        ):
            wrong = "has user-defined pieces"
        if wrong:
            raise UserError(f"{name} cannot carry {self.model_path}, which {wrong}")
        return spec.normalizer_spec

    def caveat(self):
        """A sentence if this model changes texts before encoding, which run.c does not; else ""."""
        text = " a  \ufb01 "  # spaces to fold, a ligature to take apart
        if self.sp.normalize(text) == SPACE + text.replace(" ", SPACE):
            return ""
        return (
            f"note: {self.model_path} folds spaces or replaces characters before it encodes; "
            f"./run does not, and gives such prompts other ids"
        )

    def c_file(self):
        """The tokenizer file of run.c, as bytes."""
        pieces = []
        for i in range(self.vocab_size):
            piece = self.sp.id_to_piece(i).replace(SPACE, " ")
            piece = {self.bos_id: "\n<s>\n", self.eos_id: "\n</s>\n"}.get(i, piece)
            pieces.append(piece.encode())
        entries = (
            struct.pack("<fI", self.sp.get_score(i), len(piece)) + piece
            for i, piece in enumerate(pieces)
        )
        return struct.pack("<I", max(map(len, pieces))) + b"".join(entries)


class ByteLevel(Tokenizer):
    """A model of bpe.py. Its first special token, <|endoftext|>, is both BOS and EOS."""

    ENCODERS = ("gigatoken", "tiktoken", "own")

    def __init__(self, model_path, proto=None):
        super().__init__(model_path, proto)
        self.bpe = BPETokenizer.from_bytes(self.proto, self.model_path)
        if not self.bpe.special:
            raise UserError(
                f"{self.model_path} has no special token to begin a text with: make it with "
                f"--special_tokens='<|endoftext|>'"
            )
        self.vocab_size = 1 + max(self.bpe.vocab)
        self.bos_id = self.eos_id = next(iter(self.bpe.special.values()))
        self.stop = (self.bos_id,)

    def encode(self, text, bos=True, eos=False):
        """
        Ids of `text`, a str or bytes (broken UTF-8 becomes U+FFFD), with BOS before it. Special
        tokens in it stand for themselves.
        """
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return [self.bos_id] * bos + self.bpe.encode(text) + [self.eos_id] * eos

    def by_own(self):
        return lambda texts: flattened([self.bpe.encode(text) for text in texts])

    def by_tiktoken(self):
        import tiktoken

        bpe, special = self.bpe, self.bpe.special
        merged = [bpe.ids[a + b] for a, b in bpe.merges]
        if any(a >= b for a, b in itertools.pairwise([255, *merged])):
            raise ValueError("its ids are not in the order of its merges")
        if any(a != b and a.startswith(b) for a in special for b in special):
            raise ValueError("a special token begins with another")
        if not bpe.makes_its_tokens():
            raise ValueError("it has tokens that its merges do not make")
        ranks = {token: i for token, i in bpe.ids.items() if i not in special.values()}
        words = {"mergeable_ranks": ranks, "special_tokens": special}
        encoding = tiktoken.Encoding("ours", pat_str=pattern(bpe.pattern_name).pattern, **words)

        def encode(texts):
            try:
                ids = encoding.encode_batch(texts, num_threads=1, allowed_special="all")
            except ValueError:  # its pattern fails on a megabyte of white space
                ids = [bpe.encode(text) for text in texts]
            return flattened(ids)

        return encode

    def by_gigatoken(self):
        import gigatoken

        def encoder_of(bpe):
            return gigatoken.Tokenizer.from_json(json.dumps(byte_level_json(bpe))).encode

        probing, text = letter_probe(self.bpe.pattern_name)
        if list(encoder_of(probing)(text)) != probing.encode(text):
            raise ValueError("it has the letters of another version of Unicode")
        encode = encoder_of(self.bpe)
        return lambda texts: flattened(list(map(encode, texts)))

    def piece_bytes(self):
        """For each id the bytes it stands for inside a text; BOS stands for none."""
        pieces = [self.bpe.vocab.get(i, b"") for i in range(self.vocab_size)]
        pieces[self.bos_id] = b""
        return pieces

    def decode(self, ids):
        """The text of `ids`: what run.c prints."""
        return self.bpe.decode(i for i in ids if i != self.bos_id)

    def c_file(self):
        """The tokenizer file of run.c, as bytes."""
        return byte_level_c_file(self.bpe, self.bos_id, self.eos_id)


@functools.cache
def letter_probe(pattern_name):
    """
    (a BPETokenizer, a text that it encodes otherwise if the classes of characters differ from
    ranges()). It merges "a", "1" or "." with the byte after it in the same pre-token. The text has
    the ends of all ranges, what is beside them, and characters that later versions may define.
    """
    known = {code for first, last, _ in ranges() for code in (first, last)}
    others = {code + i for code in known for i in (-1, 1)} | {*range(0x800, 0x34000, 64)}
    codes = sorted(code for code in known | others if code > 0x7F and code >> 11 != 27)
    pairs = [(start, bytes([b])) for start in (b"a", b"1") for b in range(0x80, 0x100)]
    tokens = [*(bytes([b]) for b in range(256)), *(a + b for a, b in pairs)]
    probing = BPETokenizer(dict(enumerate(tokens)), pairs, [], pattern_name)
    return probing, " ".join(f"a{chr(code)}1{chr(code)}" for code in codes)


def byte_level_c_file(bpe, bos, eos):
    """The tokenizer file of run.c of a BPETokenizer, as bytes; bos and eos are ids."""
    n = 1 + max(bpe.vocab)
    sizes = n, len(bpe.merges), len(bpe.special), len(ranges())
    numbers = [list(PATTERNS).index(bpe.pattern_name), bos, eos, *sizes]
    for first, last, kind in ranges():
        numbers += first, last, 1 + "LNS".index(kind)
    numbers += bpe.special.values()
    for a, b in bpe.merges:
        numbers += bpe.ids[a], bpe.ids[b], bpe.ids[a + b]
    tokens = (bpe.vocab.get(i, b"") for i in range(n))
    entries = (struct.pack("<I", len(token)) + token for token in tokens)
    return BPE_MAGIC + struct.pack(f"<{len(numbers)}I", *numbers) + b"".join(entries)


def open_tokenizer(model_path, proto=None):
    """The Tokenizer of a model file, or of its content: a ByteLevel or a SentencePiece."""
    data = read_model(os.fspath(model_path)) if proto is None else proto
    is_json = data.removeprefix(codecs.BOM_UTF8)[:1] == b"{"
    return (ByteLevel if is_json else SentencePiece)(model_path, proto)


def cached_tokenizer(model_path):
    """open_tokenizer() of a file that is opened again only if it has changed."""
    return opened(model_path, os.stat(model_path).st_mtime_ns)


@functools.lru_cache(maxsize=4)
def opened(model_path, mtime_ns):
    return open_tokenizer(model_path)


def tokenizer_to_encode(paths, encoder, hint):
    """
    The Tokenizer of some DataPaths; prints which encoder will be used. Raises UserError where it is
    missing (`hint`: how to get it), has another size, or has no such encoder.
    """
    path = paths.tokenizer_model
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; {hint}")
    tokenizer = cached_tokenizer(path)
    if tokenizer.vocab_size != paths.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens, not {paths.vocab_size}: give that number "
            f"as --vocab_size"
        )
    name, _ = tokenizer.encoder(encoder)
    why = tokenizer.not_used.get("gigatoken", "") if encoder == "auto" else ""
    if not why or "not installed" in why:
        why = "" if name == "gigatoken" else "several times as fast: pip install .[fast]"
    print(f"encoding with {name}" + (f" ({'gigatoken ' * (name in why)}{why})" if why else ""))
    return tokenizer


def c_tokenizer_path(model_path):
    """data/tok128.model -> data/tok128.bin"""
    return model_path.removesuffix(".model") + ".bin"


def export_beside(model_path):
    """Write the tokenizer file of run.c beside a model; prints its name, and the caveat."""
    tokenizer = open_tokenizer(model_path)
    tokenizer.export(c_tokenizer_path(model_path))
    print(f"{model_path} is ready, and {c_tokenizer_path(model_path)} for ./run")
    if tokenizer.caveat():
        print(tokenizer.caveat())


# ---- SentencePiece models


def choose_alphabet(counts, vocab_size):
    """
    Decide which single characters get a piece, and whether other characters become bytes.

    counts: Counter of the characters of the training text, without space and newline, which always
    have a piece (with byte pieces newline is one of those). Returns (alphabet, byte_fallback). Byte
    fallback: if the 256 byte pieces and all but the rarest characters (less than 1 in 100,000) fit.
    Alphabet: the most frequent characters, all of them if they fit and leave a tenth for merges.
    """
    total = sum(counts.values())
    core = sum(n * 100_000 >= total for n in counts.values())
    byte_fallback = vocab_size >= N_SPECIAL + N_BYTES + 1 + core
    room = vocab_size - N_SPECIAL - (N_BYTES + 1 if byte_fallback else 2)
    size = max(min(core, room), room * 9 // 10)
    return {c for c, _ in counts.most_common(size)}, byte_fallback


def train_sentencepiece(texts, vocab_size, num_threads=1):
    """
    Train a SentencePiece BPE vocabulary as llama2.c does (identity normalisation, digits split,
    byte fallback) but keep runs of spaces, as Llama 2's own does, so that no text is changed. Where
    the 256 byte pieces do not fit it trains without them, and newline becomes a piece.

    texts: a list of str. Returns (model file as bytes, {"byte_fallback", "dropped", "n_dropped"}):
    the characters that got no piece, and how often they occur. Raises UserError where the text is
    too small for the size.
    """
    counts = Counter()
    for text in texts:
        counts.update(text)
    for space in (" ", SPACE, "\n"):
        counts.pop(space, None)
    if not counts:
        raise UserError("cannot train a vocabulary: the text is empty")
    usable = Counter({c: n for c, n in counts.items() if c not in RESERVED})
    alphabet, byte_fallback = choose_alphabet(usable, vocab_size)
    # Training sees one line at a time, cut where a character has no piece, so that SentencePiece's
    # own alphabet is exactly ours. Newline is a byte piece or, without those, a user-defined one.
    dropped = "".join(sorted(set(counts) - alphabet))
    table = str.maketrans(dropped, "\n" * len(dropped))
    lines = (line for text in texts for line in text.translate(table).split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=byte_fallback,
            user_defined_symbols=[] if byte_fallback else ["\n"],
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 24,  # the default leaves out lines of more than 4,192 bytes
            self_test_sample_size=0,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise UserError(
            f"SentencePiece cannot train {vocab_size} pieces on this text "
            f"({str(e).rpartition(']')[2].strip() or e}); give it more text or a smaller vocab_size"
        ) from None
    about = {"byte_fallback": byte_fallback, "dropped": dropped}
    return model.getvalue(), about | {"n_dropped": sum(counts[c] for c in dropped)}


def train_byte_level(texts, vocab_size, model_path, num_workers, pattern_name):
    """
    Train byte-level BPE on documents, an iterable of str, by way of a temporary file beside
    model_path, and save it there. Raises UserError if the text is too small for the size.
    """
    pattern(pattern_name)  # UserError for an unknown name, before the texts are read
    special, folder = [SEPARATOR.decode()], os.path.dirname(model_path) or "."
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as sample_folder:
        sample = os.path.join(sample_folder, "sample.txt")
        with named(sample), open(sample, "wb") as f:
            f.writelines(text.encode() + SEPARATOR for text in texts)
        print(f"training {vocab_size:,} tokens on {os.path.getsize(sample):,} bytes of text")
        vocab, merges = train_bpe(sample, vocab_size, special, num_workers, pattern_name)
    if len(vocab) < vocab_size:
        raise UserError(
            f"this text has pairs for {len(vocab):,} tokens only: give it more text or a smaller "
            f"vocab_size"
        )
    BPETokenizer(vocab, merges, special, pattern_name).save(model_path)


def proto_module():
    """SentencePiece's module for its model files."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise UserError("this needs protobuf: pip install .[export]") from None
    return sentencepiece_model_pb2


def sentencepiece_model(pieces, scores, types, add_dummy_prefix=True):
    """
    A SentencePiece BPE model file, as bytes, that changes no text before it encodes. Its pieces
    have scores and SentencePiece's types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    6 byte.
    """
    proto = proto_module()
    model = proto.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = 6 in types
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString()


# ---- tokenizer.json of Hugging Face, which gigatoken reads too; see formats/hftokenizer.py

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def cutting_steps(pattern_name):
    """The pretokenizers that cut by a pattern and make bytes visible."""
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pattern_name]}}
    split |= {"behavior": "Isolated", "invert": False}
    return [split, {**BYTE_LEVEL, "use_regex": False}]


def byte_level_json(bpe):
    """tokenizer.json of a BPETokenizer, as a dict, without a token before each text."""
    cut = {**BYTE_LEVEL, "use_regex": True}  # by GPT-2's pattern
    if bpe.pattern_name != "gpt2":
        cut = {"type": "Sequence", "pretokenizers": cutting_steps(bpe.pattern_name)}
    return bpe_json(
        {i: text for text, i in bpe.special.items()},
        normalizer=None,
        pre_tokenizer=cut,
        decoder=BYTE_LEVEL,
        vocab={name: i for i, name in bpe.names().items()},
        merges=[[as_visible(a), as_visible(b)] for a, b in bpe.merges],
    )


def bpe_json(special, normalizer, pre_tokenizer, decoder, vocab, merges, **model):
    """
    tokenizer.json of a BPE model, as a dict. special: {id: text}; vocab: {name: id}; merges: pairs
    of names; model: what differs from byte-level BPE.
    """
    words = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **words, "special": True}
            for i, text in sorted(special.items())
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
            "vocab": vocab,
            "merges": merges,
        },
    }


if __name__ == "__main__":
    one_sentence_errors()
    parser = argparse.ArgumentParser(description="Write run.c's tokenizer file beside a .model.")
    parser.add_argument(
        "-t", "--tokenizer-model", "--tokenizer_model", default="tokenizer.model", metavar="PATH"
    )
    export_beside(parser.parse_args().tokenizer_model)
