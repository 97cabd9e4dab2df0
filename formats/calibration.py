"""
Calibration: int4 matrices that keep what a model computes, instead of its weights.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds a matrix column by column. As far as the inputs
of its product are correlated, later columns make up for the rounding errors of earlier ones. The
inputs are those of a text, or of stories that the model tells itself. Matrices are rounded in the
order of a forward pass, so each one's inputs come from rounded matrices, and it also makes up for
their errors, as in GPTAQ (Li et al. 2025, arXiv:2504.02692).
"""

import copy
import itertools

import torch

from configurator import UserError
from formats.modelbin import DTYPES, is_vector, quantized, tensors, values_of
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
    calibration, as without a tokenizer or for weights that are not finite. Raises UserError if the
    text is empty or cannot be read.
    """
    model.eval()  # the stories, too, without dropout
    is_finite = all(bool(p.isfinite().all()) for p in model.parameters())
    if text not in ("", NOT_DONE) and tokenizer is None:
        raise UserError("calibration needs the tokenizer of the text: pass --tokenizer=PATH")
    if text == NOT_DONE or tokenizer is None or not is_finite:
        return {}
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
    window = min(model.args.max_seq_len, MAX_WINDOW, len(ids))
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
    start = tokenizer.encode("") or [0]  # a BOS, or if there is none, any token
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
    copied = copy.deepcopy(model).eval()  # rounded matrix by matrix
    matrices = {  # views of its parameters
        (name, i): part
        for name, parts in tensors(copied)
        if not is_vector(name, parts)
        for i, part in enumerate(parts)
    }

    def replace(names, i, x=None, exact=None):
        """
        Round the matrices of layer or table i with these names. Their inputs are x (..., columns)
        after the rounding of earlier ones, and were `exact` before. A table has none.
        """
        solved = None if x is None else solve(x, exact)
        for name in names:
            matrix = matrices[name, i]
            result = gptq(matrix, *solved, codes) if solved else quantized(matrix, codes)
            results[name, i] = result
            matrix.copy_(values_of(*result, codes))

    def layer(i, block, original, exact_x, *exact_context):
        """Return a Block.compute() that also rounds the matrices; `original` has the exact ones."""
        blocks, is_gated = (block, original), block.feed_forward.is_gated

        def compute(x, *context):
            streams, contexts = [x, exact_x], (context, exact_context)
            # of each: with the rounded matrices, and with the exact ones
            h = [b.attention_norm(x) for b, x in zip(blocks, streams, strict=True)]
            replace(("attention.wq", "attention.wk", "attention.wv"), i, *h)
            h = [b.attention.mixed(h, *c) for b, h, c in zip(blocks, h, contexts, strict=True)]
            replace(("attention.wo",), i, *h)
            for k, b in enumerate(blocks):
                streams[k] = streams[k] + linear(h[k], b.attention.wo.weight)
            h = [b.ffn_norm(x) for b, x in zip(blocks, streams, strict=True)]
            replace(("feed_forward.w1", "feed_forward.w3")[: 1 + is_gated], i, *h)
            h = [b.feed_forward.hidden(h) for b, h in zip(blocks, h, strict=True)]
            replace(("feed_forward.w2",), i, *h)
            return streams[0] + linear(h[0], block.feed_forward.w2.weight)

        return compute

    inputs, heads = [], []  # of the layers: (x, context); of the head: x
    hooks = [b.register_forward_pre_hook(lambda b, args: inputs.append(args)) for b in model.layers]
    hooks.append(model.norm.register_forward_hook(lambda norm, args, x: heads.append(x)))
    model(tokens, tokens)  # the loss needs less memory than the logits
    for hook in hooks:
        hook.remove()
    if model.args.tie_embeddings:  # the embedding comes first, and it is the head
        replace(("tok_embeddings",), 0, heads[0], heads[0])
    for name, i in matrices:
        if name.endswith("embeddings") and (name, i) not in results:
            replace((name,), i)
    for i, block in enumerate(copied.layers):
        block.compute = layer(i, block, model.layers[i], *inputs[i])
    if not model.args.tie_embeddings:
        copied.norm.register_forward_hook(lambda *args: replace(("output",), 0, args[2], heads[0]))
    copied(tokens, tokens)
    return results


def solve(x, exact):
    """
    Return what gptq() needs of the inputs of a product: x (..., columns), and `exact` of the same
    shape, which they should be. None if they are too large or too small to be multiplied.
    """
    x, exact = x.flatten(0, -2).float(), exact.flatten(0, -2).float()
    h = (x.T @ x).double()
    diagonal = h.diagonal()  # a view
    diagonal[diagonal == 0] = 1  # an input that is always 0
    diagonal += DAMPING * diagonal.mean()
    try:
        root = torch.linalg.cholesky(h)
        # w + w @ correction: the matrix whose products with x are closest to w's with `exact`
        correction = torch.cholesky_solve(((exact - x).T @ x).double().T, root).T
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    except torch.linalg.LinAlgError:
        return None
    return correction.float(), inverse.float()


def gptq(matrix, correction, inverse, codes):
    """
    Round a matrix (rows, columns) as quantized() does, but with the least error in its products.
    correction and inverse (columns, columns): from solve().
    """
    w = matrix.float()
    w = w + w @ correction
    integers, scales = [], []
    for start in range(0, w.shape[1], codes.group):
        end = start + codes.group
        group, factors = w[:, start:end], inverse[start:end, start:end]
        # what an error in a column costs after later columns have made up for it
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
