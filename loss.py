"""The loss: cross-entropy fused with the output head, in the model's dtype or in fp8."""

import math

import torch

from dataset import STRESSED


def cross_entropy(x, weight, targets, vocab_size, softcap=0.0, is_fp8=False, stress=1.0):
    """
    Return the mean cross-entropy of the next tokens in nats, float32.

    x (..., dim): hidden states; weight (rows, dim): the head, rows after vocab_size are padding;
    targets (...): int64, -1 for positions that do not count (without any, the loss is 0), those
    with the bit STRESSED count `stress` times; softcap: logit_softcap of ModelArgs; is_fp8:
    multiply with fp8_mm. With gradients, the probability of a target counts as 2e-38 or more,
    because train.py flushes denormal numbers to 0.
    """
    x, targets = x.flatten(0, -2), targets.flatten()
    # autograd.Function.forward cannot see whether gradients are enabled
    needs_gradients = torch.is_grad_enabled()
    args = vocab_size, softcap, needs_gradients, is_fp8, stress
    return CrossEntropy.apply(x, weight, targets, *args)


def weights_of(targets, stress):
    """Return how often each of targets (...) counts in cross_entropy(), float32 (...)."""
    is_stressed = (targets >= 0) & (targets & STRESSED != 0)
    return torch.where(is_stressed, stress, (targets >= 0).float())


class CrossEntropy(torch.autograd.Function):
    """
    cross_entropy() of x (N, dim) and targets (N,), some tokens at a time, so that the logits, the
    largest tensor of a step, are never all in memory. The forward pass also computes the gradients,
    while the logits are in the cache, as in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, needs_gradients, is_fp8, stress):
        w = weight.to(x.dtype)
        # logits that fit the cache of a CPU core; a GPU needs large products
        size = (1 << 19 if x.device.type == "cpu" else 1 << 27) // len(w)
        size = max(16, size // 16 * 16)  # tokens per piece; fp8_mm needs multiples of 16
        logits_buffer = x.new_empty(min(size, len(x)), len(w))  # shared by all pieces
        if needs_gradients:
            p_buffer = torch.empty_like(logits_buffer, dtype=torch.float32)
            dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        counts_of = weights_of(targets, stress)  # (N,)
        targets = targets.clamp(min=0) & ~STRESSED
        n = counts_of.sum().clamp(min=1)
        total = x.new_zeros((), dtype=torch.float32)
        for i in range(0, len(x), size):
            h, y = x[i : i + size], targets[i : i + size, None]  # (piece, dim), (piece, 1)
            counts = counts_of[i : i + size, None]  # (piece, 1)
            logits = logits_buffer[: len(h)]  # (piece, rows)
            z = logits.copy_(fp8_mm(h, w)) if is_fp8 else torch.mm(h, w.t(), out=logits)
            if softcap:
                capped = z.float().div_(softcap).tanh_()
                z = capped * softcap
            z[:, vocab_size:] = -math.inf
            if not needs_gradients:
                log_p = torch.log_softmax(z, -1, dtype=torch.float32)
                total -= (log_p.gather(1, y) * counts).sum()
                continue
            p = torch.softmax(z, -1, dtype=torch.float32, out=p_buffer[: len(h)])
            total -= (p.gather(1, y).clamp_(min=2e-38).log_() * counts).sum()
            # gradient of the sum with respect to the logits: p, minus 1 at the target
            p.scatter_add_(1, y, p.new_full((1, 1), -1.0).expand_as(y))
            if softcap:
                p *= 1 - capped.square_()
            d = logits.copy_(p)  # may overwrite z, which is no longer needed
            counts = counts.to(h.dtype)
            h = h * counts
            if is_fp8:
                dx[i : i + size] = fp8_mm(d, w.t(), torch.float8_e5m2)
                dw += fp8_mm(d.t(), h.t(), torch.float8_e5m2)
            else:
                torch.mm(d, w, out=dx[i : i + size])
                dw += d.t() @ h
            dx[i : i + size] *= counts
        if needs_gradients:
            ctx.save_for_backward(dx, dw, n)
        return total / n

    @staticmethod
    def backward(ctx, gradient):
        dx, dw, n = ctx.saved_tensors
        scale = gradient / n
        return dx * scale.to(dx.dtype), dw * scale, *[None] * 6


def fp8_mm(a, b, a_format=torch.float8_e4m3fn):
    """
    Multiply a (m, k) with the transpose of b (n, k) -> (m, n), in a's dtype. Both are rounded to 8
    bits with one scale each: e4m3 is the finer format, e5m2 has the range that gradients need
    (Micikevicius et al. 2022, arXiv:2209.05433). On GPUs, k and n must be multiples of 16.
    """
    rounded, scales = [], []
    for t, dtype in ((a, a_format), (b, torch.float8_e4m3fn)):
        scale = t.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
        rounded.append((t / scale).to(dtype).contiguous())
        scales.append(scale)
    return torch._scaled_mm(rounded[0], rounded[1].t(), *scales, out_dtype=a.dtype)
