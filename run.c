// Inference of a Llama model from model.bin (versions 0 and 3, fp32) in one C file.
//
//   ./run model.bin -z tok.bin -i "Once upon a time"
//
// Read from main() up: the model file is mapped and checked, the prompt is cut into tokens, and one
// forward pass a token gives the logits from which the next token is drawn. Shapes are written as
// (rows, columns), row-major. No input may crash it: every size is checked before it is used, and
// whatever does not fit ends in die() with one sentence.
//
// To add an architecture option: its field or bit in Header and Config, its range in
// check_config(), its tensor in find_weights(), its use in forward(), and the same in export.py and
// doc/format.md.

#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(_WIN32)
#include <io.h>
#define isatty _isatty
#define fileno _fileno
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#if !defined(_OPENMP) && defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // without OpenMP its pragmas mean nothing
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "model.bin is little-endian, and this engine does not swap bytes"
#endif

// ------------------------------------------------------------------------------------------------
// Errors and memory

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
_Noreturn static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(EXIT_FAILURE);
}

// Zeroed memory for n items; the only place that allocates.
static void *alloc(uint64_t n, size_t size) {
    void *p = n > SIZE_MAX / size ? NULL : calloc(n ? (size_t)n : 1, size);
    if (!p) die("out of memory: %llu items of %zu bytes do not fit", (unsigned long long)n, size);
    return p;
}

// A whole file, read-only. Files are mapped, so that a model is read as its weights are needed.
typedef struct {
    const char *path;
    const uint8_t *data;
    size_t size;
} File;

static File open_file(const char *path, const char *what) {
    File f = {.path = path};
#if defined(_WIN32)
    FILE *stream = fopen(path, "rb");
    if (!stream) die("cannot open %s %s: %s", what, path, strerror(errno));
    if (_fseeki64(stream, 0, SEEK_END) != 0) die("cannot read %s %s", what, path);
    f.size = (size_t)_ftelli64(stream);
    if (f.size == 0) die("%s %s is empty", what, path);
    rewind(stream);
    uint8_t *data = alloc(f.size, 1);
    if (fread(data, 1, f.size, stream) != f.size) die("cannot read %s %s", what, path);
    fclose(stream);
    f.data = data;
#else
    int fd = open(path, O_RDONLY);
    if (fd < 0) die("cannot open %s %s: %s", what, path, strerror(errno));
    struct stat info;
    if (fstat(fd, &info) != 0) die("cannot read %s %s: %s", what, path, strerror(errno));
    if (!S_ISREG(info.st_mode)) die("%s %s is not a regular file", what, path);
    if (info.st_size == 0) die("%s %s is empty", what, path);
    if ((uintmax_t)info.st_size > SIZE_MAX) die("%s %s is too large for this machine", what, path);
    f.size = (size_t)info.st_size;
    void *map = mmap(NULL, f.size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) die("cannot map %s %s: %s", what, path, strerror(errno));
    close(fd);
    f.data = map;
#endif
    return f;
}

static void close_file(File *f) {
#if defined(_WIN32)
    free((void *)f->data);
#else
    munmap((void *)f->data, f->size);
#endif
}

// ------------------------------------------------------------------------------------------------
// The model file, see doc/format.md: a header, and the weights, all fp32

typedef enum { SWIGLU, RELU2, N_ACTIVATIONS } Activation;

// With every option off, as in version 0, the model is Llama 2.
typedef struct {
    int version;     // of the file
    int dim;         // width of the residual stream
    int hidden_dim;  // width inside the feed-forward
    int n_layers;
    int n_heads;     // query heads
    int n_kv_heads;  // key and value heads; each serves n_heads / n_kv_heads query heads
    int vocab_size;
    int seq_len;     // longest context
    float norm_eps;
    float rope_theta;
    Activation activation;  // of the feed-forward
    float logit_softcap;    // c: logits become c * tanh(logits / c); 0: none
    int value_embeddings;   // so many layers, the first ones, add an embedding to their values
    int bigram_rows;        // of a hashed table of (token before, token); 0: none
    bool tie_embeddings;    // the output head is the embedding table
    bool qk_norm;           // RMSNorm of each query and key head, before RoPE
    bool norm_gains;        // RMSNorm has gains
    bool embedding_norm;    // RMSNorm behind the embedding
    bool residual_scalars;  // a layer begins with a x + b x0; x0 is the embedding
    bool smear;             // a gate adds the embedding of the token before
} Config;

// Version 3's header; behind it the window of each layer, int32 (n_layers).
typedef struct {
    uint32_t magic;
    int32_t version;
    uint64_t file_size;
    uint32_t header_size, options, dtype, activation;
    int32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
    int32_t value_embeddings, bigram_rows;
    float norm_eps, rope_theta, logit_softcap;
} Header;

_Static_assert(sizeof(Header) == 80, "the header has no gaps");

enum { MAGIC = 0x616b3432, V0_HEADER_BYTES = 7 * 4, ALIGNMENT = 64, MAX_CONTEXT = 1 << 24 };

enum {  // bits of Header.options
    TIE_EMBEDDINGS = 1,
    QK_NORM = 2,
    NORM_GAINS = 4,
    EMBEDDING_NORM = 8,
    RESIDUAL_SCALARS = 16,
    SMEAR = 32,
    KNOWN_OPTIONS = 63,
};

// NULL where the model has none
typedef struct {
    const float *tok_embeddings;    // (vocab_size, dim)
    const float *attention_norm;    // (n_layers, dim)
    const float *wq;                // (n_layers, n_heads * head_dim, dim)
    const float *wk;                // (n_layers, n_kv_heads * head_dim, dim)
    const float *wv;                // (n_layers, n_kv_heads * head_dim, dim)
    const float *wo;                // (n_layers, dim, n_heads * head_dim)
    const float *ffn_norm;          // (n_layers, dim)
    const float *w1;                // (n_layers, hidden_dim, dim)
    const float *w2;                // (n_layers, dim, hidden_dim)
    const float *w3;                // (n_layers, hidden_dim, dim), of SwiGLU
    const float *norm;              // (dim)
    const float *output;            // (vocab_size, dim), the embeddings where tied
    const float *q_norm;            // (n_layers, head_dim)
    const float *k_norm;            // (n_layers, head_dim)
    const float *embedding_norm;    // (dim)
    const float *residual_scalars;  // (n_layers)
    const float *x0_scalars;        // (n_layers)
    const float *value_embeddings;  // (value_embeddings, vocab_size, n_kv_heads * head_dim)
    const float *bigram;            // (bigram_rows, dim)
    const float *smear_gate;        // (dim)
} Weights;

typedef struct {
    File file;
    Config config;
    Weights weights;
    int *windows;  // (n_layers) a position sees this many, itself included; 0: all
    // activations of one position
    float *x;       // (dim) the residual stream
    float *x0;      // (dim) what the first layer gets
    float *xb;      // (dim) normed, or attention's output
    float *xb2;     // (dim) what a block adds to x
    float *hb;      // (hidden_dim)
    float *hb2;     // (hidden_dim)
    float *q;       // (n_heads, head_dim)
    float *scores;  // (n_heads, n_positions)
    float *logits;  // (vocab_size)
    // of all positions so far
    int token;         // the latest
    int n_positions;   // as many as the caller asked for, at most seq_len
    float *key_cache;  // (n_layers, n_positions, n_kv_heads * head_dim)
    float *value_cache;
    float *rope_cos;  // (n_positions, head_dim / 2)
    float *rope_sin;
} Model;

static void check_config(const Config *c, const char *path) {
    struct {
        const char *name;
        double value, min, max;
    } ranges[] = {
        {"dim", c->dim, 1, 1 << 16},
        {"hidden_dim", c->hidden_dim, 1, 1 << 20},
        {"n_layers", c->n_layers, 1, 1 << 12},
        {"n_heads", c->n_heads, 1, 1 << 12},
        {"n_kv_heads", c->n_kv_heads, 1, 1 << 12},
        {"vocab_size", c->vocab_size, 3, 1 << 24},  // unk, BOS and EOS at the least
        {"max_seq_len", c->seq_len, 1, MAX_CONTEXT},
        {"value_embeddings", c->value_embeddings, 0, 1 << 12},
        {"bigram_rows", c->bigram_rows, 0, 1 << 28},
        {"norm_eps", c->norm_eps, 0, 1},
        {"rope_theta", c->rope_theta, 1, 1e12},
        {"logit_softcap", c->logit_softcap, 0, 1e6},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        if (!(ranges[i].value >= ranges[i].min && ranges[i].value <= ranges[i].max))
            die("%s is not a version %d model file: its header says %s = %.10g, expected %.10g to "
                "%.10g", path, c->version, ranges[i].name, ranges[i].value, ranges[i].min,
                ranges[i].max);
    }
    if (c->dim % c->n_heads || (c->dim / c->n_heads) % 2 || c->n_heads % c->n_kv_heads)
        die("%s is not a version %d model file: dim %d, %d heads and %d key/value heads do not fit",
            path, c->version, c->dim, c->n_heads, c->n_kv_heads);
    if (c->value_embeddings > c->n_layers)
        die("%s is not a version %d model file: value_embeddings = %d do not fit %d layers",
            path, c->version, c->value_embeddings, c->n_layers);
    if (c->bigram_rows == 1)
        die("%s is not a version %d model file: bigram_rows = 1, expected 0, or 2 or more",
            path, c->version);
}

// The version of the file; what it is if it is a well-known other kind is said.
static int find_version(const File *f) {
    uint32_t words[2] = {0};
    memcpy(words, f->data, f->size < sizeof words ? f->size : sizeof words);
    if (words[0] == MAGIC && words[1] != 3)
        die("%s is a version %u model file, and this engine reads versions 0 and 3: "
            "make one with export.py", f->path, words[1]);
    if (!memcmp(words, "GGUF", 4))
        die("%s is a GGUF file; this engine reads model.bin as export.py writes it", f->path);
    if (!memcmp(words, "PK\3\4", 4))
        die("%s is a checkpoint or zip file; make a model.bin of it: "
            "python export.py model.bin --checkpoint=%s", f->path, f->path);
    int version = words[0] == MAGIC ? 3 : 0;
    if (f->size < (version ? sizeof(Header) : V0_HEADER_BYTES))
        die("%s has %zu bytes, less than the header of a version %d model file", f->path, f->size,
            version);
    return version;
}

static Config read_v0(const File *f) {
    int32_t h[7];
    memcpy(h, f->data, V0_HEADER_BYTES);
    bool tied = h[5] > 0;  // vocab_size is negative where the head has its own matrix
    return (Config){
        .dim = h[0], .hidden_dim = h[1], .n_layers = h[2], .n_heads = h[3], .n_kv_heads = h[4],
        .vocab_size = tied || h[5] == INT32_MIN ? h[5] : -h[5], .seq_len = h[6],
        .norm_eps = 1e-5f, .rope_theta = 10000.0f,  // Llama 2's, which the version has no field for
        .tie_embeddings = tied, .norm_gains = true,
    };
}

static Config read_v3(const File *f) {
    static const char *remedy = "build run.c of the version that wrote it, or export it again";
    Header h;
    memcpy(&h, f->data, sizeof h);
    if (h.file_size != f->size)
        die("%s has %zu bytes where its header says %llu: it is %s; copy or export it again",
            f->path, f->size, (unsigned long long)h.file_size,
            f->size < h.file_size ? "truncated" : "too long");
    if (h.header_size != sizeof h)
        die("%s has a header of %u bytes, and this engine knows one of %zu: %s", f->path,
            h.header_size, sizeof h, remedy);
    if (h.options & ~(uint32_t)KNOWN_OPTIONS)
        die("%s has the options 0x%x, which this engine does not know: %s", f->path,
            h.options & ~(uint32_t)KNOWN_OPTIONS, remedy);
    if (h.dtype != 0)
        die("%s has number format %u, and this engine reads 0 (float32): %s", f->path, h.dtype,
            remedy);
    if (h.activation >= N_ACTIVATIONS)
        die("%s has activation %u, and this engine knows 0 (swiglu) and 1 (relu2): %s", f->path,
            h.activation, remedy);
    return (Config){
        .version = 3, .dim = h.dim, .hidden_dim = h.hidden_dim, .n_layers = h.n_layers,
        .n_heads = h.n_heads, .n_kv_heads = h.n_kv_heads, .vocab_size = h.vocab_size,
        .seq_len = h.seq_len, .norm_eps = h.norm_eps, .rope_theta = h.rope_theta,
        .activation = (Activation)h.activation, .logit_softcap = h.logit_softcap,
        .value_embeddings = h.value_embeddings, .bigram_rows = h.bigram_rows,
        .tie_embeddings = h.options & TIE_EMBEDDINGS, .qk_norm = h.options & QK_NORM,
        .norm_gains = h.options & NORM_GAINS, .embedding_norm = h.options & EMBEDDING_NORM,
        .residual_scalars = h.options & RESIDUAL_SCALARS, .smear = h.options & SMEAR,
    };
}

// The tensors behind a header of header_bytes, whose sizes have to add up to the file's. Within the
// ranges of check_config() no 64-bit product or sum overflows.
static Weights find_weights(const File *f, const Config *c, uint64_t header_bytes) {
    Weights w = {0};
    uint64_t dim = c->dim, hidden = c->hidden_dim, layers = c->n_layers, vocab = c->vocab_size;
    uint64_t head_dim = dim / c->n_heads, kv_dim = head_dim * c->n_kv_heads;
    uint64_t gains = c->norm_gains, head_gains = c->qk_norm && c->norm_gains;
    struct {
        const float **pointer;
        uint64_t count;  // 0: the model has none
        uint64_t at;     // its first byte
    } tensors[] = {
        {&w.tok_embeddings, vocab * dim, 0},
        {&w.attention_norm, gains * layers * dim, 0},
        {&w.wq, layers * dim * dim, 0},
        {&w.wk, layers * kv_dim * dim, 0},
        {&w.wv, layers * kv_dim * dim, 0},
        {&w.wo, layers * dim * dim, 0},
        {&w.ffn_norm, gains * layers * dim, 0},
        {&w.w1, layers * hidden * dim, 0},
        {&w.w2, layers * dim * hidden, 0},
        {&w.w3, c->activation == SWIGLU ? layers * hidden * dim : 0, 0},
        {&w.norm, gains * dim, 0},
        // version 0's rotary tables, which are computed here instead
        {&(const float *){NULL}, c->version == 0 ? (uint64_t)c->seq_len * head_dim : 0, 0},
        {&w.output, c->tie_embeddings ? 0 : vocab * dim, 0},
        {&w.q_norm, head_gains * layers * head_dim, 0},
        {&w.k_norm, head_gains * layers * head_dim, 0},
        {&w.embedding_norm, c->embedding_norm ? gains * dim : 0, 0},
        {&w.residual_scalars, c->residual_scalars ? layers : 0, 0},
        {&w.x0_scalars, c->residual_scalars ? layers : 0, 0},
        {&w.value_embeddings, c->value_embeddings * vocab * kv_dim, 0},
        {&w.bigram, c->bigram_rows * dim, 0},
        {&w.smear_gate, c->smear ? dim : 0, 0},
    };
    size_t n_tensors = sizeof tensors / sizeof *tensors;
    uint64_t alignment = c->version == 0 ? sizeof(float) : ALIGNMENT, end = header_bytes;
    for (size_t i = 0; i < n_tensors; i++) {
        if (!tensors[i].count) continue;
        tensors[i].at = (end + alignment - 1) / alignment * alignment;
        end = tensors[i].at + tensors[i].count * sizeof(float);
    }
    if (end != f->size)
        die("%s has %zu bytes where its header (dim %d, %d layers, vocabulary %d) needs %llu: "
            "it is %s, or no version %d model file", f->path, f->size, c->dim, c->n_layers,
            c->vocab_size, (unsigned long long)end, f->size < end ? "truncated" : "too long",
            c->version);
    for (size_t i = 0; i < n_tensors; i++)
        if (tensors[i].count) *tensors[i].pointer = (const float *)(f->data + tensors[i].at);
    if (c->tie_embeddings) w.output = w.tok_embeddings;
    return w;
}

// Map the model file and make room for n_positions (0: the whole context) of one sequence.
static Model load_model(const char *path, int n_positions) {
    Model m = {.file = open_file(path, "model file")};
    Config *c = &m.config;
    *c = find_version(&m.file) == 0 ? read_v0(&m.file) : read_v3(&m.file);
    check_config(c, path);
    size_t windows_at = sizeof(Header), windows_bytes = (size_t)c->n_layers * sizeof(int32_t);
    m.weights = find_weights(&m.file, c, c->version == 0 ? V0_HEADER_BYTES
                                                         : windows_at + windows_bytes);
    m.windows = alloc(c->n_layers, sizeof(int32_t));
    if (c->version == 3) memcpy(m.windows, m.file.data + windows_at, windows_bytes);
    for (int l = 0; l < c->n_layers; l++) {
        if (m.windows[l] < 0 || m.windows[l] > MAX_CONTEXT)
            die("%s is not a version 3 model file: its header says that layer %d has a window of "
                "%d, expected 0 to %d", path, l, m.windows[l], MAX_CONTEXT);
    }

    size_t dim = c->dim, hidden = c->hidden_dim, layers = c->n_layers;
    size_t head_dim = dim / c->n_heads, kv_dim = head_dim * c->n_kv_heads;
    m.n_positions = n_positions && n_positions < c->seq_len ? n_positions : c->seq_len;
    uint64_t positions = m.n_positions;
    m.x = alloc(dim, sizeof(float));
    m.x0 = alloc(dim, sizeof(float));
    m.xb = alloc(dim, sizeof(float));
    m.xb2 = alloc(dim, sizeof(float));
    m.hb = alloc(hidden, sizeof(float));
    m.hb2 = alloc(hidden, sizeof(float));
    m.q = alloc(dim, sizeof(float));
    m.scores = alloc(c->n_heads * positions, sizeof(float));
    m.logits = alloc(c->vocab_size, sizeof(float));
    m.key_cache = alloc(layers * positions, kv_dim * sizeof(float));
    m.value_cache = alloc(layers * positions, kv_dim * sizeof(float));
    m.rope_cos = alloc(positions * head_dim / 2, sizeof(float));
    m.rope_sin = alloc(positions * head_dim / 2, sizeof(float));
    for (size_t i = 0; i < head_dim / 2; i++) {
        float freq = powf(c->rope_theta, -(float)(2 * i) / (float)head_dim);
        for (size_t pos = 0; pos < positions; pos++) {
            m.rope_cos[pos * (head_dim / 2) + i] = cosf((float)pos * freq);
            m.rope_sin[pos * (head_dim / 2) + i] = sinf((float)pos * freq);
        }
    }
    return m;
}

static void free_model(Model *m) {
    float *buffers[] = {m->x, m->x0, m->xb, m->xb2, m->hb, m->hb2, m->q, m->scores, m->logits,
                        m->key_cache, m->value_cache, m->rope_cos, m->rope_sin};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    free(m->windows);
    close_file(&m->file);
}

// ------------------------------------------------------------------------------------------------
// The forward pass

// Row `row` of a tensor of rows of n; NULL of one that the model does not have.
static const float *row_of(const float *tensor, size_t row, size_t n) {
    return tensor ? tensor + row * n : NULL;
}

// x / rms(x) * weight (n), without the last factor where weight is NULL.
static void rmsnorm(float *out, const float *x, const float *weight, int n, float eps) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
    if (weight) {
        for (int i = 0; i < n; i++) out[i] = weight[i] * (scale * x[i]);
    } else {
        for (int i = 0; i < n; i++) out[i] = scale * x[i];
    }
}

// RMSNorm of each head of x (n_heads, head_dim), in place.
static void norm_heads(float *x, const float *weight, int n_heads, int head_dim, float eps) {
    for (int h = 0; h < n_heads; h++, x += head_dim) rmsnorm(x, x, weight, head_dim, eps);
}

static void add(float *x, const float *y, int n) {
    for (int i = 0; i < n; i++) x[i] += y[i];
}

// x = softmax(x / temperature)
static void softmax(float *x, int n, float temperature) {
    float max = x[0], sum = 0.0f;
    for (int i = 1; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int i = 0; i < n; i++) {
        x[i] = expf((x[i] - max) / temperature);
        sum += x[i];
    }
    for (int i = 0; i < n; i++) x[i] /= sum;
}

static float dot(const float *restrict a, const float *restrict b, int n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// out (rows) = w (rows, n) @ x (n). Four rows at a time share each load of x and keep four sums in
// flight; a row is always summed in the same order, so the result does not depend on the threads.
static void matmul(float *out, const float *x, const float *w, int n, int rows) {
    int blocks = rows / 4;
    // a small product is done before other threads would be awake
#pragma omp parallel for schedule(static) if ((int64_t)rows * n >= 65536)
    for (int b = 0; b < blocks; b++) {
        const float *w0 = w + (size_t)b * 4 * n, *w1 = w0 + n, *w2 = w1 + n, *w3 = w2 + n;
        float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int i = 0; i < n; i++) {
            s0 += w0[i] * x[i];
            s1 += w1[i] * x[i];
            s2 += w2[i] * x[i];
            s3 += w3[i] * x[i];
        }
        out[4 * b] = s0;
        out[4 * b + 1] = s1;
        out[4 * b + 2] = s2;
        out[4 * b + 3] = s3;
    }
    for (int r = blocks * 4; r < rows; r++) out[r] = dot(w + (size_t)r * n, x, n);
}

// Turn the neighbouring pairs of each head by the angles of one position.
static void rope(float *x, int n_heads, int head_dim, const float *cos, const float *sin) {
    for (int h = 0; h < n_heads; h++, x += head_dim) {
        for (int i = 0; i < head_dim / 2; i++) {
            float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cos[i] - b * sin[i];
            x[2 * i + 1] = a * sin[i] + b * cos[i];
        }
    }
}

// Attention of position pos over itself and those from `first` on: out (n_heads, head_dim) from q,
// keys and values (n_positions, n_kv_heads, head_dim).
static void attention(Model *m, float *out, const float *keys, const float *values, int first,
                      int pos) {
    const Config *c = &m->config;
    int head_dim = c->dim / c->n_heads, kv_dim = head_dim * c->n_kv_heads;
    int group = c->n_heads / c->n_kv_heads;
    float scale = 1.0f / sqrtf((float)head_dim);
#pragma omp parallel for schedule(static) if ((int64_t)(pos + 1 - first) * c->dim >= 65536)
    for (int h = 0; h < c->n_heads; h++) {
        const float *q = m->q + (size_t)h * head_dim;
        const float *k = keys + (size_t)(h / group) * head_dim;
        const float *v = values + (size_t)(h / group) * head_dim;
        float *scores = m->scores + (size_t)h * m->n_positions;
        float *y = out + (size_t)h * head_dim;
        for (int t = first; t <= pos; t++)
            scores[t] = scale * dot(q, k + (size_t)t * kv_dim, head_dim);
        softmax(scores + first, pos + 1 - first, 1.0f);
        memset(y, 0, head_dim * sizeof(float));
        for (int t = first; t <= pos; t++) {
            const float *vt = v + (size_t)t * kv_dim;
            for (int i = 0; i < head_dim; i++) y[i] += scores[t] * vt[i];
        }
    }
}

static void embedding_of(const Model *m, float *out, int token) {
    const Config *c = &m->config;
    const float *row = m->weights.tok_embeddings + (size_t)token * c->dim;
    if (c->embedding_norm) rmsnorm(out, row, m->weights.embedding_norm, c->dim, c->norm_eps);
    else memcpy(out, row, c->dim * sizeof(float));
}

// The row of the bigram table for a token and the one before it, as bigram_hash() in model.py.
static size_t bigram_hash(int before, int token, int rows) {
    if (before < 0) return 0;
    return 1 + (((uint64_t)before * 36313) ^ ((uint64_t)token * 27191)) % ((uint64_t)rows - 1);
}

// x = what the first layer gets of a token and the one before it, -1: there is none.
static void embed(Model *m, int before, int token) {
    const Config *c = &m->config;
    embedding_of(m, m->x, token);
    if (c->smear && before >= 0) {
        float gate = 1.0f / (1.0f + expf(-dot(m->weights.smear_gate, m->x, c->dim)));
        embedding_of(m, m->xb, before);
        for (int i = 0; i < c->dim; i++) m->x[i] += gate * m->xb[i];
    }
    if (c->bigram_rows) {
        size_t row = bigram_hash(before, token, c->bigram_rows);
        add(m->x, m->weights.bigram + row * c->dim, c->dim);
    }
}

// xb2 = what the feed-forward of layer l makes of xb.
static void feed_forward(Model *m, size_t l) {
    int dim = m->config.dim, hidden = m->config.hidden_dim;
    size_t size = (size_t)hidden * dim;
    matmul(m->hb, m->xb, m->weights.w1 + l * size, dim, hidden);
    if (m->config.activation == SWIGLU) {  // silu(w1 x) * w3 x
        matmul(m->hb2, m->xb, m->weights.w3 + l * size, dim, hidden);
        for (int i = 0; i < hidden; i++)
            m->hb[i] = m->hb[i] / (1.0f + expf(-m->hb[i])) * m->hb2[i];
    } else {  // relu(w1 x)²
        for (int i = 0; i < hidden; i++) m->hb[i] = m->hb[i] < 0.0f ? 0.0f : m->hb[i] * m->hb[i];
    }
    matmul(m->xb2, m->hb, m->weights.w2 + l * size, hidden, dim);
}

// Run one token at position pos < n_positions through the model, behind those given before it.
// Returns the logits (vocab_size) of the next token; NULL where they are not wanted.
static float *forward(Model *m, int token, int pos, bool want_logits) {
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    int dim = c->dim, head_dim = dim / c->n_heads, kv_dim = head_dim * c->n_kv_heads;
    const float *cos = m->rope_cos + (size_t)pos * (head_dim / 2);
    const float *sin = m->rope_sin + (size_t)pos * (head_dim / 2);

    embed(m, pos ? m->token : -1, token);
    m->token = token;
    memcpy(m->x0, m->x, dim * sizeof(float));
    for (size_t l = 0; l < (size_t)c->n_layers; l++) {
        float *keys = m->key_cache + l * m->n_positions * kv_dim;
        float *values = m->value_cache + l * m->n_positions * kv_dim;
        float *k = keys + (size_t)pos * kv_dim, *v = values + (size_t)pos * kv_dim;

        if (c->residual_scalars) {
            float kept = w->residual_scalars[l], added = w->x0_scalars[l];
            for (int i = 0; i < dim; i++) m->x[i] = kept * m->x[i] + added * m->x0[i];
        }
        rmsnorm(m->xb, m->x, row_of(w->attention_norm, l, dim), dim, c->norm_eps);
        matmul(m->q, m->xb, w->wq + l * dim * dim, dim, dim);
        matmul(k, m->xb, w->wk + l * kv_dim * dim, dim, kv_dim);
        matmul(v, m->xb, w->wv + l * kv_dim * dim, dim, kv_dim);
        if (l < (size_t)c->value_embeddings)
            add(v, w->value_embeddings + (l * c->vocab_size + token) * kv_dim, kv_dim);
        if (c->qk_norm) {
            norm_heads(m->q, row_of(w->q_norm, l, head_dim), c->n_heads, head_dim, c->norm_eps);
            norm_heads(k, row_of(w->k_norm, l, head_dim), c->n_kv_heads, head_dim, c->norm_eps);
        }
        rope(m->q, c->n_heads, head_dim, cos, sin);
        rope(k, c->n_kv_heads, head_dim, cos, sin);
        int window = m->windows[l];
        attention(m, m->xb, keys, values, window && window <= pos ? pos + 1 - window : 0, pos);
        matmul(m->xb2, m->xb, w->wo + l * dim * dim, dim, dim);
        add(m->x, m->xb2, dim);

        rmsnorm(m->xb, m->x, row_of(w->ffn_norm, l, dim), dim, c->norm_eps);
        feed_forward(m, l);
        add(m->x, m->xb2, dim);
    }
    if (!want_logits) return NULL;
    rmsnorm(m->x, m->x, w->norm, dim, c->norm_eps);
    matmul(m->logits, m->x, w->output, dim, c->vocab_size);
    if (c->logit_softcap > 0.0f)
        for (int i = 0; i < c->vocab_size; i++)
            m->logits[i] = c->logit_softcap * tanhf(m->logits[i] / c->logit_softcap);
    return m->logits;
}

// ------------------------------------------------------------------------------------------------
// The tokenizer: SentencePiece BPE, from the file that tokenizer.py writes

enum { UNK = 0, BOS = 1, EOS = 2, FIRST_PIECE = 3 };

typedef struct {
    const uint8_t *bytes;  // inside the file; a space is a plain space
    size_t length;
    float score;  // the higher, the earlier it is merged
} Piece;

typedef struct {
    File file;
    int vocab_size;
    Piece *pieces;      // (vocab_size)
    int byte_id[256];   // the piece <0xNN> of each byte, or -1
    bool byte_fallback; // all 256 are there
    int *table;         // hash table of ids, -1 where free
    size_t table_size;  // a power of two
} Tokenizer;

// A bounds-checked walk over untrusted bytes.
typedef struct {
    const File *file;
    size_t at;
} Cursor;

static const uint8_t *take(Cursor *c, size_t n) {
    if (n > c->file->size - c->at)
        die("tokenizer file %s is truncated, or no tokenizer file: at byte %zu it promises %zu "
            "bytes and has %zu; make it again with tokenizer.py", c->file->path, c->at, n,
            c->file->size - c->at);
    c->at += n;
    return c->file->data + c->at - n;
}

static size_t hash_bytes(const uint8_t *bytes, size_t n) {  // FNV-1a
    uint64_t h = 1469598103934665603u;
    for (size_t i = 0; i < n; i++) h = (h ^ bytes[i]) * 1099511628211u;
    return (size_t)(h ^ (h >> 32));
}

// The slot of a piece in the table: the one that holds it, or the free one where it belongs.
static size_t find_slot(const Tokenizer *t, const uint8_t *bytes, size_t n) {
    size_t slot = hash_bytes(bytes, n) & (t->table_size - 1);
    for (; t->table[slot] >= 0; slot = (slot + 1) & (t->table_size - 1)) {
        const Piece *p = &t->pieces[t->table[slot]];
        if (p->length == n && !memcmp(p->bytes, bytes, n)) break;
    }
    return slot;
}

static int hex_digit(uint8_t c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

// The byte that a piece of the form <0xNN> stands for, or -1.
static int byte_of_piece(const Piece *p) {
    if (p->length != 6 || memcmp(p->bytes, "<0x", 3) || p->bytes[5] != '>') return -1;
    int high = hex_digit(p->bytes[3]), low = hex_digit(p->bytes[4]);
    return high < 0 || low < 0 ? -1 : 16 * high + low;
}

// Read a tokenizer file; it must hold vocab_size pieces, as many as the model has.
static Tokenizer load_tokenizer(const char *path, int vocab_size) {
    Tokenizer t = {.file = open_file(path, "tokenizer file"), .vocab_size = vocab_size};
    Cursor cursor = {.file = &t.file};
    take(&cursor, 4);  // the longest piece, which is not needed
    t.pieces = alloc(vocab_size, sizeof(Piece));
    size_t n = 0;
    for (; cursor.at < t.file.size; n++) {
        uint32_t length;
        Piece p;
        memcpy(&p.score, take(&cursor, 4), 4);
        memcpy(&length, take(&cursor, 4), 4);
        p.length = length;
        p.bytes = take(&cursor, length);
        if (n < (size_t)vocab_size) t.pieces[n] = p;
    }
    if (n != (size_t)vocab_size)
        die("tokenizer file %s has %zu pieces, but the model's vocabulary has %d: "
            "give the tokenizer that the model was trained with (-z)", path, n, vocab_size);

    t.table_size = 4;
    while (t.table_size < 2 * (size_t)vocab_size) t.table_size *= 2;
    t.table = alloc(t.table_size, sizeof(int));
    for (size_t i = 0; i < t.table_size; i++) t.table[i] = -1;
    for (int b = 0; b < 256; b++) t.byte_id[b] = -1;
    for (int id = FIRST_PIECE; id < vocab_size; id++) {
        const Piece *p = &t.pieces[id];
        int byte = byte_of_piece(p);
        if (byte >= 0) t.byte_id[byte] = id;  // never matched by text
        else t.table[find_slot(&t, p->bytes, p->length)] = id;
    }
    t.byte_fallback = true;
    for (int b = 0; b < 256; b++) t.byte_fallback = t.byte_fallback && t.byte_id[b] >= 0;
    return t;
}

static void free_tokenizer(Tokenizer *t) {
    free(t->pieces);
    free(t->table);
    close_file(&t->file);
}

static int find_piece(const Tokenizer *t, const uint8_t *bytes, size_t n) {
    return t->table[find_slot(t, bytes, n)];
}

// Bytes of the UTF-8 character at p (n > 0 bytes are there), or 0 where there is no valid one.
static size_t utf8_length(const uint8_t *p, size_t n) {
    if (p[0] < 0x80) return 1;
    size_t length = p[0] >= 0xF0 && p[0] <= 0xF4 ? 4 : p[0] >= 0xE0 && p[0] < 0xF0 ? 3
                  : p[0] >= 0xC2 && p[0] < 0xE0 ? 2 : 0;
    if (!length || n < length) return 0;
    for (size_t i = 1; i < length; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    // overlong forms, surrogates, beyond U+10FFFF
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F) ||
        (p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F)) return 0;
    return length;
}

typedef struct {
    const uint8_t *bytes;
    size_t length;   // 0 once it is merged into its left neighbour
    ptrdiff_t prev, next;  // neighbours, -1 at the ends
    int id;          // of the piece, -1 where the vocabulary lacks it
} Symbol;

typedef struct {
    float score;
    size_t left, right;
    size_t length;  // of both together when it was found; a pair that has changed since is void
} Pair;

typedef struct {
    Pair *pairs;  // a binary heap, the best pair first
    size_t n;
} Heap;

static bool better(const Pair *a, const Pair *b) {
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

static void push(Heap *h, Pair pair) {
    size_t i = h->n++;
    for (; i > 0 && better(&pair, &h->pairs[(i - 1) / 2]); i = (i - 1) / 2)
        h->pairs[i] = h->pairs[(i - 1) / 2];
    h->pairs[i] = pair;
}

static Pair pop(Heap *h) {
    Pair top = h->pairs[0], last = h->pairs[--h->n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < h->n; i = child) {
        if (child + 1 < h->n && better(&h->pairs[child + 1], &h->pairs[child])) child++;
        if (!better(&h->pairs[child], &last)) break;
        h->pairs[i] = h->pairs[child];
    }
    h->pairs[i] = last;
    return top;
}

static void push_if_piece(const Tokenizer *t, Heap *h, const Symbol *s, ptrdiff_t left,
                          ptrdiff_t right) {
    if (left < 0 || right < 0) return;
    size_t length = s[left].length + s[right].length;  // the two are neighbours in memory
    int id = find_piece(t, s[left].bytes, length);
    if (id >= 0) push(h, (Pair){t->pieces[id].score, (size_t)left, (size_t)right, length});
}

// SentencePiece's normalisation without rules: a space in front, U+2581 is a space, a byte that is
// no UTF-8 becomes U+FFFD. Returns the bytes; *n is how many there are.
static uint8_t *normalize(const char *text, size_t *n) {
    const uint8_t *in = (const uint8_t *)text;
    size_t left = strlen(text), at = 0;
    if (left > SIZE_MAX / 4 - 1) die("the prompt is too long");
    uint8_t *out = alloc(3 * left + 1, 1);  // a broken byte grows to three
    if (left) out[at++] = ' ';
    while (left) {
        size_t length = utf8_length(in, left);
        if (length == 3 && !memcmp(in, "\xE2\x96\x81", 3)) {
            out[at++] = ' ';
        } else if (length) {
            memcpy(out + at, in, length);
            at += length;
        } else {
            memcpy(out + at, "\xEF\xBF\xBD", 3);
            at += 3;
            length = 1;
        }
        in += length;
        left -= length;
    }
    *n = at;
    return out;
}

// Cut text into tokens behind a BOS, with the ids that SentencePiece gives. Returns the tokens, to
// be freed; *n_tokens is how many there are. O(n log n): each merge is found through a heap.
static int *encode(const Tokenizer *t, const char *text, size_t *n_tokens) {
    size_t n_bytes;
    uint8_t *bytes = normalize(text, &n_bytes);
    Symbol *symbols = alloc(n_bytes, sizeof(Symbol));
    Heap heap = {.pairs = alloc(n_bytes, 3 * sizeof(Pair))};  // one a neighbour, two a merge
    size_t n = 0;
    for (size_t at = 0; at < n_bytes; at += symbols[n++].length) {
        size_t length = utf8_length(bytes + at, n_bytes - at);
        symbols[n] = (Symbol){bytes + at, length, (ptrdiff_t)n - 1, (ptrdiff_t)n + 1,
                              find_piece(t, bytes + at, length)};
    }
    if (n) symbols[n - 1].next = -1;
    for (size_t i = 0; i + 1 < n; i++)
        push_if_piece(t, &heap, symbols, (ptrdiff_t)i, (ptrdiff_t)i + 1);
    while (heap.n) {
        Pair pair = pop(&heap);
        Symbol *l = &symbols[pair.left], *r = &symbols[pair.right];
        if (!l->length || !r->length || l->length + r->length != pair.length) continue;
        l->length += r->length;
        l->id = find_piece(t, l->bytes, l->length);
        l->next = r->next;
        r->length = 0;
        if (l->next >= 0) symbols[l->next].prev = (ptrdiff_t)pair.left;
        push_if_piece(t, &heap, symbols, l->prev, (ptrdiff_t)pair.left);
        push_if_piece(t, &heap, symbols, (ptrdiff_t)pair.left, l->next);
    }

    int *tokens = alloc(n_bytes + 1, sizeof(int));
    size_t n_out = 0;
    tokens[n_out++] = BOS;
    for (ptrdiff_t i = n ? 0 : -1; i >= 0; i = symbols[i].next) {
        const Symbol *s = &symbols[i];
        if (s->id >= 0) {
            tokens[n_out++] = s->id;
        } else if (t->byte_fallback) {
            for (size_t b = 0; b < s->length; b++) tokens[n_out++] = t->byte_id[s->bytes[b]];
        } else if (tokens[n_out - 1] != UNK) {  // a run of unknown characters is one token
            tokens[n_out++] = UNK;
        }
    }
    free(heap.pairs);
    free(symbols);
    free(bytes);
    *n_tokens = n_out;
    return tokens;
}

// Collects bytes and prints whole UTF-8 characters. What can no longer become one is U+FFFD, one
// for each longest broken start, as in Python's errors="replace". On a terminal, control characters
// other than newline and tab are left out, so that no model can send it commands.
typedef struct {
    FILE *out;
    bool is_terminal;
    uint8_t pending[4];
    size_t n;
} Printer;

// Whether n bytes, no whole character, could start one: then more may follow.
static bool utf8_may_continue(const uint8_t *p, size_t n) {
    uint8_t fill[4] = {p[0], 0x80, 0x80, 0x80};
    if (p[0] == 0xE0) fill[1] = 0xA0;
    if (p[0] == 0xF0) fill[1] = 0x90;
    for (size_t i = 1; i < n; i++) fill[i] = p[i];
    return utf8_length(fill, 4) > n;
}

// Whether a character is a control character (C0, delete, C1), newline and tab excepted.
static bool is_control(const uint8_t *p, size_t n) {
    if (n == 2) return p[0] == 0xC2 && p[1] < 0xA0;
    return n == 1 && (p[0] < 0x20 || p[0] == 0x7F) && p[0] != '\n' && p[0] != '\t';
}

static void print_bytes(Printer *p, const uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        p->pending[p->n++] = bytes[i];
        if (utf8_length(p->pending, p->n)) {
            if (!(p->is_terminal && is_control(p->pending, p->n)))
                fwrite(p->pending, 1, p->n, p->out);
            p->n = 0;
        } else if (!utf8_may_continue(p->pending, p->n)) {
            fputs("\xEF\xBF\xBD", p->out);
            bool again = p->n > 1;  // the byte that broke it may start the next character
            p->n = 0;
            if (again) i--;
        }
    }
}

static void print_rest(Printer *p) {
    if (p->n) fputs("\xEF\xBF\xBD", p->out);
    p->n = 0;
    fflush(p->out);
}

// Print the text of one token; `first` says that it is the first of its text, whose space, put
// there by encoding, is left out.
static void print_token(const Tokenizer *t, Printer *printer, int token, bool first) {
    const Piece *p = &t->pieces[token];
    int byte = byte_of_piece(p);
    if (token == UNK) {
        print_bytes(printer, (const uint8_t *)" \xE2\x81\x87 ", 5);
    } else if (byte >= 0 && token >= FIRST_PIECE) {
        print_bytes(printer, &(uint8_t){(uint8_t)byte}, 1);
    } else {
        size_t skip = first && p->length && p->bytes[0] == ' ';
        print_bytes(printer, p->bytes + skip, p->length - skip);
    }
    fflush(printer->out);
}

// ------------------------------------------------------------------------------------------------
// Drawing the next token

typedef struct {
    float p;
    int token;
} Candidate;

typedef struct {
    float temperature;
    float top_p;
    uint64_t seed;
    uint64_t state;         // of the random numbers
    Candidate *candidates;  // (vocab_size)
} Sampler;

// Uniform in [0, 1): xorshift64* (Vigna 2016, arXiv:1402.6246).
static float random_float(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((*state * 0x2545F4914F6CDD1Du) >> 40) / 16777216.0f;
}

// Start the random numbers: splitmix64 spreads neighbouring seeds (Steele et al. 2014).
static void set_seed(Sampler *s, uint64_t seed) {
    s->seed = seed;
    seed += 0x9E3779B97F4A7C15u;
    seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9u;
    seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EBu;
    s->state = seed ^ (seed >> 31);
    if (!s->state) s->state = 1;  // the one state that xorshift never leaves
}

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

static int by_probability(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->p != y->p) return x->p > y->p ? -1 : 1;
    return (x->token > y->token) - (x->token < y->token);
}

// A token drawn among the likeliest whose probabilities first sum to top_p (Holtzman et al. 2020).
static int sample_top_p(const Sampler *s, const float *probs, int n, float coin) {
    // one below this bound can only be kept after all others, and is not worth sorting
    float bound = n > 1 ? (1.0f - s->top_p) / (float)(n - 1) : 0.0f;
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (probs[i] >= bound) s->candidates[kept++] = (Candidate){probs[i], i};
    if (!kept) return argmax(probs, n);  // only where the weights gave no numbers
    qsort(s->candidates, kept, sizeof(Candidate), by_probability);
    float sum = 0.0f;
    int last = 0;
    for (; last < kept; last++) {
        sum += s->candidates[last].p;
        if (sum > s->top_p) break;
    }
    if (last == kept) last = kept - 1;
    float target = coin * sum, cumulative = 0.0f;
    for (int i = 0; i < last; i++) {
        cumulative += s->candidates[i].p;
        if (target < cumulative) return s->candidates[i].token;
    }
    return s->candidates[last].token;
}

// The next token from logits (n), which are overwritten.
static int sample(Sampler *s, float *logits, int n) {
    if (s->temperature == 0.0f) return argmax(logits, n);
    softmax(logits, n, s->temperature);
    float coin = random_float(&s->state);
    if (s->top_p > 0.0f && s->top_p < 1.0f) return sample_top_p(s, logits, n, coin);
    float cumulative = 0.0f;
    for (int i = 0; i < n; i++) {
        cumulative += logits[i];
        if (coin < cumulative) return i;
    }
    return argmax(logits, n);  // rounding left the coin beyond the sum
}

// ------------------------------------------------------------------------------------------------
// The command line

static double seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// Print the prompt and what the model makes of it: up to n_positions tokens, or to the end of the
// story. The seed and the speed go to stderr; the first token is not timed.
static void generate(Model *model, const Tokenizer *tokenizer, Sampler *sampler,
                     const char *prompt) {
    size_t n_prompt;
    int *tokens = encode(tokenizer, prompt, &n_prompt);
    if (n_prompt > (size_t)model->n_positions) {
        if (n_prompt > (size_t)model->config.seq_len)
            die("the prompt has %zu tokens, and the model's context %d: shorten the prompt",
                n_prompt, model->config.seq_len);
        die("the prompt has %zu tokens, and -n stops at %d: raise -n, or give -n 0 for the whole "
            "context of %d", n_prompt, model->n_positions, model->config.seq_len);
    }
    fprintf(stderr, "seed: %llu\n", (unsigned long long)sampler->seed);
    Printer printer = {.out = stdout, .is_terminal = isatty(fileno(stdout))};
    int token = tokens[0], n_steps = 0;
    double start = 0.0;
    for (int pos = 0; pos < model->n_positions; pos++) {
        bool in_prompt = (size_t)pos + 1 < n_prompt;
        float *logits = forward(model, token, pos, !in_prompt);
        token = in_prompt ? tokens[pos + 1] : sample(sampler, logits, model->config.vocab_size);
        if (pos == 0) start = seconds();  // the first pass also pages the weights in
        else n_steps++;
        if (!in_prompt && (token == BOS || token == EOS)) break;
        print_token(tokenizer, &printer, token, pos == 0);
    }
    double elapsed = seconds() - start;
    print_rest(&printer);
    fputc('\n', stdout);
    if (fflush(stdout) || ferror(stdout)) die("cannot write the story: %s", strerror(errno));
    if (n_steps && elapsed > 0) fprintf(stderr, "achieved tok/s: %.1f\n", n_steps / elapsed);
    free(tokens);
}

static void print_usage(FILE *out) {
    fputs(
        "usage: ./run model.bin [options]\n"
        "\n"
        "  -i TEXT   prompt (default: none, the model begins by itself)\n"
        "  -z FILE   tokenizer file (default: tokenizer.bin beside the model, or in this folder)\n"
        "  -n INT    tokens in all, the prompt's counted (default 256; 0: the whole context)\n"
        "  -t FLOAT  temperature, 0 takes the likeliest token (default 1.0)\n"
        "  -p FLOAT  top-p, draw among the likeliest with this probability (default 0.9; 1: all)\n"
        "  -s INT    seed, the same seed tells the same story (default: the time)\n"
        "  -h        this help\n"
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

static uint64_t parse_integer(const char *flag, const char *text, uint64_t max) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || value > max)
        die("%s %s: expected a whole number from 0 to %llu", flag, text, (unsigned long long)max);
    return value;
}

// tokenizer.bin in the model's folder if it is there, else in this one. To be freed.
static char *default_tokenizer(const char *model_path) {
    const char *name = "tokenizer.bin", *slash = strrchr(model_path, '/');
    size_t folder = slash ? (size_t)(slash - model_path) + 1 : 0;
    char *path = alloc(folder + strlen(name) + 1, 1);
    memcpy(path, model_path, folder);
    memcpy(path + folder, name, strlen(name));
    FILE *f = fopen(path, "rb");
    if (f) fclose(f);
    else memmove(path, name, strlen(name) + 1);
    return path;
}

int main(int argc, char **argv) {
    const char *model_path = NULL, *prompt = "", *tokenizer_path = NULL;
    int n_positions = 256;
    uint64_t seed = (uint64_t)time(NULL);
    Sampler sampler = {.temperature = 1.0f, .top_p = 0.9f};
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i];
        if (!strcmp(flag, "-h") || !strcmp(flag, "--help")) {
            print_usage(stdout);
            return EXIT_SUCCESS;
        }
        if (flag[0] != '-') {
            if (model_path) die("two model files are given: %s and %s", model_path, flag);
            model_path = flag;
            continue;
        }
        if (!flag[1] || flag[2] || !strchr("izntps", flag[1]))
            die("unknown option %s; ./run -h lists them all", flag);
        if (++i == argc) die("%s needs a value; ./run -h says which", flag);
        const char *value = argv[i];
        switch (flag[1]) {
        case 'i': prompt = value; break;
        case 'z': tokenizer_path = value; break;
        case 'n': n_positions = (int)parse_integer(flag, value, INT_MAX); break;
        case 't': sampler.temperature = (float)parse_number(flag, value, 0.0, 100.0); break;
        case 'p': sampler.top_p = (float)parse_number(flag, value, 0.0, 1.0); break;
        case 's': seed = parse_integer(flag, value, UINT64_MAX); break;
        }
    }
    if (!model_path) {
        print_usage(stderr);
        return EXIT_FAILURE;
    }
    set_seed(&sampler, seed);
    Model model = load_model(model_path, n_positions);
    char *beside_model = tokenizer_path ? NULL : default_tokenizer(model_path);
    Tokenizer tokenizer = load_tokenizer(beside_model ? beside_model : tokenizer_path,
                                         model.config.vocab_size);
    sampler.candidates = alloc(model.config.vocab_size, sizeof(Candidate));

    generate(&model, &tokenizer, &sampler, prompt);

    free(sampler.candidates);
    free(beside_model);
    free_tokenizer(&tokenizer);
    free_model(&model);
    return EXIT_SUCCESS;
}
