"""
GGUF, the file format of llama.cpp and Ollama. Plain Llama is written as its architecture `llama`,
`--arch=portable` as `qwen3`, with the tokenizer inside. Every other option is refused by name.

In `llama` RoPE rotates adjacent pairs of a head, as ours does; in `qwen3` it rotates halves.

To add an architecture, add its row to ARCHITECTURES and its tensors to NAMES in formats/tensors.py.
"""

import math
from functools import partial

import numpy as np
import torch

from bpe import BPETokenizer, as_visible
from configurator import UserError
from formats.tensors import (
    Target,
    build_model,
    check_dtype_range,
    expect,
    expect_neutral,
    exported,
    gguf_name,
    misfit,
    shortest,
    unsupported_field,
)
from model import ModelArgs
from system.fields import is_bool, is_count, is_number, is_string, list_of
from system.files import atomic_write
from system.remote import need, reason
from tokenizer import ByteLevel, sentencepiece_model

# Fields of ModelArgs and their keys, which come after the architecture and a dot
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
# Keys that our model lacks, with the values that change nothing
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
# how a model was trained, with orders and on separate documents, is not stored
PLAIN = {*KEYS, "tie_embeddings", "orders", "separate_documents"}
ARCHITECTURES = {
    "llama": Target(PLAIN),
    "qwen3": Target({*PLAIN, "qk_norm"}, required=["qk_norm"]),
}

# --dtype: llama.cpp's types for matrices and for the file; vectors are F32 in all of them
GGUF_DTYPES = {
    "fp32": ("F32", "ALL_F32"),
    "fp16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
ARRAY = 9  # the type of a field that is a list
MAX_PARTS = 1 << 22  # arrays in a file's fields, 250 bytes each; 256,000 tokens take 1.5 million
BLOCK = 32  # values that share a scale in Q8_0 and Q4_0
MAX_VALUE = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}  # scales are F16


def architecture(args):
    """Return the name of the first architecture that can store ModelArgs, or raise UserError."""
    for name, target in ARCHITECTURES.items():
        if not misfit(args, target):
            return name
    field = unsupported_field(args, ARCHITECTURES["qwen3"].supported)  # a superset of llama's
    raise UserError(
        f"gguf cannot store {field.name} = {getattr(args, field.name)}: use --format=bin or hf, or "
        f"train a model with --arch=llama or portable and --{field.name}={field.default}"
    )


def check_tokenizer(tokenizer):
    """
    Raise UserError for a tokenizer that llama.cpp cannot run. Returns the normalizer_spec of a
    SentencePiece model, else None.
    """
    if tokenizer is None:
        raise UserError("gguf needs the tokenizer: pass its .model with --tokenizer=PATH")
    path, instead = tokenizer.model_path, "use --format=bin or hf"
    if isinstance(tokenizer, ByteLevel):
        tokenizer.bpe.names()  # raises UserError if two names are equal
        if not tokenizer.bpe.makes_its_tokens():  # llama-bpe takes whole words from the vocabulary
            raise UserError(
                f"gguf cannot store {path}, because its merges do not make all its tokens: "
                f"{instead}"
            )
        return None
    spec = tokenizer.check_plain("gguf")
    if spec.remove_extra_whitespaces:
        raise UserError(f"gguf cannot store {path}, which collapses spaces: {instead}")
    if not tokenizer.byte_fallback:  # llama.cpp aborts at the first character it lacks
        raise UserError(f"gguf cannot store {path}, which has no byte pieces: {instead}")
    return spec


def write_gguf(model, path, dtype, tokenizer, facts):
    """
    Write a Transformer and its Tokenizer as a GGUF file; an error leaves no partial file. With q8_0
    and q4_0, matrices with a row length that is not a multiple of 32 are F16, as in llama.cpp.
    """
    gguf, kind, spec = need("gguf"), architecture(model.args), check_tokenizer(tokenizer)
    try:
        with atomic_write(path) as part:
            f = gguf.GGUFWriter(part.name, kind)
            f.add_name(facts.get("title", "storyteller"))
            f.add_license(facts.get("license", "unknown"))
            f.add_languages([facts.get("language", "en")])
            put_args(f, kind, model.args)
            f.add_file_type(getattr(gguf.LlamaFileType, GGUF_DTYPES[dtype][1]))
            f.add_quantization_version(gguf.GGML_QUANT_VERSION)
            put_tokenizer(f, tokenizer, spec)
            in_f16 = put_tensors(f, kind, model, dtype)
            f.write_header_to_file()
            f.write_kv_data_to_file()
            f.write_tensors_to_file(progress=False)
            f.close()
    except OSError as e:
        raise UserError(f"cannot write {path}: {reason(e)}") from None
    if kind == "qwen3" and not isinstance(tokenizer, ByteLevel):
        print(
            "note: llama.cpp can run this file, but Ollama's qwen3 engine supports only byte-level "
            "BPE; for Ollama, train with --arch=llama"
        )
    if in_f16:
        print(
            f"note: {len(in_f16)} tensors, such as {in_f16[0]}, are stored as F16, because their "
            f"row length is not a multiple of {BLOCK}"
        )


def put_args(f, kind, args):
    """Add the fields of ModelArgs."""
    for name, key in KEYS.items():
        value = getattr(args, name)
        put = f.add_float32 if isinstance(value, float) else f.add_uint32
        put(f"{kind}.{key}", value)
    for key in HEAD_KEYS:
        f.add_uint32(f"{kind}.{key}", args.head_dim)


def put_tensors(f, kind, model, dtype):
    """Add all tensors of a Transformer; return the names of those stored as F16 instead."""
    gguf, in_f16 = need("gguf"), []
    types = gguf.GGMLQuantizationType
    for name, tensor in exported(model, in_halves=kind == "qwen3"):
        quant_type = types.F32
        if tensor.dim() > 1:
            quant_type = getattr(types, GGUF_DTYPES[dtype][0])
            if dtype in ("q8_0", "q4_0") and tensor.shape[1] % BLOCK:
                quant_type = types.F16
                in_f16.append(gguf_name(name))
        check_dtype_range(name, tensor, MAX_VALUE.get(quant_type.name, math.inf), dtype)
        values = np.ascontiguousarray(tensor.float().numpy())
        values = gguf.quants.quantize(values, quant_type)
        f.add_tensor(gguf_name(name), values, raw_dtype=quant_type)
    return in_f16


PRE_TOKENIZERS = {"gpt2": "gpt-2", "gpt4": "llama-bpe"}  # llama.cpp's names for our patterns


def put_tokenizer(f, tokenizer, spec):
    """Add pieces, scores or merges, and types. As in run.c, a text ends at EOS or the next BOS."""
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
    """Return the type of a piece; GGUF and SentencePiece use the same codes."""
    types = {2: sp.is_unknown, 3: sp.is_control, 5: sp.is_unused, 6: sp.is_byte}
    return next((code for code, has_type in types.items() if has_type(i)), 1)


# ---- reading


def read_gguf(path):
    """
    Return the Transformer of a llama or qwen3 GGUF file, float32, on the CPU, and the file's fields
    for tokenizer_of(). The tensors may have any type that the gguf package reads. Raises UserError.
    """
    gguf = need("gguf")
    try:
        reader = open_gguf(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        check_offsets(reader)
    except OSError:
        raise
    except Exception as e:  # a damaged file can cause any error
        raise UserError(f"{path} is damaged or not a GGUF file: {e}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    args = args_of(fields, tensors, path)

    def dequantized(tensor):
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            expected = "a type that the gguf package can read"
            expect(False, path, tensor.name, tensor.tensor_type.name, expected)
        return torch.from_numpy(np.array(values, np.float32)).view(shape_of(tensor))

    source = {name: (shape_of(t), partial(dequantized, t)) for name, t in tensors.items()}
    in_halves = fields["general.architecture"] == "qwen3"
    return build_model(args, source, path, gguf_name, in_halves), fields


def check_offsets(reader):
    """Raise ValueError unless the tensors fill the file without gaps, as llama.cpp writes them."""
    offset, alignment = reader.data_offset, int(reader.alignment)
    for tensor in reader.tensors:
        if tensor.data_offset != offset:
            raise ValueError(f"{tensor.name} starts at {tensor.data_offset}, expected {offset}")
        offset += tensor.n_bytes + -tensor.n_bytes % alignment
    if not 0 <= offset - len(reader.data) < alignment:  # the last tensor may lack padding
        raise ValueError(f"it has {len(reader.data)} bytes, but its tensors end at {offset}")


def shape_of(tensor):
    return tuple(int(n) for n in reversed(tensor.shape))


def args_of(fields, tensors, path):
    """Return the ModelArgs of a file; raise UserError for a model that ours cannot compute."""
    if (n := fields.get("split.count", 1)) > 1:
        raise UserError(
            f"{path} is one of {n} parts of a split GGUF file: join them with llama.cpp's "
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
    Open a file with gguf's reader. Raises ValueError if the file ends before the lengths it claims,
    or has so many fields that they could exhaust memory.
    """

    class Reader(need("gguf").GGUFReader):
        n_parts = 0  # arrays read

        def _get(self, offset, dtype, count=1, override_order=None):
            self.data = self.data.view(np.ndarray)  # slices of a memmap take far more memory
            self.n_parts += 1
            if self.n_parts > MAX_PARTS:
                raise ValueError("it has too many fields")
            values = super()._get(offset, dtype, count, override_order)
            if len(values) < count:  # gguf itself would keep looping past the end
                raise ValueError(f"it ends at byte {len(self.data)}, within {count} values")
            return values

        def _get_field_parts(self, orig_offs, raw_type):
            """Read an array of numbers as one part; gguf makes each number a part."""
            kinds = self.gguf_scalar_to_np
            if raw_type == ARRAY and (kind := self._get(orig_offs, np.uint32))[0] in kinds:
                size = self._get(orig_offs + 4, np.uint64)
                values = self._get(orig_offs + 12, kinds[kind[0]], size[0])
                return 12 + values.nbytes, [kind, size, values], [2], [ARRAY, kind[0]]
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader(path)


# Checks of the tokenizer's fields, tokenizer.ggml.*
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
    Return the tokenizer model in a GGUF file's fields, as bytes, or None for a kind that we do not
    support. Raises UserError if its fields are inconsistent.
    """
    values = {}
    for name, check in TOKENIZER.items():
        if (key := f"tokenizer.ggml.{name}") in fields:
            values[name] = fields[key]
            expect(check(values[name]), path, key, values[name], "what llama.cpp writes there")
    if not values.get("add_bos_token", True):  # our texts always start with BOS
        return None
    if values.get("model") not in ("gpt2", "llama") or "tokens" not in values:
        return None
    per_token = ("scores", "token_type") if values["model"] == "llama" else ("token_type",)
    n = len(values["tokens"])
    for name in per_token:
        size = len(values.get(name, ()))
        expect(size == n, path, f"tokenizer.ggml.{name}", f"{size} values", f"{n}, one per token")
    if values["model"] == "gpt2":
        return byte_level_of(values)
    ids = [values.get(f"{name}_token_id", i) for i, name in enumerate(("unknown", "bos", "eos"))]
    expect(ids == [0, 1, 2], path, "the ids of unk, BOS and EOS", ids, "[0, 1, 2] as in Llama 2")
    has_prefix = values.get("add_space_prefix", True)
    lists = (values[name] for name in ("tokens", "scores", "token_type"))
    return sentencepiece_model(*lists, add_dummy_prefix=has_prefix)


def byte_level_of(values):
    """
    Return the bpe.py model in the checked fields of TOKENIZER, as bytes, or None if bpe.py has no
    such model.
    """
    names = {theirs: ours for ours, theirs in PRE_TOKENIZERS.items()}
    pattern_name = names.get(values.get("pre"))
    tokens, types, merges = values["tokens"], values["token_type"], values.get("merges")
    bos = values.get("bos_token_id")
    if not (pattern_name and merges):
        return None
    special = [i for i, kind in enumerate(types) if kind == 3]
    if bos not in special or bos != values.get("eos_token_id"):
        return None
    special.sort(key=lambda i: i != bos)  # BOS must come first
    try:
        names = {i: tokens[i] for i, kind in enumerate(types) if kind == 1}
        names |= {i: tokens[i] for i in special}
        texts = [tokens[i] for i in special]
        return BPETokenizer.from_names(names, merges, texts, pattern_name).to_bytes()
    except (KeyError, ValueError, AttributeError, UserError):
        return None
