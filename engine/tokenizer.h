// The tokenizer: SentencePiece BPE or byte-level BPE, from a file written by tokenizer.py. Both cut
// a text into symbols (characters or bytes) and merge neighbors, best pair first.

enum { UNK = 0, FIRST_PIECE = 3 };  // of SentencePiece; its BOS is 1, its EOS is 2
enum { OTHER = 1, LETTER = 2, NUMBER = 4, BLANK = 8, NEWLINE = 16, CODE_POINTS = 0x110000 };

typedef struct {
    const uint8_t *bytes;  // in the file; spaces are plain, not U+2581. Of a byte-level merge, its
                           // two ids
    size_t length;
    float score;  // the highest is merged first
    int id;
} Piece;

typedef struct {
    File file;
    int vocab_size, bos, eos;
    Piece *pieces;        // (vocab_size)
    int byte_id[256];     // the token of each byte, or -1
    bool byte_fallback;   // every byte has a token
    const Piece **table;  // hash table of merge results, NULL where free; the key is the result's
                          // bytes for SentencePiece, the two merged ids for byte-level BPE
    size_t table_size;    // a power of two
    bool is_byte_level;   // the fields below are for byte-level BPE
    bool is_gpt4;         // the pre-token pattern, see PATTERNS of bpe.py
    uint8_t *kinds;       // (CODE_POINTS) the kind of each character: OTHER, LETTER, ...
    const Piece **special;  // (n_special) tokens matched whole in a text, never cut or merged
    size_t n_special;
    bool starts_special[256];  // whether a special token starts with this byte
} Tokenizer;

// A bounds-checked cursor over untrusted bytes.
typedef struct {
    const File *file;
    size_t at;
} Cursor;

static const uint8_t *take(Cursor *c, size_t n) {
    if (n > c->file->size - c->at)
        die("%s is truncated or not a tokenizer file: at byte %zu it needs %zu bytes but has %zu; "
            "write it again with tokenizer.py", c->file->path, c->at, n, c->file->size - c->at);
    c->at += n;
    return c->file->data + c->at - n;
}

static uint32_t take_number(Cursor *c, const char *name, size_t min, size_t max) {
    uint32_t n;
    memcpy(&n, take(c, 4), 4);
    if (n < min || n > max)
        die("%s is damaged: at byte %zu the %s is %u, expected %zu to %zu; write it again with "
            "tokenizer.py", c->file->path, c->at - 4, name, n, min, max);
    return n;
}

_Noreturn static void die_damaged(const Tokenizer *t, const char *part, size_t i,
                                  const char *problem) {
    die("%s is damaged: %s %zu %s; write it again with tokenizer.py", t->file.path, part, i,
        problem);
}

static void check_n_pieces(const Tokenizer *t, size_t n) {
    if (n != (size_t)t->vocab_size)
        die("%s has %zu pieces, but the model's vocabulary has %d: "
            "use the tokenizer that the model was trained with (-z)", t->file.path, n,
            t->vocab_size);
}

static void make_table(Tokenizer *t, size_t n) {
    for (t->table_size = 4; t->table_size < 2 * n;) t->table_size *= 2;
    t->table = alloc(t->table_size, sizeof *t->table);
}

// The slot of a key in the table, or the free slot where it belongs.
static const Piece **find_slot(const Tokenizer *t, const void *bytes, size_t n) {
    uint64_t hash = 1469598103934665603u;  // FNV-1a
    for (size_t i = 0; i < n; i++) hash = (hash ^ ((const uint8_t *)bytes)[i]) * 1099511628211u;
    size_t slot = (hash ^ (hash >> 32)) & (t->table_size - 1);
    for (const Piece *p; (p = t->table[slot]); slot = (slot + 1) & (t->table_size - 1))
        if (p->length == n && !memcmp(p->bytes, bytes, n)) break;
    return &t->table[slot];
}

// The byte that a piece of the form <0xNN> stands for, or -1.
static int byte_of_piece(const Piece *p) {
    static const char digits[] = "0123456789ABCDEF";
    if (p->length != 6 || memcmp(p->bytes, "<0x", 3) || p->bytes[5] != '>') return -1;
    const char *high = memchr(digits, p->bytes[3], 16), *low = memchr(digits, p->bytes[4], 16);
    return high && low ? (int)(16 * (high - digits) + (low - digits)) : -1;
}

static void load_sentencepiece(Tokenizer *t, Cursor *c) {
    size_t n = 0;
    t->bos = 1;
    t->eos = 2;
    for (; c->at < t->file.size; n++) {
        Piece p = {.id = (int)n};
        memcpy(&p.score, take(c, 4), 4);
        p.length = take_number(c, "length", 0, UINT32_MAX);
        p.bytes = take(c, p.length);
        if (isnan(p.score)) die_damaged(t, "piece", n, "has NaN as its score");
        if (n < (size_t)t->vocab_size) t->pieces[n] = p;
    }
    check_n_pieces(t, n);
    make_table(t, n);
    for (int id = FIRST_PIECE; id < t->vocab_size; id++) {
        const Piece *p = &t->pieces[id];
        int byte = byte_of_piece(p);
        if (byte >= 0) t->byte_id[byte] = id;  // never matched by text
        else *find_slot(t, p->bytes, p->length) = p;
    }
}

// Length in bytes of the UTF-8 character at p, with n > 0 bytes left, or 0 if it is invalid.
static size_t utf8_length(const uint8_t *p, size_t n) {
    if (p[0] < 0x80) return 1;
    size_t length = p[0] >= 0xF0 && p[0] <= 0xF4 ? 4 : p[0] >= 0xE0 && p[0] < 0xF0 ? 3
                  : p[0] >= 0xC2 && p[0] < 0xE0 ? 2 : 0;
    if (!length || n < length) return 0;
    for (size_t i = 1; i < length; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    // invalid: overlong forms, surrogates, beyond U+10FFFF
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F) ||
        (p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F)) return 0;
    return length;
}

// Length in bytes of the longest valid UTF-8 prefix of a text.
static size_t valid_utf8(const void *text, size_t n) {
    size_t at = 0;
    for (size_t size = 1; size && at < n; at += size)
        size = utf8_length((const uint8_t *)text + at, n - at);
    return at;
}

// Whether n bytes that are not a whole character could start one.
static bool utf8_may_continue(const uint8_t *p, size_t n) {
    uint8_t fill[4] = {p[0], p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : 0x80, 0x80, 0x80};
    memcpy(fill, p, n < 4 ? n : 4);
    return utf8_length(fill, 4) > n;
}

// The file's layout is that of byte_level_c_file() in tokenizer.py.
static void load_byte_level(Tokenizer *t, Cursor *c) {
    t->is_byte_level = true;
    t->is_gpt4 = take_number(c, "pattern", 0, 1);
    size_t top = (size_t)t->vocab_size - 1;
    Cursor ends = *c;  // BOS and EOS, read after the vocabulary's size is checked
    take(c, 2 * 4);
    check_n_pieces(t, take_number(c, "number of tokens", 0, UINT32_MAX));
    t->bos = (int)take_number(&ends, "bos", 0, top);
    t->eos = (int)take_number(&ends, "eos", 0, top);
    size_t n_merges = take_number(c, "number of merges", 0, 1 << 24);  // ranks are floats
    t->n_special = take_number(c, "number of special tokens", 0, top + 1);
    size_t n_ranges = take_number(c, "number of ranges", 0, CODE_POINTS);

    t->kinds = alloc(CODE_POINTS, 1);
    memset(t->kinds, OTHER, CODE_POINTS);
    for (size_t i = 0, next = 0; i < n_ranges; i++) {
        size_t first = take_number(c, "start of a range", next, CODE_POINTS - 1);
        size_t last = take_number(c, "end of a range", first, CODE_POINTS - 1);
        memset(t->kinds + first, 1 << take_number(c, "class of a range", 1, 3), last - first + 1);
        next = last + 1;
    }
    t->kinds[' '] = BLANK;  // the patterns treat these specially
    t->kinds['\n'] = t->kinds['\r'] = NEWLINE;

    Cursor special = *c, merges = *c;  // read after the tokens
    take(c, 4 * t->n_special);
    merges.at = c->at;
    take(c, 3 * 4 * n_merges);
    for (int i = 0; i < t->vocab_size; i++) {
        size_t length = take_number(c, "length", 0, UINT32_MAX);
        t->pieces[i] = (Piece){.bytes = take(c, length), .length = length, .id = i};
        if (length == 1) t->byte_id[*t->pieces[i].bytes] = i;
    }
    if (c->at < t->file.size) die_damaged(t, "byte", c->at, "follows the last token");
    for (size_t b = 0; b < 256; b++)
        if (t->byte_id[b] < 0) die_damaged(t, "byte value", b, "has no token");

    t->special = alloc(t->n_special, sizeof *t->special);
    for (size_t i = 0; i < t->n_special; i++) {
        const Piece *p = t->special[i] = &t->pieces[take_number(&special, "special token", 0, top)];
        if (!p->length || valid_utf8(p->bytes, p->length) < p->length)
            die_damaged(t, "special token", (size_t)p->id, "is empty or invalid UTF-8");
        t->starts_special[*p->bytes] = true;
    }
    make_table(t, n_merges);
    Piece *merged = alloc(n_merges, sizeof *merged);
    for (size_t i = 0; i < n_merges; i++) {
        const uint8_t *ids = merges.file->data + merges.at;
        const Piece *left = &t->pieces[take_number(&merges, "left token of a merge", 0, top)];
        const Piece *right = &t->pieces[take_number(&merges, "right token of a merge", 0, top)];
        const Piece *both = &t->pieces[take_number(&merges, "token of a merge", 0, top)];
        if (!left->length || !right->length || both->length != left->length + right->length ||
            memcmp(both->bytes, left->bytes, left->length) ||
            memcmp(both->bytes + left->length, right->bytes, right->length))
            die_damaged(t, "merge", i, "does not join its tokens");
        merged[i] = (Piece){ids, 8, -(float)i, both->id};
        *find_slot(t, ids, 8) = &merged[i];
    }
}

// The CRC-32 of zlib and PNG, four bits at a time.
static uint32_t crc32(const uint8_t *p, size_t n) {
    static const uint32_t table[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158,
        0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4,
        0xa00ae278, 0xbdbdf21c,
    };
    uint32_t crc = ~0u;
    for (size_t i = 0; i < n; i++) {
        crc = table[(crc ^ p[i]) & 15] ^ crc >> 4;
        crc = table[(crc ^ p[i] >> 4) & 15] ^ crc >> 4;
    }
    return ~crc;
}

// A tokenizer's fingerprint in a model's header: the CRC-32 of its file without the character
// classes, which change with Unicode's versions; never 0. As in fingerprint_of() of tokenizer.py.
static uint32_t fingerprint(const Tokenizer *t) {
    size_t at = 0;
    if (t->is_byte_level) {
        uint32_t n_ranges;
        memcpy(&n_ranges, t->file.data + 28, sizeof n_ranges);
        at = 32 + 12 * (size_t)n_ranges;
    }
    uint32_t crc = crc32(t->file.data + at, t->file.size - at);
    return crc ? crc : 1;
}

// Refuse a tokenizer that the model was not trained with.
static void check_tokenizer(const Tokenizer *t, const Config *c, const char *model_path) {
    if (c->tokenizer && c->tokenizer != fingerprint(t))
        die("%s was trained with a tokenizer other than %s: use the model's own tokenizer (-z)",
            model_path, t->file.path);
}

// Load a tokenizer. It must have vocab_size pieces, like the model.
static Tokenizer load_tokenizer(File file, int vocab_size) {
    Tokenizer t = {.file = file, .vocab_size = vocab_size, .byte_fallback = true};
    Cursor cursor = {.file = &t.file};
    t.pieces = alloc(vocab_size, sizeof(Piece));
    for (int b = 0; b < 256; b++) t.byte_id[b] = -1;
    // SentencePiece's file starts with the length of its longest piece, which is not needed
    bool is_byte_level = !memcmp(take(&cursor, 4), "bpe1", 4);
    (is_byte_level ? load_byte_level : load_sentencepiece)(&t, &cursor);
    for (int b = 0; b < 256; b++) t.byte_fallback = t.byte_fallback && t.byte_id[b] >= 0;
    return t;
}

typedef struct {
    const uint8_t *bytes;
    size_t length;        // 0 once it is merged into its left neighbor
    int prev, next;       // neighbors, -1 at the ends
    int id;               // its token, -1 if the vocabulary lacks it
    const Piece *merged;  // the result of merging it with the next one, or NULL
} Symbol;

// Prepare a text to be cut into symbols. Invalid UTF-8 becomes U+FFFD: one per incomplete character
// as in Python, or one per byte as in SentencePiece, which also adds a space in front and reads
// U+2581 as a space. Returns the bytes and sets *n to their number.
static uint8_t *normalize(const Tokenizer *t, const char *text, size_t left, size_t *n) {
    const uint8_t *in = (const uint8_t *)text;
    size_t at = 0;
    uint8_t *out = alloc(3 * (uint64_t)left + 1, 1);  // an invalid byte grows to three
    if (left && !t->is_byte_level) out[at++] = ' ';
    for (size_t length; left; in += length, left -= length) {
        const void *from = in;
        size_t size = length = utf8_length(in, left);
        if (!length) {
            from = "\xEF\xBF\xBD", size = 3, length = 1;
            while (t->is_byte_level && length < left && utf8_may_continue(in, length + 1)) length++;
        } else if (!t->is_byte_level && length == 3 && !memcmp(in, "\xE2\x96\x81", 3)) {
            from = " ", size = 1;
        }
        memcpy(out + at, from, size);
        at += size;
    }
    *n = at;
    return out;
}

// Cut a text into symbols for SentencePiece: its characters. Returns their number.
static size_t cut_characters(const Tokenizer *t, const uint8_t *p, size_t n_bytes, Symbol *s) {
    size_t n = 0;
    for (size_t at = 0; at < n_bytes; at += s[n++].length) {
        size_t size = utf8_length(p + at, n_bytes - at);
        const Piece *piece = *find_slot(t, p + at, size);
        s[n] = (Symbol){p + at, size, (int)n - 1, (int)n + 1, piece ? piece->id : -1, NULL};
    }
    if (n) s[n - 1].next = -1;
    return n;
}

// How many bytes at p belong to characters of these kinds, up to max_chars characters.
static size_t span(const Tokenizer *t, const uint8_t *p, size_t n, int kinds, size_t max_chars) {
    size_t at = 0;
    for (size_t size; at < n && max_chars > 0; at += size, max_chars--) {
        size = utf8_length(p + at, n - at);
        uint32_t code = p[at] & (size == 1 ? 0x7F : 0x7F >> size);
        for (size_t i = 1; i < size; i++) code = code << 6 | (p[at + i] & 0x3F);
        if (!(t->kinds[code] & kinds)) break;
    }
    return at;
}

// Length in bytes of a contraction such as 've at p, or 0. With any_case, U+017F is also an s.
static size_t contraction(const uint8_t *p, size_t n, bool any_case) {
    static const char *const endings[] = {"s", "d", "m", "t", "ll", "ve", "re", "\xC5\xBF"};
    for (size_t e = 0; n && *p == '\'' && e < (any_case ? 8 : 7); e++) {
        size_t length = strlen(endings[e]), i = 0;
        for (; i < length && i + 1 < n; i++) {
            bool is_upper = any_case && p[i + 1] >= 'A' && p[i + 1] <= 'Z';
            if (p[i + 1] + (is_upper ? 'a' - 'A' : 0) != (uint8_t)endings[e][i]) break;
        }
        if (i == length) return 1 + length;
    }
    return 0;
}

// Length in bytes of the pre-token at p: the first alternative in PATTERNS of bpe.py that matches.
// Runs are as long as possible, except that white space ends at its last newline (GPT-4) or leaves
// its last character to the next pre-token.
static size_t pretoken(const Tokenizer *t, const uint8_t *p, size_t n) {
    size_t space = *p == ' ', length = contraction(p, n, t->is_gpt4);
    if (length) return length;
    size_t prefix = t->is_gpt4 ? span(t, p, n, OTHER | BLANK, 1) : space;
    if ((length = span(t, p + prefix, n - prefix, LETTER, n))) return prefix + length;
    prefix = t->is_gpt4 ? 0 : space;
    if ((length = span(t, p + prefix, n - prefix, NUMBER, t->is_gpt4 ? 3 : n)))
        return prefix + length;
    if ((length = span(t, p + space, n - space, OTHER, n))) {
        length += space;
        return length + (t->is_gpt4 ? span(t, p + length, n - length, NEWLINE, n) : 0);
    }
    size_t white = span(t, p, n, BLANK | NEWLINE, n), end = t->is_gpt4 ? white : 0;
    while (end && p[end - 1] != '\n' && p[end - 1] != '\r') end--;
    if (end) return end;
    if (white == n) return n;
    for (end = white - 1; (p[end] & 0xC0) == 0x80;) end--;
    return end ? end : white;  // the last space joins the next pre-token unless it is the only one
}

// The longest special token at p, or NULL.
static const Piece *special_at(const Tokenizer *t, const uint8_t *p, size_t n) {
    const Piece *best = NULL;
    for (size_t i = 0; t->starts_special[*p] && i < t->n_special; i++) {
        const Piece *s = t->special[i];
        if (best && s->length <= best->length) continue;
        if (s->length <= n && !memcmp(s->bytes, p, s->length)) best = s;
    }
    return best;
}

// Cut a text into symbols for byte-level BPE: special tokens, and the bytes of the pre-tokens
// between them, with neighbors only in the same pre-token. Returns the number of symbols.
static size_t cut_bytes(const Tokenizer *t, const uint8_t *p, size_t n_bytes, Symbol *s) {
    size_t n = 0;
    for (size_t at = 0, end = 0; at < n_bytes; at = end) {
        const Piece *special = NULL;
        while (end < n_bytes && !(special = special_at(t, p + end, n_bytes - end))) end++;
        for (size_t size; at < end; at += size) {
            size = pretoken(t, p + at, end - at);
            for (size_t i = 0; i < size; i++, n++)
                s[n] = (Symbol){p + at + i, 1, i ? (int)n - 1 : -1, i + 1 < size ? (int)n + 1 : -1,
                                t->byte_id[p[at + i]], NULL};
        }
        if (!special) break;
        s[n++] = (Symbol){p + end, special->length, -1, -1, special->id, NULL};
        end += special->length;
    }
    return n;
}

// A pair that may be merged (index: its left symbol), or a token that may be sampled, as in
// keep_likeliest() of run.c.
typedef struct {
    float score;
    int index;
} Candidate;

static bool comes_first(Candidate a, Candidate b) {
    return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// A binary heap of n candidates; pop() returns the one that comes first.
static void push(Candidate *heap, size_t *n, Candidate added) {
    size_t i = (*n)++;
    for (; i > 0 && comes_first(added, heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = added;
}

static Candidate pop(Candidate *heap, size_t *n) {
    Candidate first = heap[0], moved = heap[--*n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < *n; i = child) {
        if (child + 1 < *n && comes_first(heap[child + 1], heap[child])) child++;
        if (!comes_first(heap[child], moved)) break;
        heap[i] = heap[child];
    }
    heap[i] = moved;
    return first;
}

// Look up the merge of symbol i with the next one, and push it if it exists.
static void find_merge(const Tokenizer *t, Symbol *s, int i, Candidate *heap, size_t *n) {
    if (i < 0) return;
    Symbol *l = &s[i];
    l->merged = NULL;
    if (l->next < 0) return;
    const Symbol *r = &s[l->next];
    if (t->is_byte_level) l->merged = *find_slot(t, (int[]){l->id, r->id}, 8);
    else l->merged = *find_slot(t, l->bytes, l->length + r->length);  // neighbors in memory
    if (l->merged) push(heap, n, (Candidate){l->merged->score, i});
}

// A text has up to 3 tokens per byte (1 if it is valid UTF-8), plus a space and a BOS
enum { TOKENS_PER_BYTE = 3, EXTRA_TOKENS = 2 };

// Encode a text: a BOS and its tokens, with the same ids as SentencePiece or bpe.py. Returns them
// as the newest block and sets *n_tokens to their number. O(n log n): a heap has the next merge.
static int *encode(const Tokenizer *t, const char *text, size_t length, size_t *n_tokens) {
    int *tokens = alloc(TOKENS_PER_BYTE * (uint64_t)length + EXTRA_TOKENS, sizeof(int));
    const Block *kept = blocks;
    size_t n_bytes, n_pairs = 0, n_out = 0;
    uint8_t *bytes = normalize(t, text, length, &n_bytes);
    if (n_bytes > INT_MAX)
        die("the text has %zu bytes: expected at most 700 MB, or 2 GB of UTF-8", length);
    Symbol *symbols = alloc(n_bytes, sizeof(Symbol));
    Candidate *heap = alloc(n_bytes, 3 * sizeof(Candidate));  // 1 for each symbol, 2 for each merge
    size_t n = (t->is_byte_level ? cut_bytes : cut_characters)(t, bytes, n_bytes, symbols);
    for (size_t i = 0; i < n; i++) find_merge(t, symbols, (int)i, heap, &n_pairs);
    while (n_pairs) {
        Candidate best = pop(heap, &n_pairs);
        Symbol *l = &symbols[best.index];
        if (!l->merged || l->merged->score != best.score) continue;  // outdated
        Symbol *r = &symbols[l->next];
        l->length += r->length;
        l->id = l->merged->id;
        l->next = r->next;
        *r = (Symbol){0};
        if (l->next >= 0) symbols[l->next].prev = best.index;
        find_merge(t, symbols, l->prev, heap, &n_pairs);
        find_merge(t, symbols, best.index, heap, &n_pairs);
    }

    tokens[n_out++] = t->bos;
    for (const Symbol *s = symbols; s < symbols + n; s++) {
        if (!s->length) continue;
        if (s->id >= 0) {
            tokens[n_out++] = s->id;
        } else if (t->byte_fallback) {
            for (size_t b = 0; b < s->length; b++) tokens[n_out++] = t->byte_id[s->bytes[b]];
        } else if (tokens[n_out - 1] != UNK) {  // a run of unknown characters is one token
            tokens[n_out++] = UNK;
        }
    }
    release_to(kept);
    *n_tokens = n_out;
    return tokens;
}

// Collects bytes and prints whole UTF-8 characters. Invalid bytes are printed as U+FFFD, one per
// incomplete character, as with errors="replace" in Python. On a terminal, control characters other
// than newline and tab are dropped, so that no model can send it commands.
typedef struct {
    FILE *out;            // NULL: write to text instead
    char *text;           // (room)
    size_t room, n_text;  // n_text counts all bytes, even if text has no room for them
    bool is_terminal, is_json;
    bool has_order;       // a space separates the first token from an order
    uint8_t pending[4];   // the start of a character
    size_t n;             // bytes pending
    double flushed;       // time of the last flush, in seconds
} Printer;

static void put(Printer *p, const void *bytes, size_t n) {
    if (p->out) fwrite(bytes, 1, n, p->out);
    for (size_t i = 0; i < n; i++, p->n_text++)
        if (p->n_text < p->room) p->text[p->n_text] = ((const char *)bytes)[i];
}

static void print_bytes(Printer *p, const uint8_t *bytes, size_t n) {
    uint8_t *c = p->pending;
    for (size_t i = 0; i < n; i++) {
        c[p->n++] = bytes[i];
        bool is_whole = utf8_length(c, p->n), is_c1 = p->n == 2 && *c == 0xC2 && c[1] < 0xA0;
        bool is_control = is_c1 || *c == 0x7F || (*c < 0x20 && *c != '\n' && *c != '\t');
        if (!is_whole && utf8_may_continue(c, p->n)) continue;
        if (!is_whole) {
            put(p, "\xEF\xBF\xBD", 3);
            i -= p->n > 1;  // the unexpected byte may start the next character
        } else if (p->is_json && (*c < 0x20 || *c == '"' || *c == '\\')) {
            fprintf(p->out, "\\u%04x", *c);
        } else if (!p->is_terminal || !is_control) {
            put(p, c, p->n);
        }
        p->n = 0;
    }
}

static void print_rest(Printer *p) {
    if (p->n) put(p, "\xEF\xBF\xBD", 3);
    p->n = 0;
}

// Print the text of one token; BOS and EOS have none. The first token of a text loses the space
// that SentencePiece adds in front, or that separates it from an order.
static void print_token(const Tokenizer *t, Printer *printer, int token, bool first) {
    const Piece *p = &t->pieces[token];
    if (token == t->bos || token == t->eos) return;
    int byte = t->is_byte_level || token < FIRST_PIECE ? -1 : byte_of_piece(p);
    if (!t->is_byte_level && token == UNK) {
        print_bytes(printer, (const uint8_t *)" \xE2\x81\x87 ", 5);
    } else if (byte >= 0) {
        print_bytes(printer, &(uint8_t){(uint8_t)byte}, 1);
    } else {
        bool has_space = first && (!t->is_byte_level || printer->has_order);
        size_t skip = has_space && p->length && p->bytes[0] == ' ';
        print_bytes(printer, p->bytes + skip, p->length - skip);
    }
}
