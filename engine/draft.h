// Guesses of the next tokens, from a table of what follows one to four tokens in the training text;
// text/draft.py writes it and describes its layout. The last token and the guesses run as one batch,
// which takes little longer than one token while memory limits the speed. If the story goes on as
// guessed, the logits after the guess are there already (speculative decoding, Leviathan et al.
// 2023, arXiv:2211.17192). Guesses change no bit of the logits: a seed tells the same story as
// without them.

enum {
    DRAFT_HEADER = 24,  // bytes
    DRAFT_VERSION = 1,
    MAX_LOOK_BACK = 4,  // tokens
    MAX_GUESSES = 3,
    // How likely all guesses must be right, of 255: a model in the caches computes longer for more
    // tokens, but one in memory is limited by reading its weights once.
    MIN_ODDS = 25, MIN_ODDS_CACHED = 80,
    CACHED = 32 << 20,  // bytes
};

typedef struct {
    uint32_t hash;           // of the tokens before, see hash_of()
    uint32_t token_and_odds; // the next token, and in the upper byte its probability of 255; 0: free
} Slot;

typedef struct {
    const uint8_t *slots;  // (n_slots) Slot, a hash table with linear probing
    size_t n_slots;        // 0: no guesses
    uint32_t min_odds;
} Draft;

static const char DRAFT_HINT[] = "make one with: python tinystories.py draft";

// The hash of n tokens, as in hashes_of() of text/draft.py: its upper half is the place in the
// table, its lower half identifies the tokens.
static uint64_t hash_of(const int *tokens, size_t n) {
    uint64_t hash = n;
    for (size_t i = 0; i < n; i++) {
        hash = (hash ^ (uint64_t)tokens[i]) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
    }
    return hash;
}

static Slot slot_at(const Draft *d, size_t i) {
    Slot slot;
    memcpy(&slot, d->slots + i * sizeof slot, sizeof slot);
    return slot;
}

// Load the guesses for a tokenizer, and for a model that reads matrix_bytes for every token.
static Draft load_draft(File file, const Tokenizer *t, uint64_t matrix_bytes) {
    uint32_t header[DRAFT_HEADER / 4 - 1] = {0};
    if (file.size >= DRAFT_HEADER) memcpy(header, file.data + 4, sizeof header);
    size_t n_slots = header[3], vocab_size = header[2];
    if (file.size < DRAFT_HEADER || memcmp(file.data, "l2dr", 4) || header[0] != DRAFT_VERSION)
        die("%s is not a table of guesses of version %d; %s", file.path, DRAFT_VERSION, DRAFT_HINT);
    if (file.size - DRAFT_HEADER != n_slots * sizeof(Slot))
        die("%s is damaged: it has %zu bytes, but its header needs %zu; %s", file.path, file.size,
            DRAFT_HEADER + n_slots * sizeof(Slot), DRAFT_HINT);
    if (header[1] != fingerprint(t) || vocab_size != (size_t)t->vocab_size)
        die("%s was made for another tokenizer than %s: use a table of the model's own text",
            file.path, t->file.path);
    Draft d = {.slots = file.data + DRAFT_HEADER, .n_slots = n_slots,
               .min_odds = matrix_bytes > CACHED ? MIN_ODDS : MIN_ODDS_CACHED};
    size_t n_free = 0;
    for (size_t i = 0; i < n_slots; i++) {
        uint32_t both = slot_at(&d, i).token_and_odds;
        n_free += !both;
        if ((both & 0xFFFFFF) >= vocab_size)
            die("%s is damaged: slot %zu has token %u, expected ids below %zu; %s", file.path, i,
                both & 0xFFFFFF, vocab_size, DRAFT_HINT);
    }
    if (!n_free) die("%s is damaged: no slot is free; %s", file.path, DRAFT_HINT);
    return d;
}

// Return what the table says about n tokens: 0, or the next token and its odds.
static uint32_t look_up(const Draft *d, const int *tokens, size_t n) {
    uint64_t hash = hash_of(tokens, n);
    size_t i = (size_t)((hash >> 32) * d->n_slots >> 32);
    for (Slot slot; (slot = slot_at(d, i)).token_and_odds; i = i + 1 < d->n_slots ? i + 1 : 0)
        if (slot.hash == (uint32_t)hash) return slot.token_and_odds;
    return 0;
}

// Write guesses of at most `max` tokens after the n in `tokens`. Returns their number.
static size_t guess(const Draft *d, int *tokens, size_t n, size_t max) {
    size_t count = 0;
    uint32_t odds = 255;
    for (; d->n_slots && count < max; count++) {
        size_t length = n + count, k = length < MAX_LOOK_BACK ? length : MAX_LOOK_BACK;
        uint32_t both = 0;
        while (k && !(both = look_up(d, tokens + length - k, k))) k--;
        odds = odds * (both >> 24) / 255;
        if (odds < d->min_odds) break;
        tokens[length] = (int)(both & 0xFFFFFF);
    }
    return count;
}
