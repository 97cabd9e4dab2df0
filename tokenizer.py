"""
The tokenizers, SentencePiece BPE and byte-level BPE, behind one interface, and the tokenizer file
of run.c.

    python tokenizer.py --tokenizer-model=data/tok128.model    # writes data/tok128.bin

All numbers in that file are little-endian. For SentencePiece it has llama2.c's layout:

    uint32 length in bytes of the longest piece
    for each id: float32 score, uint32 length, the bytes of the piece, with plain spaces

Byte pieces are spelled <0x0A>, BOS and EOS "\\n<s>\\n" and "\\n</s>\\n". For byte-level BPE all
numbers are uint32:

    "bpe1"
    the index of the pattern in PATTERNS of bpe.py, the ids of BOS and EOS (both end a text)
    the numbers of tokens, merges, special tokens and ranges
    for each range of characters: first and last code point; 1 letters, 2 numbers, 3 white space
    the ids of the special tokens
    for each merge, in order: the left, right and merged id
    for each id: length and bytes of the token; length 0 if the id is unused

To add a kind of tokenizer, write a class with the methods of Tokenizer and add it to
open_tokenizer(). To add a library that encodes faster, add a method to ENCODERS of a class.
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
UNK_TEXT = " \u2047 "  # what SentencePiece and run.c print for an unknown piece
N_SPECIAL = 3  # <unk>, <s>, </s>
N_BYTES = 256
BPE_MAGIC = b"bpe1"  # the start of a tokenizer file of byte-level BPE
RESERVED = "\0\x1f\u2585"  # get no piece from SentencePiece, which also drops lines with the last
# a library is used only if it encodes these texts as we do
PROBE = [
    "Once upon a time, there was a little girl named Lily. She didn't like 1,234 dogs!",
    " two  spaces,   three\n\n\nlines\t\ttabs\r\n end  ",
    "naïve Straße 日本語 中文 😀👩\u200d🚀 e\u0301 ½ Ⅷ \u00a0 \u2003 \x1c \x85 \u2581 \ufffd",
    "<s>a</s> <unk> <0x41> <|endoftext|><|endoftext|> I'VE it's",
    "",
]


class Tokenizer:
    """
    Text to ids and back, by the model file at model_path or its content, `proto`. Attributes of
    both kinds: vocab_size; bos_id, which starts a text; eos_id and unk_id (-1: none); `stop`, the
    ids that end a text; n_prefix, the number of bytes that encoding adds before a text; `hash`, the
    SHA-256 of the file, "" for `proto`. Raises UserError if the file is not a tokenizer model.
    """

    n_prefix, unk_id = 0, -1
    ENCODERS = ()  # NAME for each method by_NAME(), which returns an encoder; the fastest first

    def __init__(self, model_path, proto=None):
        self.model_path, self.hash = os.fspath(model_path), ""
        self.encoders, self.unusable = {}, {}  # {name: (name, function)}, {name: reason}
        if proto is None:
            proto = read_model(self.model_path)
            self.hash = hashlib.sha256(proto).hexdigest()
        self.proto = proto

    def __reduce__(self):
        """Pickle a tokenizer as its path, so that another process opens the file, once."""
        return cached_tokenizer, (self.model_path,)

    def encoder(self, name="auto"):
        """
        Return (name, function): an encoder of a list of texts -> (all ids, uint32; the number of
        ids of each text). "auto" is the fastest of ENCODERS that is installed and encodes PROBE
        like encode(). Raises UserError if the chosen one cannot be used.
        """
        if name in self.encoders:
            return self.encoders[name]
        choices = ("auto", *self.ENCODERS)
        if name not in choices:
            raise UserError(f"encoder = {name!r}: expected one of {', '.join(choices)}")
        expected, lengths = flattened([self.encode(text, bos=False) for text in PROBE])
        for candidate in self.ENCODERS if name == "auto" else [name]:
            try:
                encode = getattr(self, f"by_{candidate}")()
                ids, counts = encode(PROBE)
            except ImportError:
                reason = f"needs the package {candidate}: pip install {candidate}"
            except (ValueError, TypeError, KeyError, RuntimeError) as e:
                reason = f"cannot read {self.model_path}: {e}"
            else:
                if np.array_equal(ids, expected) and np.array_equal(counts, lengths):
                    self.encoders[name] = self.encoders[candidate] = candidate, encode
                    return candidate, encode
                reason = f"gives different ids from our own encoder for {self.model_path}"
            self.unusable[candidate] = reason
            if name != "auto":
                raise UserError(f"encoder = {name} {reason}")
        raise AssertionError("the last of ENCODERS is always usable")

    def encode_flat(self, texts, encode):
        """Return the ids of all texts, uint32, with BOS before each; encode: from encoder()."""
        ids, counts = encode(texts)
        return np.insert(ids, np.cumsum(counts) - counts, self.bos_id)

    def bytes_in(self, tokens):
        """
        Return the number of bytes of text in an array of ids, with BOS before each text. The prefix
        that encoding adds does not count; an unk stands for at least one byte and counts as one.
        """
        lengths = np.array([len(piece) for piece in self.piece_bytes()])
        if self.unk_id >= 0:
            lengths[self.unk_id] = 1
        counts = np.bincount(tokens, minlength=self.vocab_size)
        return int((counts * lengths).sum() - self.n_prefix * counts[self.bos_id])

    def caveat(self):
        """Return a note if ./run gives some texts other ids, else ""."""
        return ""

    @functools.cached_property
    def fingerprint(self):
        """The number that identifies this tokenizer in a model file, see fingerprint_of()."""
        return fingerprint_of(self.c_file())

    def export(self, path):
        """Write the tokenizer file of run.c."""
        with atomic_write(path) as f:
            f.write(self.c_file())


def fingerprint_of(c_file):
    """
    Return the number that identifies a tokenizer in the header of a model file: the CRC-32 of its
    file for run.c, without the character classes of byte-level BPE, which depend on the version of
    Unicode. Never 0, which means unknown.
    """
    start = 0
    if c_file.startswith(BPE_MAGIC):
        *_, n_ranges = struct.unpack_from("<7I", c_file, len(BPE_MAGIC))
        start = struct.calcsize("<8I") + n_ranges * struct.calcsize("<3I")
    return zlib.crc32(c_file[start:]) or 1


def read_model(path):
    if os.path.isdir(path):
        raise UserError(f"{path} is not a tokenizer model: it is a folder")
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; pass the path of a tokenizer model")
    check_not_pointer(path)
    with open(path, "rb") as f:
        return f.read()


def flattened(lists):
    """Join lists or arrays of ids: return (all ids, uint32; the number of ids of each)."""
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
            self.sp.id_to_piece(list(range(self.sp.vocab_size())))  # raises if one is not UTF-8
        except (RuntimeError, UnicodeDecodeError):
            raise UserError(
                f"{self.model_path} is not a tokenizer model: expected one from SentencePiece or "
                f"bpe.py"
            ) from None
        self.vocab_size = self.sp.vocab_size()
        self.unk_id, self.bos_id, self.eos_id = self.sp.unk_id(), self.sp.bos_id(), self.sp.eos_id()
        if (self.unk_id, self.bos_id, self.eos_id) != (0, 1, 2):
            raise UserError(
                f"{self.model_path} is not a tokenizer like Llama 2's: unk, BOS and EOS are "
                f"{self.unk_id}, {self.bos_id}, {self.eos_id}, expected 0, 1, 2"
            )
        self.stop = (self.bos_id, self.eos_id)
        self.byte_fallback = any(self.sp.is_byte(i) for i in range(self.vocab_size))

    def encode(self, text, bos=True, eos=False):
        """Return the ids of a str or bytes (invalid UTF-8 becomes U+FFFD), by default after BOS."""
        return [self.bos_id] * bos + self.sp.encode(text) + [self.eos_id] * eos

    def by_sentencepiece(self):
        return lambda texts: flattened(self.sp.encode(texts, num_threads=1))

    def by_gigatoken(self):
        """gigatoken reads "<s>" in a text as BOS, so such texts go to SentencePiece."""
        import gigatoken

        encode = gigatoken.Tokenizer.from_sentencepiece(self.proto).encode
        control = [self.sp.id_to_piece(i) for i in range(self.vocab_size) if self.sp.is_control(i)]

        def ids_of(text):
            if any(piece in text for piece in control):
                return np.array(self.sp.encode(text), np.uint32)
            return encode(text)

        return lambda texts: flattened(list(map(ids_of, texts)))

    def piece_bytes(self):
        """Return for each id its bytes inside a text; BOS and EOS have none."""
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
        """Return the text of ids as run.c prints it, without the space that encoding adds."""
        ids = [i for i in ids if not self.sp.is_control(i)]
        text = b"".join(self.pieces[i] for i in ids)
        if ids and not (self.sp.is_unknown(ids[0]) or self.sp.is_byte(ids[0])):
            text = text.removeprefix(b" ")
        return text.decode("utf-8", errors="replace")

    def check_plain(self, name):
        """
        Return the normalizer_spec of the model (sentencepiece_model.proto). Raises UserError for a
        model that format `name` cannot store: one that is not BPE, replaces text before encoding,
        or has user-defined pieces of several characters.
        """
        spec = proto_module().ModelProto.FromString(self.proto)
        reason = ""
        if spec.trainer_spec.model_type != spec.trainer_spec.BPE:
            reason = "is not BPE"
        elif spec.normalizer_spec.precompiled_charsmap:
            reason = "replaces characters"
        elif any(
            piece.type == piece.USER_DEFINED and len(piece.piece) > 1 for piece in spec.pieces
        ):
            reason = "has user-defined pieces"
        if reason:
            raise UserError(
                f"{name} cannot store {self.model_path}, because it {reason}: use --format=bin"
            )
        return spec.normalizer_spec

    def caveat(self):
        """Return a note if this model changes texts before encoding, unlike run.c, else ""."""
        text = " a  \ufb01 "  # has spaces to collapse and a ligature to replace
        if self.sp.normalize(text) == SPACE + text.replace(" ", SPACE):
            return ""
        return (
            f"note: {self.model_path} collapses spaces or replaces characters before encoding, but "
            f"./run does not, so such prompts get other ids there"
        )

    def c_file(self):
        """Return the tokenizer file of run.c as bytes."""
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
    """A tokenizer of bpe.py. Its first special token, <|endoftext|>, is both BOS and EOS."""

    ENCODERS = ("gigatoken", "tiktoken", "own")

    def __init__(self, model_path, proto=None):
        super().__init__(model_path, proto)
        self.bpe = BPETokenizer.from_bytes(self.proto, self.model_path)
        if not self.bpe.special:
            raise UserError(
                f"{self.model_path} has no special token to start a text: train or import it with "
                f"--special_tokens='<|endoftext|>'"
            )
        self.vocab_size = 1 + max(self.bpe.vocab)
        self.bos_id = self.eos_id = next(iter(self.bpe.special.values()))
        self.stop = (self.bos_id,)

    def encode(self, text, bos=True, eos=False):
        """
        Return the ids of a str or bytes (invalid UTF-8 becomes U+FFFD), by default after BOS.
        Special tokens in the text get their own ids.
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
            raise ValueError("a special token starts with another")
        if not bpe.makes_its_tokens():
            raise ValueError("its merges do not make all of its tokens")
        ranks = {token: i for token, i in bpe.ids.items() if i not in special.values()}
        encoding = tiktoken.Encoding(
            "ours",
            pat_str=pattern(bpe.pattern_name).pattern,
            mergeable_ranks=ranks,
            special_tokens=special,
        )

        def encode(texts):
            try:
                ids = encoding.encode_batch(texts, num_threads=1, allowed_special="all")
            except ValueError:  # tiktoken's pattern fails on a megabyte of white space
                ids = [bpe.encode(text) for text in texts]
            return flattened(ids)

        return encode

    def by_gigatoken(self):
        import gigatoken

        def encoder_of(bpe):
            return gigatoken.Tokenizer.from_json(json.dumps(byte_level_json(bpe))).encode

        probing, text = letter_probe(self.bpe.pattern_name)
        if list(encoder_of(probing)(text)) != probing.encode(text):
            raise ValueError("its letters are from another version of Unicode")
        encode = encoder_of(self.bpe)
        return lambda texts: flattened(list(map(encode, texts)))

    def piece_bytes(self):
        """Return for each id its bytes inside a text; BOS has none."""
        pieces = [self.bpe.vocab.get(i, b"") for i in range(self.vocab_size)]
        pieces[self.bos_id] = b""
        return pieces

    def decode(self, ids):
        """Return the text of ids as run.c prints it."""
        return self.bpe.decode(i for i in ids if i != self.bos_id)

    def c_file(self):
        """Return the tokenizer file of run.c as bytes."""
        return byte_level_c_file(self.bpe, self.bos_id, self.eos_id)


@functools.cache
def letter_probe(pattern_name):
    """
    Return (a BPETokenizer, a text) to probe an encoder: if its classes of characters differ from
    ranges(), it gives the text other ids. The tokenizer merges "a" or "1" with the next byte if
    both are in the same pre-token. The text has the first and last character of each range, their
    neighbors, and characters that later versions of Unicode may define.
    """
    known = {code for first, last, _ in ranges() for code in (first, last)}
    others = {code + i for code in known for i in (-1, 1)} | {*range(0x800, 0x34000, 64)}
    codes = sorted(code for code in known | others if code > 0x7F and code >> 11 != 27)
    pairs = [(start, bytes([b])) for start in (b"a", b"1") for b in range(0x80, 0x100)]
    tokens = [*(bytes([b]) for b in range(256)), *(a + b for a, b in pairs)]
    probing = BPETokenizer(dict(enumerate(tokens)), pairs, [], pattern_name)
    return probing, " ".join(f"a{chr(code)}1{chr(code)}" for code in codes)


def byte_level_c_file(bpe, bos, eos):
    """Return the tokenizer file of run.c for a BPETokenizer as bytes; bos and eos are ids."""
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
    """Open a model file, or its content: return a ByteLevel or a SentencePiece."""
    data = read_model(os.fspath(model_path)) if proto is None else proto
    is_json = data.removeprefix(codecs.BOM_UTF8)[:1] == b"{"
    return (ByteLevel if is_json else SentencePiece)(model_path, proto)


def cached_tokenizer(model_path):
    """Return open_tokenizer() of a file, cached until the file changes."""
    return opened(model_path, os.stat(model_path).st_mtime_ns)


@functools.lru_cache(maxsize=4)
def opened(model_path, mtime_ns):
    return open_tokenizer(model_path)


def tokenizer_to_encode(paths, encoder, hint):
    """
    Return the Tokenizer of some DataPaths and print which encoder will be used. Raises UserError if
    it is missing (`hint`: how to get it), has another size, or has no such encoder.
    """
    path = paths.tokenizer_model
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; {hint}")
    tokenizer = cached_tokenizer(path)
    if tokenizer.vocab_size != paths.vocab_size:
        raise UserError(
            f"vocab_size = {paths.vocab_size}: expected {tokenizer.vocab_size}, the size of {path}"
        )
    name, _ = tokenizer.encoder(encoder)
    reason = tokenizer.unusable.get("gigatoken", "") if encoder == "auto" else ""
    hint = ""
    if reason and "needs the package" not in reason:
        hint = f" (gigatoken {reason})"
    elif name != "gigatoken":
        hint = " (gigatoken is several times as fast: pip install '.[fast]')"
    print(f"encoding with {name}{hint}")
    return tokenizer


def c_tokenizer_path(model_path):
    """Return the path of run.c's tokenizer file: data/tok128.model -> data/tok128.bin."""
    return model_path.removesuffix(".model") + ".bin"


def export_beside(model_path):
    """Write the tokenizer file of run.c beside a model; print both names and the caveat."""
    tokenizer = open_tokenizer(model_path)
    tokenizer.export(c_tokenizer_path(model_path))
    print(f"{model_path} is ready, and so is {c_tokenizer_path(model_path)} for ./run")
    if tokenizer.caveat():
        print(tokenizer.caveat())


# ---- SentencePiece models


def choose_alphabet(counts, vocab_size):
    """
    Choose the characters that get a piece, and whether the others become bytes.

    counts: Counter of the characters of the training text, except space and newline, which always
    have a piece (newline may be a byte piece). Returns (alphabet, byte_fallback). byte_fallback is
    true if the 256 byte pieces and all but the rarest characters (less than 1 in 100,000) fit. The
    alphabet has the most frequent characters: all of them, if that leaves a tenth for merges.
    """
    total = sum(counts.values())
    core = sum(n * 100_000 >= total for n in counts.values())
    byte_fallback = vocab_size >= N_SPECIAL + N_BYTES + 1 + core
    room = vocab_size - N_SPECIAL - (N_BYTES + 1 if byte_fallback else 2)
    size = max(min(core, room), room * 9 // 10)
    return {c for c, _ in counts.most_common(size)}, byte_fallback


def train_sentencepiece(texts, vocab_size, num_threads=1):
    """
    Train a SentencePiece BPE vocabulary as llama2.c does (identity normalization, digits split,
    byte fallback), but keep runs of spaces, as Llama 2 does, so that no text is changed. If the 256
    byte pieces do not fit, train without them, with a piece for newline.

    texts: a list of str. Returns (model file as bytes, {"byte_fallback", "dropped", "n_dropped"}),
    where `dropped` has the characters without a piece and `n_dropped` counts their occurrences.
    Raises UserError if the text is too small for the size.
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
    # Train on lines, cut at characters without a piece, so that SentencePiece finds exactly our
    # alphabet. Newline is a byte piece or, without byte pieces, a user-defined one.
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
            max_sentence_length=1 << 24,  # the default skips lines of more than 4,192 bytes
            self_test_sample_size=0,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise UserError(
            f"SentencePiece cannot train {vocab_size} pieces on this text "
            f"({str(e).rpartition(']')[2].strip() or e}): use more text or a smaller --vocab_size"
        ) from None
    about = {"byte_fallback": byte_fallback, "dropped": dropped}
    return model.getvalue(), about | {"n_dropped": sum(counts[c] for c in dropped)}


def train_byte_level(texts, vocab_size, model_path, num_workers, pattern_name):
    """
    Train byte-level BPE on documents, an iterable of str, and save it to model_path. Writes the
    text to a temporary file beside it. Raises UserError if the text is too small for the size.
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
            f"vocab_size = {vocab_size}: this text yields only {len(vocab):,} tokens; use more "
            f"text or a smaller --vocab_size"
        )
    BPETokenizer(vocab, merges, special, pattern_name).save(model_path)


def proto_module():
    """Import SentencePiece's module for its model files."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise UserError(
            "converting SentencePiece models needs the package protobuf: pip install '.[export]'"
        ) from None
    return sentencepiece_model_pb2


def sentencepiece_model(pieces, scores, types, add_dummy_prefix=True):
    """
    Return a SentencePiece BPE model file, as bytes, that does not change text before encoding.
    types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
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


# ---- Hugging Face's tokenizer.json, which gigatoken reads too; see formats/hftokenizer.py

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def cutting_steps(pattern_name):
    """Return the pretokenizers that cut text by a pattern and make bytes visible."""
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pattern_name]}}
    split |= {"behavior": "Isolated", "invert": False}
    return [split, {**BYTE_LEVEL, "use_regex": False}]


def byte_level_json(bpe):
    """Return the tokenizer.json of a BPETokenizer as a dict; it adds no token before a text."""
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
    Return the tokenizer.json of a BPE model as a dict. special: {id: text}; vocab: {name: id};
    merges: pairs of names; model: options that differ from byte-level BPE.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": True}
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
