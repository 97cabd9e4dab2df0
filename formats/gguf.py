"""
GGUF, the file of llama.cpp and Ollama: plain Llama as its architecture `llama`, the options of
`portable` as `qwen3`, with the tokenizer inside. Every other option is refused by name.

In `llama` RoPE rotates neighbouring pairs of a head, as ours does; in `qwen3` it rotates halves.

To add an architecture: its row in ARCHITECTURES, and its tensors in NAMES of formats/tensors.py.
"""

import math
from functools import partial

import numpy as np
import torch

from bpe import BPETokenizer, as_visible
from configurator import UserError
from formats.tensors import (
    Target,
    check_range,
    expect,
    expect_neutral,
    exported,
    filled,
    gguf_name,
    misfit,
    not_carried,
    shortest,
)
from model import ModelArgs
from system.fields import is_bool, is_count, is_number, is_string, list_of
from system.files import atomic_write
from system.remote import need, reason
from tokenizer import ByteLevel, sentencepiece_model

# Fields of ModelArgs and their keys, which follow the architecture and a dot
KEYS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "context_length",
    "dim": "embedding_length",
    "n_layers": "block_count",
    "hidden_dim": "feed_forward_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
# Keys that this model lacks, with the values that change nothing
NEUTRAL = {
    "tensor_data_layout": ("Meta AI original pth", "reference"),  # llama.cpp does not read it
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (False,),
    "rope.scale_linear": (1.0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}
HEAD_KEYS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
PLAIN = {*KEYS, "tie_embeddings"}
ARCHITECTURES = {
    "llama": Target(PLAIN),
    "qwen3": Target({*PLAIN, "qk_norm"}, must=["qk_norm"]),
}

# --dtype: llama.cpp's number format of matrices, and of the file; vectors stay in F32
GGUF_DTYPES = {
    "fp32": ("F32", "ALL_F32"),
    "fp16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
ARRAY = 9  # the type of a field that is a list
MOST_PARTS = 1 << 22  # of a file's fields, about 250 bytes each; one with 256,000 tokens has 1.5 M
BLOCK = 32  # numbers that share a scale in Q8_0 and Q4_0
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}  # numbers; scales are F16


def architecture(args):
    """The name of the first architecture that carries ModelArgs. Raises UserError."""
    for name, target in ARCHITECTURES.items():
        if not misfit(args, target):
            return name
    field = not_carried(args, ARCHITECTURES["qwen3"].can)  # what llama lacks is qwen3's
    raise UserError(
        f"gguf cannot carry {field.name} = {getattr(args, field.name)}: llama.cpp has no "
        f"architecture with it; write --format=bin or hf, or train another model with --arch=llama "
        f"or portable and --{field.name}={field.default}"
    )


def check_tokenizer(tokenizer):
    """
    Raise UserError for a tokenizer that llama.cpp cannot run. Returns the normalizer_spec of a
    SentencePiece, else None.
    """
    if tokenizer is None:
        raise UserError("gguf needs the tokenizer: give --tokenizer=PATH of its .model")
    if isinstance(tokenizer, ByteLevel):
        tokenizer.bpe.names()  # raises where two would be equal
        if not tokenizer.bpe.makes_its_tokens():  # some of its patterns take them from there
            raise UserError(
                f"gguf cannot carry {tokenizer.model_path}, whose merges do not make all its tokens"
            )
        return None
    spec = tokenizer.check_plain("gguf")
    if spec.remove_extra_whitespaces:
        raise UserError(f"gguf cannot carry {tokenizer.model_path}, which folds spaces")
    if not tokenizer.byte_fallback:
        raise UserError(
            f"gguf cannot carry {tokenizer.model_path}, which has no byte pieces: llama.cpp would "
            f"end at the first character it lacks; write --format=bin or hf"
        )
    return spec


def write_gguf(model, path, dtype, tokenizer, facts):
    """
    Write a Transformer and its Tokenizer as a GGUF file, whole or not at all. As in llama.cpp,
    matrices whose rows are not a multiple of 32 stay in F16 where q8_0 or q4_0 is asked for.
    """
    gguf, kind, spec = need("gguf"), architecture(model.args), check_tokenizer(tokenizer)
    try:
        with atomic_write(path) as part:
            f = gguf.GGUFWriter(part.name, kind)
            f.add_name(facts.get("title", "story teller"))
            f.add_license(facts.get("license", "unknown"))
            f.add_languages([facts.get("language", "en")])
            put_args(f, kind, model.args)
            f.add_file_type(getattr(gguf.LlamaFileType, GGUF_DTYPES[dtype][1]))
            f.add_quantization_version(gguf.GGML_QUANT_VERSION)
            put_tokenizer(f, tokenizer, spec)
            kept = put_tensors(f, kind, model, dtype)
            f.write_header_to_file()
            f.write_kv_data_to_file()
            f.write_tensors_to_file(progress=False)
            f.close()
    except OSError as e:
        raise UserError(f"cannot write {path}: {reason(e)}") from None
    if kind == "qwen3" and not isinstance(tokenizer, ByteLevel):
        print(
            "note: llama.cpp runs this file; Ollama's engine for qwen3 reads byte-level BPE "
            "vocabularies alone: for Ollama train with --arch=llama"
        )
    if kept:
        print(
            f"note: {len(kept)} tensors, such as {kept[0]}, stay in F16: their rows are not "
            f"a multiple of {BLOCK} numbers"
        )


def put_args(f, kind, args):
    """The fields of ModelArgs."""
    for name, key in KEYS.items():
        value = getattr(args, name)
        put = f.add_float32 if isinstance(value, float) else f.add_uint32
        put(f"{kind}.{key}", value)
    for key in HEAD_KEYS:
        f.add_uint32(f"{kind}.{key}", args.head_dim)


def put_tensors(f, kind, model, dtype):
    """All tensors of a Transformer; returns the names of those that stay in F16."""
    gguf, kept = need("gguf"), []
    formats = gguf.GGMLQuantizationType
    for name, tensor in exported(model, in_halves=kind == "qwen3"):
        number_format = formats.F32
        if tensor.dim() > 1:
            number_format = getattr(formats, GGUF_DTYPES[dtype][0])
            if dtype in ("q8_0", "q4_0") and tensor.shape[1] % BLOCK:
                number_format = formats.F16
                kept.append(gguf_name(name))
        check_range(name, tensor, LARGEST.get(number_format.name, math.inf), dtype)
        numbers = np.ascontiguousarray(tensor.float().numpy())
        numbers = gguf.quants.quantize(numbers, number_format)
        f.add_tensor(gguf_name(name), numbers, raw_dtype=number_format)
    return kept


PRE_TOKENIZERS = {"gpt2": "gpt-2", "gpt4": "llama-bpe"}  # llama.cpp's names of our patterns


def put_tokenizer(f, tokenizer, spec):
    """Pieces, scores or merges, and types. As in ours, a text ends at EOS or the next BOS."""
    n = range(tokenizer.vocab_size)
    if isinstance(tokenizer, ByteLevel):
        bpe = tokenizer.bpe
        names, special = bpe.names(), {*bpe.special.values()}
        f.add_tokenizer_model("gpt2")
        f.add_tokenizer_pre(PRE_TOKENIZERS[bpe.pattern_name])
        f.add_token_list([names.get(i, f"[unused {i}]") for i in n])
        f.add_token_types([3 if i in special else 1 if i in names else 5 for i in n])
        f.add_token_merges([f"{as_visible(a)} {as_visible(b)}" for a, b in bpe.merges])
    else:
        sp = tokenizer.sp
        f.add_tokenizer_model("llama")
        f.add_tokenizer_pre("default")
        f.add_token_list([sp.id_to_piece(i) for i in n])
        f.add_token_scores([sp.get_score(i) for i in n])
        f.add_token_types([token_type(sp, i) for i in n])
        f.add_unk_token_id(tokenizer.unk_id)
        f.add_add_space_prefix(spec.add_dummy_prefix)
        f.add_remove_extra_whitespaces(False)
    f.add_bos_token_id(tokenizer.bos_id)
    f.add_eos_token_id(tokenizer.eos_id)
    f.add_eot_token_id(tokenizer.bos_id)
    f.add_pad_token_id(tokenizer.eos_id)
    f.add_add_bos_token(True)
    f.add_add_eos_token(False)


def token_type(sp, i):
    """The type of a piece, a number that gguf and SentencePiece share."""
    kinds = {2: sp.is_unknown, 3: sp.is_control, 5: sp.is_unused, 6: sp.is_byte}
    return next((number for number, is_one in kinds.items() if is_one(i)), 1)


# ---- reading


def read_gguf(path):
    """
    The Transformer of a GGUF file of llama or qwen3, in any number format that gguf can read, as
    float32 on the CPU, and the file's fields for tokenizer_of(). Raises UserError.
    """
    gguf = need("gguf")
    try:
        reader = open_gguf(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        check_places(reader)
    except OSError:
        raise
    except Exception as e:  # foreign bytes may lead to anything
        raise UserError(f"{path} is damaged or not a GGUF file: {e}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    args = args_of(fields, tensors, path)

    def numbers(tensor):
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            expected = "a number format that gguf can read"
            expect(False, path, tensor.name, tensor.tensor_type.name, expected)
        return torch.from_numpy(np.array(values, np.float32)).view(shape_of(tensor))

    source = {name: (shape_of(t), partial(numbers, t)) for name, t in tensors.items()}
    in_halves = fields["general.architecture"] == "qwen3"
    return filled(args, source, path, gguf_name, in_halves), fields


def check_places(reader):
    """Raise ValueError unless tensors follow each other to the end, as llama.cpp writes them."""
    place, alignment = reader.data_offset, int(reader.alignment)
    for tensor in reader.tensors:
        if tensor.data_offset != place:
            raise ValueError(f"{tensor.name} begins at {tensor.data_offset}, expected {place}")
        place += tensor.n_bytes + -tensor.n_bytes % alignment
    if not 0 <= place - len(reader.data) < alignment:  # the last one may not be padded
        raise ValueError(f"it has {len(reader.data)} bytes, and its tensors end at {place}")


def shape_of(tensor):
    return tuple(int(n) for n in reversed(tensor.shape))


def args_of(fields, tensors, path):
    """ModelArgs of a file's fields and tensors; UserError for what this model does not compute."""
    if (n := fields.get("split.count", 1)) > 1:
        raise UserError(
            f"{path} is one of {n} parts of a split GGUF: join them with llama.cpp's "
            f"llama-gguf-split --merge FIRST_PART OUT"
        )
    kind = fields.get("general.architecture")
    expect(kind in ARCHITECTURES, path, "general.architecture", kind, " or ".join(ARCHITECTURES))
    theirs = {k.removeprefix(f"{kind}."): v for k, v in fields.items() if k.startswith(f"{kind}.")}
    if "token_embd.weight" in tensors:  # vocab_size is often left out
        theirs["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    theirs.setdefault("attention.head_count_kv", theirs.get("attention.head_count"))
    theirs.setdefault("rope.freq_base", 10000.0)
    for key in sorted(theirs.keys() - {*KEYS.values(), *HEAD_KEYS}):
        expect_neutral(path, f"{kind}.{key}", theirs[key], NEUTRAL.get(key, ()))
    values = {}
    for name, key in KEYS.items():
        value = theirs.get(key)
        expect(isinstance(value, (int, float)), path, f"{kind}.{key}", value, "a number")
        values[name] = shortest(value) if isinstance(value, float) else value
    is_tied = "output.weight" not in tensors
    args = ModelArgs(**values, tie_embeddings=is_tied, qk_norm=kind == "qwen3")
    for key in HEAD_KEYS:
        size, expected = theirs.get(key, args.head_dim), "embedding_length / head_count"
        expect(size == args.head_dim, path, f"{kind}.{key}", size, f"{expected}, {args.head_dim}")
    return args


def open_gguf(path):
    """
    gguf's reader of a file, which must not end before what its lengths announce, and must have no
    more fields and tensors than fit the memory.
    """

    class Reader(need("gguf").GGUFReader):
        n_parts = 0  # arrays made so far

        def _get(self, offset, dtype, count=1, override_order=None):
            self.data = self.data.view(np.ndarray)  # parts of a memmap take far more memory
            self.n_parts += 1
            if self.n_parts > MOST_PARTS:
                raise ValueError("it has more fields than this program reads")
            found = super()._get(offset, dtype, count, override_order)
            if len(found) < count:  # gguf's own loops over what is not there
                raise ValueError(f"it ends at byte {len(self.data)}, before {count} numbers")
            return found

        def _get_field_parts(self, orig_offs, raw_type):
            """An array of numbers as one part; gguf makes a part of each number."""
            kinds = self.gguf_scalar_to_np
            if raw_type == ARRAY and (kind := self._get(orig_offs, np.uint32))[0] in kinds:
                size = self._get(orig_offs + 4, np.uint64)
                values = self._get(orig_offs + 12, kinds[kind[0]], size[0])
                return 12 + values.nbytes, [kind, size, values], [2], [ARRAY, kind[0]]
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader(path)


# What the fields of a tokenizer, tokenizer.ggml.*, may be
TOKENIZER = {
    "model": is_string,
    "pre": is_string,
    "tokens": list_of(is_string),
    "merges": list_of(is_string),
    "scores": list_of(is_number),
    "token_type": list_of(is_count),
    **dict.fromkeys(("unknown_token_id", "bos_token_id", "eos_token_id"), is_count),
    **dict.fromkeys(("add_bos_token", "add_space_prefix"), is_bool),
}


def tokenizer_of(fields, path):
    """
    The tokenizer model in a GGUF file's fields, as bytes; None for one that we do not have. Raises
    UserError where its fields do not fit together.
    """
    found = {}
    for name, check in TOKENIZER.items():
        if (key := f"tokenizer.ggml.{name}") in fields:
            found[name] = fields[key]
            expect(check(found[name]), path, key, found[name], "what llama.cpp writes there")
    if not found.get("add_bos_token", True):  # ours always begins with BOS
        return None
    if found.get("model") not in ("gpt2", "llama") or "tokens" not in found:
        return None
    of_each = ("scores", "token_type") if found["model"] == "llama" else ("token_type",)
    n = len(found["tokens"])
    for name in of_each:
        size = len(found.get(name, ()))
        expect(size == n, path, f"tokenizer.ggml.{name}", f"{size} values", f"{n}, one a token")
    if found["model"] == "gpt2":
        return byte_level_of(found)
    ids = [found.get(f"{name}_token_id", i) for i, name in enumerate(("unknown", "bos", "eos"))]
    expect(ids == [0, 1, 2], path, "the ids of unk, BOS and EOS", ids, "[0, 1, 2] as in Llama 2")
    has_prefix = found.get("add_space_prefix", True)
    lists = (found[name] for name in ("tokens", "scores", "token_type"))
    return sentencepiece_model(*lists, add_dummy_prefix=has_prefix)


def byte_level_of(found):
    """
    The model of bpe.py in the checked fields of TOKENIZER, as bytes; None if its pattern is
    another.
    """
    names = {theirs: ours for ours, theirs in PRE_TOKENIZERS.items()}
    pattern_name = names.get(found.get("pre"))
    tokens, types, merges = found["tokens"], found["token_type"], found.get("merges")
    bos = found.get("bos_token_id")
    if not (pattern_name and merges):
        return None
    special = [i for i, kind in enumerate(types) if kind == 3]
    if bos not in special or bos != found.get("eos_token_id"):
        return None
    special.sort(key=lambda i: i != bos)  # the first begins texts
    try:
        names = {i: tokens[i] for i, kind in enumerate(types) if kind == 1}
        names |= {i: tokens[i] for i in special}
        texts = [tokens[i] for i in special]
        return BPETokenizer.from_names(names, merges, texts, pattern_name).to_bytes()
    except (KeyError, ValueError, AttributeError, UserError):
        return None
