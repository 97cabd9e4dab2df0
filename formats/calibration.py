"""
Calibration: int4 matrices that keep what a model computes, instead of its weights.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds a matrix column by column. As far as the inputs
of its product are correlated, later columns make up for the rounding errors of earlier ones. The
inputs are those of a text, or of stories that the model tells itself. Matrices are rounded in the
order of a forward pass, so each one's inputs come from rounded matrices.
"""

import copy
import itertools

import torch

from configurator import UserError
from formats.modelbin import DTYPES, is_vector, quantized, tensors
from model import linear
from system.progress import progress
from system.threads import Threads
from text.corpus import books_among, text_files
from text.documents import stream_documents

N_TOKENS, MAX_WINDOW = 1 << 14, 1024  # tokens of text, at most so many in a window
STORIES, MAX_STORY = 64, 400  # stories told at once, and tokens of each
DAMPING = 0.01  # of the diagonal of the inputs' products, relative to its mean
NOT_DONE = "none"  # instead of a text: round to the nearest value


def calibrate(model, tokenizer, text, dtype="int4"):
    """
    Return {(name, i): (integers, scales)} of all matrices for export_model(), where i is the layer
    or table. text: a file or folder to calibrate on; "": stories of the model; "none": {} without
    calibration. Raises UserError if the text is empty or cannot be read.
    """
    if text == NOT_DONE or tokenizer is None:
        return {}
    window = min(model.args.max_seq_len, MAX_WINDOW)
    stream = read_tokens(text, tokenizer) if text else told_tokens(model, tokenizer)
    ids = []
    with progress(total=N_TOKENS, unit=" tokens", desc="calibration") as bar:
        for more in stream:
            ids += more
            bar.update(min(len(ids), N_TOKENS) - bar.n)
            if len(ids) >= N_TOKENS:
                break
    if len(ids) < 2:
        raise UserError(f"{text} contains no text to calibrate on: choose another --calibrate=TEXT")
    window = min(window, len(ids))
    n_windows = min(N_TOKENS, len(ids)) // window
    return rounded(model, torch.tensor(ids[: n_windows * window]).view(n_windows, window), dtype)


def read_tokens(text, tokenizer):
    files = text_files(text)
    books = books_among(files)
    for path in files:
        for document, _ in stream_documents(path, path in books):
            yield tokenizer.encode(document)


def told_tokens(model, tokenizer):
    """Yield the ids of stories by the model, without end, always the same."""
    start = tokenizer.encode("") or [0]
    generator, threads = torch.Generator().manual_seed(0), Threads(torch.device("cpu"))
    while True:
        stories = [list(start) for _ in range(STORIES)]
        draws = torch.rand(STORIES, MAX_STORY, generator=generator, dtype=torch.float64)
        steps = model.generate_batch([start] * STORIES, draws, stop=tokenizer.stop)
        for step in threads.watched(steps):
            for story, token in zip(stories, step, strict=True):
                story += [token] * (token is not None)
        yield list(itertools.chain.from_iterable(stories))


@torch.no_grad()
def rounded(model, tokens, dtype):
    """
    Return {(name, i): (integers, scales)} of the matrices of a model, rounded for the inputs that
    tokens (n, T) give them.
    """
    codes, results = DTYPES[dtype], {}
    model = copy.deepcopy(model).eval()
    matrices = {  # views of its parameters
        (name, i): part
        for name, parts in tensors(model)
        if not is_vector(name, parts)
        for i, part in enumerate(parts)
    }

    def replace(key, x=None):
        """Round a matrix whose inputs are x (..., columns), or None for a table, in place."""
        matrix = matrices[key]
        x = None if x is None else x.flatten(0, -2).float()
        result = quantized(matrix, codes) if x is None else gptq(matrix, x.T @ x, codes)
        results[key] = result
        matrix.copy_(values_of(*result, codes))

    def layer(i, block):
        """Return a Block.compute() that also rounds the matrices."""
        attention, ffn = block.attention, block.feed_forward

        def compute(x, *context):
            h = block.attention_norm(x)
            for name in ("wq", "wk", "wv"):
                replace((f"attention.{name}", i), h)
            h = attention.mixed(h, *context)
            replace(("attention.wo", i), h)
            x = x + linear(h, attention.wo.weight)
            h = block.ffn_norm(x)
            for name in ("w1", "w3") if ffn.is_gated else ("w1",):
                replace((f"feed_forward.{name}", i), h)
            h = ffn.hidden(h)
            replace(("feed_forward.w2", i), h)
            return x + linear(h, ffn.w2.weight)

        return compute

    def head(key):
        """Run the model, and round its head."""
        hook = model.norm.register_forward_hook(lambda module, x, y: replace(key, y))
        model(tokens, tokens)  # the loss needs less memory than the logits
        hook.remove()

    if is_tied := model.args.tie_embeddings:  # the embedding comes first; it is also the head
        head(("tok_embeddings", 0))
    for key in matrices:
        if key[0].endswith("embeddings") and key not in results:
            replace(key)
    for i, block in enumerate(model.layers):
        block.compute = layer(i, block)
    if is_tied:
        model(tokens, tokens)
    else:
        head(("output", 0))
    return results


def values_of(integers, scales, codes):
    """Return the matrix that a quantized one stands for, float32."""
    wide = scales.float().repeat_interleave(codes.group, 1)[:, : integers.shape[1]]
    return (integers.float() - codes.zero) * wide


def gptq(matrix, products, codes):
    """
    Round a matrix (rows, columns) as quantized() does, but with the least error in its products.
    products (columns, columns): the sum of x xᵀ of the inputs x.
    """
    w, h = matrix.float().clone(), products.double()
    diagonal = h.diagonal()  # a view
    diagonal[diagonal == 0] = 1  # an input that is always 0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    inverse = torch.linalg.cholesky(inverse, upper=True).float()
    integers, scales = [], []
    for start in range(0, w.shape[1], codes.group):
        end = start + codes.group
        group, factors = w[:, start:end], inverse[start:end, start:end]
        importance = factors.diagonal() ** -2
        scale = quantized(group, codes, importance)[1].float()  # (rows, 1)
        divisor = torch.where(scale == 0, 1, scale)
        errors = torch.empty_like(group)
        for j in range(group.shape[1]):
            q = (group[:, j : j + 1] / divisor).round().clamp(-codes.zero, codes.zero - 1)
            errors[:, j : j + 1] = (group[:, j : j + 1] - q * scale) / factors[j, j]
            group[:, j + 1 :] -= errors[:, j : j + 1] * factors[j, j + 1 :]
            integers.append(q + codes.zero)
        w[:, end:] -= errors @ inverse[start:end, end:]
        scales.append(scale)
    return torch.cat(integers, 1).to(torch.uint8), torch.cat(scales, 1).bfloat16()
