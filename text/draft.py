"""
A table of guesses for `./run --draft`: what follows one to four tokens most often in the training
text. engine/draft.h reads it.

The file is little-endian: the bytes "l2dr", then five uint32: version (1), the tokenizer's
fingerprint, vocab_size, n_slots, and 0. Then come n_slots slots of two uint32: the lower half of a
context's hash, and the next token plus 2^24 times its odds, 1 to 255 (a share of 255); the second
is 0 if the slot is free. A context is in the slot that the upper half of its hash names, or in the
next free one.
"""

import struct

import numpy as np

from system.files import atomic_write

MAGIC, VERSION = b"l2dr", 1
HEADER = "<4s5I"
LOOK_BACK = 4  # tokens
MAX_SLOTS = 124_997  # a file of 1 MB
FULL = 0.8  # share of the slots that are used
MAX_TOKENS = 10_000_000  # of the text that are worth counting


def hashes_of(contexts):
    """Return the uint64 hashes of contexts, ids (n, length), as hash_of() in engine/draft.h."""
    hashes = np.full(len(contexts), contexts.shape[1], np.uint64)
    for column in contexts.T:
        hashes = (hashes ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(32)
    return hashes


def contexts_of(ids, length, bos_id):
    """
    Return all contexts of `length` tokens in ids (n_tokens), an array (n, length), and the tokens
    after them (n). Stories end at a BOS, so that one occurs only as the first token.
    """
    windows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)
    windows = windows[(windows[:, 1:] != bos_id).all(axis=1)]
    return windows[:, :-1], windows[:, -1]


def most_frequent(hashes, following):
    """
    Return the distinct hashes, sorted, the most frequent next token of each, how often that token
    follows, and how often any does.
    """
    order = np.lexsort((following, hashes))
    hashes, following = hashes[order], following[order]
    is_new = np.r_[True, (hashes[1:] != hashes[:-1]) | (following[1:] != following[:-1])]
    pairs = np.flatnonzero(is_new)
    counts = np.diff(np.r_[pairs, len(hashes)])
    hashes, following = hashes[pairs], following[pairs]
    first = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]])
    group = np.repeat(np.arange(len(first)), np.diff(np.r_[first, len(hashes)]))
    best = np.lexsort((-counts, group))[first]
    return hashes[first], following[best], counts[best], np.add.reduceat(counts, first)


def best_contexts(ids, bos_id, n_kept):
    """
    Return the contexts of ids (n_tokens) that help most, at most n_kept, as (hashes, next tokens,
    odds), where odds are 1 to 255. A context helps as often as its guess is right where that of the
    context without its first token is wrong.
    """
    rows, shorter = [], None
    for length in range(1, LOOK_BACK + 1):
        contexts, following = contexts_of(ids, length, bos_id)
        if not len(contexts):
            break
        hashes = hashes_of(contexts)
        known, tokens, counts, totals = most_frequent(hashes, following)
        gains = counts
        if shorter:
            guesses = shorter[1][np.searchsorted(shorter[0], hashes_of(contexts[:, 1:]))]
            right = np.searchsorted(known, hashes[guesses == following])
            gains = counts - np.bincount(right, minlength=len(known))
        odds = 255 * counts // (totals + 1)  # as if another token had followed once
        rows.append((gains, known, tokens, odds))
        shorter = known, tokens
    gains, hashes, tokens, odds = map(np.concatenate, zip(*rows, strict=True))
    best = np.argsort(-gains, kind="stable")[:n_kept]
    best = best[(gains[best] > 0) & (odds[best] > 0)]
    return hashes[best], tokens[best], odds[best]


def write_draft(path, ids, tokenizer, max_slots=MAX_SLOTS):
    """
    Write the table of guesses of ids, a text (n_tokens) with a BOS before each document. Returns
    the number of contexts in it.
    """
    found = best_contexts(ids, tokenizer.bos_id, int(FULL * max_slots))
    n_slots = int(len(found[0]) / FULL) + 1
    slots = np.zeros((n_slots, 2), "<u4")
    for hash_, token, odds in zip(*(column.tolist() for column in found), strict=True):
        i = (hash_ >> 32) * n_slots >> 32
        while slots[i, 1]:
            i = (i + 1) % n_slots
        slots[i] = hash_ & 0xFFFFFFFF, token | odds << 24
    about = VERSION, tokenizer.fingerprint, tokenizer.vocab_size, n_slots, 0
    with atomic_write(path) as f:
        f.write(struct.pack(HEADER, MAGIC, *about) + slots.tobytes())
    return len(found[0])
