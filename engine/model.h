// The model: weight formats, the interface of the kernels, and the file model.bin.

// ------------------------------------------------------------------------------------------------
// Weight formats, and the interface of the kernels that multiply them

// LANES: how many values kernels compute together, whatever the register size of the machine;
// CODES: how many bytes of a Tensor hold 4 (int4: 8) columns of 16 rows;
// TILE: the maximum number of inputs processed at a time
enum { LANES = 16, CODES = 64, TILE = 8 };

typedef enum { FP32, BF16, INT8, INT4, N_FORMATS } Format;

// int8 and int4: a weight is (code - zero) * scale; `group` columns of a row share a scale.
static const struct {
    const char *name;
    size_t bits, group, zero;
    size_t per_code;  // columns of a row stored together
} FORMATS[N_FORMATS] = {
    [FP32] = {"fp32", 32, 0, 0, 1},
    [BF16] = {"bf16", 16, 0, 0, 1},
    [INT8] = {"int8", 8, 64, 128, 4},
    [INT4] = {"int4", 4, 32, 8, 8},
};

// A matrix (rows, cols) as stored in the model file. fp32 and bf16 are row-major. int8 and int4 are
// stored in blocks of `lanes` rows: 16 for multiplied matrices, 1 for lookup tables. A block has
// the first 4 (int4: 8) columns of each of its rows, then the next columns of each row, and so on.
// int4 packs columns 0 to 3 into the low halves of 4 bytes and columns 4 to 7 into the high halves.
// Padding has the value zero. Scales are (blocks, groups of columns, lanes).
typedef struct {
    Format format;
    size_t rows, cols, lanes, group;
    const uint8_t *data;
    const void *scales;   // bfloat16, or float32 in llama2.c's version 2
    bool wide_scales;
} Tensor;

// n rows of activations, the input of a product.
typedef struct {
    float *x;          // (n, stride)
    // for int8 and int4 matrices: x is about code * scale of its group, with codes of 16 bits
    int8_t *codes;     // (n / tile, stride / 4, tile, 8): four 16-bit codes or, if the kernels want
                       // that, their four high bytes and then their four low bytes
    float *scales;     // (n, max_groups)
    int32_t *offsets;  // (n, max_groups): -zero * the group's sum
    size_t stride, max_groups, n;
    size_t tile;       // rows multiplied at a time: TILE, or n if n is smaller
    bool is_8bit;      // the low byte of every code is 0
} Input;

// Where a row's codes of columns 4 * quad to 4 * quad + 3 start.
static inline int8_t *codes_at(const Input *in, size_t row, size_t quad) {
    return in->codes + ((row / in->tile * (in->stride / 4) + quad) * in->tile + row % in->tile) * 8;
}

// out (n, stride) = in (n, cols) @ w^T; stride includes padding to whole blocks of 16 columns.
typedef struct {
    const Tensor *w;
    const Input *in;
    float *out;
    size_t stride;
} Product;

// The activation of the feed-forward, numbered as in the file's header.
typedef enum { SWIGLU, RELU2, N_ACTIVATIONS } Activation;

// Whether the activation is gated by a third matrix, w3.
static bool is_gated(Activation a) { return a == SWIGLU; }

// How --bench reads memory.
typedef enum { PLAIN, PREFETCHED, EIGHT_STREAMS, N_PATTERNS } Pattern;

typedef struct {  // the functions of kernels.h for one instruction set
    const char *name;
    void (*rmsnorm)(float *out, const float *x, const float *gain, size_t n, float eps);
    void (*activate)(Activation kind, float *h, const float *up, size_t n);
    size_t (*argmax)(const float *x, size_t n);
    void (*softmax)(float *x, size_t n, float temperature);
    void (*softcap)(float *x, size_t n, float cap);
    float (*smear_gate)(const float *a, const float *b, size_t n);
    void (*read)(const uint8_t *data, size_t n, Pattern pattern);
    void (*quantize)(Input *in, size_t row, size_t n, size_t group, int zero);
    void (*matmul)(const Product *p, size_t first_block, size_t last_block);
    void (*attend)(float *out, const float *q, const void *keys, const void *values,
                   size_t head_dim, size_t first, size_t last, bool is_bf16);
} Kernels;

#if defined(__clang__)
#define TARGET_PUSH(features) \
    DO_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_POP _Pragma("clang attribute pop")
#else
#define TARGET_PUSH(features) _Pragma("GCC push_options") DO_PRAGMA(GCC target(features))
#define TARGET_POP _Pragma("GCC pop_options")
#endif

// The kernels, compiled once for each instruction set: kernels_portable, kernels_avx2, ...
#define KERNEL(name) name##_portable
#if defined(__wasm_simd128__)  // WebAssembly has no choice at run time
#define KERNEL_SIMD128
#endif
#include "kernels.h"
#if defined(__x86_64__)
#define KERNEL(name) name##_avx2
#define KERNEL_AVX2
TARGET_PUSH("avx2")
#include "kernels.h"
TARGET_POP
#define KERNEL(name) name##_avx512
#define KERNEL_AVX512
TARGET_PUSH("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "kernels.h"
TARGET_POP
#elif defined(__ARM_FEATURE_DOTPROD)
#define KERNEL(name) name##_dotprod
#define KERNEL_DOTPROD
#include "kernels.h"
#endif

// The fastest kernels that this machine can run. Tests select others with RUN_KERNELS.
static const Kernels *pick_kernels(void) {
    const Kernels *best = &kernels_portable, *all[3] = {best};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) best = all[1] = &kernels_avx2;
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        best = all[2] = &kernels_avx512;
#elif defined(__ARM_FEATURE_DOTPROD)
    best = all[1] = &kernels_dotprod;
#endif
#if defined(__wasm__)
    const char *wanted = NULL;  // there is no environment
#else
    const char *wanted = getenv("RUN_KERNELS");
#endif
    for (size_t i = 0; wanted && i < 3; i++)
        if (all[i] && !strcmp(all[i]->name, wanted)) best = all[i];
    return best;
}

// ------------------------------------------------------------------------------------------------
// The model file: a header and the weights, see doc/format.md

// The header of version 3; the window of each layer follows it, int32 (n_layers). Versions 0 to 2
// have fewer fields; the rest get Llama 2's values, with the options NORM_GAINS and, if tied,
// TIE_EMBEDDINGS.
typedef struct {
    uint32_t magic;
    int32_t version;
    uint64_t file_size;
    uint32_t header_size;
    uint32_t options;     // bits, see below
    uint32_t format;      // of matrices and tables; vectors are fp32
    uint32_t activation;  // of the feed-forward
    int32_t dim;          // width of the residual stream
    int32_t hidden_dim;   // width inside the feed-forward
    int32_t n_layers;
    int32_t n_heads;      // query heads
    int32_t n_kv_heads;   // key and value heads; each serves n_heads / n_kv_heads query heads
    int32_t vocab_size;
    int32_t seq_len;           // longest context
    int32_t value_embeddings;  // how many of the first layers add an embedding to their values
    int32_t bigram_rows;       // rows of the table hashed by (previous token, token); 0: none
    float norm_eps, rope_theta;
    float logit_softcap;  // c: logits become c * tanh(logits / c); 0: none
    uint32_t tokenizer;   // fingerprint() of the tokenizer; 0: unknown. Earlier files lack it,
    int32_t embedding_conv;  // and these: tokens in a convolution of the first layer's input,
    int32_t key_conv;        // and in one of each layer's keys; 0: none
    int32_t group;        // version 2: weights that share a scale; not in version 3's header
} Config;

enum {  // bits of Config.options
    TIE_EMBEDDINGS = 1,     // the output head is the embedding table
    QK_NORM = 2,            // RMSNorm of each query and key head, before RoPE
    NORM_GAINS = 4,         // RMSNorm has gains
    EMBEDDING_NORM = 8,     // RMSNorm after the embedding
    RESIDUAL_SCALARS = 16,  // a layer starts from a * x + b * x0; x0 is the embedding
    SMEAR = 32,             // a gate adds the embedding of the previous token
    ORDERS = 64,            // trained on stories with orders, see order_prompt()
    SEPARATE_DOCUMENTS = 128,  // no document saw the one before it, see loss_of()
    KNOWN_OPTIONS = 255,
};

enum {
    MAGIC = 0x616b3432,
    HEADER_BYTES = offsetof(Config, group),
    MAX_CONV = 16,
    ALIGNMENT = 64,  // of the tensors of version 3
    MAX_COPY = 1 << 22,  // bytes: smaller files of version 0 are copied, see load_weights()
    MAX_CONTEXT = 1 << 24,
    MAX_GROUP = 256,  // sums of larger groups might overflow 32 bits
};

// The header's size, by version; that of version 3 is at least this
static const uint32_t HEADER_SIZES[] = {7 * sizeof(int32_t), 256, 256, offsetof(Config, tokenizer)};

_Static_assert(HEADER_BYTES == 92, "the header has no gaps");

// Whether a header of version 3 ends with one of the fields that were once its last.
static bool is_header_size(uint32_t size) {
    return size == HEADER_SIZES[3] || size == offsetof(Config, embedding_conv) ||
           size == HEADER_BYTES;
}

static bool has(const Config *c, uint32_t option) { return c->options & option; }

// The tensors of a model; NULL if the model lacks one. Tensors of the layers are arrays; layer l
// uses item or row l.
typedef struct {
    const Tensor *tok_embeddings;    // (vocab_size, dim)
    const Tensor *bigram;            // (bigram_rows, dim)
    const Tensor *output;            // (vocab_size, dim), tok_embeddings if tied
    const float *embedding_norm;     // (dim)
    const float *smear_gate;         // (dim)
    const float *embedding_conv;     // (dim, taps - 1)
    const float *key_conv;           // (n_layers, n_kv_heads * head_dim, taps - 1)
    const float *norm;               // (dim)
    // one matrix per layer
    const Tensor *wq;                // (n_heads * head_dim, dim)
    const Tensor *wk, *wv;           // (n_kv_heads * head_dim, dim)
    const Tensor *wo;                // (dim, n_heads * head_dim)
    const Tensor *w1, *w3;           // (hidden_dim, dim); w3 only for SwiGLU
    const Tensor *w2;                // (dim, hidden_dim)
    const Tensor *value_embeddings;  // (vocab_size, n_kv_heads * head_dim), first layers only
    const float *attention_norm;     // (n_layers, dim)
    const float *ffn_norm;           // (n_layers, dim)
    const float *q_norm, *k_norm;    // (n_layers, head_dim)
    const float *x_scale, *x0_scale;  // (n_layers): a layer starts from x_scale * x + x0_scale * x0
    const int32_t *windows;          // (n_layers): positions attended to, 0: all
} Weights;

// Row l of vectors (n_layers, size), or NULL if the model has none.
static const float *row_of(const float *vectors, size_t l, size_t size) {
    return vectors ? vectors + l * size : NULL;
}

// Read the header of any version, unchecked.
static Config read_header(const File *f) {
    uint32_t words[2] = {0};
    memcpy(words, f->data, f->size < sizeof words ? f->size : sizeof words);
    bool is_gguf = !memcmp(words, "GGUF", 4);
    if (is_gguf || !memcmp(words, "PK\3\4", 4))
        die("%s is not a model.bin: it is a %s; convert it: "
            "python export.py model.bin --checkpoint=%s", f->path,
            is_gguf ? "GGUF file" : "checkpoint or zip file", f->path);
    if (!memcmp(words, "version ", 8))
        die("%s is not a model.bin: it is a Git LFS pointer; run git lfs pull in its folder",
            f->path);
    bool has_magic = f->size >= sizeof words && words[0] == MAGIC;
    if (has_magic && (words[1] < 1 || words[1] > 3))
        die("%s is a model.bin of version %u, expected 0 to 3; export it again", f->path, words[1]);
    int version = has_magic ? (int)words[1] : 0;
    Config c = {0};
    if (version == 3 && f->size >= HEADER_SIZES[3]) memcpy(&c, f->data, HEADER_SIZES[3]);
    uint32_t size = is_header_size(c.header_size) ? c.header_size : HEADER_SIZES[version];
    if (f->size < size)
        die("%s is truncated or not a model.bin: it has %zu bytes, and a version %d header has %u",
            f->path, f->size, version, size);
    if (version == 3) {
        memcpy(&c, f->data, size);
        return c;
    }
    int32_t h[7];
    const uint8_t *at = f->data + (version ? 8 : 0);
    memcpy(h, at, sizeof h);
    // a negative vocab_size marks an untied head in version 0
    bool is_tied = version ? at[sizeof h] : h[5] > 0;
    if (version == 2) memcpy(&c.group, at + sizeof h + 1, sizeof c.group);
    return (Config){
        .version = version, .file_size = f->size, .header_size = HEADER_SIZES[version],
        .options = NORM_GAINS | (is_tied ? TIE_EMBEDDINGS : 0),
        .format = version == 2 ? INT8 : FP32,
        .dim = h[0], .hidden_dim = h[1], .n_layers = h[2], .n_heads = h[3], .n_kv_heads = h[4],
        .vocab_size = version || is_tied || h[5] == INT32_MIN ? h[5] : -h[5], .seq_len = h[6],
        .norm_eps = 1e-5f, .rope_theta = 10000.0f, .group = c.group,
    };
}

static void check_config(const Config *c, const char *path) {
    uint32_t header_size = HEADER_SIZES[c->version];
    if (c->version == 3) header_size = is_header_size(c->header_size) ? c->header_size : HEADER_BYTES;
    struct {
        const char *name;
        double value, min, max;
    } ranges[] = {
        {"header_size", c->header_size, header_size, header_size},
        {"options", c->options, 0, KNOWN_OPTIONS},
        {"dtype", c->format, 0, N_FORMATS - 1},
        {"activation", c->activation, 0, N_ACTIVATIONS - 1},
        {"dim", c->dim, 1, 1 << 16},
        {"hidden_dim", c->hidden_dim, 1, 1 << 20},
        {"n_layers", c->n_layers, 1, 1 << 12},
        {"n_heads", c->n_heads, 1, 1 << 12},
        {"n_kv_heads", c->n_kv_heads, 1, 1 << 12},
        {"vocab_size", c->vocab_size, 3, 1 << 24},  // at least unk, BOS and EOS
        {"max_seq_len", c->seq_len, 1, MAX_CONTEXT},
        {"value_embeddings", c->value_embeddings, 0, c->n_layers},
        {"bigram_rows", c->bigram_rows, c->bigram_rows == 1 ? 2 : 0, 1 << 28},
        {"norm_eps", c->norm_eps, 0, 1},
        {"rope_theta", c->rope_theta, 1, 1e12},
        {"logit_softcap", c->logit_softcap, 0, 1e6},
        {"embedding_conv", c->embedding_conv, c->embedding_conv == 1 ? 2 : 0, MAX_CONV},
        {"key_conv", c->key_conv, c->key_conv == 1 ? 2 : 0, MAX_CONV},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (!(ranges[i].value >= ranges[i].min && ranges[i].value <= ranges[i].max))
            die("%s is not a version %d model.bin: its header says %s = %.10g, expected %.10g to "
                "%.10g; it is damaged or needs a newer run.c: export it again", path,
                c->version, ranges[i].name, ranges[i].value, ranges[i].min, ranges[i].max);
    if (c->dim % c->n_heads || (c->dim / c->n_heads) % 2 || c->n_heads % c->n_kv_heads)
        die("%s is not a version %d model.bin: its header's dim = %d, n_heads = %d and n_kv_heads "
            "= %d do not fit together; export it again", path, c->version, c->dim, c->n_heads,
            c->n_kv_heads);
    if (c->version == 2 && (c->group < LANES || c->group > MAX_GROUP || c->group % LANES ||
                            c->dim % c->group || c->hidden_dim % c->group))
        die("%s has groups of %d weights: expected a multiple of %d up to %d that divides dim = %d "
            "and hidden_dim = %d; export the checkpoint with export.py", path, c->group, LANES,
            MAX_GROUP, c->dim, c->hidden_dim);
}

static float bf16_at(const void *p, size_t i) {
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// out = row r of a tensor of any format; out has room for cols rounded up to LANES
static void read_row(float *out, const Tensor *t, size_t r) {
    if (t->format == FP32) memcpy(out, t->data + r * t->cols * sizeof *out, t->cols * sizeof *out);
    if (t->format == BF16)
        for (size_t c = 0; c < t->cols; c++) out[c] = bf16_at(t->data, r * t->cols + c);
    if (!t->group) return;
    size_t per_code = FORMATS[t->format].per_code, groups = (t->cols + t->group - 1) / t->group;
    size_t steps = (t->cols + per_code - 1) / per_code, block = r / t->lanes, lane = r % t->lanes;
    int zero = (int)FORMATS[t->format].zero;
    const uint8_t *codes = t->data + (block * steps * t->lanes + lane) * 4;
    for (size_t c = 0; c < t->cols; c += per_code, codes += 4 * t->lanes) {
        size_t at = (block * groups + c / t->group) * t->lanes + lane;
        float scale = t->wide_scales ? ((const float *)t->scales)[at] : bf16_at(t->scales, at);
        for (int i = 0; i < 4; i++) {
            int low = per_code == 8 ? codes[i] & 15 : codes[i];
            out[c + i] = (float)(low - zero) * scale;
            if (per_code == 8) out[c + 4 + i] = (float)((codes[i] >> 4) - zero) * scale;
        }
    }
}

// Convert a row-major int8 matrix of version 2 to the layout of Tensor: -127..127 become 1..255.
static void repack(Tensor *t) {
    const float *from = t->scales;
    size_t groups = t->cols / t->group, lanes = t->lanes, padded = ROUND_UP(t->rows, lanes);
    uint8_t *codes = alloc((uint64_t)padded * t->cols, 1);
    float *scales = alloc((uint64_t)padded * groups, sizeof(float));
    memset(codes, (int)FORMATS[INT8].zero, padded * t->cols);
    for (size_t r = 0; r < t->rows; r++) {
        size_t block = r / lanes, lane = r % lanes;
        for (size_t c = 0; c < t->cols; c++) {
            int code = (int8_t)t->data[r * t->cols + c] + 128;
            codes[(block * t->cols + c / 4 * 4) * lanes + lane * 4 + c % 4] = code ? code : 1;
        }
        for (size_t g = 0; g < groups; g++)
            scales[(block * groups + g) * lanes + lane] = from[r * groups + g];
    }
    t->data = codes;
    t->scales = scales;
}

// A walk over the tensors in file order. The first of two walks has no data and only computes the
// size that the file must have.
typedef struct {
    const uint8_t *data;  // the whole file, or NULL
    uint64_t at;          // offset of the next byte
    uint64_t alignment;
    uint64_t matrix_bytes;  // read for every token
    const Config *config;
} Walk;

// Skip n bytes and return where they start, or NULL without data. Within the ranges of
// check_config(), no sum overflows.
static const uint8_t *skip(Walk *w, uint64_t n) {
    if (!n) return NULL;
    uint64_t at = ROUND_UP(w->at, w->alignment);
    w->at = at + n;
    return w->data ? w->data + at : NULL;
}

// The next n vectors: (n, size) in float32.
static const float *walk_vectors(Walk *w, uint64_t n, uint64_t size) {
    return (const float *)skip(w, n * size * sizeof(float));
}

// The next n matrices, all (rows, cols): multiplied (lanes = 16) or looked up by row (lanes = 1).
static const Tensor *walk_tensors(Walk *w, size_t n, uint64_t rows, uint64_t cols, size_t lanes) {
    Format f = w->config->format;
    bool is_v2 = w->config->version == 2;
    size_t group = is_v2 ? (size_t)w->config->group : FORMATS[f].group;
    uint64_t data_bytes = rows * cols * FORMATS[f].bits / 8, scale_bytes = 0, at_once = n;
    if (is_v2) {  // row-major; each matrix is followed by its scales
        scale_bytes = rows * cols / group * sizeof(float);
        at_once = 1;
    } else if (group) {  // the n matrices, then the scales of all n
        uint64_t padded = ROUND_UP(rows, lanes), groups = (cols + group - 1) / group;
        data_bytes = padded * ROUND_UP(cols, FORMATS[f].per_code) * FORMATS[f].bits / 8;
        scale_bytes = padded * groups * sizeof(uint16_t);
    }
    if (lanes == LANES) w->matrix_bytes += n * (data_bytes + scale_bytes);
    Tensor *tensors = w->data && n ? alloc(n, sizeof(Tensor)) : NULL;
    for (size_t first = 0; first < n; first += at_once) {
        const uint8_t *data = skip(w, at_once * data_bytes);
        const uint8_t *scales = skip(w, at_once * scale_bytes);
        for (size_t i = 0; tensors && i < at_once; i++) {
            Tensor *t = &tensors[first + i];
            *t = (Tensor){f, rows, cols, lanes, group, data + i * data_bytes,
                          scales ? scales + i * scale_bytes : NULL, is_v2};
            if (is_v2) repack(t);
        }
    }
    return tensors;
}

// Find the tensors after the header, in the order of doc/format.md. Returns where the last ends.
static uint64_t lay_out(Weights *m, Walk *w) {
    const Config *c = w->config;
    const bool is_tied = has(c, TIE_EMBEDDINGS), gains_first = c->version == 1 || c->version == 2;
    uint64_t dim = c->dim, hidden = c->hidden_dim, vocab = c->vocab_size, layers = c->n_layers;
    uint64_t head_dim = dim / c->n_heads, kv_dim = head_dim * c->n_kv_heads;
    uint64_t gains = has(c, NORM_GAINS) ? layers : 0, head_gains = has(c, QK_NORM) ? gains : 0;
    uint64_t scalars = has(c, RESIDUAL_SCALARS) ? layers : 0;
    if (gains_first) {
        m->attention_norm = walk_vectors(w, layers, dim);
        m->ffn_norm = walk_vectors(w, layers, dim);
        m->norm = walk_vectors(w, 1, dim);
    }
    m->tok_embeddings = walk_tensors(w, 1, vocab, dim, is_tied ? LANES : 1);
    if (!gains_first) m->attention_norm = walk_vectors(w, gains, dim);
    m->wq = walk_tensors(w, layers, dim, dim, LANES);
    m->wk = walk_tensors(w, layers, kv_dim, dim, LANES);
    m->wv = walk_tensors(w, layers, kv_dim, dim, LANES);
    m->wo = walk_tensors(w, layers, dim, dim, LANES);
    if (!gains_first) m->ffn_norm = walk_vectors(w, gains, dim);
    m->w1 = walk_tensors(w, layers, hidden, dim, LANES);
    m->w2 = walk_tensors(w, layers, dim, hidden, LANES);
    m->w3 = walk_tensors(w, is_gated(c->activation) ? layers : 0, hidden, dim, LANES);
    if (!gains_first) m->norm = walk_vectors(w, gains > 0, dim);
    if (c->version == 0) skip(w, c->seq_len * head_dim * sizeof(float));  // RoPE's tables
    m->output = is_tied ? m->tok_embeddings : walk_tensors(w, 1, vocab, dim, LANES);
    m->q_norm = walk_vectors(w, head_gains, head_dim);
    m->k_norm = walk_vectors(w, head_gains, head_dim);
    m->embedding_norm = walk_vectors(w, has(c, EMBEDDING_NORM) && gains, dim);
    m->x_scale = walk_vectors(w, scalars, 1);
    m->x0_scale = walk_vectors(w, scalars, 1);
    m->value_embeddings = walk_tensors(w, c->value_embeddings, vocab, kv_dim, 1);
    m->bigram = walk_tensors(w, c->bigram_rows > 0, c->bigram_rows, dim, 1);
    m->smear_gate = walk_vectors(w, has(c, SMEAR), dim);
    m->embedding_conv = walk_vectors(w, c->embedding_conv > 0, dim * (c->embedding_conv - 1));
    m->key_conv = walk_vectors(w, c->key_conv ? layers : 0, kv_dim * (c->key_conv - 1));
    return w->at;
}
