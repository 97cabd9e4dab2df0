"""Models with random weights, and tokenizers for them: enough to measure how fast an engine is."""

import functools

import torch

from model import ModelArgs, Transformer
from tokenizer import SentencePiece, sentencepiece_model

# shapes, most of them with llama2.c's names
MODELS = {
    "260K": {"dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 172},
    "15M": {"dim": 288, "n_layers": 6, "n_heads": 6},
    "110M": {"dim": 768, "n_layers": 12, "n_heads": 12},
    "360M": {"dim": 960, "n_layers": 32, "n_heads": 15, "n_kv_heads": 5},
}
VOCABULARIES = {"260K": 512, "15M": 32000, "110M": 32000, "360M": 49152}


def random_transformer(name):
    """Return a model of MODELS, about as certain as a trained one, that rarely ends a text."""
    torch.manual_seed(1)
    args = ModelArgs(**MODELS[name], vocab_size=VOCABULARIES[name], max_seq_len=512)
    model = Transformer(args)
    with torch.no_grad():
        model.tok_embeddings.weight[1:3] *= 0.01  # BOS and EOS
        for layer in model.layers:  # or the tied head would always repeat the previous token
            layer.attention.wo.weight *= 30
            layer.feed_forward.w2.weight *= 30
        # logits of std 5: then 10 to 100 of 32,000 tokens have 0.9 of the probability
        model.norm.weight *= 5 / (model.tok_embeddings.weight.std() * args.dim**0.5)
    return model


@functools.cache
def fake_tokenizer(size):
    """Return a SentencePiece tokenizer of `size` pieces, mostly meaningless."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [2, 3, 3] + [6] * 256 + [1] * (size - len(pieces))
    pieces += [f"p{i}" for i in range(len(pieces), size)]
    return SentencePiece("", sentencepiece_model(pieces, [-float(i) for i in range(size)], types))
