// The forward pass: a batch of tokens in, logits out, by all threads; and load_model(), which finds
// the weights and allocates the buffers.

// A token of a batch. A story's tokens are adjacent, in the order of their positions.
typedef struct {
    int token;
    int pos;            // its position in its story, below n_positions
    int story;          // the index of its story, below n_stories
    bool wants_logits;  // for the next token
} BatchToken;

enum {
    MAX_BATCH = 128,  // tokens
    MAX_STORIES = 1024,
    MAX_THREADS = 256,
    MIN_WORK = 1 << 16,  // multiplications per token for which another thread helps
    MIN_ROPE = 256,      // positions in the first RoPE table
    MIN_PATIENCE = 16,   // passes before more threads are tried, see adjust_threads()
    MAX_PATIENCE = 2048,
};

typedef struct {
    File file;
    Config config;
    Weights weights;
    uint64_t matrix_bytes;  // read for every token
    const Kernels *kernels;
    size_t n_positions;  // room for each story, up to seq_len
    size_t n_stories;    // generated at once
    size_t max_batch;    // tokens in a batch
    size_t max_wanted;   // tokens of a batch whose logits are wanted
    // buffers for the tokens of a batch; width and hidden: dim and hidden_dim rounded up to LANES
    size_t width, hidden;
    float *x;         // (max_batch, width) the residual stream
    float *x0;        // (max_batch, width) the embedding, for RESIDUAL_SCALARS
    float *added;     // (max_batch, width) the output of a block, to be added to x
    float *q;         // (max_batch, width)
    float *k, *v;     // (max_batch, width)
    float *up;        // (max_batch, hidden) normed @ w3^T, which SwiGLU multiplies
    float *scratch;   // (n_threads, width)
    float *logits;    // (max_wanted, vocab_size padded)
    Input normed;     // (max_batch, width) rmsnorm(x), the input of a block
    Input mixed;      // (max_batch, width) the heads' outputs, the input of wo
    Input inner;      // (max_batch, hidden) the input of w2
    Input wanted;     // (max_batch, width) the output head's input: only tokens that want logits
    bool is_fast;     // int8 and int4: 8-bit activations instead of 16-bit
    // the key/value cache, fp32 or bf16; n_positions is padded to LANES; in values, head_dim is too
    bool bf16_cache;
    uint8_t *keys;    // (n_stories, n_layers, n_kv_heads, n_positions / 16, head_dim, 16)
    uint8_t *values;  // (n_stories, n_layers, n_kv_heads, n_positions, head_dim)
    // what later positions need as well
    int *tokens;      // (n_stories, n_positions)
    float *raw_keys;  // keys before key_conv, like values without padding; NULL if there is none
    float *rope_cos;  // (n_positions, head_dim / 2)
    float *rope_sin;
    size_t n_rope;    // rows filled in both
    // threads
    int n_threads;   // maximum
    int n_active;    // in use: fewer while other programs use the cores
    int n_passes;    // since n_active changed
    int patience;    // passes before more threads are tried
    double spent, wasted;  // seconds in recent passes, and those lost, see Pass
    atomic_int n_arrived, round;  // of the barrier, see arrive()
} Model;

static Input new_input(const Model *m, size_t stride) {
    size_t groups = stride / LANES + 1;  // a group has at least LANES columns
    return (Input){
        .x = alloc(m->max_batch * stride, sizeof(float)),
        .codes = alloc(ROUND_UP(m->max_batch, TILE) * stride, 2),
        .scales = alloc(m->max_batch * groups, sizeof(float)),
        .offsets = alloc(m->max_batch * groups, sizeof(int32_t)),
        .stride = stride, .max_groups = groups, .is_8bit = m->is_fast,
    };
}

static void set_rows(Input *in, size_t n) {
    in->n = n;
    in->tile = n < TILE ? n : TILE;
}

static size_t logits_stride(const Model *m) {
    return ROUND_UP((size_t)m->config.vocab_size, LANES);
}

// The logits (vocab_size) after the i-th of the tokens that want logits in the last batch. The
// caller may overwrite them.
static float *logits_of(const Model *m, size_t i) { return m->logits + i * logits_stride(m); }

// ---- Threads. All of them run forward(). They split the rows of a product, or the tokens of the
// batch, then wait for each other. They spin because the next product is only microseconds away.

// A forward pass as one thread sees it
typedef struct {
    Model *m;
    const BatchToken *batch;  // (n)
    size_t n;                 // tokens
    size_t n_wanted;          // tokens that want logits
    int thread, n_threads;
    size_t first, end;        // this thread's share of the tokens, set by begin_tokens()
    double lost;              // seconds spent waiting for a thread that was not running
} Pass;

// Wait until all threads have arrived and the last one calls release_threads(). In that last
// thread, return true at once: it must make the call.
static bool arrive(Pass *p) {
    Model *m = p->m;
    int round = atomic_load_explicit(&m->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&m->n_arrived, 1, memory_order_acq_rel) == p->n_threads - 1)
        return true;
    double start = 0.0;
    for (int spins = 0; atomic_load_explicit(&m->round, memory_order_acquire) == round;) {
        // a wait this long means that another program has the core of a missing thread
        wait_briefly(spins >= 10000);
        if (spins < 10000 && ++spins == 10000) start = seconds();
    }
    if (start > 0.0) p->lost += seconds() - start;
    return false;
}

static void release_threads(Model *m) {
    atomic_store_explicit(&m->n_arrived, 0, memory_order_relaxed);
    atomic_fetch_add_explicit(&m->round, 1, memory_order_release);
}

static void wait_for_all(Pass *p) {
    if (p->n_threads > 1 && arrive(p)) release_threads(p->m);
}

// Begin per-token work: wait until all threads have arrived, then set first and end to this
// thread's share of the tokens. If there is only one token, the last thread to arrive gets it; the
// others wait here until it is done.
static void begin_tokens(Pass *p) {
    if (p->n == 1 && p->n_threads > 1) {
        p->first = 0;
        p->end = arrive(p);
        return;
    }
    // whole tiles, so that no two threads write to the same cache line
    size_t tiles = (p->n + TILE - 1) / TILE, end = tiles * (p->thread + 1) / p->n_threads * TILE;
    p->first = tiles * p->thread / p->n_threads * TILE;
    p->end = end < p->n ? end : p->n;
    wait_for_all(p);
}

// End per-token work: wait until all threads are done with their tokens.
static void end_tokens(Pass *p) {
    if (p->n > 1 || p->n_threads == 1) wait_for_all(p);
    else if (p->end) release_threads(p->m);
}

// Compute this thread's share of the rows of n products.
static void multiply(Pass *p, const Product *products, size_t n) {
    size_t total = 0, before = 0, threads = p->n_threads;
    for (size_t i = 0; i < n; i++) total += (products[i].w->rows + LANES - 1) / LANES;
    size_t first = total * p->thread / threads, last = total * (p->thread + 1) / threads;
    for (size_t i = 0; i < n; i++) {
        size_t count = (products[i].w->rows + LANES - 1) / LANES;
        size_t end = before + count, from = first > before ? first : before;
        size_t to = last < end ? last : end;
        if (from < to) p->m->kernels->matmul(&products[i], from - before, to - before);
        before = end;
    }
}

// ---- Per-token work

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

static void norm(const Model *m, float *out, const float *x, const float *gain, size_t n) {
    m->kernels->rmsnorm(out, x, gain, n, m->config.norm_eps);
}

// Row i of an input is complete: quantize it if its matrix w is quantized.
static void finish_input(const Model *m, Input *in, const Tensor *w, size_t i) {
    if (w->group) m->kernels->quantize(in, i, w->cols, w->group, (int)FORMATS[w->format].zero);
}

static void embedding_of(const Model *m, float *out, int token) {
    read_row(out, m->weights.tok_embeddings, (size_t)token);
    if (has(&m->config, EMBEDDING_NORM))
        norm(m, out, out, m->weights.embedding_norm, m->config.dim);
}

// The row of the bigram table for a token and the previous one, as in bigram_hash() of model.py.
static size_t bigram_hash(int previous, int token, int rows) {
    if (previous < 0) return 0;
    return 1 + (((uint64_t)previous * 36313) ^ ((uint64_t)token * 27191)) % ((uint64_t)rows - 1);
}

// x = the embedding of the token at a position, plus SMEAR and bigram embeddings if used; tmp:
// scratch. Both have room for `width` values.
static void embed_one(const Model *m, float *x, float *tmp, const int *tokens, int pos) {
    const Config *c = &m->config;
    int token = tokens[pos], previous = pos ? tokens[pos - 1] : -1;
    embedding_of(m, x, token);
    if (has(c, SMEAR) && previous >= 0) {
        float gate = m->kernels->smear_gate(m->weights.smear_gate, x, c->dim);
        embedding_of(m, tmp, previous);
        for (int i = 0; i < c->dim; i++) x[i] += gate * tmp[i];
    }
    if (c->bigram_rows) {
        read_row(tmp, m->weights.bigram, bigram_hash(previous, token, c->bigram_rows));
        add(x, tmp, c->dim);
    }
}

// x (n) += column j - 1 of the weights (n, taps - 1) of a convolution, times `earlier` (n), what x
// was j tokens before
static void add_earlier(float *x, const float *weights, size_t taps, size_t j,
                        const float *earlier, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += weights[i * (taps - 1) + j - 1] * earlier[i];
}

// x = the input of the first layer for a token; tmp and earlier: scratch
static void embed(const Model *m, float *x, float *tmp, float *earlier, const BatchToken *s) {
    int taps = m->config.embedding_conv;
    const int *tokens = m->tokens + s->story * m->n_positions;
    embed_one(m, x, tmp, tokens, s->pos);
    for (int j = 1; j < taps && j <= s->pos; j++) {
        embed_one(m, earlier, tmp, tokens, s->pos - j);
        add_earlier(x, m->weights.embedding_conv, taps, j, earlier, m->config.dim);
    }
}

// Apply QK_NORM, if set, and RoPE: rotate neighboring pairs of a head by the angles of pos.
static void norm_and_rotate(const Model *m, float *head, const float *gain, int pos) {
    int half = m->config.dim / m->config.n_heads / 2;
    const float *cosines = m->rope_cos + (size_t)pos * half;
    const float *sines = m->rope_sin + (size_t)pos * half;
    if (has(&m->config, QK_NORM)) norm(m, head, head, gain, 2 * half);
    for (int i = 0; i < half; i++) {
        float a = head[2 * i], b = head[2 * i + 1];
        head[2 * i] = a * cosines[i] - b * sines[i];
        head[2 * i + 1] = a * sines[i] + b * cosines[i];
    }
}

static void write_cache(const Model *m, uint8_t *cache, size_t at, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = isnan(x) ? bits | 1 << 22 : bits + 0x7FFF + (bits >> 16 & 1);  // ties to even
    if (m->bf16_cache) ((uint16_t *)cache)[at] = (uint16_t)(bits >> 16);
    else ((float *)cache)[at] = x;
}

// Compute attention for one key/value head and its query heads, for tokens first to last
// (exclusive) of one story. All their keys and values are cached first.
static void attend_head(Pass *p, size_t layer, size_t head, size_t first, size_t last) {
    Model *m = p->m;
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    size_t head_dim = c->dim / c->n_heads, group = c->n_heads / c->n_kv_heads;
    size_t padded_dim = ROUND_UP(head_dim, LANES), size = m->bf16_cache ? 2 : 4;
    size_t index = ((size_t)p->batch[first].story * c->n_layers + layer) * c->n_kv_heads + head;
    size_t n_padded = ROUND_UP(m->n_positions, LANES);
    uint8_t *keys = m->keys + index * n_padded * head_dim * size;
    uint8_t *values = m->values + index * n_padded * padded_dim * size;
    float *raw = m->raw_keys ? m->raw_keys + index * m->n_positions * head_dim : NULL;
    size_t taps = c->key_conv, row = (layer * c->n_kv_heads + head) * head_dim;
    float *out = m->scratch + p->thread * m->width;
    for (size_t i = first; i < last; i++) {
        size_t pos = p->batch[i].pos;
        size_t at = i * m->width + head * head_dim;
        float *k = m->k + at, *v = m->v + at;
        if (raw) memcpy(raw + pos * head_dim, k, head_dim * sizeof *k);
        for (size_t j = 1; j < taps && j <= pos; j++)
            add_earlier(k, w->key_conv + row * (taps - 1), taps, j, raw + (pos - j) * head_dim,
                        head_dim);
        norm_and_rotate(m, k, row_of(w->k_norm, layer, head_dim), (int)pos);
        if (pos % LANES == 0) {  // already zero, but writing before reading saves a page fault
            memset(keys + pos * head_dim * size, 0, LANES * head_dim * size);
            memset(values + pos * padded_dim * size, 0, LANES * padded_dim * size);
        }
        for (size_t d = 0; d < head_dim; d++) {
            write_cache(m, keys, (pos / LANES * head_dim + d) * LANES + pos % LANES, k[d]);
            write_cache(m, values, pos * padded_dim + d, v[d]);
        }
    }
    for (size_t i = first; i < last; i++) {
        size_t pos = p->batch[i].pos, window = w->windows[layer];
        for (size_t h = head * group; h < (head + 1) * group; h++) {
            float *q = m->q + i * m->width + h * head_dim;
            norm_and_rotate(m, q, row_of(w->q_norm, layer, head_dim), (int)pos);
            m->kernels->attend(out, q, keys, values, head_dim,
                               window && window <= pos ? pos + 1 - window : 0, pos, m->bf16_cache);
            memcpy(m->mixed.x + i * m->width + h * head_dim, out, head_dim * sizeof *out);
        }
    }
}

// Compute the buffer `mixed` from q, k and v, for this thread's share of the heads of each story.
static void attention(Pass *p, size_t layer) {
    Model *m = p->m;
    size_t kv_heads = m->config.n_kv_heads, item = 0;
    for (size_t first = 0, last; first < p->n; first = last) {
        int story = p->batch[first].story;
        for (last = first + 1; last < p->n && p->batch[last].story == story;) last++;
        for (size_t head = 0; head < kv_heads; head++, item++)
            if (item % p->n_threads == (size_t)p->thread) attend_head(p, layer, head, first, last);
    }
}

// The forward pass of n tokens. Every thread runs it and computes its share of the rows of each
// product, of the heads, or of the tokens. Token i uses row i of each buffer (n, ...), except that
// `wanted` and `logits` have rows only for tokens that want logits.
static void forward(Pass *p) {
    Model *m = p->m;
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    const size_t n_layers = c->n_layers, dim = c->dim, width = m->width, hidden = m->hidden;
    const bool gated = is_gated(c->activation);

    for (size_t l = 0; l < n_layers; l++) {
        // x (n, dim) = the embedding, or x + added; normed (n, dim) = rmsnorm(x)
        begin_tokens(p);
        for (size_t i = p->first; i < p->end; i++) {
            float *x = m->x + i * width, *x0 = m->x0 + i * width, *added = m->added + i * width;
            if (l == 0) {
                embed(m, x, added, x0, &p->batch[i]);
                memcpy(x0, x, dim * sizeof *x);
            } else {
                add(x, added, dim);
            }
            if (has(c, RESIDUAL_SCALARS))
                for (size_t d = 0; d < dim; d++)
                    x[d] = w->x_scale[l] * x[d] + w->x0_scale[l] * x0[d];
            norm(m, m->normed.x + i * width, x, row_of(w->attention_norm, l, dim), dim);
            finish_input(m, &m->normed, &w->wq[l], i);
        }
        end_tokens(p);

        // q (n, n_heads * head_dim) = normed @ wq^T; k and v (n, n_kv_heads * head_dim) likewise
        multiply(p, (Product[]){{&w->wq[l], &m->normed, m->q, width},
                                {&w->wk[l], &m->normed, m->k, width},
                                {&w->wv[l], &m->normed, m->v, width}}, 3);
        if (l < (size_t)c->value_embeddings) {  // v += the value embedding of the token
            begin_tokens(p);
            for (size_t i = p->first; i < p->end; i++) {
                float *row = m->added + i * width;
                read_row(row, &w->value_embeddings[l], (size_t)p->batch[i].token);
                add(m->v + i * width, row, w->value_embeddings[l].cols);
            }
            end_tokens(p);
        } else {
            wait_for_all(p);
        }

        // RoPE; in each head, mixed (n, head_dim) = softmax(q @ k^T / sqrt(head_dim)) @ v
        attention(p, l);
        begin_tokens(p);
        for (size_t i = p->first; i < p->end; i++) finish_input(m, &m->mixed, &w->wo[l], i);
        end_tokens(p);
        // added (n, dim) = mixed @ wo^T
        multiply(p, (Product[]){{&w->wo[l], &m->mixed, m->added, width}}, 1);

        // x += added; normed = rmsnorm(x)
        begin_tokens(p);
        for (size_t i = p->first; i < p->end; i++) {
            float *x = m->x + i * width;
            add(x, m->added + i * width, dim);
            norm(m, m->normed.x + i * width, x, row_of(w->ffn_norm, l, dim), dim);
            finish_input(m, &m->normed, &w->w1[l], i);
        }
        end_tokens(p);

        // inner (n, hidden_dim) = silu(normed @ w1^T) * (normed @ w3^T), or relu(normed @ w1^T)^2
        const Tensor *w3 = gated ? &w->w3[l] : NULL;
        multiply(p, (Product[]){{&w->w1[l], &m->normed, m->inner.x, hidden},
                                {w3, &m->normed, m->up, hidden}}, gated ? 2 : 1);
        begin_tokens(p);
        for (size_t i = p->first; i < p->end; i++) {
            const float *up = gated ? m->up + i * hidden : NULL;
            m->kernels->activate(c->activation, m->inner.x + i * hidden, up, c->hidden_dim);
            finish_input(m, &m->inner, &w->w2[l], i);
        }
        end_tokens(p);
        // added (n, dim) = inner @ w2^T
        multiply(p, (Product[]){{&w->w2[l], &m->inner, m->added, width}}, 1);
    }

    // x += added; wanted (n_wanted, dim) = rmsnorm(x) of the tokens that want logits
    begin_tokens(p);
    for (size_t i = p->first; i < p->end; i++) {
        float *x = m->x + i * width;
        add(x, m->added + i * width, dim);
        if (!p->batch[i].wants_logits) continue;
        size_t row = 0;
        for (size_t j = 0; j < i; j++) row += p->batch[j].wants_logits;
        norm(m, m->wanted.x + row * width, x, w->norm, dim);
        finish_input(m, &m->wanted, w->output, row);
    }
    end_tokens(p);
    if (!p->n_wanted) return;

    // logits (n_wanted, vocab_size) = wanted @ output^T; with a softcap c, c * tanh(logits / c)
    multiply(p, (Product[]){{w->output, &m->wanted, m->logits, logits_stride(m)}}, 1);
    if (c->logit_softcap > 0.0f) {
        begin_tokens(p);
        for (size_t i = p->first; i < p->end && i < p->n_wanted; i++)
            m->kernels->softcap(logits_of(m, i), c->vocab_size, c->logit_softcap);
        end_tokens(p);
    }
}

// Adjust the number of threads after a pass that took `time` seconds, `lost` of them waiting for a
// thread that was not running. If most of the recent time was lost, other programs are using the
// cores: halve the threads, and after a while try doubling them. The number of threads changes no
// bit of the results.
static void adjust_threads(Model *m, double time, double lost) {
    m->spent += time;
    m->wasted += lost;
    bool is_busy = m->spent > 0.01 && m->wasted > m->spent / 2;
    if (m->n_passes < MAX_PATIENCE) m->n_passes++;
    if (m->spent > 0.02) {  // older passes count less
        m->spent /= 2;
        m->wasted /= 2;
    }
    if (is_busy) {
        m->n_active /= 2;
        if (m->patience < MAX_PATIENCE) m->patience *= 2;
    } else if (m->n_active < m->n_threads && m->n_passes >= m->patience) {
        m->n_active = 2 * m->n_active < m->n_threads ? 2 * m->n_active : m->n_threads;
    } else {
        if (m->n_passes >= MAX_PATIENCE) m->patience = MIN_PATIENCE;
        return;
    }
    m->n_passes = 0;
    m->spent = m->wasted = 0.0;
}

// Fill the RoPE tables for at least the first n positions. They grow on demand because most of a
// long context is never used. The angles are doubles, so different libms almost always agree.
static void fill_rope(Model *m, size_t n) {
    if (n <= m->n_rope) return;
    size_t head_dim = m->config.dim / m->config.n_heads, half = head_dim / 2;
    if (n < 2 * m->n_rope) n = 2 * m->n_rope;
    if (n < MIN_ROPE) n = MIN_ROPE;
    if (n > m->n_positions) n = m->n_positions;
    for (size_t i = 0; i < half; i++) {
        double freq = pow(m->config.rope_theta, -(double)(2 * i) / (double)head_dim);
        for (size_t pos = m->n_rope; pos < n; pos++) {
            m->rope_cos[pos * half + i] = (float)cos((double)pos * freq);
            m->rope_sin[pos * half + i] = (float)sin((double)pos * freq);
        }
    }
    m->n_rope = n;
}

// Run a batch of n <= max_batch tokens through the model. Earlier tokens are in the cache.
static void run_batch(Model *m, const BatchToken *batch, size_t n) {
    Pass p = {.m = m, .batch = batch, .n = n, .n_threads = 1};
    size_t end_pos = 0;
    for (size_t i = 0; i < n; i++) {
        p.n_wanted += batch[i].wants_logits;
        if ((size_t)batch[i].pos >= end_pos) end_pos = (size_t)batch[i].pos + 1;
        m->tokens[batch[i].story * m->n_positions + batch[i].pos] = batch[i].token;
    }
    fill_rope(m, end_pos);
    set_rows(&m->normed, n);
    set_rows(&m->mixed, n);
    set_rows(&m->inner, n);
    set_rows(&m->wanted, p.n_wanted);
    if (m->n_active == 1) {
        if (m->n_threads > 1) adjust_threads(m, 0.0, 0.0);
        forward(&p);
        return;
    }
    double start = seconds(), end = start, lost = 0.0;
    OMP(parallel num_threads(m->n_active) firstprivate(p) reduction(max : lost))
    {
        p.n_threads = omp_get_num_threads();  // may be fewer than n_active
        p.thread = omp_get_thread_num();
        forward(&p);
        lost = p.lost;
        if (p.thread == 0) end = seconds();
    }
    double now = seconds();
    if (now - end > 1e-4) lost += now - end;  // waiting for the others to finish
    adjust_threads(m, now - start, lost);
}

// The number of threads: `wanted`, or if that is 0, the machine's, limited so that each thread has
// MIN_WORK multiplications per token. With less work, waiting costs more than sharing saves.
static int pick_threads(const Config *c, int wanted) {
#if !defined(_OPENMP)
    wanted = 1;
#endif
    uint64_t work = (uint64_t)c->n_layers * c->dim * (2 * (uint64_t)c->dim + 2 * c->hidden_dim) +
                    (uint64_t)c->vocab_size * c->dim;
    uint64_t limit = omp_get_max_threads() < MAX_THREADS ? omp_get_max_threads() : MAX_THREADS;
    if (wanted) return wanted < MAX_THREADS ? wanted : MAX_THREADS;
    return (int)(work / MIN_WORK < 1 ? 1 : work / MIN_WORK < limit ? work / MIN_WORK : limit);
}

// Find the weights in the file. Its size must be exactly what its header requires.
static void load_weights(Model *m) {
    const Config *c = &m->config;
    const File *f = &m->file;
    Walk walk = {.config = c, .at = c->header_size, .alignment = 1};
    if (c->version == 3) {
        walk.at += c->n_layers * sizeof(int32_t);  // the windows
        walk.alignment = ALIGNMENT;
    }
    Walk measure = walk;
    uint64_t needs = lay_out(&m->weights, &measure);
    if (c->file_size != f->size) needs = c->file_size;
    if (needs != f->size)
        die("%s is %s or not a version %d model.bin: it has %zu bytes, but its header (dim %d, %d "
            "layers, vocabulary %d) %s %llu; copy or export it again", f->path,
            f->size < needs ? "truncated" : "too long", c->version, f->size, c->dim, c->n_layers,
            c->vocab_size, c->file_size != f->size ? "says" : "needs", (unsigned long long)needs);
    walk.data = f->data;
    if (c->version == 0 && f->size <= MAX_COPY) {
        // the short header would make every vector straddle two cache lines
        size_t shift = ALIGNMENT - c->header_size;
        walk.data = memcpy((uint8_t *)alloc(f->size + shift, 1) + shift, f->data, f->size);
    }
    lay_out(&m->weights, &walk);
    m->matrix_bytes = walk.matrix_bytes;

    int32_t *windows = alloc(c->n_layers, sizeof *windows);
    m->weights.windows = windows;
    if (c->version == 3) memcpy(windows, f->data + c->header_size, c->n_layers * sizeof *windows);
    for (int l = 0; l < c->n_layers; l++)
        if (windows[l] < 0 || windows[l] > MAX_CONTEXT)
            die("%s is not a version 3 model.bin: layer %d has a window of %d, expected 0 to %d; "
                "export it again", f->path, l, windows[l], MAX_CONTEXT);
}

// Bytes of memory that this process may use: the machine's, or its container's if that is less.
static double memory_limit(void) {
    double limit = HUGE_VAL;
#if defined(IS_POSIX)
    double group;
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    if (pages > 0 && size > 0) limit = (double)pages * (double)size;
    FILE *f = fopen("/sys/fs/cgroup/memory.max", "r");
    if (f && fscanf(f, "%lf", &group) == 1 && group < limit) limit = group;
    if (f) fclose(f);
#endif
    return limit;
}

// Refuse a key/value cache that does not fit in memory. The system provides memory on the first
// write, and would otherwise kill the program in the middle of a story.
static void check_memory(const Model *m) {
    const Config *c = &m->config;
    double values = (double)m->n_stories * c->n_layers * c->n_kv_heads * (c->dim / c->n_heads);
    double size = 2 * (m->bf16_cache ? 2 : 4) + (c->key_conv ? 4 : 0);
    double bytes = values * size * (double)m->n_positions;
    if (bytes > memory_limit())
        die("not enough memory for the keys and values of %zu positions%s: they need %.1f GB, and "
            "there are %.1f GB; use fewer positions (-n)%s", m->n_positions,
            m->n_stories > 1 ? " per story" : "", bytes / 1e9, memory_limit() / 1e9,
            m->n_stories > 1 ? " or stories (-b)" : "");
}

static void alloc_buffers(Model *m) {
    const Config *c = &m->config;
    size_t head_dim = c->dim / c->n_heads;
    float **buffers[] = {&m->x, &m->x0, &m->added, &m->q, &m->k, &m->v};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        *buffers[i] = alloc(m->max_batch * m->width, sizeof(float));
    m->up = alloc(m->max_batch * m->hidden, sizeof(float));
    m->scratch = alloc(m->n_threads * m->width, sizeof(float));
    m->normed = new_input(m, m->width);
    m->wanted = new_input(m, m->width);
    m->mixed = new_input(m, m->width);
    m->inner = new_input(m, m->hidden);
    m->logits = alloc(m->max_wanted, logits_stride(m) * sizeof(float));
    uint64_t heads = (uint64_t)m->n_stories * c->n_layers * c->n_kv_heads;
    uint64_t rows = heads * ROUND_UP(m->n_positions, LANES);
    size_t size = m->bf16_cache ? sizeof(uint16_t) : sizeof(float);
    m->keys = alloc(rows, head_dim * size);
    m->values = alloc(rows, ROUND_UP(head_dim, LANES) * size);
    m->tokens = alloc((uint64_t)m->n_stories * m->n_positions, sizeof(int));
    if (c->key_conv) m->raw_keys = alloc(heads * m->n_positions, head_dim * sizeof(float));
    m->rope_cos = alloc((uint64_t)m->n_positions * (head_dim / 2), sizeof(float));
    m->rope_sin = alloc((uint64_t)m->n_positions * (head_dim / 2), sizeof(float));
}

// Load a model, with room for n_stories of n_positions each (0: the whole context), and for the
// logits of max_wanted tokens of a batch (0: of all).
static Model load_model(File file, int n_positions, int n_stories, int max_wanted, int n_threads,
                        bool bf16_cache, bool is_fast) {
    Model m = {.file = file, .config = read_header(&file), .kernels = pick_kernels(),
               .bf16_cache = bf16_cache, .is_fast = is_fast, .n_stories = (size_t)n_stories};
    const Config *c = &m.config;
    check_config(c, file.path);
    load_weights(&m);
    m.n_positions = n_positions && n_positions < c->seq_len ? n_positions : c->seq_len;
    m.max_batch = m.n_positions < MAX_BATCH ? m.n_positions : MAX_BATCH;
    if (m.max_batch < m.n_stories) m.max_batch = m.n_stories;
    m.max_wanted = max_wanted ? (size_t)max_wanted : m.max_batch;
    m.width = ROUND_UP((size_t)c->dim, LANES);
    m.hidden = ROUND_UP((size_t)c->hidden_dim, LANES);
    m.n_threads = m.n_active = pick_threads(c, n_threads);
    m.patience = MIN_PATIENCE;
    check_memory(&m);
    alloc_buffers(&m);
    return m;
}
