// Llama inference in plain C: model.bin and a prompt in, a story out.
//
//   ./run model.bin -z tok.bin -i "Once upon a time"
//
// From prompt to logits:
//
//   main()         parses the options, calls load_model() and load_tokenizer()
//   load_model()   reads the header, checks it, and finds the tensors with lay_out()
//   generate()     turns the prompt into tokens with encode() and passes them to prefill()
//   prefill()      runs them in batches of up to MAX_BATCH tokens, which feed() builds
//   run_batch()    starts the threads, which all run forward()
//   forward()      embedding, layers, output head: the whole model, in order, with all shapes
//   kernels.h      the inner loops: matmul, attend, rmsnorm, softmax, ...
//
// generate() then samples the next token with sample(), runs it as the next batch, and so on.
//
// The engine is this file, with sampling, stories, evaluation, speed and the command line, and
// engine/: base.h (errors, memory, files), model.h (model.bin), kernels.h, forward.h (load_model()
// to forward()), tokenizer.h and draft.h. They are compiled as one. Shapes are (rows, columns).
//
// No input may crash it: every size is checked before use, and every error ends in die() with one
// sentence.
//
// To add
// - an architecture option: its field or bit in Config (and KNOWN_OPTIONS), its range in
//   check_config(), its tensor in lay_out(), all in model.h, its use in forward(); also in
//   formats/modelbin.py and doc/format.md
// - an activation: its name in Activation, is_gated() if it needs w3, its formula in activate() of
//   kernels.h; the head of model.py lists the places outside the engine
// - a weight format: its row in FORMATS, its decoding in read_row(), its product in kernels.h; also
//   in formats/modelbin.py and doc/format.md
// - an instruction set: its block where model.h includes kernels.h, its row in pick_kernels(), its
//   constants at the head of kernels.h
// - a pre-token pattern: its number in load_byte_level(), its matcher in pretoken(); also in
//   PATTERNS of bpe.py

#include "engine/base.h"
#include "engine/model.h"
#include "engine/forward.h"
#include "engine/tokenizer.h"
#include "engine/draft.h"

// ------------------------------------------------------------------------------------------------
// Sampling the next token

typedef struct { const int *tokens; size_t n; bool is_speech; } Phrase;

typedef struct {
    float temperature;     // 0: the most likely token
    float top_p, min_p;    // 1 and 0: all tokens
    float repeat_penalty;  // 1: none
    float order_bias;      // see favor_phrases()
    int top_k;             // 0: all tokens
    const Kernels *kernels;
    Candidate *candidates;  // (n_threads, vocab_size)
    Phrase *phrases;        // (n_phrases) what an order asks for, see set_phrases()
    size_t n_phrases, n_order;  // n_order: tokens before the story
} Sampler;

enum { PENALTY_WINDOW = 64 };  // how many tokens repeat_penalty looks back
// LATE: speech is favored from this token of a story on, see text/orders.py. Above MAX_ORDER_BIAS,
// models write the order instead of a story.
enum { LATE = 100, MAX_ORDER_BIAS = 10 };

// Uniform in [0, 1): xorshift64* (Vigna 2016, arXiv:1402.6246).
static float random_float(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((*state * 0x2545F4914F6CDD1Du) >> 40) / 16777216.0f;
}

// The generator's initial state: splitmix64 (Steele et al. 2014) spreads neighboring seeds.
static uint64_t random_state(uint64_t seed) {
    seed += 0x9E3779B97F4A7C15u;
    seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9u;
    seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EBu;
    seed ^= seed >> 31;
    return seed ? seed : 1;  // xorshift never leaves the state 0
}

// Move the likeliest of n candidates to the front, until max_kept were moved or their sum exceeds
// `mass`. Returns how many were moved, and sets *sum to their sum; the last of them is the least
// likely. Quickselect (Hoare 1961): only the part with the boundary is split again.
static size_t keep_likeliest(Candidate *c, size_t n, size_t max_kept, float mass, float *sum) {
    size_t kept = 0;
    uint32_t state = 1;
    for (*sum = 0.0f; kept < n;) {
        state = state * 1664525u + 1013904223u;  // a random pivot avoids the worst case
        size_t place = kept + (size_t)((uint64_t)state * (n - kept) >> 32), at = kept;
        Candidate pivot = c[place];
        float before = *sum;
        c[place] = c[n - 1];
        for (size_t i = kept; i < n - 1; i++) {  // without unpredictable branches
            Candidate moved = c[i];
            bool is_first = comes_first(moved, pivot);
            c[i] = c[at];
            c[at] = moved;
            at += is_first;
            before += is_first ? moved.score : 0.0f;
        }
        c[n - 1] = c[at];
        c[at] = pivot;
        if (at < max_kept && !(before > mass)) kept = at + 1, *sum = before + pivot.score;
        else n = at;
    }
    return kept;
}

// A probability below which no token is kept, so that few tokens need sorting. With top_p, the
// tokens below it sum to less than 1 - top_p. With top_k, the tokens are split into COLUMNS groups,
// and the bound is the top_k-th largest of the groups' maxima, which at least top_k tokens reach.
static float lower_bound(const Sampler *s, const float *probs, int n, float top_p) {
    enum { COLUMNS = 1024 };
    Candidate *c = s->candidates;
    float maxima[COLUMNS] = {0}, sum;
    if (!s->top_k) return s->min_p > 0.0f ? 0.0f : (1.0f - top_p) / (float)n;
    if (s->top_k >= COLUMNS || n <= COLUMNS) return 0.0f;
    for (int i = 0; i < n; i += COLUMNS)
        for (int j = 0; j < COLUMNS && j < n - i; j++)
            maxima[j] = probs[i + j] > maxima[j] ? probs[i + j] : maxima[j];
    for (int j = 0; j < COLUMNS; j++) c[j] = (Candidate){maxima[j], j};
    return c[keep_likeliest(c, COLUMNS, (size_t)s->top_k, INFINITY, &sum) - 1].score;
}

// Sample from the tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024), then
// only the top_k likeliest, then only the likeliest of these that make up top_p of their total
// probability (Holtzman et al. 2020).
static int sample_likeliest(const Sampler *s, const float *probs, int n, float coin) {
    size_t likeliest = s->kernels->argmax(probs, n), left = 0;
    float top_p = s->top_p > 0.0f ? s->top_p : 1.0f, sum = 1.0f;
    float bound = lower_bound(s, probs, n, top_p), min_prob = s->min_p * probs[likeliest];
    if (bound < min_prob) bound = min_prob;
    if (!(bound > 0.0f)) bound = FLT_MIN;  // tokens of probability 0 are never sampled
    Candidate *c = s->candidates;
    for (int first = 0; first < n; first += LANES) {  // most vectors have no candidate
        int last = n - first < LANES ? n : first + LANES, any = 0;
        for (int i = first; i < last; i++) any |= probs[i] >= bound;
        for (int i = first; any && i < last; i++)
            if (probs[i] >= bound) c[left++] = (Candidate){probs[i], i};
    }
    if (!left) return (int)likeliest;  // only if the logits are NaN
    size_t max_kept = s->top_k ? (size_t)s->top_k : left;
    if (s->top_k || s->min_p > 0.0f) left = keep_likeliest(c, left, max_kept, INFINITY, &sum);
    left = keep_likeliest(c, left, left, top_p * sum, &sum);
    left = keep_likeliest(c, left, left, coin * sum, &sum);
    return c[left - 1].index;
}

// Add order_bias to the logit of the next token of each phrase, once per token, until the story has
// the phrase. As in text/orders.py, a phrase that breaks off is not searched for again in its own
// tokens.
static void favor_phrases(const Sampler *s, float *logits, const int *history, size_t n_history) {
    size_t n_favored = 0;
    for (size_t i = 0; i < s->n_phrases; i++) {
        Phrase p = s->phrases[i];
        size_t k = 0, j = 0;  // k: how much of the phrase the story ends with
        for (size_t at = s->n_order; at < n_history && k < p.n; at++)
            k = history[at] == p.tokens[k] ? k + 1 : history[at] == p.tokens[0];
        if (k == p.n || (p.is_speech && n_history < s->n_order + LATE)) continue;
        while (j < n_favored && s->candidates[j].index != p.tokens[k]) j++;
        if (j < n_favored) continue;
        s->candidates[n_favored++].index = p.tokens[k];
        logits[p.tokens[k]] += s->order_bias;
    }
}

// Sample the next token from logits (n), which are overwritten. history: the tokens before it.
static int sample(Sampler *s, uint64_t *state, float *logits, int n, const int *history,
                  size_t n_history) {
    size_t first = n_history > PENALTY_WINDOW ? n_history - PENALTY_WINDOW : 0;
    favor_phrases(s, logits, history, n_history);
    for (size_t i = first; s->repeat_penalty != 1.0f && i < n_history; i++) {
        size_t j = first;  // Keskar et al. 2019, once per distinct token
        while (history[j] != history[i]) j++;
        float *logit = &logits[history[i]];
        if (j == i) *logit *= *logit > 0 ? 1.0f / s->repeat_penalty : s->repeat_penalty;
    }
    if (s->temperature == 0.0f) return (int)s->kernels->argmax(logits, n);
    s->kernels->softmax(logits, n, s->temperature);
    float coin = random_float(state), cumulative = 0.0f;
    if ((s->top_p > 0.0f && s->top_p < 1.0f) || s->top_k || s->min_p > 0.0f)
        return sample_likeliest(s, logits, n, coin);
    for (int i = 0; i < n; i++) {
        cumulative += logits[i];
        if (coin < cumulative) return i;
    }
    return (int)s->kernels->argmax(logits, n);  // rounding can leave the coin above the sum
}

// ------------------------------------------------------------------------------------------------
// Stories

// Flush stdout, and fail if it cannot be written, for example to a full disk.
static void flush_output(const char *what) {
    if (fflush(stdout) || ferror(stdout)) die("cannot write the %s: %s", what, strerror(errno));
}

typedef struct {
    int *tokens;  // (n_positions + 1): a BOS, the prompt, and the tokens sampled so far
    size_t n, n_printed;
    size_t n_hidden;  // tokens that are not printed: the BOS, and those of an order
    uint64_t seed, state;
    bool is_done;
} Story;

// Run as many of the first story's n tokens as fit in a batch, starting at position `first`.
// Computes the logits after every token, or only after token n - 1. Returns the number of tokens
// in the batch.
static size_t feed(Model *m, const int *tokens, size_t first, size_t n, bool wants_all) {
    BatchToken batch[MAX_BATCH];
    size_t count = n - first < m->max_batch ? n - first : m->max_batch;
    if (count > MAX_BATCH) count = MAX_BATCH;
    for (size_t i = 0, pos = first; i < count; i++, pos++)
        batch[i] = (BatchToken){tokens[pos], (int)pos, 0, wants_all || pos + 1 == n};
    run_batch(m, batch, count);
    return count;
}

// Run tokens `start` to n - 1, with the earlier ones in the cache. Returns the last one's logits.
static float *prefill(Model *m, const int *tokens, size_t start, size_t n) {
    while (start < n) start += feed(m, tokens, start, n, false);
    return logits_of(m, 0);
}

// Copy the first n positions of the first story, and what is cached for them, to another story.
static void copy_first_story(Model *m, size_t story, size_t n) {
    size_t head_dim = m->config.dim / m->config.n_heads, places = ROUND_UP(m->n_positions, LANES);
    size_t heads = (size_t)m->config.n_layers * m->config.n_kv_heads, used = ROUND_UP(n, LANES);
    size_t k = head_dim * (m->bf16_cache ? 2 : 4), v = k / head_dim * ROUND_UP(head_dim, LANES);
    for (size_t i = 0; i < heads; i++) {
        memcpy(m->keys + (story * heads + i) * places * k, m->keys + i * places * k, used * k);
        memcpy(m->values + (story * heads + i) * places * v, m->values + i * places * v, used * v);
    }
    memcpy(m->tokens + story * m->n_positions, m->tokens, n * sizeof *m->tokens);
    size_t size = m->n_positions * head_dim;
    for (size_t i = 0; m->raw_keys && i < heads; i++)
        memcpy(m->raw_keys + (story * heads + i) * size, m->raw_keys + i * size,
               n * head_dim * sizeof(float));
}

// Sample the next token of a story. The story ends at EOS, at BOS, or after the last position.
static void draw_next(const Model *m, const Tokenizer *t, const Sampler *sampler, Story *s,
                      float *logits) {
    Sampler local = *sampler;
    local.candidates += (size_t)omp_get_thread_num() * m->config.vocab_size;
    int token = sample(&local, &s->state, logits, m->config.vocab_size, s->tokens, s->n);
    s->is_done = token == t->bos || token == t->eos;
    if (!s->is_done) s->tokens[s->n++] = token;
    if (s->n > m->n_positions) s->is_done = true;
}

// Append guesses of a story's next tokens to a batch of its last token. Returns their number.
static size_t add_guesses(const Draft *d, const Story *s, size_t n_positions, BatchToken *batch) {
    size_t room = n_positions - s->n;
    size_t n = guess(d, s->tokens, s->n, room < MAX_GUESSES ? room : MAX_GUESSES);
    for (size_t i = 0, pos = s->n; i < n; i++, pos++)
        batch[1 + i] = (BatchToken){s->tokens[pos], (int)pos, 0, true};
    return n;
}

// Print the tokens of a story that have not been printed yet.
static void print_story(const Tokenizer *t, Printer *printer, Story *s) {
    if (printer->is_json && !s->n_printed)
        fprintf(printer->out, "{\"seed\": %llu, \"text\": \"", (unsigned long long)s->seed);
    if (!s->n_printed) s->n_printed = s->n_hidden;
    for (; s->n_printed < s->n; s->n_printed++)
        print_token(t, printer, s->tokens[s->n_printed], s->n_printed == s->n_hidden);
    if (s->is_done) {
        print_rest(printer);
        if (printer->is_json) fprintf(printer->out, "\", \"tokens\": %zu}", s->n - 1);
        fputc('\n', printer->out);
    }
    double now = seconds();
    if (s->is_done || now - printer->flushed > 0.02) {  // more often would slow down a terminal
        flush_output("story");
        printer->flushed = now;
    }
}

// What a story must contain; NULL: nothing in particular.
typedef struct { const char *words, *features, *sentence, *summary; } Order;

// Append a line of an order to `at`: its name, and the text with single spaces between words. A list
// has commas between its parts. Returns where the next line goes.
static char *append_field(char *at, const char *name, const char *text, bool is_list) {
    if (!text) return at;
    char *start = at, *value = at + sprintf(at, "%s: ", name);
    at = value;
    bool is_gap = false, is_next = false;  // white space, a comma since the last character
    for (const char *c = text; *c; c++) {
        if (strchr(" \t\n\v\f\r", *c)) is_gap = true;
        else if (is_list && *c == ',') is_next = true;
        else {
            if (at > value && is_next) *at++ = ',';
            if (at > value && (is_gap || is_next)) *at++ = ' ';
            is_gap = is_next = false;
            *at++ = *c;
        }
    }
    if (at == value) {
        *start = '\0';
        return start;
    }
    *at++ = '\n';
    return at;
}

// Return the prompt of an order and the beginning of a story, as text/orders.py writes it. n (out):
// the bytes before the story; 0 if the order has no fields, unless it is written all the same.
static char *order_prompt(const Order *order, const char *beginning, bool always, size_t *n) {
    const char *texts[] = {order->words, order->features, order->sentence, order->summary};
    size_t room = strlen(beginning) + 80;
    for (int i = 0; i < 4; i++) room += texts[i] ? 2 * strlen(texts[i]) : 0;
    char *prompt = alloc(room, 1), *at = prompt;
    at = append_field(at, "Words", order->words, true);
    at = append_field(at, "Features", order->features, true);
    at = append_field(at, "Random sentence", order->sentence, false);
    at = append_field(at, "Summary", order->summary, false);
    bool is_ordered = always || at > prompt;
    if (is_ordered) at += sprintf(at, "Story:");
    *n = (size_t)(at - prompt);
    while (is_ordered && *beginning == ' ') beginning++;
    if (*beginning) at += sprintf(at, "%s%s", is_ordered ? " " : "", beginning);
    while (is_ordered && at[-1] == ' ') *--at = '\0';
    return prompt;
}

// Set what a sampler favors: the words of an order, its sentence, and a quotation mark for dialogue.
// prompt: its first n_order bytes are the order.
static void set_phrases(Sampler *s, const Tokenizer *t, const Order *order, const char *prompt,
                        size_t n_order) {
    const char *fields[] = {order->words, order->features, order->sentence};
    size_t n_start, n_all;
    s->n_phrases = 0;
    s->phrases = alloc(n_order, sizeof *s->phrases);  // each is at least a byte of the order
    encode(t, prompt, n_order, &s->n_order);
    encode(t, "Story:", 6, &n_start);
    for (int i = 0; i < 3; i++) {
        const bool is_features = i == 1, is_list = i < 2;
        for (const char *part = fields[i], *next; part; part = next ? next + 1 : NULL) {
            next = is_list ? strchr(part, ',') : NULL;
            size_t n = next ? (size_t)(next - part) : strlen(part);
            char *text = alloc(n + 1, 1), *line = alloc(n + sizeof "Story: \n", 1);
            memcpy(text, part, n);  // encoded as in a story
            size_t size = (size_t)(append_field(line, "Story", text, false) - line);
            if (!size || (is_features && strncmp(line, "Story: Dialogue\n", size))) continue;
            if (is_features) size = (size_t)sprintf(line, "Story: \"\n");
            int *tokens = encode(t, line, size - 1, &n_all);
            if (n_all <= n_start) continue;  // one token spans "Story:" and the phrase
            s->phrases[s->n_phrases++] = (Phrase){tokens + n_start, n_all - n_start, is_features};
        }
    }
}

// Print the prompt and its continuation, for each story, but not the order in the first n_order
// bytes of the prompt. A single story is printed token by token, several at the end, one after
// another. Seed and speed go to stderr; so does a note if the context cuts a story and wants_note is
// set. draft: guesses for a single story.
static void generate(Model *m, const Tokenizer *tokenizer, const Sampler *sampler,
                     const Draft *draft, const char *prompt, size_t n_order, uint64_t seed,
                     bool as_json, bool wants_note) {
    size_t n_prompt, n_hidden = 1, n_stories = m->n_stories, n_generated = 0;
    if (n_order) encode(tokenizer, prompt, n_order, &n_hidden);
    int *tokens = encode(tokenizer, prompt, strlen(prompt), &n_prompt);
    const char *what = n_hidden > 1 ? "order and the prompt have" : "prompt has";
    if (n_prompt > (size_t)m->config.seq_len)
        die("the %s %zu tokens, but the model's context is %d: shorten the %s", what, n_prompt,
            m->config.seq_len, n_hidden > 1 ? "order" : "prompt");
    if (n_prompt > m->n_positions)
        die("the %s %zu tokens, but -n is %zu: raise -n, or use -n 0 for the whole context of %d",
            what, n_prompt, m->n_positions, m->config.seq_len);
    if (valid_utf8(prompt, strlen(prompt)) < strlen(prompt))
        fputs("note: the prompt is not UTF-8; its invalid bytes are read as U+FFFD\n", stderr);
    fprintf(stderr, "seed: %llu\n", (unsigned long long)seed);
    Printer printer = {.out = stdout, .is_terminal = isatty(fileno(stdout)), .is_json = as_json,
                       .has_order = n_order > 0};
    Story *stories = alloc(n_stories, sizeof(Story));
    BatchToken *batch = alloc(n_stories + MAX_GUESSES, sizeof(BatchToken));
    size_t n_guesses = 0, n_right = 0, all_guesses = 0, all_right = 0;  // of the last batch, and all

    double start = seconds();
    float *logits = prefill(m, tokens, 0, n_prompt);
    double prefilled = seconds();
    for (size_t i = 0; i < n_stories; i++) {
        stories[i] = (Story){alloc(m->n_positions + 1, sizeof(int)), n_prompt, 0, n_hidden,
                             seed + i, random_state(seed + i), false};
        memcpy(stories[i].tokens, tokens, n_prompt * sizeof *tokens);
        batch[i].story = (int)i;
        if (!i) continue;
        copy_first_story(m, i, n_prompt);
        memcpy(logits_of(m, i), logits, m->config.vocab_size * sizeof *logits);
    }
    bool is_cut = false;
    for (size_t n = n_stories; n; n_generated += n) {
        OMP(parallel for num_threads(m->n_active) if (n > 1))
        for (size_t i = 0; i < n; i++)
            draw_next(m, tokenizer, sampler, &stories[batch[i].story], logits_of(m, n_right + i));
        if (n_stories == 1) print_story(tokenizer, &printer, stories);
        n = 0;
        for (size_t i = 0; i < n_stories; i++) {
            const Story *s = &stories[i];
            is_cut |= s->n > m->n_positions;
            if (!s->is_done)
                batch[n++] = (BatchToken){s->tokens[s->n - 1], (int)s->n - 1, (int)i, true};
        }
        if (!n) break;
        if (n_right < n_guesses && batch[0].token == batch[n_right + 1].token) {
            n_right++;  // its logits are known
            all_right++;
            continue;
        }
        n_right = 0;
        n_guesses = n_stories > 1 ? 0 : add_guesses(draft, stories, m->n_positions, batch);
        all_guesses += n_guesses;
        run_batch(m, batch, n + n_guesses);
    }
    double end = seconds();
    for (size_t i = 0; n_stories > 1 && i < n_stories; i++) {
        if (i && !as_json) fputs("\n---\n\n", stdout);
        print_story(tokenizer, &printer, &stories[i]);
    }
    if (is_cut && wants_note)
        fprintf(stderr, "note: %s story stops at the model's context of %d tokens\n",
                n_stories > 1 ? "a" : "the", m->config.seq_len);
    else if (is_cut && n_order > strlen("Story:") && !as_json)
        fprintf(stderr, "note: %s story stops at %zu tokens, with the %zu of the order%s\n",
                n_stories > 1 ? "a" : "the", m->n_positions, n_hidden,
                m->n_positions < (size_t)m->config.seq_len ? "; raise -n" : "");
    if (n_stories == 1 && stories[0].n == n_prompt && n_prompt < m->n_positions && !as_json)
        fputs("note: the model ended the story at once; try another seed (-s) or prompt (-i)\n",
              stderr);
    fprintf(stderr, "prompt: %zu tokens, %.1f tok/s\n", n_prompt,
            (double)n_prompt / (prefilled - start));
    if (n_generated)
        fprintf(stderr, "achieved tok/s: %.1f\n", (double)n_generated / (end - prefilled));
    if (draft->n_slots) fprintf(stderr, "guesses: %zu of %zu right\n", all_right, all_guesses);
}

// ------------------------------------------------------------------------------------------------
// Evaluation: bits per byte of a text, as in train.py

// The next document of a file from *at on, or NULL. Documents are separated by <|endoftext|>; ASCII
// white space around them is dropped, in training all white space. The text is not NUL-terminated; *n
// is its length.
static const char *next_document(const File *f, size_t *at, size_t *n) {
    static const char mark[] = "<|endoftext|>";
    const size_t length = sizeof mark - 1;
    while (*at < f->size) {
        const char *start = (const char *)f->data + *at, *limit = start + (f->size - *at);
        const char *end = start;
        while (end < limit && ((size_t)(limit - end) < length || memcmp(end, mark, length))) end++;
        *at += (size_t)(end - start) + length;
        while (start < end && isspace((uint8_t)*start)) start++;
        while (end > start && isspace((uint8_t)end[-1])) end--;
        *n = (size_t)(end - start);
        if (*n) return start;
    }
    return NULL;
}

// Copy a text (n bytes) with \r\n and \r as newlines, which is how training reads it. Returns the
// number of bytes written.
static size_t copy_lines(char *out, const char *text, size_t n) {
    size_t size = 0;
    for (size_t i = 0; i < n; i++) {
        bool is_return = text[i] == '\r';
        out[size++] = is_return ? '\n' : text[i];
        i += is_return && i + 1 < n && text[i + 1] == '\n';
    }
    return size;
}

// Mean loss over tokens 1 to n - 1, in nats per token. As in train.py, the tokens are read in
// windows of the context, and each window starts with an empty cache. So does each document (at a
// bos), if the model was trained so.
static double loss_of(Model *m, const int *tokens, size_t n, int bos) {
    size_t vocab = m->config.vocab_size;
    double total = 0.0;
    for (size_t start = 0, window; start + 1 < n; start += window) {
        window = m->n_positions - start % m->n_positions;
        if (window > n - 1 - start) window = n - 1 - start;
        if (has(&m->config, SEPARATE_DOCUMENTS))
            for (size_t i = window; --i;)
                if (tokens[start + i] == bos) window = i;
        for (size_t first = 0, count; first < window; first += count) {
            double losses[MAX_BATCH];
            count = feed(m, tokens + start, first, window, true);
            OMP(parallel for num_threads(m->n_active))
            for (size_t i = 0; i < count; i++) {
                float *logits = logits_of(m, i), target = logits[tokens[start + first + i + 1]];
                size_t best = m->kernels->argmax(logits, vocab);
                float max = logits[best];
                m->kernels->softmax(logits, vocab, 1.0f);  // the likeliest becomes 1 / sum
                losses[i] = (double)max - log(logits[best]) - (double)target;
            }
            for (size_t i = 0; i < count; i++) total += losses[i];
        }
    }
    return total / (double)(n - 1);
}

static void evaluate(Model *m, const Tokenizer *tokenizer, File f, bool as_json) {
    size_t valid = valid_utf8(f.data, f.size), at = 0;
    if (valid < f.size)
        die("%s is not UTF-8: byte %zu is 0x%02X; convert it to UTF-8, for example with iconv",
            f.path, valid, f.data[valid]);
    if (f.size >= 3 && !memcmp(f.data, "\xEF\xBB\xBF", 3)) at = 3;  // a byte order mark
    size_t length, n = 0, bytes = 0, n_documents = 0;
    int *tokens = alloc((uint64_t)f.size + EXTRA_TOKENS, sizeof(int));  // UTF-8: one per byte
    const Block *kept = blocks;
    for (const char *text; (text = next_document(&f, &at, &length)); n_documents++) {
        size_t count;
        char *lines = alloc(length, 1);
        length = copy_lines(lines, text, length);
        int *ids = encode(tokenizer, lines, length, &count);
        memcpy(tokens + n, ids, count * sizeof(int));
        release_to(kept);
        n += count;
        bytes += length;
    }
    if (n < 2) die("%s has no text to evaluate", f.path);
    double start = seconds(), loss = loss_of(m, tokens, n, tokenizer->bos);
    double elapsed = seconds() - start;
    if (!isfinite(loss)) die("the loss on %s is NaN or infinite: the model is damaged", f.path);
    const char *format = as_json ? "{\"documents\": %zu, \"bytes\": %zu, \"tokens\": %zu, "
                                   "\"loss\": %.6f, \"bits_per_byte\": %.6f}\n"
                                 : "%zu documents, %zu bytes, %zu tokens\n"
                                   "loss: %.4f nats per token\nbits per byte: %.4f\n";
    printf(format, n_documents, bytes, n, loss, loss / log(2.0) * (double)n / (double)bytes);
    flush_output("result");
    fprintf(stderr, "achieved tok/s: %.1f\n", (double)(n - 1) / elapsed);
}

// ------------------------------------------------------------------------------------------------
// Speed

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

enum { PREFILL, DECODE, READ, RATES = READ + N_PATTERNS, ROUNDS = 7, BENCH_TOKENS = 128 };

// Alternate these measurements and print medians: prefill of n_positions tokens; decode of as many,
// for all stories at once; and reading as many bytes as the matrices take, by all threads, in several
// patterns. The fastest pattern is the limit of decode.
static void bench(Model *m) {
    static const char *patterns[] = {"one stream", "one prefetched stream", "eight streams"};
    uint64_t bytes = m->matrix_bytes;
    int n = (int)m->n_positions, n_reads = 1 + (int)(200000000 / bytes);
    uint8_t *memory = alloc(bytes, 1);
    memset(memory, 1, bytes);
    int *tokens = alloc(n, sizeof(int));
    for (int i = 0; i < n; i++) tokens[i] = i % m->config.vocab_size;
    BatchToken *batch = alloc(m->n_stories, sizeof(BatchToken));
    double rates[RATES][ROUNDS + 1];
    for (int round = ROUNDS; round >= 0; round--) {  // the first loads the weights and is dropped
        double start = seconds();
        prefill(m, tokens, 0, n);
        double prefilled = seconds();
        for (int i = 0; i < n; i++) {
            for (size_t s = 0; s < m->n_stories; s++)
                batch[s] = (BatchToken){tokens[i], i, (int)s, true};
            run_batch(m, batch, m->n_stories);
        }
        double decoded = seconds();
        rates[PREFILL][round] = n / (prefilled - start);
        rates[DECODE][round] = n * (double)m->n_stories / (decoded - prefilled);
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            start = seconds();
            for (int i = 0; i < n_reads; i++) {
                OMP(parallel num_threads(m->n_threads))
                {
                    size_t share = bytes / omp_get_num_threads();  // a few bytes are left over
                    uint8_t *part = memory + share * omp_get_thread_num();
                    m->kernels->read(part, share, (Pattern)pattern);
                }
            }
            rates[READ + pattern][round] = (double)bytes * n_reads / (seconds() - start);
        }
    }
    int best = READ;
    for (int i = 0; i < RATES; i++) {
        qsort(rates[i], ROUNDS, sizeof(double), compare_doubles);
        if (i > best && rates[i][ROUNDS / 2] > rates[best][ROUNDS / 2]) best = i;
    }
    double decode = rates[DECODE][ROUNDS / 2], read = rates[best][ROUNDS / 2];
    double by_decode = decode / (double)m->n_stories * (double)bytes;
    printf("kernels: %s, %d threads, %s\n"
           "matrices: %.1f MB of a %.1f MB file\n"
           "prefill: %.1f tok/s\n"
           "decode: %.1f tok/s\n"
           "memory: %.1f GB/s as %s, %.1f GB/s by decode (%.0f %%)\n",
           m->kernels->name, m->n_threads, FORMATS[m->config.format].name, (double)bytes / 1e6,
           (double)m->file.size / 1e6, rates[PREFILL][ROUNDS / 2], decode, read / 1e9,
           patterns[best - READ], by_decode / 1e9, 100 * by_decode / read);
    flush_output("figures");
}

// ------------------------------------------------------------------------------------------------
// The command line

static void print_usage(FILE *out) {
    fputs(
        "usage: ./run model.bin [options]\n"
        "\n"
        "  -i TEXT   prompt (default: none)\n"
        "  -z FILE   tokenizer file (default: tokenizer.bin beside the model, or in this folder)\n"
        "  -n INT    total tokens, including order and prompt (default 256; 0: the whole context);\n"
        "            with -m eval: tokens per window (default: the whole context)\n"
        "  -t FLOAT  temperature; 0 always picks the likeliest token (default 1.0)\n"
        "  -p FLOAT  top-p: keep the likeliest tokens up to this total probability\n"
        "            (default 0.9; 0 or 1: all)\n"
        "  -k INT    top-k: keep the k likeliest tokens (default 0: all)\n"
        "  --min-p FLOAT           drop tokens less likely than this fraction of the likeliest\n"
        "  --repeat-penalty FLOAT  make the last 64 tokens less likely (default 1: off)\n"
        "  -s INT    seed; the same seed gives the same story (default: the time)\n"
        "  --words LIST, --features LIST, --sentence TEXT, --summary TEXT\n"
        "            what the story must contain, for models trained with orders; for example\n"
        "            --words \"kite, forest\" --features Dialogue\n"
        "  --order-bias FLOAT      added to the logits of what is ordered until the story has it\n"
        "            (default 3; 0: off)\n"
        "  --draft FILE            guesses that make a single story faster, see doc/engine.md\n"
        "  -b INT    number of stories to generate at once, with seeds from -s up\n"
        "  --json    print one line of JSON per story, or for the evaluation\n"
        "  -m MODE   generate (default), or eval: bits per byte of a text file (-i FILE)\n"
        "  --bench   measure tokens/s of prefill and decode (-n INT of each, default 128),\n"
        "            and the memory bandwidth\n"
        "  -j INT    number of threads (default: automatic)\n"
        "  --fast    int8, int4: 8-bit activations instead of 16-bit ones; with AVX-512 or\n"
        "            NEON, long prompts and -b get faster\n"
        "  --kv FORMAT  format of the key/value cache: fp32 (default) or bf16\n"
        "  -h        print this help\n"
        "\n"
        "example: ./run out/model.bin -z data/tok4096.bin -t 0.8 -i \"Once upon a time\"\n",
        out);
}

static double parse_number(const char *flag, const char *text, double min, double max) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= min && value <= max))
        die("%s %s: expected a number from %g to %g", flag, text, min, max);
    return value;
}

static uint64_t parse_integer(const char *flag, const char *text, uint64_t min, uint64_t max) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || value < min || value > max)
        die("%s %s: expected a whole number from %llu to %llu", flag, text,
            (unsigned long long)min, (unsigned long long)max);
    return value;
}

// Parse a flag with two choices. Returns whether it is the second.
static bool parse_choice(const char *flag, const char *text, const char *first,
                         const char *second) {
    bool is_second = !strcmp(text, second);
    if (!is_second && strcmp(text, first))
        die("%s %s: expected %s or %s", flag, text, first, second);
    return is_second;
}

// tokenizer.bin beside the model, beside the target if the model is a link, or in the current
// folder.
static char *default_tokenizer(const char *model_path) {
    static const char name[] = "tokenizer.bin";
    char *target = realpath(model_path, NULL), *path = NULL;
    const char *places[] = {model_path, target ? target : model_path, ""};
    struct stat info;
    for (size_t i = 0; i < 3; i++) {
        const char *slash = strrchr(places[i], '/');
        size_t folder = slash ? (size_t)(slash - places[i]) + 1 : 0;
        path = alloc(folder + sizeof name, 1);
        memcpy(path, places[i], folder);
        memcpy(path + folder, name, sizeof name);
        if (!stat(path, &info)) break;
    }
    free(target);
    return path;
}

typedef struct {
    const char *model, *tokenizer, *draft;  // paths
    const char *text;               // the prompt, or with -m eval a path
    Order order;
    int n_positions, n_stories, n_threads;
    uint64_t seed;
    Sampler sampler;
    bool as_json, is_eval, is_bench, is_fast, bf16_cache, wants_help;
} Options;

static Options parse_options(int argc, char **argv) {
    Options o = {.n_positions = -1, .n_stories = 1, .seed = (uint64_t)time(NULL),
                 .sampler = {.temperature = 1.0f, .top_p = 0.9f, .repeat_penalty = 1.0f,
                             .order_bias = 3.0f}};
    const char *mode = "generate", *cache = "fp32";
    const struct {
        const char *flag;
        enum { TEXT, INTEGER, SEED, NUMBER, SWITCH } kind;
        void *place;
        double min, max;
    } flags[] = {
        {"-i", TEXT, &o.text, 0, 0},
        {"-z", TEXT, &o.tokenizer, 0, 0},
        {"--draft", TEXT, &o.draft, 0, 0},
        {"-n", INTEGER, &o.n_positions, 0, INT_MAX - 1},
        {"-t", NUMBER, &o.sampler.temperature, 0, 100},
        {"-p", NUMBER, &o.sampler.top_p, 0, 1},
        {"-k", INTEGER, &o.sampler.top_k, 0, INT_MAX},
        {"--min-p", NUMBER, &o.sampler.min_p, 0, 1},
        {"--repeat-penalty", NUMBER, &o.sampler.repeat_penalty, 0.01, 100},
        {"-s", SEED, &o.seed, 0, 0},
        {"--words", TEXT, &o.order.words, 0, 0},
        {"--features", TEXT, &o.order.features, 0, 0},
        {"--sentence", TEXT, &o.order.sentence, 0, 0},
        {"--summary", TEXT, &o.order.summary, 0, 0},
        {"--order-bias", NUMBER, &o.sampler.order_bias, 0, MAX_ORDER_BIAS},
        {"-b", INTEGER, &o.n_stories, 1, MAX_STORIES},
        {"--json", SWITCH, &o.as_json, 0, 0},
        {"-m", TEXT, &mode, 0, 0},
        {"--bench", SWITCH, &o.is_bench, 0, 0},
        {"-j", INTEGER, &o.n_threads, 1, MAX_THREADS},
        {"--fast", SWITCH, &o.is_fast, 0, 0},
        {"--kv", TEXT, &cache, 0, 0},
        {"-h", SWITCH, &o.wants_help, 0, 0},
        {"--help", SWITCH, &o.wants_help, 0, 0},
    };
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (arg[0] != '-') {
            if (o.model) die("expected one model file, not both %s and %s", o.model, arg);
            o.model = arg;
            continue;
        }
        size_t f = 0, n_flags = sizeof flags / sizeof *flags;
        while (f < n_flags && strcmp(arg, flags[f].flag)) f++;
        if (f == n_flags) die("unknown option %s: ./run -h lists all options", arg);
        if (flags[f].kind != SWITCH && ++i == argc)
            die("%s needs a value: ./run -h lists all options", arg);
        void *place = flags[f].place;
        double min = flags[f].min, max = flags[f].max;
        switch (flags[f].kind) {
        case SWITCH: *(bool *)place = true; break;
        case INTEGER: *(int *)place = (int)parse_integer(arg, argv[i], min, max); break;
        case SEED: *(uint64_t *)place = parse_integer(arg, argv[i], 0, UINT64_MAX); break;
        case NUMBER: *(float *)place = (float)parse_number(arg, argv[i], min, max); break;
        case TEXT: *(const char **)place = argv[i]; break;
        }
    }
    o.is_eval = parse_choice("-m", mode, "generate", "eval");
    o.bf16_cache = parse_choice("--kv", cache, "fp32", "bf16");
    return o;
}

#if defined(IS_POSIX)
static void on_bus_error(int signal_number) {
    static const char text[] = "error: the model, tokenizer or text file shrank while it was being "
                               "read, or its disk failed: restore the file and run again\n";
    (void)signal_number;
    _exit(write(STDERR_FILENO, text, sizeof text - 1) < 0 ? 2 : EXIT_FAILURE);
}
#endif

int main(int argc, char **argv) {
#if defined(IS_POSIX)
    signal(SIGBUS, on_bus_error);  // raised by a mapped file that shrank
#endif
    Options o = parse_options(argc, argv);
    if (!o.model || o.wants_help) {
        print_usage(o.wants_help ? stdout : stderr);
        flush_output("help");
        return o.wants_help ? EXIT_SUCCESS : EXIT_FAILURE;
    }
    if (o.is_eval && !o.text) die("-i FILE is missing: -m eval needs a text file");
    const int n_requested = o.n_positions;  // -1 without -n
    if (o.n_positions < 0) o.n_positions = o.is_eval ? 0 : o.is_bench ? BENCH_TOKENS : 256;
    File text = {0};
    if (o.is_eval) {
        o.n_stories = 1;
        text = open_file(o.text, "pass a text file (-i)");
        size_t max_tokens = text.size + EXTRA_TOKENS;  // further positions would stay unused
        if (max_tokens < MAX_CONTEXT && (!o.n_positions || (size_t)o.n_positions > max_tokens))
            o.n_positions = (int)max_tokens;
    }
    if (o.draft && o.n_stories > 1)
        die("--draft cannot be used with -b %d: it makes a single story faster", o.n_stories);
    Model model = load_model(open_file(o.model, MODEL_HINT), o.n_positions, o.n_stories,
                             o.is_eval ? 0 : o.n_stories + MAX_GUESSES, o.n_threads,
                             o.bf16_cache, o.is_fast);
    if (o.is_bench) {
        bench(&model);
    } else {
        if (!o.tokenizer) o.tokenizer = default_tokenizer(o.model);
        Tokenizer tokenizer = load_tokenizer(open_file(o.tokenizer, TOKENIZER_HINT),
                                             model.config.vocab_size);
        check_tokenizer(&tokenizer, &model.config, o.model);
        o.sampler.kernels = model.kernels;
        o.sampler.candidates = alloc((uint64_t)model.n_threads * model.config.vocab_size,
                                     sizeof(Candidate));
        if (o.is_eval) {
            evaluate(&model, &tokenizer, text, o.as_json);
        } else {
            if (!o.text) o.text = "";
            size_t n_order;
            bool knows_orders = has(&model.config, ORDERS);  // without a prompt it would make one up
            const char *prompt = order_prompt(&o.order, o.text, knows_orders && !*o.text, &n_order);
            if (n_order && !knows_orders)
                die("%s was trained without orders: train with shards of pretokenize --orders",
                    o.model);
            if (n_order) set_phrases(&o.sampler, &tokenizer, &o.order, prompt, n_order);
            bool wants_note = n_requested > model.config.seq_len && !o.as_json;
            Draft draft = {0};
            if (o.draft)
                draft = load_draft(open_file(o.draft, DRAFT_HINT), &tokenizer, model.matrix_bytes);
            generate(&model, &tokenizer, &o.sampler, &draft, prompt, n_order, o.seed, o.as_json,
                     wants_note);
        }
    }
    release_to(NULL);
    return EXIT_SUCCESS;
}
