"""llama.cpp runs our GGUF files, through llama-cpp-python: make test-peers."""

import numpy as np
import pytest
import torch
from conftest import random_model
from test_formats import CASES, IN_GGUF, close, sized
from test_tokenizer import c_ids, generated_texts

from formats import gguf as gguffile
from formats import huggingface

pytestmark = pytest.mark.peers
F32 = 0  # GGML's id of this type, for the key/value cache
NAMES = [n for n, (o, kind) in CASES.items() if kind in IN_GGUF and "sliding_window" not in o]


def llama(path, **options):
    from llama_cpp import Llama

    return Llama(str(path), verbose=False, n_threads=1, type_k=F32, type_v=F32, **options)


@pytest.mark.parametrize("dtype", gguffile.GGUF_DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_computes_our_logits_and_text(tmp_path, tokenizers, name, dtype):
    """Other dtypes than fp32 are compared with the model as read back, and by logits only."""
    tokenizer, path = tokenizers[512], tmp_path / "model.gguf"
    sizes = {"dim": 64, "n_heads": 4, "hidden_dim": 96, "max_seq_len": 256}
    model = sized(tokenizer, **{**CASES[name][0], **sizes})
    gguffile.write_gguf(model, path, dtype, tokenizer, {})
    model = gguffile.read_gguf(path)[0].eval()
    prompt = "Once upon a time, Zoë saw"
    ids = tokenizer.encode(prompt)
    peer = llama(path, n_ctx=256, logits_all=True)
    assert peer.tokenize(prompt.encode()) == ids
    peer.eval(ids)
    logits = torch.from_numpy(np.array(peer.scores[: len(ids)]))
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    # llama.cpp's activations have 8 bits in quantized formats, 16 in fp16 and bf16
    worst = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}.get(dtype, 0.1)
    assert (logits - expected).abs().max() <= worst * expected.abs().max()
    if dtype == "fp32":
        assert close(logits, expected)
        our_ids, peer_ids = list(model.generate(ids, 64, temperature=0)), []
        peer.reset()
        for token in peer.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            peer_ids.append(int(token))
            if len(peer_ids) == len(our_ids):
                break
        assert peer_ids == our_ids and len(our_ids) == 64


@pytest.mark.parametrize("which", [512, 1500, "gpt2", "gpt4"])
def test_ids_are_the_same_everywhere(tmp_path, tokenizers, builds, which):
    """Ours, llama.cpp's, run.c's and AutoTokenizer's agree on thousands of lines."""
    from transformers import AutoTokenizer

    tokenizer, path = tokenizers[which], tmp_path / "model.gguf"
    model = sized(tokenizer)
    gguffile.write_gguf(model, path, "fp32", tokenizer, {})
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", tokenizer, {})
    auto = AutoTokenizer.from_pretrained(tmp_path / "hf")
    peer = llama(path, vocab_only=True, n_ctx=32)
    texts = [*generated_texts(4000, seed=5)]
    texts += [c * n for c in ("a", " ", "\n", "ha", "é") for n in range(24)]
    bytes_ = [text.encode() for text in texts]
    in_c = c_ids(builds, tokenizer, bytes_)
    for text, theirs in zip(bytes_, in_c, strict=True):
        ids = tokenizer.encode(text)
        assert theirs == ids and peer.tokenize(text) == ids, text
        assert auto(text.decode())["input_ids"] == ids, text


def test_llama_cpp_stops_at_bos_of_byte_level_bpe(tmp_path, tokenizers):
    from llama_cpp import llama_cpp

    tokenizer, path = tokenizers["gpt2"], tmp_path / "model.gguf"
    gguffile.write_gguf(sized(tokenizer), path, "fp32", tokenizer, {})
    peer = llama(path, vocab_only=True, n_ctx=32)
    vocab = llama_cpp.llama_model_get_vocab(peer.model)
    assert llama_cpp.llama_vocab_is_eog(vocab, tokenizer.bos_id)
    assert peer.token_bos() == peer.token_eos() == tokenizer.bos_id
    text = "a<|endoftext|> b<|end|>"
    assert peer.tokenize(text.encode(), special=True) == tokenizer.encode(text)


def test_llama_cpp_stops_at_bos_and_eos(tmp_path, tokenizers):
    """As in our engine. Text that looks like a special token stays text."""
    path = tmp_path / "model.gguf"
    gguffile.write_gguf(random_model(vocab_size=512), path, "fp32", tokenizers[512], {})
    peer = llama(path, vocab_only=True, n_ctx=32)
    from llama_cpp import llama_cpp

    vocab = llama_cpp.llama_model_get_vocab(peer.model)
    assert llama_cpp.llama_vocab_is_eog(vocab, 1) and llama_cpp.llama_vocab_is_eog(vocab, 2)
    assert peer.token_bos() == 1 and peer.token_eos() == 2
    text = "a</s> <s>"
    assert peer.tokenize(text.encode(), special=False) == tokenizers[512].encode(text)
